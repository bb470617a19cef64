// Package remember keeps, for a later process of ours, what the kernel does not show: files of
// JSON in directories of each network namespace. Below /run nothing outlives a boot. It hides what
// makes such a file safe to read: whose it is, who else can write to it, and that it is whole. It
// imports nothing of this module.
package remember

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
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
	info, err := os.Stat("/proc/thread-self/ns/net")
	if err != nil {
		return "", err
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return "", errors.ErrUnsupported
	}
	path := append([]string{Root, name, strconv.FormatUint(stat.Ino, 10)}, below...)
	return Dir(filepath.Join(path...)), nil
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
		if !info.IsDir() || !isOwn(info) {
			return fmt.Errorf("%s: want a directory that only uid %d can write to", path, os.Geteuid())
		}
	}
	return nil
}

// isOwn reports whether a file is this user's and nobody else can write to it.
func isOwn(info fs.FileInfo) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	const others = 0o022
	return ok && int(stat.Uid) == os.Geteuid() && info.Mode().Perm()&others == 0
}

// Write stores value under name, in place of what is there.
func (d Dir) Write(name string, value any) error {
	if err := d.Make(); err != nil {
		return err
	}
	text, err := json.Marshal(value)
	if err != nil {
		return err
	}
	return ReplaceFile(d.Path(name), text, 0o600)
}

// Read sets value to what is stored under name. fs.ErrNotExist says that there is nothing; unknown
// keys are errors.
func (d Dir) Read(name string, value any) error {
	if d == "" {
		return fs.ErrNotExist
	}
	f, err := Open(d.Path(name))
	if err != nil {
		return err
	}
	defer f.Close()
	decoder := json.NewDecoder(io.LimitReader(f, MaxFile))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(value); err != nil {
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	return nil
}

// Open opens a file for reading if it is a regular one, no link, that only this user can write to.
func Open(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && (!info.Mode().IsRegular() || !isOwn(info)) {
		err = fmt.Errorf("%s: want a file that only uid %d can write to", path, os.Geteuid())
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Remove deletes what is stored under name, if anything is.
func (d Dir) Remove(name string) error {
	if d == "" {
		return nil
	}
	err := os.Remove(d.Path(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// ReplaceFile lets whoever reads path see the old content or the new one, whole.
func ReplaceFile(path string, content []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-")
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
