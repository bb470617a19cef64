package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"

	"github.com/spf13/pflag"

	"github.com/table-allocator/table-allocator/internal/cgroup"
)

// Exit codes of run, as env, nice and their like have them.
const (
	exitFailed        = 125 // ours, not the command's
	exitNotExecutable = 126
	exitNotFound      = 127
)

const runUsage = `Usage: table-allocator-client run --ifname IFNAME [options] [--] COMMAND...

Executes a command in place of itself. All that the command and its children
send leaves by IFNAME with an address of IFNAME, IPv4 and IPv6; they notice
nothing. What goes to this host itself does not change. Needs root.

      --ifname IFNAME     the link; an address of it needs a lease
      --on-loss WHAT      without a route there: block (default: nothing leaves
                          by another uplink) or fallback
      --wait SECONDS      wait for a lease so long (0)
  -d, --destination NAME  socket of the server (tas_socket)
      --server-user USER  believe a server of this user, too (repeatable)
  -h, --help              print this and exit

Exit code: that of COMMAND; 125 if it was not started, 126 if it is not
executable, 127 if there is none.
`

// The command inherits what belongs to a thread, such as the signal at the end of its parent, from
// the one that executes it. That has to be the first, from before the runtime moves us.
func init() {
	if len(os.Args) > 1 && os.Args[1] == "run" {
		runtime.LockOSThread()
	}
}

func runRun(args []string) int {
	o := newBindOptions("run")
	o.flags.SetInterspersed(false)
	if err := o.parse(args); errors.Is(err, pflag.ErrHelp) {
		fmt.Print(runUsage)
		return 0
	} else if err != nil {
		return failed(fmt.Errorf("%w (see run --help)", err))
	}
	command := o.flags.Args()
	if len(command) == 0 {
		return failed(errors.New("a COMMAND is needed (see run --help)"))
	}
	path, err := lookPath(command[0])
	if err != nil {
		return notExecuted(command[0], err)
	}
	if err := o.enter(); err != nil {
		return failed(err)
	}
	err = syscall.Exec(path, command, os.Environ())
	if errors.Is(err, syscall.ENOEXEC) { // a script that does not say of what, as execvp has it
		err = syscall.Exec("/bin/sh", append([]string{"/bin/sh", path}, command[1:]...), os.Environ())
	}
	return notExecuted(command[0], err)
}

// lookPath finds a command as execvp does.
func lookPath(name string) (string, error) {
	path, err := exec.LookPath(name)
	switch {
	case errors.Is(err, exec.ErrDot): // who has the dot in PATH means it
		return path, nil
	case errors.Is(err, exec.ErrNotFound):
		for _, dir := range filepath.SplitList(os.Getenv("PATH")) {
			if _, statErr := os.Stat(filepath.Join(dir, name)); statErr == nil {
				return "", fs.ErrPermission // it is there, and cannot be executed
			}
		}
	}
	return path, err
}

// enter binds this process.
func (o *bindOptions) enter() error {
	uplink, mark, err := o.bound()
	if err != nil {
		return err
	}
	cgroups, err := cgroup.Open()
	if err != nil {
		return err
	}
	defer cgroups.Close()
	missing, err := cgroups.Enter(uplink, mark)
	tell(missing)
	return err
}

func notExecuted(name string, err error) int {
	var path *exec.Error
	if errors.As(err, &path) {
		err = path.Err
	}
	fmt.Fprintf(os.Stderr, "table-allocator-client: execute %s: %v\n", name, err)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, exec.ErrNotFound) {
		return exitNotFound
	}
	return exitNotExecutable
}
