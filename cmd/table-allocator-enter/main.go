// Command table-allocator-enter executes a program in a network namespace of table-allocator, for users of a group. It has
// two capabilities by its file, and gives them up before the program. Whoever may execute it chooses all its arguments, its
// environment, its directory and its limits: it believes what the kernel and root say, and nothing else.
package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const usage = `Usage: table-allocator-enter NAMESPACE PATH NAME [ARG...]
Executes the program PATH in a namespace, with the words from NAME on as its arguments. "table-allocator-client netns exec"
calls it for those who are not root. See table-allocator-netns(8).
`

// socket is the one of the service.
const socket = "/run/table-allocator/netns.sock"

// Exit codes of this program, as those of table-allocator-client netns exec.
const (
	exitFailed        = 125 // the program was not executed
	exitNotExecutable = 126
	exitNotFound      = 127
)

func init() { runtime.LockOSThread() } // namespaces and capabilities are those of a thread

func main() {
	if len(os.Args) == 2 && os.Args[1] == "--help" {
		fmt.Print(usage)
		return
	}
	if len(os.Args) < 4 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(exitFailed)
	}
	name, path, args := os.Args[1], os.Args[2], os.Args[3:]
	if err := enter(name); err != nil {
		fmt.Fprintf(os.Stderr, "table-allocator-enter: namespace %q: %v; nothing was executed\n", name, err)
		os.Exit(exitFailed)
	}
	err := unix.Exec(path, args, os.Environ())
	if errors.Is(err, unix.ENOEXEC) { // a script that names no interpreter: execvp takes the shell
		err = unix.Exec("/bin/sh", append([]string{"/bin/sh", path}, args[1:]...), os.Environ())
	}
	fmt.Fprintf(os.Stderr, "table-allocator-enter: execute %q: %v\n", path, err)
	if errors.Is(err, fs.ErrNotExist) {
		os.Exit(exitNotFound)
	}
	os.Exit(exitNotExecutable)
}

// enter moves this thread into a namespace, and gives up all capabilities.
func enter(name string) error {
	host, mounts, network, err := ask(name)
	if err != nil {
		return err
	}
	// Whoever has another root, other mounts or another network is in a sandbox, which this would lead out of.
	for _, id := range host {
		kind, _, _ := strings.Cut(id, ":")
		if own, err := os.Readlink("/proc/self/ns/" + kind); err != nil || own != id {
			return fmt.Errorf("this process is in a sandbox or container: its %s namespace is %q and not that of the host (%v)", kind, own, err)
		}
	}
	root, err := identity("/")
	if err != nil {
		return err
	}
	dir, err := unix.Getwd()
	if err != nil {
		return fmt.Errorf("the directory of this process: %w", err)
	}
	before, err := identity(".")
	if err != nil {
		return fmt.Errorf("directory %q: %w", dir, err)
	}
	if err := errors.Join(unix.Unshare(unix.CLONE_FS), unix.Setns(mounts, unix.CLONE_NEWNS), unix.Setns(network, unix.CLONE_NEWNET)); err != nil {
		return fmt.Errorf("enter it: %w (this program needs the capabilities cap_sys_admin and cap_sys_chroot, which it has not in a file system without "+
			"them and where no_new_privs is set)", err)
	}
	if inside, err := identity("/"); err != nil || inside != root {
		return errors.New("this process has another root directory than the host")
	}
	if err := dropCapabilities(); err != nil {
		return err
	}
	// By its name and with the rights of the user: a directory that is kept would lead out of the mounts.
	if err := unix.Chdir(dir); err != nil {
		return fmt.Errorf("enter directory %q: %w", dir, err)
	}
	if after, err := identity("."); err != nil || after != before {
		return fmt.Errorf("directory %q is another one in it", dir)
	}
	return errors.Join(unix.Close(mounts), unix.Close(network))
}

// ask has the service check that this user may enter, and returns what it says of the host's namespaces, and the
// descriptors of those to enter.
func ask(name string) (host []string, mounts, network int, err error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, 0, 0, err
	}
	defer unix.Close(fd)
	patience := unix.Timeval{Sec: 5}
	err = errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience), unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &patience))
	if err == nil {
		err = unix.Connect(fd, &unix.SockaddrUnix{Name: socket})
	}
	if err != nil {
		return nil, 0, 0, fmt.Errorf("ask the service at %s: %w (start the service table-allocator-netns; its group may ask)", socket, err)
	}
	peer, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil || peer.Uid != 0 {
		return nil, 0, 0, fmt.Errorf("the process at %s is not root's (%v)", socket, err)
	}
	if err := unix.Send(fd, []byte("enter "+name), unix.MSG_NOSIGNAL); err != nil && !errors.Is(err, unix.EPIPE) {
		return nil, 0, 0, fmt.Errorf("ask the service: %w", err)
	}
	text, control := make([]byte, 1024), make([]byte, unix.CmsgSpace(2*4))
	n, controls, flags, _, err := unix.Recvmsg(fd, text, control, unix.MSG_CMSG_CLOEXEC)
	for errors.Is(err, unix.EINTR) { // with a time limit the kernel does not go on after a signal by itself
		n, controls, flags, _, err = unix.Recvmsg(fd, text, control, unix.MSG_CMSG_CLOEXEC)
	}
	if err == nil && n == 0 || errors.Is(err, unix.ECONNRESET) {
		return nil, 0, 0, errors.New("the service closed the connection: it has ended, or has 8 others of this user; try again")
	}
	if err != nil || flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		return nil, 0, 0, fmt.Errorf("the service does not answer (%v)", err)
	}
	return parse(text[:n], control[:controls])
}

// parse reads an answer of the service: "ok" and the host's namespaces, a line for each, beside two descriptors; or why not.
func parse(text, control []byte) (host []string, mounts, network int, err error) {
	lines := strings.Split(string(text), "\n")
	if lines[0] != "ok" {
		return nil, 0, 0, errors.New(strings.ToValidUTF8(lines[0], "?"))
	}
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil || len(messages) != 1 || len(messages[0].Data) != 2*4 || len(lines) < 2 { // ParseUnixRights panics at parts of one
		return nil, 0, 0, fmt.Errorf("the service gives no namespaces (%v)", err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 2 {
		return nil, 0, 0, fmt.Errorf("the service gives %d namespaces (%v)", len(fds), err)
	}
	return lines[1:], fds[0], fds[1], nil
}

// dropCapabilities clears all capability sets of this thread, those that the caller had too. Root gets its own back with
// the program.
func dropCapabilities() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var have [2]unix.CapUserData
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("give up ambient capabilities: %w", err)
	}
	if err := unix.Capset(&header, &have[0]); err != nil {
		return fmt.Errorf("give up capabilities: %w", err)
	}
	have[0].Effective = ^uint32(0)
	if err := unix.Capget(&header, &have[0]); err != nil || have != [2]unix.CapUserData{} {
		return fmt.Errorf("capabilities are left: %+v (%v)", have, err)
	}
	return nil
}

// identity is what tells a directory from others.
func identity(path string) (id [2]uint64, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return id, err
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return id, errors.ErrUnsupported
	}
	return [2]uint64{uint64(stat.Dev), stat.Ino}, nil
}
