package wire

import (
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// MaxName is the longest text of an abstract name that has both forms.
const MaxName = 106

// Addr is the address of a unix socket, byte for byte as the kernel gives it. An answer
// has to go to these very bytes: an abstract name has any length and may contain NULs,
// which the resolvers of Go's net and x/sys/unix cut off.
type Addr struct {
	raw [unix.SizeofSockaddrUnix]byte
	len uint32
}

const pathOffset = 2 // of sun_path in sockaddr_un

// Exact is the abstract name text as Go, Python and socat write it.
func Exact(text string) (Addr, error) {
	var a Addr
	if len(text) == 0 || len(text) > MaxName {
		return a, fmt.Errorf("socket name %q: %d bytes, want 1 to %d", text, len(text), MaxName)
	}
	*(*uint16)(unsafe.Pointer(&a.raw[0])) = unix.AF_UNIX
	copy(a.raw[pathOffset+1:], text)
	a.len = uint32(pathOffset + 1 + len(text))
	return a, nil
}

// Padded is the abstract name text as the C original writes it: with NULs up to the
// full length of a sockaddr_un. It is another address than Exact's.
func Padded(text string) (Addr, error) {
	a, err := Exact(text)
	a.len = unix.SizeofSockaddrUnix
	return a, err
}

// Bound reports whether a socket can be at this address: a peer that never bound its socket cannot be
// answered.
func (a Addr) Bound() bool { return a.len > pathOffset }

// String returns the address for people: "@name" for an abstract name, otherwise its path.
func (a Addr) String() string {
	if !a.Bound() {
		return "(unbound)"
	}
	name := a.raw[pathOffset:a.len]
	end := len(name)
	for end > 1 && name[end-1] == 0 {
		end--
	}
	if name[0] != 0 {
		return strconv.Quote(string(name[:end]))
	}
	return strconv.Quote("@" + string(name[1:end]))
}

// MarshalText writes the address for another program of this host.
func (a Addr) MarshalText() ([]byte, error) {
	return base64.StdEncoding.AppendEncode(nil, a.raw[:a.len]), nil
}

// UnmarshalText reads what MarshalText wrote.
func (a *Addr) UnmarshalText(text []byte) error {
	raw, err := base64.StdEncoding.AppendDecode(nil, text)
	if err != nil || len(raw) > len(a.raw) {
		return fmt.Errorf("socket address %q: want at most %d bytes in base64", text, len(a.raw))
	}
	*a = Addr{len: uint32(len(raw))}
	copy(a.raw[:], raw)
	return nil
}

// path returns the part of sun_path that belongs to the address: unix_diag calls it the name.
func (a Addr) path() []byte { return a.raw[pathOffset:a.len] }

// Cred is the sender of a datagram as the kernel reports it: pid, real uid and real gid, as seen from the
// namespaces of the receiver. Process tells it from later processes of the same pid; 0: not known.
type Cred struct {
	PID      int32
	UID, GID uint32
	Process  Process
}

// Anonymous reports whether the kernel recorded no sender, since the datagram was queued before the
// receiver asked for credentials.
func (c Cred) Anonymous() bool { return c.PID == 0 && c.UID == OverflowID() }

// Datagram is one message as received. Data is valid until the next Receive.
type Datagram struct {
	Data      []byte
	Truncated bool // longer than the connection reads
	From      Addr
	Cred      Cred
}

// Message is one datagram to send.
type Message struct {
	Data []byte
	To   Addr
}

// Conn is a unix datagram socket that receives in batches, with credentials, and never waits when it
// sends. Receive may run at the same time as Send and Close, but not as another Receive.
type Conn struct {
	file *os.File
	raw  syscall.RawConn
	size int
	room int    // for control messages of a datagram
	in   *batch // nil while a holder's socket waits
	out  *batch
	addr Addr

	waits            bool // Receive waits within the system call
	reading, writing syscallState
}

// syscallState has the arguments and results of a system call within a RawConn. A closure for each call
// would cost an allocation.
type syscallState struct {
	call   func(fd uintptr) (done bool)
	atOnce bool // do not wait
	n      int
	errno  syscall.Errno
}

// Listen binds a socket to addr. It reads datagrams of at most size bytes, and reports a longer one as
// truncated.
func Listen(addr Addr, size int) (*Conn, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	// Before bind: a datagram that is queued earlier has no credentials.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("setsockopt SO_PASSCRED: %w", err)
	}
	_, _, errno := unix.Syscall(unix.SYS_BIND, uintptr(fd), uintptr(unsafe.Pointer(&addr.raw[0])), uintptr(addr.len))
	if errno != 0 {
		unix.Close(fd)
		return nil, fmt.Errorf("bind %s: %w", addr, errno)
	}
	return newConn(fd, addr, size)
}

