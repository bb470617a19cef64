package allocator

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
)

// openFile opens or creates the file at path, makes sure that it is ours alone, and locks it
// against a second server. Nothing is written to it.
func openFile(path string, log *slog.Logger) (f *os.File, made bool, err error) {
	defer func() {
		if err != nil && f != nil {
			err, f = errors.Join(err, f.Close()), nil
		}
	}()
	// Not blocking, in case that it is a FIFO.
	const flags = os.O_RDWR | unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NONBLOCK
	f, err = os.OpenFile(path, flags, 0)
	if made = errors.Is(err, fs.ErrNotExist); made {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return nil, made, fmt.Errorf("%w: create the directory, or choose another path", err)
		}
	} else if err != nil {
		return nil, made, explainFile(err)
	}
	// Before a file is made: a file that the next attempt finds would be somebody else's to it.
	if err := checkPlace(path, log); err != nil {
		return f, made, err
	}
	if made {
		if f, err = os.OpenFile(path, flags|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
			return nil, made, explainFile(err)
		}
	}
	info, err := f.Stat()
	if err != nil {
		return f, made, err
	}
	if err := ownFile(info); err != nil {
		return f, made, err
	}
	if err := outside.Again(func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) }); errors.Is(err, unix.EWOULDBLOCK) {
		return f, made, fmt.Errorf("another server uses it%s", lockHolder(f))
	} else if err != nil {
		return f, made, fmt.Errorf("lock: %w", err)
	}
	return f, made, nil
}

func explainFile(err error) error {
	switch {
	case errors.Is(err, unix.ELOOP):
		return errors.New("it is a symbolic link: give the path of the file itself")
	case errors.Is(err, unix.EROFS), errors.Is(err, unix.ENOSPC), errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: the file and its directory must be writable for uid %d", cause(err), os.Geteuid())
	}
	return cause(err)
}

// cause returns an error without its operation and path, which the caller adds.
func cause(err error) error {
	var e *fs.PathError
	if errors.As(err, &e) {
		return e.Err
	}
	return err
}

// ownFile returns an error if another user made the file, or if it has another name.
func ownFile(info fs.FileInfo) error {
	st := info.Sys().(*syscall.Stat_t)
	switch {
	case !info.Mode().IsRegular():
		return errors.New("it is not a regular file: choose another path")
	case int64(st.Uid) != int64(os.Geteuid()):
		return fmt.Errorf("it belongs to uid %d and not to uid %d: chown it if you trust its content, or choose another path", st.Uid, os.Geteuid())
	case st.Nlink != 1:
		return fmt.Errorf("it has %d hard links: remove the others, or choose another path", st.Nlink)
	}
	return nil
}

// checkHeader returns errDamaged for a file that SQLite would not read, or not write to.
func checkHeader(f *os.File) error {
	head := make([]byte, headerBytes)
	n, err := f.ReadAt(head, 0)
	switch {
	case err != nil && !errors.Is(err, io.EOF):
		return err
	case n == 0: // a new one
	case n < headerBytes || string(head[:16]) != "SQLite format 3\x00" || head[18] > 2 || head[19] > 2:
		return errDamaged
	}
	return nil
}

// checkPlace checks the files beside the database. Where other users can create files, one of them may
// have created a journal that SQLite would apply.
func checkPlace(path string, log *slog.Logger) error {
	dir, err := os.Stat(filepath.Dir(path))
	if err != nil {
		return err
	}
	if dir.Mode().Perm()&0o002 != 0 {
		log.Warn("anybody can write to the directory of the database", "path", path)
	}
	for _, suffix := range []string{"-wal", "-shm", "-journal"} {
		info, err := os.Lstat(path + suffix)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = ownFile(info)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", path+suffix, err)
		}
	}
	return nil
}

// lockHolder returns " (pid N)" for the process that has the lock on f, or "": /proc/locks has pids of
// this pid namespace only, and not every file system.
func lockHolder(f *os.File) string {
	info, err := f.Stat()
	if err != nil {
		return ""
	}
	st := info.Sys().(*syscall.Stat_t)
	locks, err := os.ReadFile("/proc/locks")
	if err != nil {
		return ""
	}
	id := fmt.Sprintf("%02x:%02x:%d", unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev)), st.Ino)
	for line := range strings.Lines(string(locks)) {
		f := strings.Fields(line)
		if len(f) < 6 || f[1] != "FLOCK" || f[5] != id {
			continue
		}
		if pid, err := strconv.Atoi(f[4]); err == nil && pid > 0 {
			return fmt.Sprintf(" (pid %d)", pid)
		}
	}
	return ""
}
