package netns

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// places tells when another program puts a file or directory of its own where the namespaces have mounts: the kernel unmounts
// what is mounted on a file that goes. It watches the directories of these places by inotify(7). That a file of /proc with the
// mounts of a namespace tells of it, as proc_pid_mountinfo(5) promises, is not so on every kernel, and what a symbolic
// link leads to is no mount.
type places struct {
	mu      sync.Mutex
	events  *os.File
	fd      int
	watched map[int32][]string // number of a watch to the names of its directory
	names   map[string]bool    // paths that count
}

// watchPlaces begins to watch.
func watchPlaces() (*places, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("inotify_init", err)
	}
	p := &places{events: os.NewFile(uintptr(fd), "inotify"), fd: fd}
	if err := p.follow(); err != nil {
		return nil, errors.Join(err, p.close())
	}
	return p, nil
}

// close ends next.
func (p *places) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fd = -1
	return p.events.Close()
}

// next waits until one of the places may have changed.
func (p *places) next() error {
	buf := make([]byte, 4096) // for more than one event with the longest name
	for {
		n, err := p.events.Read(buf)
		if err != nil {
			return err
		}
		if p.concern(buf[:n]) {
			return p.follow()
		}
	}
}

// concern reports whether events are of one of the places, or some were lost.
func (p *places) concern(events []byte) (found bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(events) >= unix.SizeofInotifyEvent {
		number, mask := int32(binary.NativeEndian.Uint32(events)), binary.NativeEndian.Uint32(events[4:])
		name := events[unix.SizeofInotifyEvent:][:binary.NativeEndian.Uint32(events[12:])]
		events = events[unix.SizeofInotifyEvent+len(name):]
		found = found || mask&unix.IN_Q_OVERFLOW != 0
		for _, dir := range p.watched[number] {
			path := filepath.Join(dir, string(bytes.TrimRight(name, "\x00")))
			found = found || p.names[path] || mask&(unix.IN_IGNORED|unix.IN_MOVE_SELF) != 0 // the directory itself went
		}
		if mask&unix.IN_IGNORED != 0 {
			delete(p.watched, number)
		}
	}
	return found
}

// follow watches the directories in which the places are now. A directory that is missing is looked for in the one above it.
func (p *places) follow() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fd < 0 {
		return nil
	}
	p.names = make(map[string]bool)
	dirs := make(map[string]bool)
	add := func(path string) {
		for ; path != "/"; path = filepath.Dir(path) {
			p.names[path], dirs[filepath.Dir(path)] = true, true
		}
	}
	for _, dir := range maskable {
		add(dir)
	}
	const links = 40 // as many as the kernel follows
	path := resolvConf
	for range links {
		add(path)
		target, err := os.Readlink(path)
		if err != nil {
			break
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(path), target)
		}
		path = filepath.Clean(target)
	}
	before := p.watched
	p.watched = make(map[int32][]string)
	for dir := range dirs {
		// What is watched already keeps its number, also by another name.
		number, err := unix.InotifyAddWatch(p.fd, dir, unix.IN_CREATE|unix.IN_DELETE|unix.IN_MOVED_FROM|unix.IN_MOVED_TO|unix.IN_MOVE_SELF|unix.IN_ONLYDIR)
		switch {
		case err == nil:
			p.watched[int32(number)] = append(p.watched[int32(number)], dir)
		case !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTDIR): // else the directory above tells when it comes
			return fmt.Errorf("watch %s: %w", dir, err)
		}
	}
	for number := range before {
		if p.watched[number] == nil {
			_, _ = unix.InotifyRmWatch(p.fd, uint32(number)) // it may have gone
		}
	}
	return nil
}
