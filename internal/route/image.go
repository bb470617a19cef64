package route

import (
	"cmp"
	"errors"
	"hash/maphash"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Sum returns a hash of what makes r the same route as another one, see Equal.
func (r Route) Sum(seed maphash.Seed) uint64 { return maphash.Comparable(seed, r.key()) }

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
	seed    maphash.Seed
	routes  map[uint64]string // by the hash of the destination: half of the memory
	count   int
	daemons int
	left    int
	since   time.Time // lifetimes of routes are counted from here
	took    time.Duration
}

// ReadImage reads the routes of family in table. Of those that routing daemons made it keeps no
// more than most, so that a table of the whole Internet does not take all memory; 0 is no limit.
func (c *Conn) ReadImage(family int, table uint32, most int) (*Image, error) {
	i := &Image{family: family, table: table, most: most, seed: maphash.MakeSeed()}
	return i, i.Read(c)
}

// Read reads the routes again.
func (i *Image) Read(c *Conn) error {
	began := time.Now()
	i.routes, i.count, i.daemons, i.left, i.since = make(map[uint64]string), 0, 0, 0, began
	var routes []Route // that cannot be told without the nexthop objects
	err := c.eachRoute(i.family, filter{table: i.table}, func(r Route) {
		if r.NexthopID != 0 && r.Index == 0 && !r.Multipath {
			routes = append(routes, r)
			return
		}
		i.put(r)
	})
	i.took = time.Since(began)
	if err != nil {
		return err
	}
	err = c.resolve(routes)
	for _, r := range routes {
		i.put(r)
	}
	return err
}

// answersBetween is after how many messages of a dump Meanwhile is called. They take a millisecond.
const answersBetween = 512

// each is dump with a function that is called for each message, which must not keep it. An
// interrupted dump is not repeated.
func (c *Conn) each(typ, answer uint16, body []byte, f func([]byte)) error {
	req := nl.NetlinkRequest{
		NlMsghdr: unix.NlMsghdr{Type: typ, Flags: unix.NLM_F_REQUEST | unix.NLM_F_DUMP},
		RawData:  body,
		Sockets:  c.handle(c.reading),
	}
	n := 0
	err := req.ExecuteIter(unix.NETLINK_ROUTE, answer, func(msg []byte) bool {
		if n++; n%answersBetween == 0 {
			c.meanwhile()
		}
		f(msg)
		return true
	})
	if err != nil && isPassing(err) {
		err = errors.Join(err, c.reopen(&c.reading, readingSocket))
	}
	return err
}

// Len returns how many routes there are, and Left how many of routing daemons are left out.
func (i *Image) Len() int  { return i.count }
func (i *Image) Left() int { return i.left }

// Took returns how long the last Read took.
func (i *Image) Took() time.Duration { return i.took }

// To returns the routes to one destination, in the kernel's order.
func (i *Image) To(dst netip.Prefix) []Route {
	routes := i.unpack(i.routes[i.hash(dst)])
	return slices.DeleteFunc(routes, func(r Route) bool { return r.Dst != dst })
}

// All calls f for the routes to each destination, in no order.
func (i *Image) All(f func(dst netip.Prefix, routes []Route)) {
	for _, text := range i.routes {
		i.each(text, f)
	}
}

// Keys returns what stands for the destinations, for Some.
func (i *Image) Keys() []uint64 { return slices.Collect(maps.Keys(i.routes)) }

// Some is All for the destinations of some keys, as far as there are any still.
func (i *Image) Some(keys []uint64, f func(dst netip.Prefix, routes []Route)) {
	for _, key := range keys {
		i.each(i.routes[key], f)
	}
}

func (i *Image) each(text string, f func(dst netip.Prefix, routes []Route)) {
	routes := i.unpack(text)
	for len(routes) > 0 {
		dst := routes[0].Dst
		var to, rest []Route
		for _, r := range routes {
			if r.Dst == dst {
				to = append(to, r)
			} else { // of the same hash
				rest = append(rest, r)
			}
		}
		f(dst, to)
		routes = rest
	}
}

func (i *Image) hash(dst netip.Prefix) uint64 { return maphash.Comparable(i.seed, dst) }

// The attribute with the table comes first, and is the same for all: it is left out.
const (
	tableFrom = unix.SizeofRtMsg
	tableTo   = tableFrom + unix.SizeofRtAttr + 4
)

// pack appends a route to others.
func (i *Image) pack(text string, r Route) string {
	if r.Expires > 0 {
		r.Expires += i.now()
	}
	body := r.encodeWhole()
	packed := make([]byte, 0, len(text)+2+len(body)-(tableTo-tableFrom))
	packed = append(packed, text...)
	packed = native.AppendUint16(packed, uint16(len(body)-(tableTo-tableFrom)))
	packed = append(packed, body[:tableFrom]...)
	return string(append(packed, body[tableTo:]...))
}

func (i *Image) unpack(text string) []Route {
	var routes []Route
	now := i.now()
	for text != "" {
		n := int(native.Uint16([]byte(text[:2])))
		r, _, err := parseRoute([]byte(text[2 : 2+n]))
		text = text[2+n:]
		if err != nil { // not of what pack wrote
			continue
		}
		r.Table = i.table
		if r.Expires > 0 {
			if r.Expires -= now; r.Expires <= 0 {
				continue
			}
		}
		routes = append(routes, r)
	}
	return routes
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
	i.routes[i.hash(r.Dst)] = i.pack(i.routes[i.hash(r.Dst)], r)
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
	hash := i.hash(dst)
	var rest string
	for _, r := range i.unpack(i.routes[hash]) {
		if r.Dst != dst {
			rest = i.pack(rest, r)
			continue
		}
		i.count--
		if ofDaemon(r) {
			i.daemons--
		}
	}
	delete(i.routes, hash)
	if rest != "" {
		i.routes[hash] = rest
	}
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
