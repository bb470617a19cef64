package route

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// Socket is a TCP or UDP socket of this network namespace, as the kernel lists it (sock_diag).
type Socket struct {
	Protocol uint8
	Local    netip.AddrPort
	Remote   netip.AddrPort // its address is unspecified where the socket is not connected
	Device   int            // ifindex of the link that the socket is bound to; 0: none
	Mark     uint32         // 0 also without CAP_NET_ADMIN
	UID      uint32
	Inode    uint32
	id       [48]byte // struct inet_diag_sockid of linux/inet_diag.h
	domain   uint8
}

// Connected reports whether the socket has a far end.
func (s Socket) Connected() bool { return s.Remote.Port() != 0 }

// Question is about what the socket sends to its far end.
func (s Socket) Question() Question {
	q := Question{Dst: s.Remote.Addr(), Src: s.Local.Addr(), Oif: s.Device, Mark: s.Mark, UID: s.UID, IPProto: s.Protocol, Sport: s.Local.Port(), Dport: s.Remote.Port()}
	if q.Src.IsUnspecified() {
		q.Src = netip.Addr{}
	}
	return q
}

// Sockets lists all TCP and UDP sockets.
func Sockets() (all []Socket, err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, fmt.Errorf("list sockets: %w", err)
	}
	defer unix.Close(fd)
	for _, protocol := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		some, err := socketsIn(fd, protocol, anyState)
		if err != nil {
			return nil, err
		}
		all = append(all, some...)
	}
	return all, nil
}

// States of TCP, a bit for each.
const (
	anyState = ^uint32(0)
	inUse    = 1<<1 | 1<<2 | 1<<4 | 1<<5 | 1<<8 // established, SYN sent, FIN wait 1 and 2, close wait: a program may have the socket
)

// socketsIn lists the sockets of both families: those of IPv6 may have addresses of IPv4.
func socketsIn(fd int, protocol uint8, states uint32) (all []Socket, err error) {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		some, err := socketsOf(fd, family, protocol, states)
		if err != nil {
			return nil, fmt.Errorf("list sockets: %w", err)
		}
		all = append(all, some...)
	}
	return all, nil
}

func socketsOf(fd, family int, protocol uint8, states uint32) (all []Socket, err error) {
	req := socketRequest(unix.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP, states, Socket{domain: uint8(family), Protocol: protocol})
	if err := unix.Sendto(fd, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	buf := make([]byte, 64<<10)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			return nil, err
		}
		messages, err := syscall.ParseNetlinkMessage(buf[:n])
		if err != nil {
			return nil, err
		}
		for _, m := range messages {
			switch {
			case m.Header.Type == unix.NLMSG_DONE:
				return all, nil
			case m.Header.Type == unix.NLMSG_ERROR && len(m.Data) >= 4:
				errno := syscall.Errno(-int32(binary.NativeEndian.Uint32(m.Data)))
				if errno == unix.ENOENT {
					return nil, nil // the kernel has no such module, and so no such sockets
				}
				return nil, errno
			}
			if s, ok := parseSocket(m.Data, protocol); ok {
				all = append(all, s)
			}
		}
	}
}

// socketRequest is a message with a struct inet_diag_req_v2 of linux/inet_diag.h.
func socketRequest(typ, flags uint16, states uint32, s Socket) []byte {
	const length = unix.SizeofNlMsghdr + 8 + len(s.id)
	req := binary.NativeEndian.AppendUint32(nil, uint32(length))
	req = binary.NativeEndian.AppendUint16(req, typ)
	req = binary.NativeEndian.AppendUint16(req, unix.NLM_F_REQUEST|flags)
	req = append(req, make([]byte, 8)...) // sequence, port
	req = append(req, s.domain, s.Protocol, 0, 0)
	req = binary.NativeEndian.AppendUint32(req, states)
	return append(req, s.id[:]...)
}

