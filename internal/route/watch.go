package route

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// EventKind is what an Event is about.
type EventKind int

// The kinds of events, with the fields that each sets.
const (
	Overrun         EventKind = iota // notifications were lost: read everything again
	AddressChanged                   // came, went or got other flags: Family, Index, Addr, Network, Deleted
	LinkChanged                      // came or changed: Index, Name, Down
	LinkGone                         // no longer here: Index, Name, Down
	RuleChanged                      // Family, Priority, Table, Protocol, Deleted
	RouteChanged                     // Family, Table, Index (0 for none or several), Protocol, Deleted, Route, Replaced, Appended
	NexthopChanged                   // a nexthop object, of which routes may have their gateway: Nexthop, Deleted
	NeighbourSilent                  // does not answer ARP or neighbour discovery any more: Index, Addr
)

func (k EventKind) String() string {
	names := [...]string{"overrun", "address changed", "link changed", "link gone", "rule changed", "route changed", "nexthop changed", "neighbour silent"}
	if k < 0 || int(k) >= len(names) {
		return fmt.Sprintf("event %d", int(k))
	}
	return names[k]
}

// Event is a hint that something changed. It tells who is concerned and not what is true now: by
// the time it is read the kernel may have moved on.
type Event struct {
	Kind   EventKind
	Family int        // AF_INET or AF_INET6
	Index  int        // ifindex
	Name   string     // of the link
	Down   bool       // the administrator has set the link down: the kernel deletes its routes, those of IPv4 without an event
	Addr   netip.Addr // the local address
	// Network is what the address has on the link, as in Address; the zero Prefix if a route of type local makes it.
	Network netip.Prefix
	// Elsewhere says that a deleted address is there with another network or on another link, and Bare that its link has
	// no IPv4 address left, upon which the kernel deletes all IPv4 routes over it: for those who follow Whereabouts.
	Elsewhere, Bare bool
	Table           uint32
	// Priority is a rule's.
	Priority uint32
	// Protocol tells what is ours. Not who changed it: the kernel and other programs delete ours too.
	Protocol uint8
	Nexthop  uint32 // the number of a nexthop object
	Deleted  bool   // the address, rule, route or object, rather than added or changed
	Port     uint32 // of the socket that asked for it; 0: the kernel did it by itself
	// Route is the route as the notification has it, and Replaced says that it took the place of
	// another one, of which there is no notification.
	Route    *Route
	Replaced bool
	// Appended says that it was to come behind what is in its place, for IPv4 if something was.
	Appended bool
}

// Beside reports whether a new route stands beside what was in its place for sure: it was appended, or a router
// advertised it, of which there may be several, and the kernel took that over itself.
func (e Event) Beside() bool {
	return e.Appended || e.Family == unix.AF_INET6 && e.Protocol == unix.RTPROT_RA && e.Port == 0
}

// Groups selects what a Watcher hears of; combine with |.
type Groups uint32

// Groups of notifications: the bits of sockaddr_nl.nl_groups.
const (
	Links      Groups = 1 << (unix.RTNLGRP_LINK - 1)
	Addresses4 Groups = 1 << (unix.RTNLGRP_IPV4_IFADDR - 1)
	Addresses6 Groups = 1 << (unix.RTNLGRP_IPV6_IFADDR - 1)
	Rules4     Groups = 1 << (unix.RTNLGRP_IPV4_RULE - 1)
	Rules6     Groups = 1 << (unix.RTNLGRP_IPV6_RULE - 1)
	Routes4    Groups = 1 << (unix.RTNLGRP_IPV4_ROUTE - 1)
	Routes6    Groups = 1 << (unix.RTNLGRP_IPV6_ROUTE - 1)
	Nexthops   Groups = 1 << (rtnlgrpNexthop - 1)
)

const (
	rtnlgrpNexthop = 32 // RTNLGRP_NEXTHOP of linux/rtnetlink.h

	// A notification takes about 1 KiB of it: a burst of 2,000 has room (the kernel doubles it).
	watchBuffer = 1 << 20
	maxEvents   = 1000    // of one Next
	maxErrors   = 100     // in a row
	maxMessage  = 1 << 16 // the longest that the kernel sends, links with hundreds of functions apart
)

// Watcher receives notifications of the network namespace in which it was made.
type Watcher struct {
	file    *os.File
	conn    syscall.RawConn
	buf     []byte
	holding atomic.Bool // Next has read notifications, or is about to, since it last found none
}

// Watch subscribes to groups and returns; whatever happens from then on is told by Next. So watch
// first, and look afterwards.
func Watch(groups Groups) (*Watcher, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open rtnetlink socket: %w", err)
	}
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, watchBuffer) != nil {
		// Without the capability net.core.rmem_max limits it. Overruns are told, so less will do.
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, watchBuffer)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: uint32(groups)}); err != nil {
		_ = unix.Close(fd) // the error above is the one to tell
		return nil, fmt.Errorf("subscribe to rtnetlink groups %#x: %w", uint32(groups), err)
	}
	file := os.NewFile(uintptr(fd), "rtnetlink")
	conn, err := file.SyscallConn()
	if err != nil {
		_ = file.Close() // likewise
		return nil, fmt.Errorf("open rtnetlink socket: %w", err)
	}
	return &Watcher{file: file, conn: conn, buf: make([]byte, maxMessage)}, nil
}

// Join adds groups to what is heard of. Joining again does nothing.
func (w *Watcher) Join(groups Groups) error {
	var err error
	controlErr := w.conn.Control(func(fd uintptr) {
		for bit := 0; groups>>bit != 0; bit++ {
			if groups>>bit&1 != 0 && err == nil {
				err = unix.SetsockoptInt(int(fd), unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, bit+1)
			}
		}
	})
	if err = errors.Join(err, controlErr); err != nil {
		return fmt.Errorf("subscribe to rtnetlink groups %#x: %w", uint32(groups), err)
	}
	return nil
}

