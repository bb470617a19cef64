package route

import (
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	// FirstMost is how many tables FirstRoutes reads in one go. The kernel keeps an answer of 9 KiB for each of them
	// until it is read.
	FirstMost = 32

	// firstReads is how many answers with routes FirstRoutes reads. Each has tens of routes.
	firstReads = 16
)

// FirstRoutes returns the first thousand or so of the routes of a table, and those of the empty tables behind it, in the
// order of their numbers: count tables at most, or fewer if one of them has routes. It does not read the other routes of
// a large table. All these dumps cost one request. A route that names a nexthop object may have no link here.
func (c *Conn) FirstRoutes(family int, table uint32, count int) (tables [][]Route, err error) {
	const tries = 2
	for range tries {
		tables, err = c.firstOnce(family, table, min(count, FirstMost))
		if len(tables) > 0 || err != nil && !isPassing(err) {
			break
		}
		count = 1
	}
	if len(tables) == 0 {
		return nil, fmt.Errorf("list routes of table %d: %w", table, err)
	}
	return tables, nil
}

// first is a socket of FirstRoutes.
type first struct {
	socket *nl.NetlinkSocket
	buf    []byte
}

func openFirst() (*first, error) {
	s, err := readingSocket()
	if err != nil {
		return nil, err
	}
	// As large as a process without capabilities may have it. With less room FirstRoutes returns fewer tables.
	_ = s.SetReceiveBufferSize(FirstMost*9<<10, false)
	// The kernel makes its answers as large as a page, and larger ones for a reader with a larger buffer.
	return &first{s, make([]byte, min(os.Getpagesize(), 1<<13))}, nil
}

func (c *Conn) firstOnce(family int, table uint32, count int) (tables [][]Route, err error) {
	if c.first == nil {
		if c.first, err = openFirst(); err != nil {
			return nil, err
		}
	}
	seq := c.requests + 1
	c.requests += uint32(count)
	var b []byte
	for i := range count {
		body := filter{table: table + uint32(i)}.request(family)
		b = native.AppendUint32(b, uint32(unix.SizeofNlMsghdr+len(body)))
		b = native.AppendUint16(b, unix.RTM_GETROUTE)
		b = native.AppendUint16(b, unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
		b = native.AppendUint32(b, seq+uint32(i))
		b = append(native.AppendUint32(b, 0), body...)
	}
	if err = unix.Sendto(c.first.socket.GetFd(), b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err == nil {
		tables, err = c.first.read(family, table, seq, count)
	}
	for _, routes := range tables {
		c.read += len(routes)
	}
	if len(tables) < count || err != nil { // the rest would be in the way of the next dump
		c.first.socket.Close()
		c.first = nil
	}
	return tables, err
}

// read returns the routes of the tables whose dumps, numbered from seq on, are finished, and of one that is large. The
// kernel makes the first answer of each dump before the request returns, and another one whenever the last one was
// read. It refuses the dumps behind one that is not finished by then.
func (f *first) read(family int, table, seq uint32, count int) (tables [][]Route, err error) {
	var routes []Route // of the table whose dump is being read
	answers := 0       // of that dump
	refused := count
	for len(tables) < refused {
		if answers > firstReads {
			return append(tables, routes), errLarge
		}
		n, from, err := unix.Recvfrom(f.socket.GetFd(), f.buf, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
		switch {
		case err != nil:
			return tables, err
		case n > len(f.buf):
			return tables, errMalformed
		case !isKernel(from):
			continue
		}
		got := len(routes)
		err = eachMessage(f.buf[:n], func(m message) error {
			i := int(m.seq - seq)
			switch {
			case m.seq < seq || i >= count:
			case m.typ == unix.NLMSG_ERROR && m.errno() == unix.EBUSY:
				refused = min(refused, i)
			case i != len(tables): // of a dump that was refused
			case m.typ == unix.NLMSG_DONE, m.typ == unix.NLMSG_ERROR:
				if errno := m.errno(); errno != 0 && errno != unix.ENOENT && errno != unix.EAFNOSUPPORT {
					return errno
				}
				tables, routes = append(tables, routes), nil // ENOENT: there is no such table
			case m.typ == unix.RTM_NEWROUTE:
				r, cloned, err := parseRoute(m.body)
				if err != nil {
					return err
				}
				if !cloned && r.Family == family && r.Expires >= 0 && r.Table == table+uint32(i) { // old kernels do not filter
					routes = append(routes, r)
				}
			}
			return nil
		})
		if err != nil {
			return tables, err
		}
		if len(routes) > got {
			answers++
		}
	}
	return tables, nil
}

// errLarge says that a table has more routes than FirstRoutes reads.
var errLarge = errors.New("the table is large")

// message is a netlink message.
type message struct {
	typ  uint16
	seq  uint32
	body []byte
}

// errno is the error of an NLMSG_ERROR or NLMSG_DONE.
func (m message) errno() unix.Errno { return unix.Errno(-int32(uint32Of(m.body))) }

// eachMessage calls do for each netlink message in b, until that returns an error.
func eachMessage(b []byte, do func(message) error) error {
	for len(b) > 0 {
		if len(b) < unix.SizeofNlMsghdr {
			return errMalformed
		}
		n := int64(native.Uint32(b)) // an int of 32 bits cannot hold it
		if n < unix.SizeofNlMsghdr || n > int64(len(b)) {
			return errMalformed
		}
		if err := do(message{native.Uint16(b[4:]), native.Uint32(b[8:]), b[unix.SizeofNlMsghdr:n]}); err != nil {
			return err
		}
		b = b[min(align(int(n)), len(b)):]
	}
	return nil
}
