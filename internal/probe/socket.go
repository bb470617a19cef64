package probe

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// What a packet has before its payload, in bytes.
func ipHeader(a netip.Addr) int {
	if a.Is4() {
		return 20
	}
	return 40
}

const (
	udpHeader = 8
	tcpHeader = 20
	tcpOpen   = 60 // of a segment that opens a connection, with its options
)

// ErrUnable says that this process may not have the socket to ask by, so that nothing has left: ping sockets are for the groups of
// net.ipv4.ping_group_range only, which is nobody unless somebody sets it.
var ErrUnable = errors.New("this process cannot ask")

// dial connects a socket that is bound to the address and to the link of an uplink. With the address alone the packets
// could leave by a tunnel, or by another uplink where the table of this one is empty. Its deadline is that of ctx.
func dial(ctx context.Context, u Uplink, kind, protocol int, to netip.AddrPort) (*os.File, error) {
	domain := unix.AF_INET6
	if u.Address.Is4() {
		domain = unix.AF_INET
	}
	fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return nil, unasked(os.NewSyscallError("socket", err))
	}
	err = os.NewSyscallError("bind to the link", unix.SetsockoptString(fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE, u.Ifname))
	if err == nil {
		err = os.NewSyscallError("bind to the address", unix.Bind(fd, sockaddr(netip.AddrPortFrom(u.Address, 0))))
	}
	if err == nil {
		err = os.NewSyscallError("connect", unix.Connect(fd, sockaddr(to)))
	}
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		unix.Close(fd)
		if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EADDRNOTAVAIL) { // its link is renamed, or its address renewed
			err = unasked(err)
		}
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "probe")
	if deadline, ok := ctx.Deadline(); ok {
		err = f.SetDeadline(deadline)
	}
	return f, err
}

// unasked says why nothing could be asked: this process may not, or files or memory ran out, which passes.
func unasked(err error) error {
	why := errNotAsked
	if slices.ContainsFunc([]error{unix.EACCES, unix.EPERM, unix.EAFNOSUPPORT, unix.EPROTONOSUPPORT, unix.EOPNOTSUPP}, func(o error) bool { return errors.Is(err, o) }) {
		why = ErrUnable
	}
	return fmt.Errorf("%w: %w", why, err)
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

// neverCut has the packets of a socket never cut into pieces.
func neverCut(f *os.File, to netip.Addr) error {
	level, option, value := unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO
	if to.Is4() {
		level, option, value = unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if ctlErr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, option, value) }); ctlErr != nil {
		return ctlErr
	}
	return os.NewSyscallError("forbid to cut packets", err)
}

// interrupt ends what waits on a socket when ctx ends, until stop is called.
func interrupt(ctx context.Context, f *os.File) (stop func() bool) {
	return context.AfterFunc(ctx, func() { _ = f.SetDeadline(time.Unix(1, 0)) }) // a closed one waits for nothing
}

// exchange sends a datagram and waits for one that is the answer.
func exchange(ctx context.Context, u Uplink, kind, protocol int, to netip.AddrPort, question []byte, isAnswer func([]byte) bool) (bytes int, err error) {
	f, err := dial(ctx, u, kind, protocol, to)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	header := ipHeader(u.Address)
	if protocol == 0 {
		header += udpHeader
	}
	return converse(ctx, f, header, question, isAnswer)
}

// converse sends a datagram by a socket, and waits for one that is the answer. Datagrams have a header beside their bytes. An
// answer that came while the process stood still, and the time ran out, counts.
func converse(ctx context.Context, f *os.File, header int, question []byte, isAnswer func([]byte) bool) (bytes int, err error) {
	defer interrupt(ctx, f)()
	if _, err := f.Write(question); err != nil {
		return 0, err
	}
	bytes = header + len(question)
	buf := make([]byte, 1500)
	for {
		n, err := f.Read(buf)
		late := errors.Is(err, os.ErrDeadlineExceeded)
		if late {
			n = arrived(f, buf)
		}
		if err != nil && n == 0 {
			return bytes, err
		}
		bytes += header + n
		if isAnswer(buf[:n]) {
			return bytes, nil
		}
		if late {
			return bytes, err
		}
	}
}

// arrived reads a datagram that is there. It returns 0 if there is none.
func arrived(f *os.File, buf []byte) (n int) {
	if raw, err := f.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { // an error is that of a closed file, from which nothing is read
			if n, _, err = unix.Recvfrom(int(fd), buf, unix.MSG_DONTWAIT); err != nil {
				n = 0
			}
		})
	}
	return n
}

// open waits until a TCP connection stands. Closing it resets it, so that nothing lingers at either end.
func open(ctx context.Context, u Uplink, to netip.AddrPort) (*os.File, error) {
	f, err := dial(ctx, u, unix.SOCK_STREAM, unix.IPPROTO_TCP, to)
	if err != nil {
		return nil, err
	}
	raw, err := f.SyscallConn()
	if err == nil {
		stop := interrupt(ctx, f)
		err = connected(raw)
		stop()
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// connected waits for the end of a socket's connect. One that ended while the process stood still, and the time ran out, counts.
func connected(raw syscall.RawConn) (err error) {
	ended := func(fd uintptr) bool {
		code, e := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if e == nil && code != 0 {
			e = unix.Errno(code)
		}
		if e == nil {
			if _, e = unix.Getpeername(int(fd)); errors.Is(e, unix.ENOTCONN) {
				return false
			}
		}
		if e == nil {
			e = unix.SetsockoptLinger(int(fd), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		}
		err = e
		return true
	}
	waitErr := raw.Write(ended) // until it can be written to
	if errors.Is(waitErr, os.ErrDeadlineExceeded) {
		late := false
		if ctlErr := raw.Control(func(fd uintptr) { late = ended(fd) }); ctlErr == nil && late {
			return err
		}
	}
	return errors.Join(waitErr, err)
}
