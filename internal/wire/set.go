package wire

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
)

// Set receives from many connections in one goroutine. A goroutine for each of a thousand connections
// would take most of the memory of a process.
type Set struct {
	file *os.File // an epoll instance, which the runtime can wait for itself
	raw  syscall.RawConn
	buf  [64]unix.EpollEvent

	errors int // in a row that need not come back

	mu      sync.Mutex
	members map[int32]member // by descriptor
}

type member struct {
	conn *Conn
	tag  any
}

// NewSet returns an empty set, to be closed by the caller.
func NewSet() (*Set, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("epoll: %w", err)
	}
	file := os.NewFile(uintptr(fd), "epoll")
	raw, err := file.SyscallConn()
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("epoll: %w", err)
	}
	return &Set{file: file, raw: raw, members: make(map[int32]member)}, nil
}

// Add puts a connection into the set. Its datagrams come with tag.
func (s *Set) Add(c *Conn, tag any) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.control(c, func(fd int32) error {
		s.members[fd] = member{c, tag}
		return s.epoll(unix.EPOLL_CTL_ADD, fd)
	})
}

// Remove takes a connection out, before it is closed.
func (s *Set) Remove(c *Conn) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.control(c, func(fd int32) error {
		delete(s.members, fd)
		return s.epoll(unix.EPOLL_CTL_DEL, fd)
	})
}

func (s *Set) control(c *Conn, f func(fd int32) error) error {
	var err error
	if controlErr := c.raw.Control(func(fd uintptr) { err = f(int32(fd)) }); controlErr != nil {
		err = controlErr
	}
	return err
}

func (s *Set) epoll(op int, fd int32) error {
	var err error
	controlErr := s.raw.Control(func(epfd uintptr) {
		err = unix.EpollCtl(int(epfd), op, int(fd), &unix.EpollEvent{Events: unix.EPOLLIN, Fd: fd})
	})
	if err = errors.Join(err, controlErr); err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	return nil
}

// passes reports whether an error need not come back. The datagrams wait, and are received soon.
func (s *Set) passes(err error) bool {
	const most = 100
	s.errors++
	return s.errors <= most && outside.Passes(err)
}

// Receive waits for datagrams and calls f with those of one connection at a time. They are
// valid until f returns. After Close the error is os.ErrClosed.
func (s *Set) Receive(f func(tag any, datagrams []Datagram)) error {
	var n int
	var failed error
	err := s.raw.Read(func(fd uintptr) bool {
		n, failed = unix.EpollWait(int(fd), s.buf[:], 0)
		return n > 0 || failed != nil && failed != unix.EINTR
	})
	switch {
	case err != nil: // the file is closed: it has no deadline
		return os.ErrClosed
	case failed != nil:
		return fmt.Errorf("epoll: %w", failed)
	}
	for _, e := range s.buf[:n] {
		s.mu.Lock()
		m, ok := s.members[e.Fd]
		s.mu.Unlock()
		if !ok {
			continue // it went in between
		}
		datagrams, err := m.conn.receive(true)
		if err != nil && !errors.Is(err, os.ErrClosed) && !s.passes(err) {
			return err
		}
		if len(datagrams) > 0 {
			s.errors = 0
			f(m.tag, datagrams)
		}
		if m.conn.size > MaxRequest {
			m.conn.release() // the next Receive may be for another one
		}
	}
	return nil
}

// Close ends the set and a Receive that waits. The connections stay.
func (s *Set) Close() error { return s.file.Close() }
