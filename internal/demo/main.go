// Command demo shows the pair at work: it makes a host with two uplinks out of network
// namespaces, starts the server and clients there, and sends packets. Nothing of it
// outlives it, and nothing of this machine's network is touched. See make demo.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

// inside marks the process that runs in namespaces of its own.
const inside = "TABLE_ALLOCATOR_DEMO_INSIDE"

func main() {
	var err error
	if os.Getenv(inside) == "" {
		err = enter()
	} else {
		err = show()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
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
		return fmt.Errorf("make namespaces: %w%s", err, advice())
	}
	err := cmd.Wait()
	if exit, ok := err.(*exec.ExitError); ok && exit.ExitCode() > 0 {
		os.Exit(exit.ExitCode()) // it has said why
	}
	return err
}

// advice names the setting that keeps users from making namespaces.
func advice() string {
	if os.Geteuid() == 0 {
		return ""
	}
	for _, setting := range []struct{ name, forbids string }{
		{"kernel/unprivileged_userns_clone", "0"},
		{"kernel/apparmor_restrict_unprivileged_userns", "1"},
		{"user/max_user_namespaces", "0"},
	} {
		value, err := os.ReadFile(filepath.Join("/proc/sys", setting.name))
		if err == nil && string(value) == setting.forbids+"\n" {
			return fmt.Sprintf("\n/proc/sys/%s is %s, which forbids user namespaces to users: run make demo as root", setting.name, setting.forbids)
		}
	}
	return "\nthis system forbids user namespaces to users: run make demo as root"
}
