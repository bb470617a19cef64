package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
)

// OverflowID returns the uid that the kernel reports for all users whom this user namespace does not map.
// It stands for many users, so it is never trusted.
var OverflowID = sync.OnceValue(func() uint32 {
	text, err := os.ReadFile("/proc/sys/kernel/overflowuid")
	if err == nil {
		if id, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 32); err == nil {
			return uint32(id)
		}
	}
	return 65534 // DEFAULT_OVERFLOWUID of the kernel
})

// Owner is the owner of a socket.
type Owner struct {
	UID     uint32
	PID     int    // 0 if no process with the socket can be seen
	Command string // its name, if PID is known
}

func (o Owner) String() string {
	if o.PID == 0 {
		return fmt.Sprintf("uid %d", o.UID)
	}
	return fmt.Sprintf("pid %d (%s) of uid %d", o.PID, quote(o.Command), o.UID)
}

// quote returns text from outside as it is if all of it prints and nothing in it can be mistaken, and else quoted.
func quote(text string) string {
	if quoted := strconv.Quote(text); quoted != `"`+text+`"` {
		return quoted
	}
	return text
}

// ErrNobody is FindOwner's answer for an address that no socket is bound to.
var ErrNobody = errors.New("no socket is bound to it")

// FindOwner returns the owner of the socket that is bound to addr. It asks the kernel's unix_diag.
func FindOwner(addr Addr) (Owner, error) {
	owners, err := FindOwners(addr)
	if err == nil && len(owners) == 0 {
		err = ErrNobody
	}
	if err != nil {
		return Owner{}, fmt.Errorf("owner of %s: %w", addr, err)
	}
	return owners[addr], nil
}

// FindOwners is FindOwner for many addresses, at the cost of one. Those that no socket is bound to are not among the
// owners.
func FindOwners(addrs ...Addr) (map[Addr]Owner, error) {
	byPath := make(map[string]Addr, len(addrs))
	for _, a := range addrs {
		byPath[string(a.path())] = a
	}
	owners, inodes := make(map[Addr]Owner), make(map[string]Addr)
	err := eachSocket(func(s socket) bool {
		if addr, ok := byPath[string(s.path)]; ok && s.datagram {
			owners[addr] = Owner{UID: s.uid}
			inodes[fmt.Sprintf("socket:[%d]", s.inode)] = addr
		}
		return len(owners) < len(byPath)
	})
	if err != nil {
		return nil, err
	}
	if outside.Listens(outside.Proc) != nil {
		return owners, nil // whose process is not known, as with a /proc that hides it
	}
	found, err := outside.Ask("the descriptors of all processes", scanLimit, func() (map[Addr]Owner, error) {
		found := make(map[Addr]Owner)
		findProcesses(inodes, func(addr Addr, pid int, command string) { found[addr] = Owner{PID: pid, Command: command} })
		return found, nil
	})
	if err != nil {
		return owners, nil // as above
	}
	for addr, owner := range found {
		owner.UID = owners[addr].UID
		owners[addr] = owner
	}
	return owners, nil
}

// scanLimit is long: a busy host has very many descriptors.
const scanLimit = 10 * time.Second

// PaddedNames lists the texts of all padded names that users who are trusted have bound in
// this network namespace.
func PaddedNames(trusted func(uid uint32) bool) ([]string, error) {
	var names []string
	err := eachSocket(func(s socket) bool {
		if s.datagram && len(s.path) == unix.SizeofSockaddrUnix-pathOffset && s.path[0] == 0 && trusted(s.uid) {
			names = append(names, string(bytes.TrimRight(s.path[1:], "\x00")))
		}
		return true
	})
	slices.Sort(names)
	return slices.Compact(names), err // a name has one socket, which eachSocket may have begun again with
}

// unixDiagReq is struct unix_diag_req, unixDiagMsg struct unix_diag_msg of
// linux/unix_diag.h.
type unixDiagReq struct {
	family, protocol    uint8
	_                   uint16
	states, inode, show uint32
	cookie              [2]uint32
}

type unixDiagMsg struct {
	family, kind, state, _ uint8
	inode                  uint32
	cookie                 [2]uint32
}

const (
	unixDiagName     = 0 // UNIX_DIAG_NAME
	unixDiagUID      = 7 // UNIX_DIAG_UID
	unixDiagShowName = 1 << unixDiagName
	unixDiagShowUID  = 1 << 6
)

// socket is a socket as unix_diag reports it.
type socket struct {
	path       []byte // sun_path; nil: not bound
	datagram   bool   // a name is taken for sockets of one type only
	inode, uid uint32
}

