package nettest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// A root is a root directory that looks like the host's. What is written to it
// does not reach the host.
//
// One overlay over "/" would be simpler. But overlayfs refuses a layer that lies
// inside another one, and the layer with the packages usually lies below "/". So
// each directory in "/" has an overlay of its own, in a tmpfs.
type root struct {
	dir         string   // where it is mounted until pivot
	layer       string   // directory with a layer between the host and upper, or ""
	upper, work string   // for what is written, and for overlayfs itself; on one file system
	only        []string // unless nil, all other directories are read-only
}

// private lists the directories in "/" that are not the host's, but new or empty.
var private = []string{"boot", "dev", "lost+found", "media", "mnt", "proc", "run", "sys", "tmp"}

// path returns where p, a path in the new root, is before pivot.
func (r root) path(p string) string { return filepath.Join(r.dir, p) }

// mount builds the root. /sys and the kernel's settings, /proc/sys, belong to
// the host, so they are read-only. ("ip netns exec" mounts a /sys of its own,
// which can be written.)
func (r root) mount() error {
	if err := os.MkdirAll(r.dir, 0o755); err != nil {
		return err
	}
	if err := mountNew(r.dir, "tmpfs", 0, "mode=0755"); err != nil {
		return err
	}
	entries, err := os.ReadDir("/")
	if err != nil {
		return err
	}
	for _, e := range entries {
		switch {
		case e.Type() == fs.ModeSymlink:
			target, err := os.Readlink("/" + e.Name())
			if err != nil {
				return err
			}
			if err := os.Symlink(target, r.path(e.Name())); err != nil {
				return err
			}
		case e.IsDir() && !slices.Contains(private, e.Name()):
			if err := r.mountDir(e.Name()); err != nil {
				return err
			}
		}
	}
	for _, name := range private {
		if err := os.MkdirAll(r.path(name), 0o755); err != nil {
			return err
		}
	}
	if err := r.mountDev(); err != nil {
		return err
	}
	for _, m := range []struct {
		dir, fstype string
		flags       uintptr
		data        string
	}{
		{"proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_RDONLY, ""},
		{"run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
		{"run/lock", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
	} {
		if err := mountNew(r.path(m.dir), m.fstype, m.flags, m.data); err != nil {
			return err
		}
	}
	return mountBind(r.path("proc/sys"), r.path("proc/sys"), false)
}

// mountDir mounts the directory name of "/".
func (r root) mountDir(name string) error {
	host, dst := "/"+name, r.path(name)
	if err := copyDir(host, dst); err != nil {
		return err
	}
	if r.only != nil && !slices.Contains(r.only, name) {
		return mountBind(host, dst, false)
	}
	upper, work := filepath.Join(r.upper, name), filepath.Join(r.work, name)
	if err := copyDir(host, upper); err != nil {
		return err
	}
	if err := copyDir(host, work); err != nil {
		return err
	}
	lower := escape(host)
	layered := false
	if r.layer != "" {
		if _, err := os.Stat(filepath.Join(r.layer, name)); err == nil {
			lower = escape(filepath.Join(r.layer, name)) + ":" + lower
			layered = true
		}
	}
	err := unix.Mount("overlay", dst, "overlay", 0, fmt.Sprintf(
		"lowerdir=%s,upperdir=%s,workdir=%s,metacopy=off", lower, escape(upper), escape(work)))
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ELOOP) && layered:
		return fmt.Errorf("overlay on /%s: the package layer %s must not be inside /%s: set XDG_CACHE_HOME to another place: %w", name, r.layer, name, err)
	case r.only != nil:
		return fmt.Errorf("overlay on /%s, writing to %s: the kernel needs overlayfs, and the file system there must not be an overlay itself or a network's (XDG_CACHE_HOME chooses another): %w", name, upper, err)
	case layered:
		return fmt.Errorf("overlay on /%s: %w", name, err)
	}
	// Some file systems, such as vfat, cannot be below an overlay. No package is installed there, so
	// the directory is read-only.
	return mountBind(host, dst, false)
}

// mountDev makes a /dev with the devices that programs expect, and none of the
// host's hardware, so that a test can run udevd.
func (r root) mountDev() error {
	if err := mountNew(r.path("dev"), "tmpfs", unix.MS_NOSUID, "mode=0755"); err != nil {
		return err
	}
	for _, d := range []struct {
		name         string
		mode         uint32
		major, minor uint32
	}{
		{"null", 0o666, 1, 3},
		{"zero", 0o666, 1, 5},
		{"full", 0o666, 1, 7},
		{"random", 0o666, 1, 8},
		{"urandom", 0o666, 1, 9},
		{"tty", 0o666, 5, 0},
		{"net/tun", 0o666, 10, 200},
		{"ppp", 0o600, 108, 0},
	} {
		path := r.path(filepath.Join("dev", d.name))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := unix.Mknod(path, unix.S_IFCHR|d.mode, int(unix.Mkdev(d.major, d.minor))); err != nil {
			return fmt.Errorf("make /dev/%s: %w", d.name, err)
		}
		if err := os.Chmod(path, os.FileMode(d.mode)); err != nil { // whatever the umask
			return err
		}
	}
	for name, target := range map[string]string{
		"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2", "ptmx": "pts/ptmx",
	} {
		if err := os.Symlink(target, r.path(filepath.Join("dev", name))); err != nil {
			return err
		}
	}
	if err := mountNew(r.path("dev/pts"), "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620"); err != nil {
		return err
	}
	return mountNew(r.path("dev/shm"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777")
}

// share mounts a path of the host at its place in the root.
func (r root) share(b bind) error {
	dst := r.path(b.Path)
	info, err := os.Stat(b.Path)
	if err != nil {
		return err
	}
	// A path in /tmp, or on a file system of its own, is missing in the root.
	if info.IsDir() {
		err = os.MkdirAll(dst, 0o755)
	} else if err = os.MkdirAll(filepath.Dir(dst), 0o755); err == nil {
		var f *os.File
		if f, err = os.OpenFile(dst, os.O_CREATE, 0o644); err == nil {
			err = f.Close()
		}
	}
	if err != nil {
		return err
	}
	return mountBind(b.Path, dst, b.Writable)
}

// pivot makes r the root directory of the process, and unmounts the host's.
func (r root) pivot() error {
	if err := os.Chdir(r.dir); err != nil {
		return err
	}
	// With the same directory twice, the old root is mounted on top of the new one: pivot_root(2).
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root to %s: %w", r.dir, err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount the host's root: %w", err)
	}
	return os.Chdir("/")
}

// mountNew mounts a new file system on dir, which it makes if it is missing.
func mountNew(dir, fstype string, flags uintptr, data string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(fstype, dir, fstype, flags, data); err != nil {
		return fmt.Errorf("mount %s on %s: %w", fstype, dir, err)
	}
	return nil
}

// mountBind mounts src on dst, without the mounts below src.
func mountBind(src, dst string, writable bool) error {
	if err := unix.Mount(src, dst, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s on %s: %w", src, dst, err)
	}
	var flags uintptr = unix.MS_BIND | unix.MS_REMOUNT
	if !writable {
		flags |= unix.MS_RDONLY
	}
	if err := unix.Mount("", dst, "", flags, ""); err != nil {
		return fmt.Errorf("make %s read-only=%v: %w", dst, !writable, err)
	}
	return nil
}

// copyDir makes the directory dst, and its parents, with the mode and owner of src.
func copyDir(src, dst string) error {
	if err := os.MkdirAll(dst, 0o755); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Stat(src, &st); err != nil {
		return fmt.Errorf("stat %s: %w", src, err)
	}
	if err := unix.Chown(dst, int(st.Uid), int(st.Gid)); err != nil {
		return fmt.Errorf("chown %s: %w", dst, err)
	}
	if err := unix.Chmod(dst, st.Mode&0o7777); err != nil {
		return fmt.Errorf("chmod %s: %w", dst, err)
	}
	return nil
}

// escape quotes the characters that mean something in the options of overlayfs.
func escape(path string) string {
	return strings.NewReplacer(`\`, `\\`, ":", `\:`, ",", `\,`).Replace(path)
}
