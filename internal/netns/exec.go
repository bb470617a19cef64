package netns

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"os/user"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// Command is a program to execute in a namespace.
type Command struct {
	Path string   // of the program
	Args []string // with its name first
	User *User    // nil: the user of this process
	Log  string   // for Start: what the program prints goes to this file; "": nowhere
}

// User is who a program runs as.
type User struct {
	UID, GID   uint32
	Groups     []uint32
	Name, Home string
}

// Account returns the user of a name or number, with all groups.
func Account(name string) (*User, error) {
	u, err := user.Lookup(name)
	if err != nil {
		if u, err = user.LookupId(name); err != nil {
			return nil, errors.New("no such user")
		}
	}
	groups, err := u.GroupIds()
	if err != nil {
		return nil, fmt.Errorf("the groups of %s: %w", name, err)
	}
	account := User{Name: u.Username, Home: u.HomeDir}
	for _, id := range append([]string{u.Gid}, groups...) {
		n, err := strconv.ParseUint(id, 10, 32)
		if err != nil {
			return nil, err
		}
		account.Groups = append(account.Groups, uint32(n))
	}
	account.GID = account.Groups[0]
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	account.UID = uint32(uid)
	return &account, err
}

// Exec executes the command in place of this process. It returns only if that fails.
func (c Command) Exec() error {
	if c.User != nil {
		var groups []int
		for _, g := range c.User.Groups {
			groups = append(groups, int(g))
		}
		uid, gid := int(c.User.UID), int(c.User.GID)
		if err := errors.Join(syscall.Setgroups(groups), syscall.Setresgid(gid, gid, gid), syscall.Setresuid(uid, uid, uid)); err != nil {
			return fmt.Errorf("become user %d: %w", uid, err)
		}
	}
	err := syscall.Exec(c.Path, c.Args, os.Environ())
	if errors.Is(err, syscall.ENOEXEC) { // a script that names no interpreter: execvp takes the shell
		err = syscall.Exec("/bin/sh", append([]string{"/bin/sh", c.Path}, c.Args[1:]...), os.Environ())
	}
	return err
}

// command returns the command as a child in a session of its own.
func (c Command) command() *exec.Cmd {
	cmd := &exec.Cmd{Path: c.Path, Args: c.Args, SysProcAttr: &syscall.SysProcAttr{Setsid: true}}
	if c.User != nil {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: c.User.UID, Gid: c.User.GID, Groups: c.User.Groups}
	}
	return cmd
}

// Start starts the command in the background, without a terminal, and returns its pid. The calling thread is in the
// namespace.
func (c Command) Start() (pid int, err error) {
	cmd := c.command()
	if c.Log != "" {
		f, err := os.OpenFile(c.Log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return 0, err
		}
		defer f.Close()
		cmd.Stdout, cmd.Stderr = f, f
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	pid = cmd.Process.Pid // Release forgets it
	return pid, cmd.Process.Release()
}

// RunOnTerminal runs the command on a terminal of its own and connects that with the standard input and output of this
// process, until the command ends. It returns the command's exit code, which is 128 and its number for a signal.
func (c Command) RunOnTerminal() (code int, err error) {
	master, slave, err := openTerminal()
	if err != nil {
		return 0, err
	}
	defer master.Close()
	cmd := c.command()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr.Setctty = true
	if c.User != nil {
		if err := slave.Chown(int(c.User.UID), -1); err != nil {
			return 0, err
		}
	}
	resize(master)
	restore, err := makeRaw()
	if err != nil {
		return 0, err
	}
	defer restore()
	err = cmd.Start()
	slave.Close()
	if err != nil {
		return 0, err
	}
	sizes := make(chan os.Signal, 1)
	signal.Notify(sizes, unix.SIGWINCH)
	defer signal.Stop(sizes)
	go func() {
		for range sizes {
			resize(master)
		}
	}()
	go func() { // it ends with this process, since nothing can wake a read of a terminal
		if _, err := io.Copy(master, os.Stdin); err == nil {
			_, _ = master.Write([]byte{4}) // the end of the input is Ctrl-D on a terminal; the program may have ended
		}
	}()
	_, _ = io.Copy(os.Stdout, master) // EIO is the end: no process has the terminal any more
	err = cmd.Wait()
	exit := new(exec.ExitError)
	if err != nil && !errors.As(err, &exit) {
		return 0, err
	}
	if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return 128 + int(status.Signal()), nil
	}
	return cmd.ProcessState.ExitCode(), nil
}

// openTerminal makes a terminal: the side of the program, and that of whoever reads it.
func openTerminal() (master, slave *os.File, err error) {
	if master, err = os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		return nil, nil, err
	}
	err = unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
	number, numberErr := unix.IoctlGetUint32(int(master.Fd()), unix.TIOCGPTN)
	if err = errors.Join(err, numberErr); err == nil {
		slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		master.Close()
		return nil, nil, fmt.Errorf("make a terminal: %w", err)
	}
	return master, slave, nil
}

// resize gives a terminal the size of that of this process, if it has one.
func resize(master *os.File) {
	if size, err := unix.IoctlGetWinsize(0, unix.TIOCGWINSZ); err == nil {
		_ = unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, size) // the program has ended, perhaps
	}
}

// makeRaw has the terminal of this process, if it has one, pass each key to the program.
func makeRaw() (restore func(), err error) {
	before, err := unix.IoctlGetTermios(0, unix.TCGETS)
	if err != nil {
		return func() {}, nil // standard input is none
	}
	raw := *before
	raw.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	raw.Oflag &^= unix.OPOST
	raw.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	raw.Cflag = raw.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8
	raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(0, unix.TCSETS, &raw); err != nil {
		return nil, fmt.Errorf("set the terminal to raw mode: %w", err)
	}
	return func() { _ = unix.IoctlSetTermios(0, unix.TCSETS, before) }, nil // the terminal may be gone
}
