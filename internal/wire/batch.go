package wire

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
)

// batchSize datagrams are read or written with one system call.
const batchSize = 64

// credSpace is the size of one SCM_CREDENTIALS. The kernel writes that first, and closes descriptors that
// a peer sends along, since it finds no room for them. processSpace is the size of one SCM_PIDFD more.
var (
	credSpace    = unix.CmsgSpace(unix.SizeofUcred)
	processSpace = credSpace + unix.CmsgSpace(sizeofDescriptor)
)

const sizeofDescriptor = 4

type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
}

// batch is the memory of recvmmsg and sendmmsg.
type batch struct {
	headers []mmsghdr
	iovecs  []unix.Iovec
	names   []Addr
	data    []byte
	control []byte
	room    int // of control, for each datagram
	size    int
	used    int // headers that the kernel has written to
	out     []Datagram
}

func newBatch(n, size, room int) *batch {
	b := &batch{
		headers: make([]mmsghdr, n),
		iovecs:  make([]unix.Iovec, n),
		names:   make([]Addr, n),
		room:    room,
		size:    size,
		used:    n,
	}
	if size > 0 {
		b.out = make([]Datagram, n)
		b.data = make([]byte, n*size)
		b.control = make([]byte, n*room)
	}
	for i := range b.headers {
		h := &b.headers[i].hdr
		h.Name = &b.names[i].raw[0]
		h.Iov = &b.iovecs[i]
		h.SetIovlen(1)
		if size > 0 {
			b.iovecs[i].Base = &b.data[i*size]
			b.iovecs[i].SetLen(size)
			h.Control = &b.control[i*room]
		}
	}
	return b
}

// receive reads the datagrams that wait at a socket.
func (b *batch) receive(fd uintptr, flags int) (int, syscall.Errno) {
	for i := range b.headers[:b.used] { // the kernel wrote to these
		h := &b.headers[i].hdr
		h.Namelen = unix.SizeofSockaddrUnix
		h.SetControllen(b.room)
		h.Flags = 0
	}
	n, errno := b.call(unix.SYS_RECVMMSG, fd, len(b.headers), flags)
	b.used = min(max(n, 0)+1, len(b.headers))
	return n, errno
}

func (b *batch) fill(messages []Message) int {
	n := min(len(messages), len(b.headers))
	for i, m := range messages[:n] {
		b.names[i] = m.To
		b.headers[i].hdr.Namelen = m.To.len
		b.iovecs[i].Base = unsafe.SliceData(m.Data)
		b.iovecs[i].SetLen(len(m.Data))
	}
	return n
}

func (b *batch) call(trap, fd uintptr, n, flags int) (int, syscall.Errno) {
	for try := 1; ; try++ {
		done, _, errno := unix.Syscall6(trap, fd, uintptr(unsafe.Pointer(&b.headers[0])), uintptr(n), uintptr(flags), 0, 0)
		if errno == 0 || errno != unix.EINTR && (try == outside.Tries || !outside.Passes(errno)) {
			return int(done), errno
		}
	}
}

func (b *batch) datagrams(n int) []Datagram {
	for i := range n {
		h := &b.headers[i]
		length := min(int(h.len), b.size-1)
		name := &b.names[i]
		name.len = min(h.hdr.Namelen, unix.SizeofSockaddrUnix)
		clear(name.raw[name.len:]) // the rest of an earlier, longer name
		b.out[i] = Datagram{
			Data:      b.data[i*b.size : i*b.size+length],
			Truncated: h.hdr.Flags&unix.MSG_TRUNC != 0 || int(h.len) >= b.size,
			From:      *name,
			Cred:      b.cred(i),
		}
	}
	return b.out[:n]
}

// cred returns the sender of datagram i: its SCM_CREDENTIALS and, where there is room for it, its SCM_PIDFD. Without them
// the sender has the overflow uid: descriptors that it sent along may have taken the room. They are closed.
func (b *batch) cred(i int) Cred {
	cred := Cred{UID: OverflowID(), GID: OverflowID()}
	credible, known := false, b.room < processSpace
	room := b.control[i*b.room : (i+1)*b.room]
	room = room[:min(int(b.headers[i].hdr.Controllen), len(room))]
	for len(room) >= unix.CmsgLen(0) {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&room[0]))
		length := int(h.Len)
		if length < unix.CmsgLen(0) || length > len(room) {
			break
		}
		data := room[unix.CmsgLen(0):length]
		switch {
		case h.Level != unix.SOL_SOCKET:
		case h.Type == unix.SCM_CREDENTIALS && len(data) >= unix.SizeofUcred:
			c := *(*unix.Ucred)(unsafe.Pointer(&data[0]))
			cred.PID, cred.UID, cred.GID, credible = c.Pid, c.Uid, c.Gid, true
		case h.Type == unix.SCM_PIDFD && len(data) >= sizeofDescriptor:
			cred.Process, known = takeProcess(*(*int32)(unsafe.Pointer(&data[0]))), true
		case h.Type == unix.SCM_RIGHTS:
			for at := 0; at+sizeofDescriptor <= len(data); at += sizeofDescriptor {
				_ = unix.Close(int(*(*int32)(unsafe.Pointer(&data[at])))) // nobody uses it
			}
		}
		room = room[min(unix.CmsgSpace(len(data)), len(room)):]
	}
	if !credible || !known {
		return Cred{UID: OverflowID(), GID: OverflowID()}
	}
	return cred
}
