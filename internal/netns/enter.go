package netns

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Enter moves the calling thread, which the caller has locked and never unlocks, into a namespace, with the directory that
// it is in. What the thread executes or starts from now on is in there.
func (h *Host) Enter(name string) error {
	if _, err := h.known(name); err != nil {
		return named(name, err)
	}
	var files []*os.File
	for _, path := range []string{h.memory.mountPin(name), netPin(name)} {
		f, err := os.Open(path)
		if err != nil {
			return named(name, err)
		}
		defer f.Close()
		files = append(files, f)
	}
	dir, err := os.Getwd()
	if err != nil {
		return fmt.Errorf("the directory of this process: %w", err)
	}
	before, ok := identity(".")
	if !ok {
		return fmt.Errorf("the directory %s cannot be read", dir)
	}
	// A thread whose directory others share cannot change its mounts.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return named(name, err)
	}
	if err := unix.Setns(int(files[0].Fd()), unix.CLONE_NEWNS); err != nil {
		return named(name, fmt.Errorf("enter its mounts: %w", err))
	}
	if err := unix.Setns(int(files[1].Fd()), unix.CLONE_NEWNET); err != nil {
		return named(name, fmt.Errorf("enter its network: %w", err))
	}
	// By its name: a directory that is kept would lead out of the mount namespace.
	if err := unix.Chdir(dir); err != nil {
		return fmt.Errorf("enter directory %s: %w", dir, err)
	}
	if after, ok := identity("."); !ok || after != before {
		return errors.New("directory " + dir + " is another one in the namespace")
	}
	return nil
}