// FromFile takes a socket that a service manager has bound. It closes the file.
func FromFile(f *os.File, size int) (*Conn, error) {
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("duplicate socket: %w", err)
	}
	addr, err := checkSocket(fd)
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("socket that was passed in: %w", err)
	}
	return newConn(fd, addr, size)
}

// File returns a duplicate of the socket, which a program that is executed next can take by FromFile.
func (c *Conn) File() (*os.File, error) {
	duplicate, errno := 0, error(nil)
	err := c.raw.Control(func(fd uintptr) { duplicate, errno = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3) })
	if err = errors.Join(err, errno); err != nil {
		return nil, fmt.Errorf("duplicate socket %s: %w", c.addr, err)
	}
	return os.NewFile(uintptr(duplicate), c.addr.String()), nil
}

func checkSocket(fd int) (Addr, error) {
	addr := Addr{len: unix.SizeofSockaddrUnix}
	_, _, errno := unix.Syscall(unix.SYS_GETSOCKNAME, uintptr(fd),
		uintptr(unsafe.Pointer(&addr.raw[0])), uintptr(unsafe.Pointer(&addr.len)))
	if errno != 0 {
		return addr, fmt.Errorf("getsockname: %w", errno)
	}
	kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return addr, fmt.Errorf("getsockopt SO_TYPE: %w", err)
	}
	if *(*uint16)(unsafe.Pointer(&addr.raw[0])) != unix.AF_UNIX || kind != unix.SOCK_DGRAM {
		return addr, errors.New("not a unix datagram socket")
	}
	return addr, nil
}

func newConn(fd int, addr Addr, size int) (*Conn, error) {
	file := os.NewFile(uintptr(fd), addr.String())
	raw, err := file.SyscallConn()
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("socket %s: %w", addr, err)
	}
	c := &Conn{file: file, raw: raw, size: size, addr: addr, room: credSpace}
	c.reading.call, c.writing.call = c.read, c.write
	if size <= MaxRequest {
		c.in, c.out = newBatch(batchSize, size+1, credSpace), newBatch(batchSize, 0, 0)
		return c, nil
	}
	c.out = newBatch(1, 0, 0)
	if processesAreKnown() && unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSPIDFD, 1) == nil {
		c.room = processSpace
	}
	return c, nil
}

// largeBatches are for the sockets of holders, of which a process may have a thousand. Such a socket
// reads few messages, some of them large, and has memory only while it reads.
var largeBatches sync.Pool

// Addr returns the address that the connection is bound to.
func (c *Conn) Addr() Addr { return c.addr }

// Room returns how many descriptors this process may have, and how many of them are free at most. The kernel gives the lowest
// one that is free, so all below that of a new connection are in use.
func (c *Conn) Room() (free, limit int) {
	limit = MaxDescriptors()
	if err := c.raw.Control(func(fd uintptr) { free = limit - int(fd) - 1 }); err != nil {
		return 0, limit // closed
	}
	return free, limit
}

// MaxDescriptors returns how many descriptors this process may have now.
func MaxDescriptors() int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return math.MaxInt32
	}
	return int(min(limit.Cur, math.MaxInt32))
}

// Close ends a Receive that waits.
func (c *Conn) Close() error { return c.file.Close() }

// SetReadDeadline makes Receive fail with os.ErrDeadlineExceeded at t; the zero time
// takes the deadline off.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.file.SetReadDeadline(t) }

// Wait makes Receive wait within the system call that receives. That saves three system calls for each
// datagram, and costs a thread. Only a datagram ends such a wait: see Wake.
func (c *Conn) Wait() error {
	err := c.raw.Control(func(fd uintptr) {
		if err := unix.SetNonblock(int(fd), false); err == nil {
			c.waits = true
		}
	})
	if err == nil && !c.waits {
		err = fmt.Errorf("socket %s: cannot wait", c.addr)
	}
	return err
}

// Wake sends an empty datagram of this process to the connection, which ends a Receive that waits. If the
// queue is full, Receive does not wait.
func (c *Conn) Wake() error {
	err := SendApart(Message{To: c.addr})
	if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) { // so the socket itself has to do
		controlErr := c.raw.Control(func(fd uintptr) {
			_, _, errno := unix.Syscall6(unix.SYS_SENDTO, fd, 0, 0, unix.MSG_DONTWAIT, uintptr(unsafe.Pointer(&c.addr.raw[0])), uintptr(c.addr.len))
			if err = nil; errno != 0 {
				err = fmt.Errorf("send to %s: %w", c.addr, errno)
			}
		})
		err = errors.Join(err, controlErr)
	}
	if errors.Is(err, unix.EAGAIN) {
		return nil
	}
	return err
}

