// Package remember keeps, for a later process of ours, what the kernel does not show: files of
// JSON in directories of each network namespace. Below /run nothing outlives a boot. It hides what
// makes such a file safe to read: whose it is, who else can write to it, and that it is whole; and
// that of a lock, which nobody else can take. A Dir waits for its file system as long as outside.Limit: a loop may use it.
package remember

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
)

// Root is the directory of all that is remembered.
const Root = "/run/table-allocator"

// MaxFile is how much of a file is read, in bytes.
const MaxFile = 128 << 10

// Dir is a directory below Root with a file for each name, which nobody else can write to. It is
// made by the first Write; "" has nothing and takes nothing.
type Dir string

// Own is the directory Root/name/NAMESPACE, or one below it, where NAMESPACE is the inode number of
// this process's network namespace. That number may be another namespace's later.
func Own(name string, below ...string) (Dir, error) {
	inode, err := NamespaceInode()
	if err != nil {
		return "", err
	}
	path := append([]string{Root, name, strconv.FormatUint(inode, 10)}, below...)
	return Dir(filepath.Join(path...)), nil
}

// OfLink is the directory of what hooks and clients remember of a link.
func OfLink(ifname string) (Dir, error) {
	if filepath.Base(ifname) != ifname || !filepath.IsLocal(ifname) || ifname == "." {
		return "", fmt.Errorf("%q: not the name of a link", ifname)
	}
	return Own("links", ifname)
}

// NamespaceInode is the inode number of this process's network namespace. A socket leads to the namespace if the process has
// CAP_NET_ADMIN, else /proc does, which may be silent or not mounted.
func NamespaceInode() (uint64, error) {
	socket, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(socket)
	var stat unix.Stat_t
	if namespace, socketErr := unix.IoctlRetInt(socket, unix.SIOCGSKNS); socketErr == nil {
		defer unix.Close(namespace)
		err = unix.Fstat(namespace, &stat)
		return stat.Ino, err
	}
	if err := unix.Stat("/proc/thread-self/ns/net", &stat); err != nil {
		return 0, fmt.Errorf("stat /proc/thread-self/ns/net: %w", err)
	}
	return stat.Ino, nil
}

// Namespace tells this process's network namespace from all others since the boot, also from those of the same inode
// number. It is 0 before Linux 5.14.
func Namespace() (uint64, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if errors.Is(err, unix.ENOPROTOOPT) {
		return 0, nil
	}
	return cookie, err
}

// Path is the file of a name, which holds no slash.
func (d Dir) Path(name string) string { return filepath.Join(string(d), name) }

// Make makes the directory, and those between it and Root, unless they are there. It fails if
// anybody else can write to one of them.
func (d Dir) Make() error {
	below, ok := strings.CutPrefix(string(d), Root+"/")
	if !ok {
		return fmt.Errorf("remember in %q: the network namespace is not known", string(d))
	}
	if err := os.MkdirAll(Root, 0o755); err != nil {
		return err
	}
	path := Root
	for _, name := range strings.Split(below, "/") {
		path = filepath.Join(path, name)
		if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		info, err := os.Lstat(path)
		if err != nil {
			return err
		}
		if !info.IsDir() || !isOwn(info, write) {
			return fmt.Errorf("%s: want a directory that only uid %d can write to", path, os.Geteuid())
		}
	}
	return nil
}

// What others must not be able to do with a file.
const (
	write = 0o022
	open  = 0o077
)

// isOwn reports whether a file is this user's and gives others none of the rights.
func isOwn(info fs.FileInfo, rights fs.FileMode) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(stat.Uid) == os.Geteuid() && info.Mode().Perm()&rights == 0
}

// Write stores value under name, in place of what is there.
func (d Dir) Write(name string, value any) error {
	text, err := json.Marshal(value)
	if err != nil {
		return err
	}
	return ask(func() error {
		if err := d.Make(); err != nil {
			return err
		}
		return ReplaceFile(d.Path(name), text, 0o600)
	})
}

// Ask calls f, which asks the file system of Root, and waits for it as outside.Ask does.
func Ask[T any](f func() (T, error)) (T, error) {
	return outside.Ask(Root, outside.Limit, func() (T, error) {
		outside.Reach(Root)
		return f()
	})
}

// ask is Ask for what has no answer.
func ask(f func() error) error {
	_, err := Ask(func() (struct{}, error) { return struct{}{}, f() })
	return err
}

// Read sets value to what is stored under name. fs.ErrNotExist says that there is nothing; unknown
// keys are errors.
func (d Dir) Read(name string, value any) error {
	if d == "" {
		return fs.ErrNotExist
	}
	text, err := Ask(func() ([]byte, error) {
		f, err := Open(d.Path(name))
		if err != nil {
			return nil, err
		}
		defer f.Close()
		return io.ReadAll(io.LimitReader(f, MaxFile))
	})
	if err != nil {
		return err
	}
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(value); err != nil {
		return fmt.Errorf("%s: %w", d.Path(name), err)
	}
	return nil
}

// Said is the name, in the directory of a link, of what was said of values that are left out.
const Said = "said"

