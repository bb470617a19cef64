package e2e

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	socket "github.com/table-allocator/table-allocator/internal/uplinks"
)

// TestUplinksStrangers: connections of users who are not trusted end at once, and take no room from others.
func TestUplinksStrangers(t *testing.T) {
	h := newHost(t)
	var l *socket.Listener
	var err error
	h.ns.Do(func() { l, err = socket.Listen() })
	if err != nil {
		t.Fatal(err)
	}
	gate, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		l.Serve(func(f func()) { go func() { <-gate; f() }() }, func(socket.Request) (socket.Answer, bool) { return socket.Answer{}, true })
	}()
	const connections = 40
	var fds []int
	h.ns.Do(func() {
		for range connections {
			fd, socketErr := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			err = errors.Join(err, socketErr)
			fds = append(fds, fd)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	patience := unix.Timeval{Sec: 60}
	for _, fd := range fds {
		defer unix.Close(fd)
		err := errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience),
			asUser(uidNobodyKnows, uidNobodyKnows, func() error { return unix.Connect(fd, &unix.SockaddrUnix{Name: "@table-allocator-uplinks"}) }))
		if err != nil {
			t.Fatal(err)
		}
		n, err := unix.Read(fd, make([]byte, 1))
		for errors.Is(err, unix.EINTR) {
			n, err = unix.Read(fd, make([]byte, 1))
		}
		if n != 0 || err != nil {
			t.Fatalf("a stranger's connection: read %d bytes, %v", n, err)
		}
	}
	close(gate)
	h.ns.Do(func() { _, err = socket.Ask(socket.Request{}) })
	if err != nil {
		t.Errorf("root: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	<-ended
}
