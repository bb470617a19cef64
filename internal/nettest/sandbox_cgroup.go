package nettest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// cgroupPrefix begins the names of the sandboxes' cgroups.
const cgroupPrefix = "nettest-"

// makeCgroup makes a cgroup for a sandbox below the cgroup of this process, and returns its open directory;
// nil if the host has no cgroup2 file system that can be written.
func makeCgroup() (*os.File, error) {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	path := ""
	for line := range strings.Lines(string(own)) {
		if p, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::"); ok {
			path = p
		}
	}
	for line := range strings.Lines(string(mounts)) {
		before, after, _ := strings.Cut(line, " - ")
		f := strings.Fields(before) // the root in the file system is the fourth, the mount point the fifth
		if path == "" || !strings.HasPrefix(after, "cgroup2 ") || f[3] != "/" {
			continue
		}
		parent := filepath.Join(f[4], path)
		sweepCgroups(parent)
		dir, err := lockedCgroup(parent)
		if err == nil || !errors.Is(err, unix.EROFS) && !errors.Is(err, fs.ErrPermission) {
			return dir, err
		}
	}
	return nil, nil
}

// lockedCgroup makes a cgroup that others do not sweep as long as its directory is open. A lock tells them, and no pid:
// they may live in other pid namespaces.
func lockedCgroup(parent string) (*os.File, error) {
	for {
		path, err := os.MkdirTemp(parent, cgroupPrefix)
		if err != nil {
			return nil, err
		}
		dir, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // swept by then
		}
		if err != nil {
			return nil, err
		}
		err = dir.Chmod(0o755) // others may look into it, as into any /sys/fs/cgroup
		if err := errors.Join(err, unix.Flock(int(dir.Fd()), unix.LOCK_SH)); err != nil {
			return nil, errors.Join(err, dir.Close())
		}
		if err := os.Chmod(path, 0o755); err == nil { // others may look, as into /sys/fs/cgroup
			return dir, nil
		}
		_ = dir.Close() // swept by then
	}
}

// sweepCgroups removes the cgroups of sandboxes that were killed together with their makers.
func sweepCgroups(parent string) {
	left, _ := filepath.Glob(filepath.Join(parent, cgroupPrefix+"*")) // the pattern is a good one
	for _, path := range left {
		sweepCgroup(path)
	}
}

func sweepCgroup(path string) {
	dir, err := os.Open(path)
	if err != nil {
		return
	}
	defer dir.Close()
	if unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		return // its maker lives
	}
	events, err := os.ReadFile(filepath.Join(path, "cgroup.events"))
	if err == nil && strings.Contains(string(events), "populated 0") {
		_ = removeCgroup(path) // the next sandbox tries again
	}
}

// enterCgroup moves the process into a cgroup, makes that the root of the cgroups that the process and
// its children see, and mounts them on mount. The calling thread must be the one that starts the
// children.
func enterCgroup(dir, mount string) error {
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
		return fmt.Errorf("enter cgroup: %w", err)
	}
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("make a cgroup namespace: %w", err)
	}
	if err := unix.Mount("cgroup2", mount, "cgroup2", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount cgroup2 on %s: %w", mount, err)
	}
	return nil
}
