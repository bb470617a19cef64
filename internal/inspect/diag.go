package inspect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
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
}

// Connected reports whether the socket has a far end.
func (s Socket) Connected() bool { return s.Remote.Port() != 0 }

// Packet is what the socket sends to its far end.
func (s Socket) Packet() Packet {
	q := route.Question{Dst: s.Remote.Addr(), Src: s.Local.Addr(), Oif: s.Device, Mark: s.Mark, UID: s.UID, IPProto: s.Protocol, Sport: s.Local.Port(), Dport: s.Remote.Port()}
	if q.Src.IsUnspecified() {
		q.Src = netip.Addr{}
	}
	return Packet{Question: q}
}

// Sockets lists all TCP and UDP sockets.
func Sockets() (all []Socket, err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, fmt.Errorf("list sockets: %w", err)
	}
	defer unix.Close(fd)
	for _, family := range families {
		for _, protocol := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
			some, err := socketsOf(fd, family, protocol)
			if errors.Is(err, unix.ENOENT) {
				continue // the kernel has no such module, and so no such sockets
			}
			if err != nil {
				return nil, fmt.Errorf("list sockets: %w", err)
			}
			all = append(all, some...)
		}
	}
	return all, nil
}

func socketsOf(fd, family int, protocol uint8) (all []Socket, err error) {
	const length = unix.SizeofNlMsghdr + 8 + 48 // struct inet_diag_req_v2 of linux/inet_diag.h
	req := binary.NativeEndian.AppendUint32(nil, length)
	req = binary.NativeEndian.AppendUint16(req, unix.SOCK_DIAG_BY_FAMILY)
	req = binary.NativeEndian.AppendUint16(req, unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	req = append(req, make([]byte, 8)...) // sequence, port
	req = append(req, byte(family), protocol, 0, 0)
	req = binary.NativeEndian.AppendUint32(req, ^uint32(0)) // in any state
	req = append(req, make([]byte, length-len(req))...)
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
				return nil, syscall.Errno(-int32(binary.NativeEndian.Uint32(m.Data)))
			}
			if s, ok := parseSocket(m.Data, protocol); ok {
				all = append(all, s)
			}
		}
	}
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

// SocketsOf lists the sockets of a process that have a far end.
func SocketsOf(pid int) (own []Socket, err error) {
	if _, err := UserOf(pid); err != nil { // it checks the namespace, too
		return nil, err
	}
	all, err := Sockets()
	if err != nil {
		return nil, err
	}
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", pid, err)
	}
	for _, e := range entries {
		var inode uint32
		text, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil || !strings.HasPrefix(text, "socket:[") {
			continue // it was closed meanwhile, or is no socket
		}
		if _, err := fmt.Sscanf(text, "socket:[%d]", &inode); err != nil {
			continue
		}
		at := slices.IndexFunc(all, func(s Socket) bool { return s.Inode == inode })
		if at >= 0 && all[at].Connected() && !slices.Contains(own, all[at]) {
			own = append(own, all[at])
		}
	}
	return own, nil
}

// ErrNoSocket says that there is no such socket.
var ErrNoSocket = errors.New("no TCP or UDP socket of this network namespace has these ends (see ss -tun)")

// SocketOf finds the socket with two ends.
func SocketOf(local, remote netip.AddrPort) (Socket, error) {
	all, err := Sockets()
	if err != nil {
		return Socket{}, err
	}
	same := func(a, b netip.AddrPort) bool {
		return a.Port() == b.Port() && a.Addr().WithZone("") == b.Addr().WithZone("")
	}
	at := slices.IndexFunc(all, func(s Socket) bool { return same(s.Local, local) && same(s.Remote, remote) })
	if at < 0 {
		return Socket{}, fmt.Errorf("%s-%s: %w", local, remote, ErrNoSocket)
	}
	return all[at], nil
}