// NetnsCookie identifies the network namespace of the socket for the life of the
// kernel (SO_NETNS_COOKIE, Linux 5.14), and is 0 where the kernel has none.
func (c *Conn) NetnsCookie() uint64 {
	var cookie uint64
	err := c.raw.Control(func(fd uintptr) {
		size := uint32(unsafe.Sizeof(cookie))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE,
			uintptr(unsafe.Pointer(&cookie)), uintptr(unsafe.Pointer(&size)), 0)
		if errno != 0 {
			cookie = 0
		}
	})
	if err != nil {
		return 0
	}
	return cookie
}

// Backlog returns the bytes of the send buffer that messages take which their receivers have not read
// yet, and the size of the buffer. With a full buffer every Send is EAGAIN, whatever its receiver.
func (c *Conn) Backlog() (taken, size int) {
	err := c.raw.Control(func(fd uintptr) {
		var err error
		if taken, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ); err == nil {
			size, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF)
		}
		if err != nil {
			taken, size = 0, 1
		}
	})
	if err != nil {
		return 0, 1 // closed
	}
	return taken, size
}

// Charge returns the bytes of a send buffer that a message of n bytes takes: the kernel adds a struct
// skb_shared_info, rounds up to the next size of its allocator, and adds a struct sk_buff.
func Charge(n int) int {
	const skb, shared = 256, 320
	return skb + 1<<bits.Len(uint(n+shared-1))
}

// Receive waits for a datagram and returns it with all that wait behind it, up to a
// batch.
func (c *Conn) Receive() ([]Datagram, error) { return c.receive(false) }

// ReceiveNow returns the datagrams that wait already, and none if there are none.
func (c *Conn) ReceiveNow() ([]Datagram, error) { return c.receive(true) }

func (c *Conn) receive(atOnce bool) ([]Datagram, error) {
	if c.size > MaxRequest {
		c.release()
	}
	c.reading.atOnce = atOnce
	err := c.raw.Read(c.reading.call)
	n, errno := c.reading.n, c.reading.errno
	if err == nil && errno == unix.EAGAIN {
		return nil, nil
	}
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		err = os.ErrClosed // which a RawConn reports with an error of its own
	}
	if err != nil {
		return nil, fmt.Errorf("receive from %s: %w", c.addr, err)
	}
	if errno != 0 {
		return nil, fmt.Errorf("receive from %s: %w", c.addr, errno)
	}
	return c.in.datagrams(n), nil
}

// read makes one system call of receive.
func (c *Conn) read(fd uintptr) (done bool) {
	if c.in == nil {
		c.in = largeBatch(c.size, c.room)
	}
	r := &c.reading
	flags := unix.MSG_DONTWAIT
	if c.waits && !r.atOnce {
		flags = unix.MSG_WAITFORONE
	}
	r.n, r.errno = c.in.receive(fd, flags)
	if r.errno == unix.EAGAIN && c.size > MaxRequest {
		c.release()
	}
	return r.errno != unix.EAGAIN || r.atOnce
}

// write makes one system call of Send. It never waits, so a peer that does not read cannot delay others.
func (c *Conn) write(fd uintptr) (done bool) {
	w := &c.writing
	w.n, w.errno = c.out.call(unix.SYS_SENDMMSG, fd, w.n, unix.MSG_DONTWAIT)
	return true
}

func largeBatch(size, room int) *batch {
	if b, ok := largeBatches.Get().(*batch); ok && b.size > size && b.room == room {
		return b
	}
	return newBatch(1, size+1, room)
}

func (c *Conn) release() {
	if c.in != nil {
		largeBatches.Put(c.in)
		c.in = nil
	}
}

// Send sends each message that its receiver has room for. It never waits. The error
// of message i is errs[i]; a full queue is EAGAIN, nobody there ECONNREFUSED. Without
// any error errs is nil.
func (c *Conn) Send(messages ...Message) (errs []error) {
	fail := func(i int, err error) {
		if errs == nil {
			errs = make([]error, len(messages))
		}
		errs[i] = fmt.Errorf("send to %s: %w", messages[i].To, err)
	}
	for i := 0; i < len(messages); {
		c.writing.n = c.out.fill(messages[i:])
		err := c.raw.Write(c.writing.call)
		sent, errno := c.writing.n, c.writing.errno
		switch {
		case err != nil:
			fail(i, err)
			i++
		case errno != 0: // of the first one
			fail(i, errno)
			i++
		default:
			i += sent
		}
	}
	return errs
}

// SendApart sends a message from a new socket without a name. The send buffer of that socket is empty,
// whatever other peers have not read. SendApart never waits. If the peer has connected its socket to
// another one, the error is EPERM.
func SendApart(m Message) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	out := newBatch(1, 0, 0)
	if _, errno := out.call(unix.SYS_SENDMMSG, uintptr(fd), out.fill([]Message{m}), unix.MSG_DONTWAIT); errno != 0 {
		return fmt.Errorf("send to %s: %w", m.To, errno)
	}
	return nil
}