// ResetSockets cuts the TCP connections of programs for which which reports true: reads and writes of the program fail
// with ECONNABORTED. The kernel does it for whoever may administer the network, if it has CONFIG_INET_DIAG_DESTROY. The error
// is the first one, with the number of those that stay.
func ResetSockets(which func(Socket) bool) (count int, err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return 0, fmt.Errorf("reset connections: %w", err)
	}
	defer unix.Close(fd)
	all, err := socketsIn(fd, unix.IPPROTO_TCP, inUse)
	if err != nil {
		return 0, err
	}
	all = slices.DeleteFunc(all, func(s Socket) bool { return s.Inode == 0 || !s.Connected() || !which(s) })
	stay := 0
	for i, s := range all {
		resetErr := s.reset(fd)
		switch {
		case resetErr == nil:
			count++
			continue
		case errors.Is(resetErr, unix.ENOENT): // it has ended meanwhile
			continue
		case errors.Is(resetErr, unix.EOPNOTSUPP):
			return count, fmt.Errorf("the kernel has no CONFIG_INET_DIAG_DESTROY, so that %d connections stay: %w", len(all)-i, resetErr)
		}
		if stay++; err == nil {
			err = fmt.Errorf("reset the connection from %s to %s: %w", s.Local, s.Remote, resetErr)
		}
	}
	if stay > 1 {
		err = fmt.Errorf("%d connections stay; the first: %w", stay, err)
	}
	return count, err
}

// Reset cuts the connection of one socket, which SO_DOMAIN, SO_PROTOCOL and SO_COOKIE describe, like ResetSockets.
func Reset(domain, protocol int, local, remote netip.AddrPort, cookie uint64) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	s := Socket{Protocol: uint8(protocol), domain: uint8(domain)}
	id := binary.BigEndian.AppendUint16(nil, local.Port())
	id = binary.BigEndian.AppendUint16(id, remote.Port())
	for _, a := range []netip.Addr{local.Addr(), remote.Addr()} {
		var wide [16]byte
		if domain == unix.AF_INET6 {
			wide = a.As16()
		} else {
			copy(wide[:], a.AsSlice())
		}
		id = append(id, wide[:]...)
	}
	id = binary.NativeEndian.AppendUint32(id, 0) // any interface
	s.id = [48]byte(binary.NativeEndian.AppendUint64(id, cookie))
	return s.reset(fd)
}

// reset has the kernel end the connection of a socket. The cookie in its id says that it is still this one.
func (s Socket) reset(fd int) error {
	const sockDestroy = 21 // SOCK_DESTROY of linux/sock_diag.h
	if err := unix.Sendto(fd, socketRequest(sockDestroy, unix.NLM_F_ACK, anyState, s), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	answer := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, answer, 0)
	if err != nil {
		return err
	}
	if n < unix.SizeofNlMsghdr+4 || binary.NativeEndian.Uint16(answer[4:]) != unix.NLMSG_ERROR {
		return errors.New("unexpected answer of the kernel")
	}
	if errno := int32(binary.NativeEndian.Uint32(answer[unix.SizeofNlMsghdr:])); errno != 0 {
		return syscall.Errno(-errno)
	}
	return nil
}

// parseSocket reads a struct inet_diag_msg and its attributes.
func parseSocket(b []byte, protocol uint8) (s Socket, ok bool) {
	const header, mark = 72, 15 // INET_DIAG_MARK
	if len(b) < header {
		return s, false
	}
	addr := func(at int) netip.Addr {
		if b[0] == unix.AF_INET {
			return netip.AddrFrom4([4]byte(b[at : at+4]))
		}
		return netip.AddrFrom16([16]byte(b[at : at+16])).Unmap()
	}
	s = Socket{
		Protocol: protocol,
		Local:    netip.AddrPortFrom(addr(8), binary.BigEndian.Uint16(b[4:])),
		Remote:   netip.AddrPortFrom(addr(24), binary.BigEndian.Uint16(b[6:])),
		Device:   int(binary.NativeEndian.Uint32(b[40:])),
		UID:      binary.NativeEndian.Uint32(b[64:]),
		Inode:    binary.NativeEndian.Uint32(b[68:]),
		id:       [48]byte(b[4:]),
		domain:   b[0],
	}
	for rest := b[header:]; len(rest) >= 4; {
		length, typ := int(binary.NativeEndian.Uint16(rest)), binary.NativeEndian.Uint16(rest[2:])
		if length < 4 || length > len(rest) {
			return s, false
		}
		if typ == mark && length >= 8 {
			s.Mark = binary.NativeEndian.Uint32(rest[4:])
		}
		rest = rest[min((length+3)&^3, len(rest)):]
	}
	return s, true
}
