// Package nettest hides how a test gets a network, or a whole machine, of its own.
//
//	Main         a sandbox for all tests of a package: a root, processes and Debian packages of its own
//	New, Veth    network namespaces, and links between them
//	NewInternet  a host behind providers, and the internet behind those
//	Cgroup       a cgroup for one test
//	Program      namespaces for a command that is no test: make demo, make bench
//
// The kernel, ip and every daemon in there are real. The host's network and files are not touched.
package nettest

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// TB is the part of testing.TB that namespaces need. A Session is one, too, for programs that are no
// tests.
type TB interface {
	Helper()
	Fatalf(format string, args ...any)
	Logf(format string, args ...any)
	Cleanup(func())
	Name() string
}

// Namespace is a network namespace. It has no name in the file system: the kernel removes it after
// the test, when its last process ends. Its methods may be called from several goroutines.
type Namespace struct {
	name string
	file *os.File
}

// New returns a new network namespace whose loopback is up. The name is for messages. The test fails
// if it has no right to make a namespace; root has.
func New(t TB, name string) *Namespace {
	t.Helper()
	n, err := Open(name)
	if err != nil {
		t.Fatalf("make network namespace %q for %s (root can): %v", name, t.Name(), err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Logf("close network namespace %q: %v", name, err)
		}
	})
	return n
}

// Open is New for a test that makes thousands of namespaces: the caller closes each.
func Open(name string) (*Namespace, error) {
	n := &Namespace{name: name}
	var err error
	if enterErr := onThread(nil, func() { n.file, err = unshare() }); enterErr != nil {
		return nil, enterErr
	}
	return n, err
}

// Close lets go of a namespace of Open.
func (n *Namespace) Close() error { return n.file.Close() }

// unshare moves the thread into a new network namespace, and returns a file that stands for that.
func unshare() (*os.File, error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, err
	}
	file, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, err
	}
	if err := loopbackUp(); err != nil {
		_ = file.Close() // err says what went wrong
		return nil, fmt.Errorf("set lo up: %w", err)
	}
	return file, nil
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req)
}

// onThread runs f on a thread of its own, in the namespace of file unless that is nil, and waits. If
// f ends the test, by t.Fatal say, onThread ends the calling goroutine. Afterwards the thread returns
// to its first namespace. If it cannot, because f entered a user namespace without rights on that
// one, the thread ends.
func onThread(file *os.File, f func()) error {
	var err error
	var returned bool
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // a goroutine that ends locked takes its thread along
		home, openErr := os.Open("/proc/thread-self/ns/net")
		if err = openErr; err != nil {
			return
		}
		defer func() {
			if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread()
			}
			_ = home.Close() // was only read
		}()
		if file != nil {
			if err = unix.Setns(int(file.Fd()), unix.CLONE_NEWNET); err != nil {
				returned = true
				return
			}
		}
		f()
		returned = true
	}()
	<-done
	if err == nil && !returned {
		runtime.Goexit()
	}
	return err
}

// Do runs f inside the namespace, on a goroutine whose thread is locked. Sockets that f makes stay in
// the namespace; goroutines that f starts do not run in it. f may call t.Fatal. Do panics after the
// end of the namespace's test.
func (n *Namespace) Do(f func()) {
	if err := onThread(n.file, f); err != nil {
		panic(fmt.Sprintf("enter network namespace %q: %v", n.name, err))
	}
}

// Start is cmd.Start inside the namespace.
func (n *Namespace) Start(cmd *exec.Cmd) error {
	var err error
	if enterErr := onThread(n.file, func() { err = cmd.Start() }); enterErr != nil {
		return fmt.Errorf("enter network namespace %q: %w", n.name, enterErr)
	}
	return err
}

// Output runs a program inside the namespace and returns what it wrote to stdout and stderr.
func (n *Namespace) Output(name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := n.Start(cmd); err != nil {
		return "", err
	}
	err := cmd.Wait()
	return out.String(), err
}

// Run is Output for a program that has to succeed.
func (n *Namespace) Run(t TB, name string, args ...string) string {
	t.Helper()
	out, err := n.Output(name, args...)
	if err != nil {
		t.Fatalf("%s: %s %s: %v\n%s", n.name, name, strings.Join(args, " "), err, out)
	}
	return out
}

// IP runs `ip` with the words of args: n.IP(t, "link set eth0 up").
func (n *Namespace) IP(t TB, args string) string {
	t.Helper()
	return n.Run(t, "ip", strings.Fields(args)...)
}

// Batch runs the lines with one `ip`, which starts once for all of them:
// n.Batch(t, "link set eth0 up", "address add 192.0.2.1/24 dev eth0").
func (n *Namespace) Batch(t TB, lines ...string) {
	t.Helper()
	cmd := exec.Command("ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(strings.Join(lines, "\n") + "\n")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := n.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		t.Fatalf("%s: ip -batch: %v\n%s\nthe lines are\n%s", n.name, err, &out, strings.Join(lines, "\n"))
	}
}

// Sysctl sets one of the namespace's kernel settings: n.Sysctl(t, "net/ipv4/ip_forward", "1").
func (n *Namespace) Sysctl(t TB, name, value string) {
	t.Helper()
	var err error
	n.Do(func() { err = os.WriteFile("/proc/sys/"+name, []byte(value), 0) })
	if err != nil {
		t.Fatalf("%s: %v", n.name, err)
	}
}

// Path returns a file that stands for the namespace, for setns, nsenter or `ip link ... netns`. It
// exists until the test ends.
func (n *Namespace) Path() string {
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.file.Fd())
}

// String returns the name.
func (n *Namespace) String() string { return n.name }

// Veth makes a pair of links, aName in a and bName in b, and sets both up.
func Veth(t TB, a *Namespace, aName string, b *Namespace, bName string) {
	t.Helper()
	a.Batch(t, fmt.Sprintf("link add %s type veth peer name %s netns %s", aName, bName, b.Path()), "link set "+aName+" up")
	b.IP(t, "link set "+bName+" up")
}