// Next waits for events and returns all that are there, in order. If some were lost it returns
// one Overrun and nothing else. After Close the error is os.ErrClosed, and os.ErrDeadlineExceeded when the
// deadline has come.
func (w *Watcher) Next() ([]Event, error) {
	var events []Event
	var overrun bool
	var failed error
	errs := 0
	err := w.conn.Read(func(fd uintptr) bool {
		w.holding.Store(true)
		// After an overrun the kernel drops what comes, without another word, until the queue is
		// empty. Only then is it time to read everything again.
		for overrun || len(events) < maxEvents {
			n, from, err := unix.Recvfrom(int(fd), w.buf, unix.MSG_TRUNC)
			switch {
			case err == unix.EAGAIN:
				w.holding.Store(overrun || len(events) > 0)
				return w.holding.Load()
			case err == unix.EINTR:
			case err != nil && isPassing(err):
				overrun = true
				if errs++; errs > maxErrors {
					failed = err
					return true
				}
			case err != nil:
				failed = err
				return true
			case !isKernel(from):
			case n > len(w.buf):
				overrun = true
			default:
				events = append(events, parseEvents(w.buf[:n])...)
			}
		}
		return true
	})
	switch {
	case failed != nil:
		return nil, fmt.Errorf("receive rtnetlink notifications: %w", failed)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, err
	case err != nil:
		return nil, os.ErrClosed
	case overrun:
		return []Event{{Kind: Overrun}}, nil
	}
	return events, nil
}

// HasNews reports whether events of the past are still to come from Next: they wait in the queue, or Next has returned them
// and was not called again.
func (w *Watcher) HasNews() bool {
	queued := false
	err := w.conn.Control(func(fd uintptr) {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		queued = err == nil && n > 0
	})
	return err == nil && (queued || w.holding.Load())
}

// SetDeadline is when Next stops waiting.
func (w *Watcher) SetDeadline(at time.Time) error { return w.file.SetReadDeadline(at) }

// Close ends the subscription, and a Next that waits.
func (w *Watcher) Close() error { return w.file.Close() }

func isKernel(from unix.Sockaddr) bool {
	addr, ok := from.(*unix.SockaddrNetlink)
	return ok && addr.Pid == 0
}

// parseEvents reads the messages in b. What is malformed could have been anything: an Overrun.
func parseEvents(b []byte) []Event {
	var events []Event
	for len(b) > 0 {
		if len(b) < unix.SizeofNlMsghdr {
			return append(events, Event{Kind: Overrun})
		}
		n := int64(native.Uint32(b)) // an int of 32 bits cannot hold it
		if n < unix.SizeofNlMsghdr || n > int64(len(b)) {
			return append(events, Event{Kind: Overrun})
		}
		if e, ok, err := parseEvent(native.Uint16(b[4:]), native.Uint16(b[6:]), b[unix.SizeofNlMsghdr:n]); err != nil {
			events = append(events, Event{Kind: Overrun})
		} else if ok {
			e.Port = native.Uint32(b[12:])
			events = append(events, e)
		}
		b = b[min(align(int(n)), len(b)):]
	}
	return events
}

// parseEvent reads the body of a message of a type and with flags, and reports whether it is about
// anything that there are events for.
func parseEvent(typ, flags uint16, body []byte) (Event, bool, error) {
	switch typ {
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		a, family, err := parseAddress(body)
		return Event{Kind: AddressChanged, Family: family, Index: a.Index, Addr: a.Addr, Network: a.Network(), Deleted: typ == unix.RTM_DELADDR}, true, err
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		l, family, err := parseLink(body)
		kind := LinkChanged
		// Of another family it is the link's part in something that ended: AF_BRIDGE, a port that
		// left its bridge.
		if typ == unix.RTM_DELLINK && family == unix.AF_UNSPEC {
			kind = LinkGone
		}
		return Event{Kind: kind, Index: l.Index, Name: l.Name, Down: !l.Up || kind == LinkGone}, true, err
	case unix.RTM_NEWRULE, unix.RTM_DELRULE:
		r, err := parseRule(body)
		if err != nil {
			return Event{}, false, err
		}
		return Event{Kind: RuleChanged, Family: int(body[0]), Priority: r.Priority, Table: r.Table, Protocol: r.Protocol, Deleted: typ == unix.RTM_DELRULE}, true, nil
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		r, cloned, err := parseRoute(body)
		if a, ok := r.localAddress(); ok && err == nil {
			return Event{Kind: AddressChanged, Family: r.Family, Index: a.Index, Addr: a.Addr, Deleted: typ == unix.RTM_DELROUTE}, true, nil
		}
		return Event{
			Kind: RouteChanged, Family: r.Family, Table: r.Table, Index: r.Index, Protocol: r.Protocol,
			Deleted: typ == unix.RTM_DELROUTE, Route: &r, Replaced: typ == unix.RTM_NEWROUTE && flags&unix.NLM_F_REPLACE != 0,
			Appended: typ == unix.RTM_NEWROUTE && flags&unix.NLM_F_APPEND != 0,
		}, !cloned, err
	case rtmNewNexthop, rtmDelNexthop:
		id, err := nexthopID(body)
		return Event{Kind: NexthopChanged, Nexthop: id, Deleted: typ == rtmDelNexthop}, true, err
	case unix.RTM_NEWNEIGH:
		n, err := parseNeighbour(body)
		return Event{Kind: NeighbourSilent, Index: n.Index, Addr: n.Addr}, n.State == NeighbourFailed, err
	}
	return Event{}, false, nil
}
