package inspect

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
)

// connection is what the kernel does with a UDP socket that is connected, which sends nothing.
type connection struct {
	src   netip.Addr
	sport uint16
	mtu   int
	err   error // of connect
}

// errCannotAsk says that this user may not make such a socket.
var errCannotAsk = errors.New("this user may not make such a socket")

// errInUse says that another socket has the port.
var errInUse = cannotAsk("another socket has this source port")

// cannotAsk is an errCannotAsk with a reason of its own.
type cannotAsk string

func (c cannotAsk) Error() string { return string(c) }

func (cannotAsk) Is(err error) bool { return err == errCannotAsk }

// errBound says that sockets of this process get the mark of the link that it is bound to.
var errBound = cannotAsk("this process is bound to a link, and --pid asks as a process does")

// connect asks as a socket does.
func connect(q route.Question) (c connection, err error) {
	fd, err := socketOf(q)
	if err != nil {
		return c, err
	}
	defer unix.Close(fd)
	const discard = 9
	port := int(q.Dport)
	if port == 0 {
		port = discard
	}
	if err := unix.Connect(fd, sockaddr(q.Dst, port)); err != nil {
		c.err = fmt.Errorf("connect a socket to %s: %w", q.Dst, err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		return c, err
	}
	switch a := name.(type) {
	case *unix.SockaddrInet4:
		c.src, c.sport = netip.AddrFrom4(a.Addr), uint16(a.Port)
	case *unix.SockaddrInet6:
		c.src, c.sport = netip.AddrFrom16(a.Addr), uint16(a.Port)
	}
	if c.src.IsUnspecified() {
		c.src = netip.Addr{}
	}
	level, mtu := unix.IPPROTO_IP, unix.IP_MTU
	if q.Dst.Is6() {
		level, mtu = unix.IPPROTO_IPV6, unix.IPV6_MTU
	}
	if c.err == nil {
		c.mtu, err = unix.GetsockoptInt(fd, level, mtu)
	}
	return c, err
}

// socketOf makes the socket: with its owner, mark, device, TOS and address.
func socketOf(q route.Question) (fd int, err error) {
	// The owner of a socket is the user of the thread, for files, that makes it.
	if self := unix.Geteuid(); int(q.UID) != self {
		if self != 0 {
			return -1, errCannotAsk
		}
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		_, _, _ = syscall.RawSyscall(unix.SYS_SETFSUID, uintptr(q.UID), 0, 0) // returns no error, and root may
		defer syscall.RawSyscall(unix.SYS_SETFSUID, uintptr(self), 0, 0)
	}
	fd, err = unix.Socket(q.Family(), unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	level, tos := unix.IPPROTO_IP, unix.IP_TOS
	if q.Dst.Is6() {
		level, tos = unix.IPPROTO_IPV6, unix.IPV6_TCLASS
	}
	var errs []error
	if q.Mark != 0 {
		errs = append(errs, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(q.Mark)))
	}
	if q.Oif != 0 {
		errs = append(errs, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, q.Oif))
	}
	errs = append(errs, unix.SetsockoptInt(fd, level, tos, int(q.TOS)), unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BROADCAST, 1))
	if q.Src.IsValid() || q.Sport != 0 {
		src := q.Src
		if !src.IsValid() {
			src = netip.IPv6Unspecified()
			if q.Dst.Is4() {
				src = netip.IPv4Unspecified()
			}
		}
		errs = append(errs, unix.Bind(fd, sockaddr(src, int(q.Sport))))
	}
	if err := errors.Join(errs...); err != nil {
		unix.Close(fd)
		switch {
		case errors.Is(err, unix.EADDRINUSE):
			err = errInUse
		case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
			err = errCannotAsk
		}
		return -1, err
	}
	if mark, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK); err == nil && uint32(mark) != q.Mark {
		unix.Close(fd)
		return -1, errBound
	}
	return fd, nil
}

func sockaddr(a netip.Addr, port int) unix.Sockaddr {
	if a.Is4() {
		return &unix.SockaddrInet4{Addr: a.As4(), Port: port}
	}
	return &unix.SockaddrInet6{Addr: a.As16(), Port: port}
}

// UserOf returns the user whose sockets a process makes. The process has to be in the network namespace of the caller.
func UserOf(pid int) (uint32, error) {
	own, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		return 0, err
	}
	theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("process %d: %w", pid, unix.ESRCH)
	}
	if err != nil {
		return 0, fmt.Errorf("process %d: %w", pid, err)
	}
	if own != theirs {
		return 0, fmt.Errorf("process %d is in another network namespace: nsenter --net=/proc/%d/ns/net table-allocator-client explain", pid, pid)
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, fmt.Errorf("process %d: %w", pid, err)
	}
	var uid [4]uint32 // real, effective, saved, for files
	_, rest, _ := strings.Cut(string(text), "\nUid:")
	if _, err := fmt.Sscan(rest, &uid[0], &uid[1], &uid[2], &uid[3]); err != nil {
		return 0, fmt.Errorf("process %d: read its users: %w", pid, err)
	}
	return uid[3], nil
}
