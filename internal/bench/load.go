package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// target is a server that the load asks.
type target struct {
	name   string        // text of its abstract name
	padded bool          // the name is as C programs write it; else exact
	echo   bool          // it is the echo server
	rest   time.Duration // a key is renewed at least this long after its last answer
}

// sockaddr is an abstract name in the form of the target's. The original does not answer a name
// in the other form.
func (t target) sockaddr(name string) (addr [unix.SizeofSockaddrUnix]byte, size uintptr) {
	*(*uint16)(unsafe.Pointer(&addr[0])) = unix.AF_UNIX
	size = uintptr(3 + copy(addr[3:], name))
	if t.padded {
		size = unix.SizeofSockaddrUnix
	}
	return addr, size
}

// dial makes the socket of a client.
func (t target) dial(name string) (fd int, err error) {
	fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	for _, call := range []struct {
		number uintptr
		what   string
		name   string
	}{{unix.SYS_BIND, "bind", name}, {unix.SYS_CONNECT, "connect", t.name}} {
		addr, size := t.sockaddr(call.name)
		if _, _, errno := unix.Syscall(call.number, uintptr(fd), uintptr(unsafe.Pointer(&addr[0])), size); errno != 0 {
			unix.Close(fd)
			return -1, fmt.Errorf("%s @%s: %w", call.what, call.name, errno)
		}
	}
	return fd, nil
}

// try asks the target to release a lease that nobody holds, which changes nothing, and waits for
// the answer.
func (t target) try() error {
	fd, err := t.dial(t.name + "-tried")
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	nothing := wire.Request{Key: wire.Key{Family: wire.Inet, Ifname: "none", Address: "192.0.2.1"}, Cmd: wire.Release}
	if _, err := unix.Write(fd, nothing.Append(nil)); err != nil {
		return err
	}
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(silence.Milliseconds()))
	if n == 0 {
		return errors.New("no answer")
	}
	return err
}

// tablesMax bounds the tables whose holders the load knows.
const tablesMax = 1 << 20

// silence is how long an answer may take before the request counts as lost.
const silence = 15 * time.Second

// fleet is the clients: a socket for each of them, and one thread for all, because the server is to
// be measured and not how Go wakes goroutines. It does the same work for every target, builds a
// datagram for each request, and decodes and checks each reply, so that a difference between two
// targets is a difference of the targets.
type fleet struct {
	target target
	keys   []wire.Key
	held   []uint32 // the table of each key, 0 without one
	holder []uint32 // the key of each table, from 1
	peers  []*peer
	epoll  int
	end    int // the key after the last one that once asked for
	faults faults

	renewed int         // the last key that renew asked for
	touched []time.Time // when renew asked for each key, or the answer came
}

// faults counts what a server must not do.
type faults struct {
	mu         sync.Mutex
	Violations int      `json:"violations"` // two keys with one table, a renewal that changed it, a reply to somebody else
	Lost       int      `json:"lost"`       // requests without an answer
	Refused    int      `json:"refused"`
	First      []string `json:"first,omitempty"` // the first fault of each kind, in words
}

func (f *faults) add(count *int, format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if *count++; *count == 1 {
		f.First = append(f.First, fmt.Sprintf(format, args...))
	}
}

func (f *faults) merge(other *faults) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.Violations += other.Violations
	f.Lost += other.Lost
	f.Refused += other.Refused
	f.First = append(f.First, other.First...)
}

func (f *faults) sum() int { return f.Violations + f.Lost + f.Refused }

// String is the counts, and the first fault of each kind.
func (f *faults) String() string {
	text := fmt.Sprintf("%d violations, %d requests without an answer, %d refused", f.Violations, f.Lost, f.Refused)
	return strings.Join(append([]string{text}, f.First...), "\n")
}

// peer is one client.
type peer struct {
	fd      int
	index   int32
	asks    bool // it has asked, and has no answer yet
	key     int
	since   time.Time
	expires int64 // of the last request to an echo server
}

// keysFor returns n keys: addresses on eight links.
func keysFor(n int) []wire.Key {
	keys := make([]wire.Key, n)
	for i := range keys {
		keys[i] = wire.Key{
			Family:  wire.Inet,
			Ifname:  fmt.Sprintf("wan%d", i%8),
			Address: fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255),
		}
	}
	return keys
}

