package wire

import "golang.org/x/sys/unix"

// Waiting reports whether a datagram waits to be received.
func (c *Conn) Waiting() (waiting bool) {
	err := c.raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0)
		waiting = err == nil && n > 0
	})
	return err == nil && waiting
}
