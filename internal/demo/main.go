// Command demo shows the pair at work: it makes a host with two uplinks out of network
// namespaces, starts the server and clients there, and sends packets. Nothing of it
// outlives it, and nothing of this machine's network is touched. See make demo.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

// inside marks the process that runs in namespaces of its own.
const inside = "TABLE_ALLOCATOR_DEMO_INSIDE"

// exitForbidden is how that process says that it has no rights in them. AppArmor lets
// users make namespaces, and forbids what they are for.
const exitForbidden = 3

func main() {
	var err error
	if os.Getenv(inside) == "" {
		err = enter()
	} else {
		err = show()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		if os.Getenv(inside) != "" && errors.Is(err, os.ErrPermission) {
			os.Exit(exitForbidden)
		}
		os.Exit(1)
	}
}

// enter runs this program again as the first process of its own namespaces, so that all
// it starts ends with it. Root needs no user namespace; everybody else gets one.
func enter() error {
	if _, err := exec.LookPath("ip"); err != nil {
		return fmt.Errorf("the ip command is missing: sudo apt-get install iproute2")
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), inside+"=1", "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
	}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("make namespaces: %w\n%s", err, advice())
	}
	err := cmd.Wait()
	if exit, ok := err.(*exec.ExitError); ok && exit.ExitCode() > 0 {
		if exit.ExitCode() == exitForbidden {
			fmt.Fprintln(os.Stderr, advice())
		}
		os.Exit(exit.ExitCode()) // it has said why
	}
	return err
}

// advice names the setting that keeps users from making namespaces.
func advice() string {
	if os.Geteuid() == 0 {
		return "root may not either: is this a container? Run make demo outside of it"
	}
	for _, setting := range []struct{ name, forbids string }{
		{"kernel/unprivileged_userns_clone", "0"},
		{"kernel/apparmor_restrict_unprivileged_userns", "1"},
		{"user/max_user_namespaces", "0"},
	} {
		value, err := os.ReadFile(filepath.Join("/proc/sys", setting.name))
		if err == nil && string(value) == setting.forbids+"\n" {
			return fmt.Sprintf("/proc/sys/%s is %s, which forbids user namespaces to users: run make demo as root", setting.name, setting.forbids)
		}
	}
	return "this system forbids user namespaces to users: run make demo as root"
}
