// Package route hides rtnetlink: how the policy rules, addresses, links and routes of a network
// namespace are read and changed, and how their changes are followed. Callers say which rules
// there should be; the messages, their attributes, partial deletes, interrupted dumps and lost
// notifications stay in here. It imports nothing of this module.
package route

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Protocol is the rtnetlink protocol (RTA_PROTOCOL, FRA_PROTOCOL) that marks the rules and routes
// which are ours. Rules and routes of earlier versions carry it too: it never changes.
const Protocol = 116

const (
	dumpTries = 50 // 6,000 rules take 10 ms to dump; a burst of changes is over after half a second
	timeout   = 10 * time.Second
)

// Conn asks and changes the network namespace in which it was dialled. Its methods are for one
// goroutine at a time. Reading needs no capability, changing needs CAP_NET_ADMIN.
type Conn struct {
	sockets map[int]*nl.SocketHandle
	guard   *nl.NetlinkSocket // joins the rule groups while rules are read, see dumpRules
}

// Dial returns a Conn for the network namespace of the calling thread, to be closed by the caller.
func Dial() (*Conn, error) {
	requests, err := nl.Subscribe(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open rtnetlink socket: %w", err)
	}
	guard, err := nl.Subscribe(unix.NETLINK_ROUTE)
	if err != nil {
		requests.Close()
		return nil, fmt.Errorf("open rtnetlink socket: %w", err)
	}
	// The kernel answers at once. A limit keeps a caller alive should an answer ever be missing.
	limit := unix.NsecToTimeval(timeout.Nanoseconds())
	_ = requests.SetSendTimeout(&limit) // only stores the value
	_ = requests.SetReceiveTimeout(&limit)
	// With it (Linux 4.20) the kernel filters dumps by table and by link. Without it we filter
	// alone, as we do anyway.
	_ = unix.SetsockoptInt(requests.GetFd(), unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1)
	return &Conn{
		sockets: map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: requests}},
		guard:   guard,
	}, nil
}

// Close closes the sockets.
func (c *Conn) Close() {
	c.sockets[unix.NETLINK_ROUTE].Close()
	c.guard.Close()
}

// request sends one message, header and attributes in body, and returns the messages of type
// answer, or any with answer 0.
func (c *Conn) request(typ, flags, answer uint16, body []byte) ([][]byte, error) {
	req := nl.NetlinkRequest{
		NlMsghdr: unix.NlMsghdr{Type: typ, Flags: unix.NLM_F_REQUEST | flags},
		RawData:  body,
		Sockets:  c.sockets,
	}
	return req.Execute(unix.NETLINK_ROUTE, answer)
}

// change sends one message and waits for its acknowledgement.
func (c *Conn) change(typ, flags uint16, body []byte) error {
	_, err := c.request(typ, unix.NLM_F_ACK|flags, 0, body)
	return err
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

// native is the byte order of rtnetlink.
var native = binary.NativeEndian

// The library finds its byte order at the first request, and races if two goroutines make that.
var _ = nl.NativeEndian()

var errMalformed = errors.New("malformed rtnetlink message")

// eachAttribute calls f for each attribute in b.
func eachAttribute(b []byte, f func(typ uint16, value []byte)) error {
	for len(b) >= unix.SizeofRtAttr {
		n := int(native.Uint16(b))
		if n < unix.SizeofRtAttr || n > len(b) {
			return errMalformed
		}
		f(native.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofRtAttr:n])
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
