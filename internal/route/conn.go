// Package route hides rtnetlink: how the policy rules, addresses, links and routes of a network
// namespace are read and changed, and how their changes are followed. Callers say which rules and
// routes there should be; the messages, their attributes, partial deletes, interrupted dumps and
// lost notifications stay in here. It imports nothing of this module.
package route

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
)

// Protocol is the rtnetlink protocol (RTA_PROTOCOL, FRA_PROTOCOL) that marks the rules and routes
// which are ours. Rules and routes of earlier versions carry it too: it never changes.
const Protocol = 116

const (
	dumpTries = 50 // 6,000 rules take 10 ms to dump; a burst of changes is over after half a second
	timeout   = 10 * time.Second

	quietTries = 10 // undisturbed dumps
	syncRounds = 5  // two or three are usual: the last one finds all as it should be
)

// Conn asks and changes the network namespace in which it was dialled. Its methods are for one
// goroutine at a time. Reading needs no capability, changing needs CAP_NET_ADMIN.
type Conn struct {
	reading     *nl.NetlinkSocket
	changing    *nl.NetlinkSocket // its errors say why; the library cannot read that of a dump
	requests    uint32
	disturbance *nl.NetlinkSocket // joins a group while its objects are read, see undisturbed
	snapshot    *snapshot         // nil: rules are read each time
	first       *first            // nil: none is open
	ports       []uint32          // of the sockets that changed something
	read        int
	// Meanwhile is called before each request, and now and then while a long answer is read, for what cannot wait until
	// thousands of routes are read or changed; nil: nothing is. It must not use the Conn.
	Meanwhile func()
}

// Dial returns a Conn for the network namespace of the calling thread, to be closed by the caller.
func Dial() (*Conn, error) {
	c := &Conn{}
	var err error
	if c.reading, err = readingSocket(); err != nil {
		return nil, err
	}
	if c.changing, err = changingSocket(); err == nil {
		c.disturbance, err = nl.Subscribe(unix.NETLINK_ROUTE)
	}
	if err == nil {
		err = c.notePort()
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("open rtnetlink socket: %w", err)
	}
	return c, nil
}

func (c *Conn) notePort() error {
	port, err := c.changing.GetPid()
	if err != nil {
		return fmt.Errorf("read the port of an rtnetlink socket: %w", err)
	}
	c.ports = append(c.ports[max(0, len(c.ports)-1):], port) // events of the socket before may still come
	return nil
}

// RoutesRead is how many routes all dumps so far had: what a call costs that does not change much.
func (c *Conn) RoutesRead() int { return c.read }

// Port is that of the socket that changes things, as events name it.
func (c *Conn) Port() uint32 { return c.ports[len(c.ports)-1] }

// Made reports whether an event is of what this Conn changed.
func (c *Conn) Made(e Event) bool { return slices.Contains(c.ports, e.Port) }

// readingSocket opens a socket that dumps objects.
func readingSocket() (*nl.NetlinkSocket, error) {
	s, err := openSocket()
	if err == nil {
		// With it (Linux 4.20) the kernel filters dumps by table and by link. Without it we filter
		// alone, as we do anyway.
		_ = unix.SetsockoptInt(s.GetFd(), unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1)
	}
	return s, err
}

// changingSocket opens a socket that changes objects.
func changingSocket() (*nl.NetlinkSocket, error) {
	s, err := openSocket()
	if err == nil {
		_ = s.SetExtAck(true) // Linux 4.12; without it errors are shorter
	}
	return s, err
}

func openSocket() (*nl.NetlinkSocket, error) {
	s, err := nl.Subscribe(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open rtnetlink socket: %w", err)
	}
	// The kernel answers at once. A limit keeps a caller alive should an answer ever be missing.
	limit := unix.NsecToTimeval(timeout.Nanoseconds())
	_ = s.SetSendTimeout(&limit) // only stores the value
	_ = s.SetReceiveTimeout(&limit)
	return s, nil
}

// Close closes the sockets.
func (c *Conn) Close() {
	for _, s := range []*nl.NetlinkSocket{c.reading, c.changing, c.disturbance} {
		if s != nil {
			s.Close()
		}
	}
	if c.snapshot != nil {
		c.snapshot.heard.Close()
	}
	if c.first != nil {
		c.first.socket.Close()
	}
}

// request sends one message that asks, header and attributes in body, and returns the messages of
// type answer.
func (c *Conn) request(typ, flags, answer uint16, body []byte) ([][]byte, error) {
	msgs, _, err := c.execute(&c.reading, readingSocket, typ, flags, answer, body)
	return msgs, err
}

// change sends one message that changes something and waits for its acknowledgement.
func (c *Conn) change(typ, flags uint16, body []byte) error {
	_, again, err := c.execute(&c.changing, changingSocket, typ, unix.NLM_F_ACK|flags, 0, body)
	if again && (errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EEXIST)) {
		return nil // the kernel did it the first time, and the answer was lost
	}
	return err
}

// execute tries again after an error that need not come back, from another socket: what is left of an answer that was
// not read whole would be taken for the next one. The calling thread has to be in the namespace of Dial. again reports
// whether it did: the kernel may have carried out the request before.
func (c *Conn) execute(socket **nl.NetlinkSocket, open func() (*nl.NetlinkSocket, error), typ, flags, answer uint16, body []byte) (msgs [][]byte, again bool, err error) {
	const tries = 4
	for try := 1; ; try++ {
		req := nl.NetlinkRequest{
			NlMsghdr: unix.NlMsghdr{Type: typ, Flags: unix.NLM_F_REQUEST | flags},
			RawData:  body,
			Sockets:  c.handle(*socket),
		}
		msgs, err = req.Execute(unix.NETLINK_ROUTE, answer)
		if err == nil || !isPassing(err) || try == tries {
			return msgs, try > 1, err
		}
		if err := c.reopen(socket, open); err != nil {
			return nil, true, err
		}
	}
}

