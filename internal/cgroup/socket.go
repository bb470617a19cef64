package cgroup

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
)

// A Socket is an IPv4 or IPv6 socket of a process, and what became of it.
type Socket struct {
	FD            int
	Kind          string // tcp, udp, ...
	Local, Remote netip.AddrPort
	Done          string // "bound", "left alone: connected"

	fd int // of the same socket, ours
}

// look fills in what the socket is and reports whether it is one of the internet's.
func (s *Socket) look() bool {
	domain, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil || domain != unix.AF_INET && domain != unix.AF_INET6 {
		return false
	}
	typ, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return false
	}
	protocol, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if err != nil {
		return false
	}
	names := map[int]string{
		unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_MPTCP: "mptcp", unix.IPPROTO_SCTP: "sctp",
		unix.IPPROTO_ICMP: "icmp", unix.IPPROTO_ICMPV6: "icmp6", unix.IPPROTO_UDPLITE: "udplite",
	}
	if s.Kind = names[protocol]; s.Kind == "" {
		s.Kind = fmt.Sprintf("protocol %d", protocol)
	}
	if typ == unix.SOCK_RAW {
		s.Kind = "raw " + s.Kind
	}
	local, _ := unix.Getsockname(s.fd) // an address that it has not is the zero one
	remote, _ := unix.Getpeername(s.fd)
	s.Local, s.Remote = addrPort(local), addrPort(remote)
	return true
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

// connected reports whether a mark must not change any more: packets of a connection would leave another uplink with
// the source address of this one.
func (s *Socket) connected() bool {
	if s.Remote.IsValid() {
		return true
	}
	const closed, listens = 7, 10 // TCP_CLOSE, TCP_LISTEN
	info, err := unix.GetsockoptTCPInfo(s.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	return err == nil && info.State != closed && info.State != listens // or will be soon
}

// chosen says what the program has chosen for a socket, so that it goes on by another uplink; "" if nothing. own are
// addresses of the link that it is to be bound to.
func (s *Socket) chosen(own []netip.Addr) string {
	if v, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err == nil && v != 0 {
		return "listening"
	}
	if index, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX); err == nil && index != 0 {
		return "bound to a link"
	}
	a := s.Local.Addr()
	if a.IsValid() && !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast() && !slices.Contains(own, a) {
		return "bound to an address"
	}
	return ""
}

const leftAlone = "left alone: "

func (s *Socket) attach(m Mark, own []netip.Addr, reset bool) {
	why := s.chosen(own)
	switch {
	case s.connected() && s.Remote.Addr().IsLoopback():
		s.Done = leftAlone + "connected to this host"
	case s.connected() && reset:
		if err := s.reset(); err != nil {
			s.Done = leftAlone + "connected, and cannot be reset: " + err.Error()
			return
		}
		s.set("reset", m, m.Value) // it may be used again
	case s.connected():
		s.Done = leftAlone + "connected"
	case why != "":
		s.Done = leftAlone + why
	default:
		s.set("bound", m, m.Value)
	}
}

// detach frees the socket, whatever address or link it has: those lead to their own uplinks.
func (s *Socket) detach(m Mark) {
	if s.connected() {
		s.Done = leftAlone + "connected"
		return
	}
	s.set("free", m, m.out())
}

// set gives the socket our bits, and looks whether it has them. The programs of the cgroup that it was made in look at
// this, too, and let it pass for its length.
func (s *Socket) set(done string, m Mark, bits uint32) {
	s.Done = done
	now, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_MARK)
	if err == nil {
		value := binary.NativeEndian.AppendUint32(nil, uint32(now)&^m.Mask|bits)
		value = binary.NativeEndian.AppendUint32(value, passage)
		err = unix.SetsockoptString(s.fd, unix.SOL_SOCKET, unix.SO_MARK, string(value))
	}
	if err == nil {
		now, err = unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_MARK)
	}
	switch {
	case err != nil:
		s.Done = leftAlone + "set mark: " + err.Error()
	case uint32(now)&m.Mask != bits:
		s.Done = leftAlone + fmt.Sprintf("it keeps mark %#x", uint32(now)&m.Mask)
	}
}

// String returns the socket as a line: "fd 3 tcp 10.0.0.1:5 > 10.0.0.2:6 left alone: connected".
func (s Socket) String() string {
	local := "*"
	if a := s.Local; a.IsValid() && (a.Port() != 0 || !a.Addr().IsUnspecified()) {
		local = a.String()
	}
	if s.Remote.IsValid() {
		local += " > " + s.Remote.String()
	}
	return fmt.Sprintf("fd %d %s %s %s", s.FD, s.Kind, local, s.Done)
}

// reset cuts the connection: reads and writes of the program fail with ECONNABORTED, the peer gets a
// reset.
func (s *Socket) reset() error {
	protocol, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if err != nil {
		return err
	}
	domain, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return err
	}
	cookie, err := unix.GetsockoptUint64(s.fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		return err
	}
	return route.Reset(domain, protocol, s.Local, s.Remote, cookie)
}
