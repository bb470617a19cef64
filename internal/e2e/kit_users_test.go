package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Users and groups of the sandbox. The groups are nobody's primary ones.
const (
	uidAnna, uidBert, uidCarl = 21001, 21002, 21003 // bert is in group leasers
	uidNobodyKnows            = 21999
	gidLeasers, gidStaff      = 22001, 22002
)

// addUsers adds them to the /etc of the sandbox.
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

// publicBin is a copy of the server that any user can run.
var publicBin = sync.OnceValues(func() (string, error) {
	dir, err := binDir()
	if err != nil {
		return "", err
	}
	public, err := os.MkdirTemp("", "public")
	if err != nil {
		return "", err
	}
	path := filepath.Join(public, serverBin)
	data, err := os.ReadFile(filepath.Join(dir, serverBin))
	if err == nil {
		err = os.WriteFile(path, data, 0o755)
	}
	if err == nil {
		err = os.Chmod(public, 0o755)
	}
	return path, err
})

// serverAs is the command line of the server for another user.
func (h *host) serverAs(uid uint32, args ...string) *exec.Cmd {
	h.t.Helper()
	path, err := publicBin()
	if err != nil {
		h.t.Fatal(err)
	}
	cmd := exec.Command(path, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	cmd.Dir = "/"
	return cmd
}

// userBin is the client where any user may run it.
var userBin = sync.OnceValues(func() (string, error) {
	from, err := binDir()
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp("", "userbin")
	if err != nil {
		return "", err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", err
	}
	data, err := os.ReadFile(filepath.Join(from, clientBin))
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, clientBin)
	return path, os.WriteFile(path, data, 0o755)
})

// clientWith runs the client through setpriv with the given words.
func (h clients) clientWith(setpriv string, args ...string) result {
	h.t.Helper()
	path, err := userBin()
	if err != nil {
		h.t.Fatal(err)
	}
	return h.run("setpriv", append(append(strings.Fields(setpriv), path), args...)...)
}

const (
	asStranger     = "--reuid 4711 --regid 4711 --clear-groups"
	withoutNetwork = "--bounding-set -net_admin --inh-caps -net_admin"
)

// stranger is the uid of somebody who is not trusted.
const stranger = 4711

// as runs f inside the host on a thread of its own that belongs to user uid, and
// returns when f has called ready or returned. Sockets that f makes or writes to are
// that user's to the kernel.
func (h *machine) as(uid int, f func(ready func())) {
	h.t.Helper()
	begun, ended := make(chan struct{}), make(chan struct{})
	var err error
	go func() {
		defer close(ended)
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		var ns *os.File
		if ns, err = os.Open(h.ns.Path()); err != nil {
			return
		}
		err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
		ns.Close()
		if err != nil {
			return
		}
		// The raw call: of this thread, where the library's would be of all.
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