// News returns those of texts that are not among the last ones under name, and adds them.
func (d Dir) News(name string, texts []string) (news []string) {
	const most = 100
	var said []string
	_ = d.Read(name, &said) // what cannot be read is said again
	for _, text := range texts {
		if !slices.Contains(said, text) {
			news = append(news, text)
		}
	}
	if said = append(said, news...); len(news) > 0 {
		_ = d.Write(name, said[max(0, len(said)-most):]) // as above
	}
	return news
}

// Files returns what is in the directory, files that are being written among it: their names begin with a dot.
func (d Dir) Files() (files []fs.FileInfo, err error) {
	return Ask(func() (files []fs.FileInfo, err error) {
		entries, err := os.ReadDir(string(d))
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		for _, e := range entries {
			if info, err := e.Info(); err == nil { // else it has just gone
				files = append(files, info)
			}
		}
		return files, err
	})
}

// RemoveEmpty removes the directory if there is nothing in it.
func (d Dir) RemoveEmpty() {
	_ = ask(func() error { return os.Remove(string(d)) }) // it stays while there are files
}

// Open opens a file for reading if it is a regular one, no link, that only this user can write to.
func Open(path string) (*os.File, error) {
	return openRegular(path, os.O_RDONLY|syscall.O_NOFOLLOW, write)
}

// OpenAppend opens a file below Root for appending, and makes it if there is none. Nobody else can open it.
func OpenAppend(path string) (*os.File, error) {
	outside.Reach(filepath.Dir(path))
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	return openRegular(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|syscall.O_NOFOLLOW, open)
}

// openRegular opens a regular file, without waiting as for the writer of a FIFO. With rights, it has
// to be this user's, and others must not have them.
func openRegular(path string, flags int, rights fs.FileMode) (*os.File, error) {
	var f *os.File
	err := outside.Again(func() (err error) {
		f, err = os.OpenFile(path, flags|syscall.O_NONBLOCK, 0o600)
		return err
	})
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	switch {
	case err != nil:
	case !info.Mode().IsRegular():
		err = fmt.Errorf("%s: want a regular file", path)
	case rights != 0 && !isOwn(info, rights):
		err = fmt.Errorf("%s: want a file of uid %d without the mode bits %#o", path, os.Geteuid(), rights)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// ReadFile is os.ReadFile for regular files only, whoever made them.
func ReadFile(path string) ([]byte, error) {
	f, err := openRegular(path, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

// ErrBusy says that another process of ours has a lock.
var ErrBusy = errors.New("another process of table-allocator holds the lock")

// Lock takes lock number n of this user without waiting for it. The locks are in a file that nobody else can open: whoever
// can open a file, or a directory, can lock it for ever.
func Lock(n uint64) (unlock func(), err error) {
	f, err := Ask(func() (*os.File, error) {
		if err := os.MkdirAll(Root, 0o755); err != nil {
			return nil, err
		}
		return openRegular(filepath.Join(Root, "locks"), os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, open)
	})
	if err != nil {
		return nil, err
	}
	set := func(kind int16) error {
		// Of this open file and no process, and of one byte, which need not be there.
		return unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: kind, Start: int64(n & math.MaxInt64), Len: 1})
	}
	if err := outside.Again(func() error { return set(unix.F_WRLCK) }); err != nil {
		f.Close()
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			return nil, ErrBusy
		}
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return func() {
		// A process that another thread has just forked has the file, too, until it executes something.
		_ = set(unix.F_UNLCK) // else the lock ends with the file
		f.Close()
	}, nil
}

// Remove deletes what is stored under name, if anything is. In the directory of another user nothing is that this one
// stored.
func (d Dir) Remove(name string) error {
	if d == "" {
		return nil
	}
	return ask(func() error {
		if info, err := os.Lstat(string(d)); err == nil && !isOwn(info, write) || errors.Is(err, fs.ErrPermission) {
			return nil
		}
		err := outside.Again(func() error { return os.Remove(d.Path(name)) })
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return errors.Join(err, RemoveTemp(d.Path(name)))
	})
}

// ReplaceFile lets whoever reads path see the old content or the new one, whole.
func ReplaceFile(path string, content []byte, mode fs.FileMode) error {
	return outside.Again(func() error { return replaceFile(path, content, mode) })
}

func replaceFile(path string, content []byte, mode fs.FileMode) error {
	const flags = os.O_WRONLY | os.O_CREATE | os.O_EXCL
	f, err := os.OpenFile(temp(path), flags, 0o600)
	if errors.Is(err, fs.ErrExist) { // a process that was killed left it: each file has one writer at a time
		if err = RemoveTemp(path); err == nil {
			f, err = os.OpenFile(temp(path), flags, 0o600)
		}
	}
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	err = errors.Join(err, f.Chmod(mode), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

// temp is the file that ReplaceFile writes to before it takes the place of path. It has one name, so that those of
// processes that were killed do not pile up.
func temp(path string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".new")
}

// RemoveTemp removes what a process left that was killed in ReplaceFile.
func RemoveTemp(path string) error {
	err := outside.Again(func() error { return os.Remove(temp(path)) })
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