// eachSocket calls f for the sockets of this network namespace until it returns false. After an error that need not come
// back it begins again, with another socket: what is left of the answer would be taken for the next one.
func eachSocket(f func(socket) bool) error {
	return outside.Again(func() error { return eachSocketOnce(f) })
}

func eachSocketOnce(f func(socket) bool) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return fmt.Errorf("unix_diag: %w", err)
	}
	defer unix.Close(fd)
	const reqSize = unix.SizeofNlMsghdr + int(unsafe.Sizeof(unixDiagReq{}))
	req := make([]byte, 0, reqSize)
	req = binary.NativeEndian.AppendUint32(req, uint32(reqSize))
	req = binary.NativeEndian.AppendUint16(req, unix.SOCK_DIAG_BY_FAMILY)
	req = binary.NativeEndian.AppendUint16(req, unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	req = append(req, make([]byte, reqSize-len(req))...)
	*(*unixDiagReq)(unsafe.Pointer(&req[unix.SizeofNlMsghdr])) = unixDiagReq{
		family: unix.AF_UNIX,
		states: ^uint32(0),
		show:   unixDiagShowName | unixDiagShowUID,
	}
	if err := unix.Sendto(fd, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("unix_diag: %w", err)
	}
	buf := make([]byte, 16<<10) // the kernel fills what a reader has room for, up to 32 KiB
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			return fmt.Errorf("unix_diag: %w", err)
		}
		last, err := answers(buf[:n], f)
		if err != nil {
			return fmt.Errorf("unix_diag: %w", err)
		}
		if last {
			return nil
		}
	}
}

// answers calls f for the sockets in one datagram of unix_diag, and reports whether it was the last one or
// f wants no more.
func answers(datagram []byte, f func(socket) bool) (last bool, err error) {
	msgs, err := syscall.ParseNetlinkMessage(datagram)
	if err != nil {
		return false, err
	}
	for _, m := range msgs {
		switch m.Header.Type {
		case unix.NLMSG_DONE:
			return true, nil
		case unix.NLMSG_ERROR:
			if len(m.Data) >= 4 {
				if errno := -int32(binary.NativeEndian.Uint32(m.Data)); errno > 0 {
					return false, syscall.Errno(errno)
				}
			}
			return false, errors.New("the kernel refuses")
		}
		if s, ok := parseSocket(m.Data); ok && !f(s) {
			return true, nil
		}
	}
	return false, nil
}

func parseSocket(data []byte) (s socket, ok bool) {
	const header = 4
	if len(data) < int(unsafe.Sizeof(unixDiagMsg{})) {
		return s, false
	}
	msg := (*unixDiagMsg)(unsafe.Pointer(&data[0]))
	s.inode, s.datagram = msg.inode, msg.kind == unix.SOCK_DGRAM
	s.uid = OverflowID()
	for b := data[unsafe.Sizeof(unixDiagMsg{}):]; len(b) >= header; {
		size := int(binary.NativeEndian.Uint16(b))
		kind := binary.NativeEndian.Uint16(b[2:])
		if size < header || size > len(b) {
			break
		}
		switch value := b[header:size]; {
		case kind == unixDiagName:
			s.path = value
		case kind == unixDiagUID && len(value) == 4:
			s.uid = binary.NativeEndian.Uint32(value)
		}
		b = b[min(len(b), (size+3)&^3):]
	}
	return s, true
}

// findProcesses searches the descriptors of all processes that can be seen for sockets, by the text of their links,
// and calls found for each socket. systemd keeps the sockets that it passes to a service: it is the owner only if no
// other process is, which found hears of last.
func findProcesses(inodes map[string]Addr, found func(addr Addr, pid int, command string)) {
	const passes = "systemd"
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return
	}
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil {
			continue
		}
		fds, err := os.ReadDir("/proc/" + p.Name() + "/fd")
		if err != nil {
			continue // not permitted, or the process has ended
		}
		for _, fd := range fds {
			link, err := os.Readlink("/proc/" + p.Name() + "/fd/" + fd.Name())
			addr, ok := inodes[link]
			if err != nil || !ok {
				continue
			}
			comm, err := os.ReadFile("/proc/" + p.Name() + "/comm")
			if err != nil {
				comm = []byte("?")
			}
			command := strings.TrimSpace(string(comm))
			found(addr, pid, command)
			if command == passes {
				continue
			}
			if delete(inodes, link); len(inodes) == 0 {
				return
			}
		}
	}
}
