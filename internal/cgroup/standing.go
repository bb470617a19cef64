package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// standingMode has the sticky bit: the cgroup is nobody's leftover while it is empty.
const standingMode = fs.ModeSticky | 0o755

// Standing makes the cgroup ta-IFNAME at the top, which stays while no process is in it: whoever is put into it is bound.
func (c *Cgroups) Standing(u Uplink, m Mark) (missing []Missing, err error) {
	if err := u.Check(); err != nil {
		return nil, err
	}
	if c.private != nil {
		return nil, errNotMounted
	}
	cgroup := standing(u)
	for range bindRounds {
		if missing, err = c.place(-1, cgroup, m); err != nil {
			return nil, err
		}
		if err = os.Chmod(c.file(cgroup), standingMode); !errors.Is(err, fs.ErrNotExist) { // else it was swept meanwhile
			break
		}
	}
	return missing, err
}

// RemoveStanding removes the cgroup that Standing made. While there are processes in it, it stays, and used is true.
func (c *Cgroups) RemoveStanding(u Uplink) (used bool, err error) {
	c.sweepIn(standing(u))
	switch err := os.Remove(c.file(standing(u))); {
	case err == nil, errors.Is(err, fs.ErrNotExist):
		return false, nil
	case errors.Is(err, unix.EBUSY):
		return true, nil
	default:
		return true, fmt.Errorf("remove cgroup %s: %w", standing(u), err)
	}
}

// Named reports whether any cgroup is for an uplink by its name. To look at the programs of a cgroup takes CAP_SYS_ADMIN,
// which a watch need not have.
func (c *Cgroups) Named(u Uplink) (named bool, err error) {
	err = filepath.WalkDir(c.dir, func(dir string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || err == nil && !e.IsDir() {
			return nil
		}
		if inside, ok := cutPath(dir, c.dir); ok && err == nil {
			if of, found := uplinkOf(inside); found && of == u {
				named = true
				return fs.SkipAll
			}
		}
		return err
	})
	return named, err
}

func standing(u Uplink) string { return path.Join("/", childPrefix+u.String()) }

func stands(dir string) bool {
	info, err := os.Stat(dir)
	return err == nil && info.Mode()&fs.ModeSticky != 0
}

// AllStanding are the uplinks with a cgroup that Standing made.
func (c *Cgroups) AllStanding() (uplinks []Uplink) {
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		return nil // the file system has gone, and they with it
	}
	for _, e := range entries {
		if u, ok := uplinkOf("/" + e.Name()); ok && stands(c.file("/"+e.Name())) {
			uplinks = append(uplinks, u)
		}
	}
	return uplinks
}
