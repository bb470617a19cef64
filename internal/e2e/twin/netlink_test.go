package twin

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// This file speaks rtnetlink by itself: what the product's own package for it misreads, the test
// must not misread in the same way.

var native = binary.NativeEndian

// socket is an rtnetlink socket of one network namespace. It is for one goroutine at a time.
type socket struct {
	fd  int
	seq uint32
	buf []byte
}

// message is a netlink message without its header.
type message struct {
	typ  uint16
	body []byte
}

// dial opens a socket in a namespace that hears of the given multicast groups.
func dial(ns *nettest.Namespace, groups ...int) (*socket, error) {
	s := &socket{buf: make([]byte, 1<<16)}
	var err error
	ns.Do(func() {
		s.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	})
	if err != nil {
		return nil, fmt.Errorf("open rtnetlink socket: %w", err)
	}
	if err := unix.Bind(s.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		s.close()
		return nil, fmt.Errorf("bind rtnetlink socket: %w", err)
	}
	for _, group := range groups {
		if err := unix.SetsockoptInt(s.fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group); err != nil {
			s.close()
			return nil, fmt.Errorf("join rtnetlink group %d: %w", group, err)
		}
	}
	return s, nil
}

func (s *socket) close() { _ = unix.Close(s.fd) } // nothing is buffered in it

func (s *socket) send(typ, flags uint16, body []byte) error {
	s.seq++
	b := make([]byte, 0, unix.SizeofNlMsghdr+len(body))
	b = native.AppendUint32(b, uint32(unix.SizeofNlMsghdr+len(body)))
	b = native.AppendUint16(b, typ)
	b = native.AppendUint16(b, unix.NLM_F_REQUEST|flags)
	b = native.AppendUint32(b, s.seq)
	b = native.AppendUint32(b, 0)
	b = append(b, body...)
	return unix.Sendto(s.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
}

// errInterrupted says that the objects changed while they were dumped.
var errInterrupted = errors.New("dump interrupted by a change")

// receive reads the answers to the request that was sent last, and reports whether they were the
// last ones.
func (s *socket) receive(each func(message)) (done bool, err error) {
	n, _, err := unix.Recvfrom(s.fd, s.buf, 0)
	if err != nil {
		return false, err
	}
	interrupted := false
	for b := s.buf[:n]; len(b) >= unix.SizeofNlMsghdr; {
		size := int(native.Uint32(b))
		typ, flags, seq := native.Uint16(b[4:]), native.Uint16(b[6:]), native.Uint32(b[8:])
		body := b[unix.SizeofNlMsghdr:size]
		b = b[min(align(size), len(b)):]
		if seq != s.seq {
			continue
		}
		interrupted = interrupted || flags&unix.NLM_F_DUMP_INTR != 0
		switch typ {
		case unix.NLMSG_DONE:
			done = true
		case unix.NLMSG_ERROR:
			if errno := int32(native.Uint32(body)); errno != 0 {
				return true, unix.Errno(-errno)
			}
			return true, nil
		default:
			each(message{typ, append([]byte(nil), body...)})
			done = done || flags&unix.NLM_F_MULTI == 0
		}
	}
	if interrupted {
		return done, errInterrupted
	}
	return done, nil
}

// ask sends a request that has one answer.
func (s *socket) ask(typ uint16, body []byte) (answer message, err error) {
	if err := s.send(typ, 0, body); err != nil {
		return message{}, err
	}
	for done := false; !done; {
		if done, err = s.receive(func(m message) { answer = m }); err != nil {
			return message{}, err
		}
	}
	return answer, nil
}

// change sends a request that changes something.
func (s *socket) change(typ, flags uint16, body []byte) error {
	if err := s.send(typ, flags|unix.NLM_F_ACK, body); err != nil {
		return err
	}
	for {
		if done, err := s.receive(func(message) {}); done || err != nil {
			return err
		}
	}
}

// dump reads all objects of a kind. One that was interrupted is begun again.
func (s *socket) dump(typ uint16, body []byte) ([]message, error) {
	for {
		var all []message
		interrupted := false
		if err := s.send(typ, unix.NLM_F_DUMP, body); err != nil {
			return nil, err
		}
		for done := false; !done; {
			var err error
			done, err = s.receive(func(m message) { all = append(all, m) })
			if errors.Is(err, errInterrupted) {
				interrupted = true
			} else if err != nil {
				return nil, err
			}
		}
		if !interrupted {
			return all, nil
		}
		runtime.Gosched()
	}
}

func align(n int) int { return (n + 3) &^ 3 }

// attribute appends an attribute to a message.
func attribute(b []byte, typ uint16, value []byte) []byte {
	b = native.AppendUint16(b, uint16(unix.SizeofRtAttr+len(value)))
	b = native.AppendUint16(b, typ)
	b = append(b, value...)
	return append(b, make([]byte, align(len(b))-len(b))...)
}

func attribute32(b []byte, typ uint16, value uint32) []byte {
	return attribute(b, typ, native.AppendUint32(nil, value))
}

// attributes calls each for the attributes in b.
func attributes(b []byte, each func(typ uint16, value []byte)) {
	for len(b) >= unix.SizeofRtAttr {
		n := int(native.Uint16(b))
		if n < unix.SizeofRtAttr || n > len(b) {
			return
		}
		each(native.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofRtAttr:n])
		b = b[min(align(n), len(b)):]
	}
}

func addrOf(value []byte) netip.Addr {
	addr, _ := netip.AddrFromSlice(value) // of another length there is none
	return addr
}

func uint32Of(value []byte) uint32 {
	if len(value) < 4 {
		return 0
	}
	return native.Uint32(value)
}

// anyOf is 0.0.0.0 or ::.
func anyOf(family int) netip.Addr {
	if family == unix.AF_INET {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
