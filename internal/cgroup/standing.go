package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"

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

// RemoveStanding removes the cgroup that Standing made, and returns the mark that it gave. While there are processes in
// it, it stays, and used is true.
func (c *Cgroups) RemoveStanding(u Uplink) (m Mark, used bool, err error) {
	dir := c.file(standing(u))
	if m, _, err = programsMark(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return m, true, err
	}
	c.sweepIn(standing(u))
	switch err := os.Remove(dir); {
	case err == nil, errors.Is(err, fs.ErrNotExist):
		return m, false, nil
	case errors.Is(err, unix.EBUSY):
		return m, true, nil
	default:
		return m, true, fmt.Errorf("remove cgroup %s: %w", standing(u), err)
	}
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
