package remember

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

func TestMain(m *testing.M) { nettest.Main(m) }

var locks = filepath.Join(Root, "locks")

// TestLock: a lock has one holder at a time, and others not at all.
func TestLock(t *testing.T) {
	unlock, err := Lock(7)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Lock(7); !errors.Is(err, ErrBusy) {
		t.Errorf("held: got %v, want %v", err, ErrBusy)
	}
	other, err := Lock(1<<63 + 8)
	if err != nil {
		t.Errorf("another number: %v", err)
	} else {
		other()
	}
	unlock()
	if unlock, err = Lock(7); err != nil {
		t.Fatalf("given back: %v", err)
	}
	unlock()

	// Nobody else can open the file, and what he can open keeps nobody from it.
	stranger := func(args ...string) error {
		return exec.Command("setpriv", append([]string{"--reuid", "4711", "--regid", "4711", "--clear-groups", "flock"}, args...)...).Run()
	}
	if err := stranger("-n", locks, "true"); err == nil {
		t.Error("a stranger has opened the file")
	}
	hold := exec.Command("setpriv", "--reuid", "4711", "--regid", "4711", "--clear-groups", "flock", Root, "sh", "-c", "echo held; exec sleep 60")
	out, err := hold.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := hold.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = hold.Wait() }() // it is killed
	defer func() { _ = hold.Process.Kill() }()
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if unlock, err = Lock(7); err != nil {
		t.Fatalf("while a stranger has the directory: %v", err)
	}
	unlock()
}

// TestLockOfOthers: a file that somebody else made, or could lock, is not used.
func TestLockOfOthers(t *testing.T) {
	elsewhere := filepath.Join(t.TempDir(), "file")
	for _, tt := range []struct {
		name, want string
		make       func() error
	}{
		{"readable", "want a file of uid 0", func() error { return os.WriteFile(locks, nil, 0o644) }},
		{"another user's", "want a file of uid 0", func() error {
			return errors.Join(os.WriteFile(locks, nil, 0o600), os.Chown(locks, 4711, 4711))
		}},
		{"link", "symbolic links", func() error { return os.Symlink(elsewhere, locks) }},
		{"FIFO", "want a regular file", func() error { return syscall.Mkfifo(locks, 0o600) }},
		{"directory", "is a directory", func() error { return os.Mkdir(locks, 0o700) }},
	} {
		if err := errors.Join(os.MkdirAll(Root, 0o755), os.RemoveAll(locks), tt.make()); err != nil {
			t.Fatal(err)
		}
		if _, err := Lock(7); err == nil || errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want %q", tt.name, err, tt.want)
		}
	}
	if _, err := os.Stat(elsewhere); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the link was followed: %v", err)
	}
	if err := os.RemoveAll(locks); err != nil {
		t.Fatal(err)
	}
}

// TestReadFile: what would make the reader wait is refused.
func TestReadFile(t *testing.T) {
	dir := t.TempDir()
	file, link, fifo := filepath.Join(dir, "file"), filepath.Join(dir, "link"), filepath.Join(dir, "fifo")
	if err := errors.Join(os.WriteFile(file, []byte("text"), 0o666), os.Symlink(file, link), syscall.Mkfifo(fifo, 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, link} {
		if text, err := ReadFile(path); err != nil || string(text) != "text" {
			t.Errorf("%s: %q, %v", path, text, err)
		}
	}
	for _, path := range []string{fifo, dir, "/dev/zero"} {
		if text, err := ReadFile(path); err == nil || !strings.Contains(err.Error(), "want a regular file") {
			t.Errorf("%s: %q, %v", path, text, err)
		}
	}
}

// TestReplaceFileKilled: what a process that was killed left is no obstacle, and does not stay.
func TestReplaceFileKilled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(temp(path), []byte("half"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := ReplaceFile(path, []byte("whole"), 0o600); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != "whole" {
		t.Errorf("%q, %v", text, err)
	}
	for range 2 {
		if err := RemoveTemp(path); err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(temp(path)); err == nil {
			t.Error("it stays")
		}
		if err := os.WriteFile(temp(path), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestOfLink: no name leads out of the directories of links.
func TestOfLink(t *testing.T) {
	own, err := Own("links")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := OfLink("wan0"); err != nil || got != own+"/wan0" {
		t.Errorf("got %s, %v", got, err)
	}
	for _, name := range []string{"", ".", "..", "../x", "a/b", "/etc"} {
		if got, err := OfLink(name); err == nil {
			t.Errorf("%q: %s", name, got)
		}
	}
}
