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
	"github.com/table-allocator/table-allocator/internal/cli"
)

// Exit codes of run, the same as of env(1) and timeout(1).
const (
	exitFailed        = 125 // the command was not executed
	exitNotExecutable = 126
	exitNotFound      = 127
)

const runUsage = `Usage: table-allocator-client run IFNAME [options] [--] COMMAND...
       table-allocator-client run --ifname IFNAME [options] [--] COMMAND...

Executes COMMAND in place of itself. Everything that COMMAND and its children
send leaves by IFNAME, with a source address of IFNAME, IPv4 and IPv6. Traffic
to the host itself does not change. Needs root.

The exit code is that of COMMAND; 125 if COMMAND was not started, 126 if it is
not executable, 127 if it does not exist.

  -i, --ifname IFNAME       the link; one of its addresses needs a lease
      --on-loss WHAT        while the link has no route: block (default: nothing
                            leaves by another link) or fallback
      --local               reach containers, too (default), or --local=false
      --resolv FILE         the /etc/resolv.conf of COMMAND; uplink: with the
                            name servers of the link
      --wait SECONDS        how long to wait for a lease (0)
      --force               bind to a name that no link has yet
`

// The command inherits attributes of a thread, such as the signal at the end of its parent, from the
// thread that executes it. That has to be the first thread of this process: lock it before the runtime
// moves the main goroutine to another.
func init() {
	if len(os.Args) > 1 && (os.Args[1] == "run" || os.Args[1] == "netns") {
		runtime.LockOSThread()
	}
}

func execute(f *flags) action {
	b := newBindFlags(f)
	value(f, &b.config.Wait, "wait", "", parseSeconds)
	var resolv string
	value(f, &resolv, "resolv", "", parseResolv)
	f.SetInterspersed(false)
	return func(command []string) error {
		if !f.Changed("ifname") && len(command) > 0 {
			rest, err := f.takeLink(&b.config.Ifname, command)
			if err == nil {
				err = f.parse(rest) // options may follow the link
			}
			if errors.Is(err, pflag.ErrHelp) {
				fmt.Print(runUsage + sharedUsage)
				return nil
			}
			if err != nil {
				return wrongUsage(err)
			}
			command = f.Args()
		}
		if b.config.Ifname == "" {
			return wrongUsage(errors.New("a link and a COMMAND are needed"))
		}
		if len(command) == 0 {
			return wrongUsage(errors.New("a COMMAND is needed behind the link"))
		}
		if err := b.check(); err != nil {
			return err
		}
		path, err := lookPath(command[0])
		if err != nil {
			return notExecuted(command[0], err)
		}
		if err := b.undo(b.enter(resolv)); err != nil {
			return err
		}
		cli.Flush() // our lines come before those of COMMAND
		err = syscall.Exec(path, command, os.Environ())
		if errors.Is(err, syscall.ENOEXEC) { // a script that names no interpreter: execvp takes the shell
			err = syscall.Exec("/bin/sh", append([]string{"/bin/sh", path}, command[1:]...), os.Environ())
		}
		return notExecuted(command[0], err)
	}
}

// lookPath finds a command as execvp does.
func lookPath(name string) (string, error) {
	path, err := exec.LookPath(name)
	switch {
	case errors.Is(err, exec.ErrDot): // execvp takes a command from a dot in PATH
		return path, nil
	case errors.Is(err, exec.ErrNotFound):
		for _, dir := range filepath.SplitList(os.Getenv("PATH")) {
			if _, statErr := os.Stat(filepath.Join(dir, name)); statErr == nil {
				return "", fs.ErrPermission // the file exists, and is not executable
			}
		}
	}
	return path, err
}

// enter binds this process to the link, and gives it its resolv.conf.
func (b *bindFlags) enter(resolv string) error {
	target, mark, err := b.bind()
	if err != nil {
		return err
	}
	cgroups, err := cgroup.Open()
	if err != nil {
		return err
	}
	defer cgroups.Close()
	missing, err := cgroups.Enter(target, mark)
	warnMissing(missing)
	if err != nil {
		return err
	}
	if resolv != "" {
		return giveResolv(resolv, target)
	}
	warnOfResolver(target.Ifname)
	return nil
}

func notExecuted(name string, err error) error {
	var path *exec.Error
	if errors.As(err, &path) {
		err = path.Err
	}
	warn(fmt.Errorf("execute %s: %w", name, err))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, exec.ErrNotFound) {
		return exitError{exitNotFound}
	}
	return exitError{exitNotExecutable}
}