func newFleet(t target, clients, keys int) (*fleet, error) {
	f := &fleet{
		target:  t,
		keys:    keysFor(keys),
		held:    make([]uint32, keys),
		holder:  make([]uint32, tablesMax),
		touched: make([]time.Time, keys),
	}
	var err error
	if f.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	return f, f.resize(clients)
}

// sockets counts all sockets ever made, for their names.
var sockets int

// resize changes the number of clients. The keys keep their leases.
func (f *fleet) resize(clients int) error {
	for _, p := range f.peers {
		unix.Close(p.fd)
	}
	f.peers = nil
	for i := range clients {
		sockets++
		fd, err := f.target.dial(fmt.Sprintf("table-allocator-bench-%d-%d", os.Getpid(), sockets))
		if err == nil {
			f.peers = append(f.peers, &peer{fd: fd, index: int32(i)})
			err = unix.EpollCtl(f.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(i)})
		}
		if err != nil {
			return fmt.Errorf("client %d of %d: %w", i, clients, err)
		}
	}
	return nil
}

func (f *fleet) close() {
	for _, p := range f.peers {
		unix.Close(p.fd)
	}
	unix.Close(f.epoll)
}

// run is one measurement.
type run struct {
	requests int
	took     time.Duration
	each     []uint32 // nanoseconds of each request, sorted
}

func (r run) rate() float64 { return float64(r.requests) / r.took.Seconds() }

func (r run) quantile(q float64) time.Duration {
	if len(r.each) == 0 {
		return 0
	}
	return time.Duration(r.each[min(int(q*float64(len(r.each))), len(r.each)-1)])
}

// once asks once for each key from first up to and without last, but no longer than most.
// Afterwards f.end is the key after the last one that it asked for.
func (f *fleet) once(cmd wire.Command, first, last int, most time.Duration) run {
	f.end = first
	return f.drive(cmd, most, func() (key int, ok bool) {
		if f.end == last {
			return 0, false
		}
		f.end++
		return f.end - 1, true
	})
}

// renew goes round the first keys, from where the last call stopped, but no longer than most, and
// only until it comes to a key that has to rest.
func (f *fleet) renew(keys int, most time.Duration) run {
	next := func() int { return (f.renewed + 1) % keys }
	time.Sleep(time.Until(f.touched[next()].Add(f.target.rest)))
	over := false
	return f.drive(wire.Acquire, most, func() (int, bool) {
		now := time.Now()
		if over = over || now.Sub(f.touched[next()]) < f.target.rest; over {
			return 0, false
		}
		f.renewed = next()
		f.touched[f.renewed] = now
		return f.renewed, true
	})
}

// drive has each client ask for the next key as soon as it has its answer.
func (f *fleet) drive(cmd wire.Command, most time.Duration, next func() (key int, ok bool)) run {
	d := drive{fleet: f, cmd: cmd, next: next, start: time.Now()}
	d.end = d.start.Add(most)
	for _, p := range f.peers {
		d.want(p, d.start)
	}
	for len(d.ready) > 0 || d.asking > 0 {
		d.send()
		d.receive()
	}
	r := run{requests: len(d.took), took: time.Since(d.start), each: d.took}
	slices.Sort(r.each)
	return r
}

// drive is the state of one measurement.
type drive struct {
	*fleet
	cmd        wire.Command
	next       func() (key int, ok bool)
	start, end time.Time
	ready      []*peer // the clients that want to ask, in order
	blocked    *peer   // the first of them, if the server's queue is full
	asking     int     // how many clients have no answer yet
	took       []uint32
	out        []byte
	in         [1024]byte
	events     [256]unix.EpollEvent
}

// want gives a client a key to ask for, unless the measurement is over.
func (d *drive) want(p *peer, now time.Time) {
	if now.After(d.end) {
		return
	}
	if key, ok := d.next(); ok {
		p.key, p.since = key, now
		d.ready = append(d.ready, p)
	}
}

// send sends requests until the server's queue is full.
func (d *drive) send() {
	for len(d.ready) > 0 {
		p := d.ready[0]
		d.out = d.build(d.out[:0], p, d.cmd)
		_, err := unix.Write(p.fd, d.out)
		if err == unix.EAGAIN {
			d.block(p)
			return
		}
		d.block(nil)
		d.ready = d.ready[1:]
		if err != nil {
			d.faults.add(&d.faults.Lost, "%v: send: %v", d.keys[p.key], err)
			continue
		}
		p.asks = true
		d.asking++
	}
}

