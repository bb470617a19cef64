package nettest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// inside marks the process that Program runs in namespaces of its own.
const inside = "NETTEST_PROGRAM_INSIDE"

// exitForbidden is the exit code of that process if it has no rights in its namespaces. AppArmor lets
// users make namespaces, and denies them all capabilities in there.
const exitForbidden = 3

// Session is the TB of a program that is no test. It ends at the first error.
type Session struct {
	name     string
	cleanups []func()
}

// failure is the panic of Fatalf, which Program recovers from.
type failure struct{ error }

// The methods of a TB.
func (s *Session) Helper()                   {}
func (s *Session) Name() string              { return s.name }
func (s *Session) Logf(string, ...any)       {}
func (s *Session) Cleanup(f func())          { s.cleanups = append(s.cleanups, f) }
func (s *Session) Fatalf(f string, a ...any) { panic(failure{fmt.Errorf(f, a...)}) }

// Program is the main function of a command that is called as "make name". It runs the command again
// as the first process of network, mount and pid namespaces, calls play in there, and returns the exit
// code. The kernel kills all that play started when play returns. Users other than root get a user
// namespace, too.
func Program(name string, play func(*Session) error) int {
	if os.Getenv(inside) == "" {
		code, err := enter(name)
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		}
		return code
	}
	os.Unsetenv(inside)
	err := (&Session{name: name}).run(play)
	if err == nil {
		return 0
	}
	fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
	if errors.Is(err, os.ErrPermission) {
		return exitForbidden
	}
	return 1
}

func enter(name string) (code int, err error) {
	if _, err := exec.LookPath("ip"); err != nil {
		return 1, fmt.Errorf("the ip command is missing: sudo apt-get install iproute2")
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
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
		return 1, fmt.Errorf("make namespaces: %w\n%s", err, advice(name))
	}
	err = cmd.Wait()
	if exit, ok := err.(*exec.ExitError); ok && exit.ExitCode() > 0 {
		if exit.ExitCode() == exitForbidden {
			fmt.Fprintln(os.Stderr, advice(name))
		}
		return exit.ExitCode(), nil // the process has printed the reason
	}
	if err != nil {
		return 1, err
	}
	return 0, nil
}

// advice names the kernel setting that forbids users to make namespaces.
func advice(name string) string {
	if os.Geteuid() == 0 {
		return "root may not make namespaces here: if this is a container, run make " + name + " outside of it"
	}
	for _, setting := range []struct{ name, forbids string }{
		{"kernel/unprivileged_userns_clone", "0"},
		{"kernel/apparmor_restrict_unprivileged_userns", "1"},
		{"user/max_user_namespaces", "0"},
	} {
		value, err := os.ReadFile(filepath.Join("/proc/sys", setting.name))
		if err == nil && string(value) == setting.forbids+"\n" {
			return fmt.Sprintf("/proc/sys/%s is %s, which forbids user namespaces to users: run make %s as root", setting.name, setting.forbids, name)
		}
	}
	return "this system forbids user namespaces to users: run make " + name + " as root"
}

func (s *Session) run(play func(*Session) error) (err error) {
	// A new pid namespace needs a /proc of its own.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mount /proc (a container may forbid it: run make %s outside): %w", s.name, err)
	}
	defer func() {
		for i := len(s.cleanups) - 1; i >= 0; i-- {
			s.cleanups[i]()
		}
		if r := recover(); r != nil {
			f, ok := r.(failure)
			if !ok {
				panic(r)
			}
			err = f
		}
	}()
	return play(s)
}
