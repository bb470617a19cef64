package route

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Image is the routes of one family in a table, as the kernel has them: read once and kept up to
// date by the events of a Watcher, which has to hear of them before the Image is read. It takes
// about 200 bytes for each route.
//
// Not every event says what changed: of a route that was replaced there is no notification, nor
// of the routes that go with a link. Then the Image is uncertain, and has to be read again.
type Image struct {
	family  int
	table   uint32
	most    int // routes of routing daemons
	routes  map[netip.Prefix]string
	count   int
	daemons int
	left    int
	since   time.Time // lifetimes of routes are counted from here
	took    time.Duration
}

// ReadImage reads the routes of family in table. Of those that routing daemons made it keeps no
// more than most, so that a table of the whole Internet does not take all memory; 0 is no limit.
func (c *Conn) ReadImage(family int, table uint32, most int) (*Image, error) {
	i := &Image{family: family, table: table, most: most}
	return i, i.Read(c)
}

// Read reads the routes again.
func (i *Image) Read(c *Conn) error {
	began := time.Now()
	i.routes, i.count, i.daemons, i.left, i.since = make(map[netip.Prefix]string), 0, 0, 0, began
	request := make([]byte, unix.SizeofRtMsg)
	request[0] = byte(i.family)
	request = appendUint32(request, unix.RTA_TABLE, i.table)
	var routes []Route // that cannot be told without the nexthop objects
	var malformed error
	err := c.each(unix.RTM_GETROUTE, unix.RTM_NEWROUTE, request, func(body []byte) {
		r, cloned, err := parseRoute(body)
		if err != nil {
			malformed = err
			return
		}
		switch {
		case cloned || r.Family != i.family || r.Table != i.table || r.Expires < 0:
		case r.NexthopID != 0 && r.Index == 0 && !r.Multipath:
			routes = append(routes, r)
		default:
			i.put(r)
		}
	})
	i.took = time.Since(began)
	switch {
	case errors.Is(err, nl.ErrDumpInterrupted): // the events of these changes are still to come
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EAFNOSUPPORT): // no such table or family
	case err != nil:
		return fmt.Errorf("list routes of table %d: %w", i.table, err)
	}
	if malformed != nil {
		return fmt.Errorf("list routes of table %d: %w", i.table, malformed)
	}
	err = c.resolve(routes)
	for _, r := range routes {
		i.put(r)
	}
	return err
}

// each is dump with a function that is called for each message, which must not keep it. An
// interrupted dump is not repeated.
func (c *Conn) each(typ, answer uint16, body []byte, f func([]byte)) error {
	req := nl.NetlinkRequest{
		NlMsghdr: unix.NlMsghdr{Type: typ, Flags: unix.NLM_F_REQUEST | unix.NLM_F_DUMP},
		RawData:  body,
		Sockets:  c.reading,
	}
	return req.ExecuteIter(unix.NETLINK_ROUTE, answer, func(msg []byte) bool {
		f(msg)
		return true
	})
}

// Len returns how many routes there are, and Left how many of routing daemons are left out.
func (i *Image) Len() int  { return i.count }
func (i *Image) Left() int { return i.left }

// Took returns how long the last Read took.
func (i *Image) Took() time.Duration { return i.took }

// To returns the routes to one destination, in the kernel's order.
func (i *Image) To(dst netip.Prefix) []Route {
	var routes []Route
	now := i.now()
	for text := i.routes[dst]; text != ""; {
		n := int(native.Uint16([]byte(text[:2])))
		r, _, err := parseRoute([]byte(text[2 : 2+n]))
		text = text[2+n:]
		if err != nil { // not of what encodeWhole wrote
			continue
		}
		if r.Expires > 0 {
			if r.Expires -= now; r.Expires <= 0 {
				continue
			}
		}
		routes = append(routes, r)
	}
	return routes
}

// All calls f for the routes to each destination, in no order.
func (i *Image) All(f func(dst netip.Prefix, routes []Route)) {
	for dst := range i.routes {
		f(dst, i.To(dst))
	}
}

// ofDaemon reports whether a route is one of those of which there may be very many: to a gateway, and
// made by a routing daemon (RTPROT_GATED to RTPROT_EIGRP of linux/rtnetlink.h).
func ofDaemon(r Route) bool {
	switch r.Protocol {
	case 8, 11, 12, 14, 15, 42, 99, 186, 187, 188, 189, 192:
		return r.Dst.Bits() > 0 && r.viaGateway()
	}
	return false
}

// now is what lifetimes are counted from.
func (i *Image) now() int { return int(time.Since(i.since) / time.Second) }

// put adds a route behind those to its destination.
func (i *Image) put(r Route) {
	if ofDaemon(r) {
		if i.most > 0 && i.daemons >= i.most {
			i.left++
			return
		}
		i.daemons++
	}
	i.count++
	if r.Expires > 0 {
		r.Expires += i.now()
	}
	body := r.encodeWhole()
	text := make([]byte, 0, 2+len(body))
	text = native.AppendUint16(text, uint16(len(body)))
	text = append(text, body...)
	i.routes[r.Dst] += string(text)
}

// encodeWhole is encode with the links and gateways of a nexthop object.
func (r Route) encodeWhole() []byte {
	id := r.NexthopID
	if id == 0 {
		return r.encode()
	}
	r.NexthopID = 0
	return appendUint32(r.encode(), rtaNexthopID, id)
}

// set makes routes those to a destination.
func (i *Image) set(dst netip.Prefix, routes []Route) {
	for _, r := range i.To(dst) {
		i.count--
		if ofDaemon(r) {
			i.daemons--
		}
	}
	delete(i.routes, dst)
	for _, r := range routes {
		i.put(r)
	}
}

// Apply takes over a notification of a route, and reports whether it is certain what the table
// has now. An event of another table or family changes nothing.
func (i *Image) Apply(e Event) (certain bool) {
	r := e.Route
	if e.Kind != RouteChanged || r == nil || r.Family != i.family || r.Table != i.table {
		return true
	}
	have := i.To(r.Dst)
	same := slices.IndexFunc(have, r.Equal)
	inPlace := 0
	for _, h := range have {
		if h.place() == r.place() {
			inPlace++
		}
	}
	switch {
	case r.NexthopID != 0 && r.Index == 0 && !r.Multipath:
		return false // where it leads the object tells
	case e.Deleted && same >= 0:
		i.set(r.Dst, slices.Delete(have, same, same+1))
	case e.Deleted && inPlace > 0:
		return false // of one next hop of several, say
	case e.Deleted:
		i.left = max(0, i.left-1) // or the table was read after that
	case e.Replaced && same < 0 && inPlace == 1:
		at := slices.IndexFunc(have, func(h Route) bool { return h.place() == r.place() })
		have[at] = *r
		i.set(r.Dst, have)
	case same >= 0 && inPlace == 1:
		have[same] = *r // its lifetime may be another one
		i.set(r.Dst, have)
	case inPlace > 0:
		return false
	default:
		at := slices.IndexFunc(have, func(h Route) bool { return h.comesAfter(*r) })
		if at < 0 {
			at = len(have)
		}
		i.set(r.Dst, slices.Insert(have, at, *r))
	}
	return true
}

// comesAfter reports whether r stands behind a new route o to the same destination.
func (r Route) comesAfter(o Route) bool {
	return cmp.Or(cmp.Compare(o.TOS, r.TOS), cmp.Compare(r.Metric, o.Metric)) > 0
}