// block notes which client waits for room in the server's queue, as a process whose send blocks.
func (d *drive) block(p *peer) {
	if p == d.blocked {
		return
	}
	for _, change := range []struct {
		p      *peer
		events uint32
	}{{d.blocked, unix.EPOLLIN}, {p, unix.EPOLLIN | unix.EPOLLOUT}} {
		if change.p != nil {
			must(unix.EpollCtl(d.epoll, unix.EPOLL_CTL_MOD, change.p.fd, &unix.EpollEvent{Events: change.events, Fd: change.p.index}))
		}
	}
	d.blocked = p
}

// must is for system calls on our own descriptors, which fail only by a bug.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

// receive waits for answers, or for room in the server's queue.
func (d *drive) receive() {
	n, err := unix.EpollWait(d.epoll, d.events[:], int(silence.Milliseconds()))
	if n == 0 {
		if d.blocked != nil {
			d.faults.add(&d.faults.Lost, "%v: the server's queue is full for %v", d.keys[d.blocked.key], silence)
			d.block(nil)
		}
		for _, p := range d.peers {
			if p.asks {
				d.faults.add(&d.faults.Lost, "%v: no reply within %v", d.keys[p.key], silence)
				p.asks = false
			}
		}
		d.asking, d.ready = 0, nil
	}
	if err != unix.EINTR {
		must(err)
	}
	for _, e := range d.events[:max(n, 0)] {
		p := d.peers[e.Fd]
		if e.Events&unix.EPOLLIN == 0 {
			continue
		}
		n, err := unix.Read(p.fd, d.in[:])
		if err != nil || !p.asks {
			d.faults.add(&d.faults.Violations, "%v: a reply to nothing: %s, %v", d.keys[p.key], d.in[:max(n, 0)], err)
			continue
		}
		now := time.Now()
		d.touched[p.key] = now
		d.took = append(d.took, uint32(min(now.Sub(p.since), 1<<32-1)))
		p.asks = false
		d.asking--
		if d.check(p, d.cmd, p.key, d.in[:n]) {
			d.want(p, now)
		}
	}
}

// build appends the datagram of a request.
func (f *fleet) build(b []byte, p *peer, cmd wire.Command) []byte {
	if !f.target.echo {
		return wire.Request{Key: f.keys[p.key], Cmd: cmd}.Append(b)
	}
	// The echo server gets the reply that it is to send back. So the load builds one datagram and
	// decodes one reply for either target.
	p.expires++
	return wire.Reply{Table: uint32(p.key + 1), Expires: p.expires}.Append(b)
}

func (f *fleet) check(p *peer, cmd wire.Command, key int, datagram []byte) bool {
	reply, err := wire.ParseReply(datagram)
	switch had := f.held[key]; {
	case err != nil:
		f.faults.add(&f.faults.Violations, "%v: reply %q: %v", f.keys[key], datagram, err)
	case f.target.echo && reply.Expires != p.expires:
		f.faults.add(&f.faults.Violations, "%v: an answer to another request: %s", f.keys[key], datagram)
	case cmd == wire.Release && (reply.Table != 0 || reply.Code != ""):
		f.faults.add(&f.faults.Violations, "%v: release answered with %s", f.keys[key], datagram)
	case cmd == wire.Release:
		f.holder[had] = 0
		f.held[key] = 0
	case reply.Table == 0:
		f.faults.add(&f.faults.Refused, "%v: %s", f.keys[key], datagram)
		return false
	case reply.Table >= tablesMax:
		f.faults.add(&f.faults.Violations, "%v: table %d: only those below %d can be told apart", f.keys[key], reply.Table, tablesMax)
	case had == 0 && f.holder[reply.Table] != 0:
		f.faults.add(&f.faults.Violations, "%v: table %d is held by %v", f.keys[key], reply.Table, f.keys[f.holder[reply.Table]-1])
	case had == 0:
		f.held[key], f.holder[reply.Table] = reply.Table, uint32(key+1)
	case had != reply.Table:
		f.faults.add(&f.faults.Violations, "%v: renewal of table %d answered with %d", f.keys[key], had, reply.Table)
	}
	return true
}
