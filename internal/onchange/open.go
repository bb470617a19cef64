package onchange

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// CheckPath returns an error unless a path is absolute and as short as it can be.
func CheckPath(path string) error {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" || strings.ContainsRune(path, 0) {
		return errors.New("want the absolute path of a program, without dots in place of names")
	}
	return nil
}

// open opens a program for execution by its descriptor. Each directory on the way is opened in the one before it and
// checked, so that nobody but root has a moment in which another file could be put in its place.
func open(path string) (*os.File, error) {
	if err := CheckPath(path); err != nil {
		return nil, err
	}
	fd, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: "/", Err: err}
	}
	at := ""
	names := strings.Split(path[1:], "/")
	for i, name := range names {
		if err := check(fd, unix.S_IFDIR); err != nil {
			unix.Close(fd)
			return nil, fmt.Errorf("%s/ %w", at, err)
		}
		at += "/" + name
		flags := unix.O_PATH | unix.O_DIRECTORY
		if i == len(names)-1 {
			flags = unix.O_RDONLY | unix.O_NONBLOCK // of a FIFO, which is refused, no writer is waited for
		}
		next, err := unix.Openat(fd, name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		unix.Close(fd)
		if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) {
			return nil, fmt.Errorf("%s is a symbolic link, or no directory: give the path without links", at)
		}
		if err != nil {
			return nil, &fs.PathError{Op: "open", Path: at, Err: err}
		}
		fd = next
	}
	if err := check(fd, unix.S_IFREG); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("%s %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// check returns an error unless a file is of a type, belongs to root and nobody else can write to it.
func check(fd int, want uint32) error {
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	switch {
	case err != nil:
		return fmt.Errorf("cannot be looked at: %w", err)
	case st.Mode&unix.S_IFMT != want && want == unix.S_IFREG:
		return errors.New("is no regular file")
	case st.Uid != 0:
		return errors.New("is not root's")
	case st.Mode&0o022 != 0:
		return errors.New("is writable for others than root")
	case want == unix.S_IFREG && st.Mode&0o111 == 0:
		return errors.New("is not executable")
	}
	return nil
}
