package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// Users and groups of the sandbox. No user has one of the groups as its primary group.
const (
	uidAnna, uidBert, uidCarl = 21001, 21002, 21003 // bert is in group leasers
	uidNobodyKnows            = 21999
	gidLeasers, gidStaff      = 22001, 22002
)

// The kernel shows the first thread of a process as the process: no test takes another user's uid on that.
func init() { runtime.LockOSThread() }

// addUsers adds the users and groups to /etc of the sandbox.
var addUsers = sync.OnceValue(func() error {
	for path, lines := range map[string]string{
		"/etc/passwd": "anna:x:21001:21001::/:/bin/sh\nbert:x:21002:21002::/:/bin/sh\ncarl:x:21003:21003::/:/bin/sh\n",
		"/etc/group":  "anna:x:21001:\nbert:x:21002:\ncarl:x:21003:\nleasers:x:22001:bert\n",
	} {
		f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		if _, err := f.WriteString(lines); err != nil {
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	return nil
})

// publicBin is the path of a copy of one of our commands that any user may run.
func publicBin(t *testing.T, name string) string {
	t.Helper()
	dir, err := publicDir()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, name)
}

var publicDir = sync.OnceValues(func() (string, error) {
	from, err := binDir()
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp("", "public")
	if err != nil {
		return "", err
	}
	for _, name := range []string{serverBin, clientBin} {
		data, err := os.ReadFile(filepath.Join(from, name))
		if err != nil {
			return "", err
		}
		if err := nettest.WriteExecutable(filepath.Join(dir, name), data); err != nil {
			return "", err
		}
	}
	return dir, os.Chmod(dir, 0o755)
})

// serverAs is a command line of the server as another user.
func (h *host) serverAs(uid uint32, args ...string) *exec.Cmd {
	h.t.Helper()
	cmd := exec.Command(publicBin(h.t, serverBin), args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	cmd.Dir = "/"
	return cmd
}

// clientWith runs the client through setpriv with the given words.
func (h clients) clientWith(setpriv string, args ...string) result {
	h.t.Helper()
	return h.run("setpriv", append(append(strings.Fields(setpriv), publicBin(h.t, clientBin)), args...)...)
}

const (
	asStranger     = "--reuid 4711 --regid 4711 --clear-groups"
	withoutNetwork = "--bounding-set -net_admin --inh-caps -net_admin"
)

// stranger is the uid of a user who is not trusted.
const stranger = 4711

// as runs f on the machine, on a thread that belongs to user uid, and returns when f has called ready or
// returned. To the kernel, sockets that f makes or writes to belong to that user.
func (h *machine) as(uid int, f func(ready func())) {
	h.t.Helper()
	begun, ended := make(chan struct{}), make(chan struct{})
	var err error
	go func() {
		defer close(ended)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		var ns *os.File
		if ns, err = os.Open(h.ns.Path()); err != nil {
			return
		}
		err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
		ns.Close()
		if err != nil {
			return
		}
		// The raw call changes this thread; that of the library changes all threads.
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
			err = errno
			return
		}
		f(sync.OnceFunc(func() { close(begun) }))
	}()
	select {
	case <-begun:
	case <-ended:
		if err != nil {
			h.t.Fatalf("become uid %d: %v", uid, err)
		}
	}
}
