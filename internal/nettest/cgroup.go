package nettest

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// cgroups is the root of the host's cgroup2 hierarchy, mounted for this sandbox alone.
var cgroups = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "cgroup")
	if err != nil {
		return "", err
	}
	return dir, mountNew(dir, "cgroup2", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
})

// Cgroup makes a cgroup for a test that runs in a sandbox, and returns its directory in a cgroup2
// file system. At the end of the test the processes in it are killed, and it is removed with the
// cgroups below it.
func Cgroup(t TB) string {
	t.Helper()
	if !InSandbox() {
		t.Fatalf("make a cgroup for %s: not in a sandbox", t.Name())
	}
	root, err := cgroups()
	if err != nil {
		t.Fatalf("mount the cgroup2 hierarchy: %v", err)
	}
	dir, err := os.MkdirTemp(root, "table-allocator-test-")
	if err != nil {
		t.Fatalf("make a cgroup for %s: %v", t.Name(), err)
	}
	t.Cleanup(func() {
		if err := removeCgroup(dir); err != nil {
			t.Logf("remove the cgroup of %s: %v", t.Name(), err)
		}
	})
	return dir
}

// removeCgroup kills the processes in a cgroup and below it, and removes it.
func removeCgroup(dir string) error {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	slices.Reverse(dirs) // children before their parents
	for _, d := range dirs {
		err = errors.Join(err, killCgroup(d), unix.Rmdir(d))
	}
	return err
}

func killCgroup(dir string) error {
	const patience = 10 * time.Second
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		text, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		pids := strings.Fields(string(text))
		if err != nil || len(pids) == 0 || time.Now().After(deadline) {
			return err
		}
		for _, p := range pids {
			if pid, err := strconv.Atoi(p); err == nil && pid > 0 { // 0 is a process of another pid namespace
				_ = unix.Kill(pid, unix.SIGKILL) // the process may have ended
			}
		}
	}
}
