package nettest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// cgroupPrefix begins the names of the sandboxes' cgroups. The pid of the process that made it follows.
const cgroupPrefix = "nettest-"

// makeCgroup makes a cgroup for a sandbox below the cgroup of this process, and returns its directory;
// "" if the host has no cgroup2 file system that can be written.
func makeCgroup() (string, error) {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", err
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
		dir := filepath.Join(parent, cgroupPrefix+strconv.Itoa(os.Getpid()))
		switch err := os.Mkdir(dir, 0o755); {
		case err == nil || errors.Is(err, fs.ErrExist):
			return dir, nil
		case errors.Is(err, unix.EROFS) || errors.Is(err, fs.ErrPermission):
		default:
			return "", err
		}
	}
	return "", nil
}

// sweepCgroups removes the cgroups of sandboxes that were killed together with their makers.
func sweepCgroups(parent string) {
	left, _ := filepath.Glob(filepath.Join(parent, cgroupPrefix+"*")) // the pattern is a good one
	for _, dir := range left {
		pid, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(dir), cgroupPrefix))
		if err != nil || !errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			continue
		}
		// The maker may live in a pid namespace that this process cannot see.
		events, err := os.ReadFile(filepath.Join(dir, "cgroup.events"))
		if err == nil && strings.Contains(string(events), "populated 0") {
			_ = removeCgroup(dir) // the next sandbox tries again
		}
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