// handle is how the library takes a socket. Each request has a number of its own, so that the answer to another one is
// not taken for its answer.
func (c *Conn) handle(s *nl.NetlinkSocket) map[int]*nl.SocketHandle {
	c.meanwhile()
	c.requests++
	return map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Seq: c.requests, Socket: s}}
}

func (c *Conn) meanwhile() {
	if c.Meanwhile != nil {
		c.Meanwhile()
	}
}

func (c *Conn) reopen(socket **nl.NetlinkSocket, open func() (*nl.NetlinkSocket, error)) error {
	s, err := open()
	if err != nil {
		return err
	}
	(*socket).Close()
	*socket = s
	if socket == &c.changing {
		if err := c.notePort(); err != nil {
			return err
		}
	}
	if c.snapshot != nil && socket == &c.changing {
		clear(c.snapshot.rules)
		c.snapshot.own, err = s.GetPid()
	}
	return err
}

// isPassing reports whether an error need not come back.
func isPassing(err error) bool {
	return outside.Passes(err) && !errors.Is(err, nl.ErrDumpInterrupted) // which is an EINTR, too
}

// dump is request for all objects of a kind. It asks again while changes interrupt it.
func (c *Conn) dump(typ, answer uint16, body []byte) (msgs [][]byte, err error) {
	for range dumpTries {
		msgs, err = c.request(typ, unix.NLM_F_DUMP, answer, body)
		if !errors.Is(err, nl.ErrDumpInterrupted) {
			return msgs, err
		}
	}
	return nil, err
}

// undisturbed calls read, which dumps the objects of a multicast group, until none of them has
// changed meanwhile, and reports whether there was such a quiet moment. It is for objects whose
// dumps may miss some then, and do not say so.
func (c *Conn) undisturbed(group int, read func() error) (quiet bool, err error) {
	if err := unix.SetsockoptInt(c.disturbance.GetFd(), unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group); err != nil {
		return false, fmt.Errorf("join netlink group %d: %w", group, err)
	}
	defer func() {
		// Cannot fail for a group that was joined.
		_ = unix.SetsockoptInt(c.disturbance.GetFd(), unix.SOL_NETLINK, unix.NETLINK_DROP_MEMBERSHIP, group)
	}()
	c.disturbed() // what an earlier call has left
	for range quietTries {
		if err := read(); err != nil {
			return false, err
		}
		if !c.disturbed() {
			return true, nil
		}
	}
	return false, nil
}

// disturbed reports whether the disturbance socket heard of changes, and forgets them.
func (c *Conn) disturbed() bool {
	var heard bool
	var buf [1]byte // a message cut short is as good
	for {
		switch _, _, err := unix.Recvfrom(c.disturbance.GetFd(), buf[:], unix.MSG_DONTWAIT); err {
		case nil, unix.ENOBUFS:
			heard = true
		case unix.EINTR:
		default: // EAGAIN: nothing is left
			return heard
		}
	}
}

// native is the byte order of rtnetlink.
var native = binary.NativeEndian

// The library finds its byte order at the first request, and races if two goroutines make that.
var _ = nl.NativeEndian()

var errMalformed = errors.New("malformed rtnetlink message")

// eachAttribute calls f for each attribute in b.
func eachAttribute(b []byte, f func(typ uint16, value []byte)) error {
	return eachAttributeAsIs(b, func(typ uint16, value []byte) { f(typ&attributeType, value) })
}

// attributeType masks the flags out of an attribute's type.
const attributeType = 1<<16 - 1 - unix.NLA_F_NESTED - unix.NLA_F_NET_BYTEORDER

// eachAttributeAsIs is eachAttribute with the flags in the types.
func eachAttributeAsIs(b []byte, f func(typ uint16, value []byte)) error {
	for len(b) >= unix.SizeofRtAttr {
		n := int(native.Uint16(b))
		if n < unix.SizeofRtAttr || n > len(b) {
			return errMalformed
		}
		f(native.Uint16(b[2:]), b[unix.SizeofRtAttr:n])
		b = b[min(align(n), len(b)):]
	}
	return nil
}

// appendAttribute appends an attribute to a message whose length is aligned, and keeps it so.
func appendAttribute(b []byte, typ uint16, value []byte) []byte {
	b = native.AppendUint16(b, uint16(unix.SizeofRtAttr+len(value)))
	b = native.AppendUint16(b, typ)
	b = append(b, value...)
	return append(b, make([]byte, align(len(b))-len(b))...)
}

func appendUint32(b []byte, typ uint16, value uint32) []byte {
	return appendAttribute(b, typ, native.AppendUint32(nil, value))
}

// uint32Of returns an attribute's value, 0 where it is too short to have one.
func uint32Of(value []byte) uint32 {
	if len(value) < 4 {
		return 0
	}
	return native.Uint32(value)
}

// align rounds a length up to the alignment of messages and of attributes.
func align(n int) int { return (n + unix.RTA_ALIGNTO - 1) &^ (unix.RTA_ALIGNTO - 1) }
