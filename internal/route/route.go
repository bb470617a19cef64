package route

import (
	"cmp"
	"encoding/base64"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Values of Route.Pref, RFC 4191 section 2.1.
const (
	PrefMedium = 0
	PrefHigh   = 1
	PrefLow    = 3
)

// MetricIPv6 is what the kernel makes of metric 0 in IPv6: IP6_RT_PRIO_USER.
const MetricIPv6 = 1024

const (
	clockTicks = 100 // of rta_cacheinfo, a second: USER_HZ

	rtaNexthopID = 30                        // RTA_NH_ID of linux/rtnetlink.h
	flagsNexthop = 0x02 | unix.RTNH_F_ONLINK // RTNH_F_PERVASIVE; the other RTNH_F_* are states
)

// Route is one route of a table, `ip route`. All that the kernel told is in it, also where there is
// no field: a route that is read, changed and added has the attributes of the first.
type Route struct {
	Family   int          // AF_INET or AF_INET6
	Dst      netip.Prefix // masked; the default route is 0.0.0.0/0 or ::/0
	From     netip.Prefix // IPv6 routes for some sources only; the zero Prefix is all
	Table    uint32       // the whole number, above 255 too
	Metric   uint32       // a request's 0 becomes 1024 in IPv6
	TOS      uint8        // IPv4 only
	Type     uint8        // unix.RTN_*; 0 in a request is RTN_UNICAST
	Scope    uint8        // unix.RT_SCOPE_*; IPv4 only
	Protocol uint8        // who made the route: Protocol for ours
	Index    int          // ifindex of the link; 0 if there is none or there are several
	Gateway  netip.Addr   // without a zone; in IPv4 it may be of IPv6. The zero Addr is none
	Src      netip.Addr   // the preferred source address, if there is one
	Onlink   bool         // the gateway is on the link whatever the routes say
	Pref     uint8        // PrefMedium, PrefHigh or PrefLow; IPv6 only
	// Expires is the rest of the lifetime in seconds, rounded up; 0 is forever. IPv6 only.
	Expires   int
	Multipath bool   // there are several gateways or links, with weights
	Encap     bool   // packets are wrapped: MPLS, a tunnel, segment routing
	NexthopID uint32 // the nexthop object (`ip nexthop`) that Index and Gateway come from, or 0
	Dead      bool   // its link is down
	deadHops  uint64 // which of several next hops are dead, by bits
	LinkDown  bool   // its link has no carrier

	rest string // the attributes without a field, as the kernel encodes them, in its order
}

// NewRoute returns a unicast route of ours to dst, through a gateway or with the zero Addr
// directly on the link.
func NewRoute(table uint32, dst netip.Prefix, gateway netip.Addr, index int) Route {
	r := Route{Family: unix.AF_INET, Dst: dst.Masked(), Table: table, Protocol: Protocol, Gateway: gateway, Index: index}
	if dst.Addr().Is6() {
		r.Family = unix.AF_INET6
	}
	if !gateway.IsValid() {
		r.Scope = unix.RT_SCOPE_LINK // as `ip route` has it; only then may it lead to a gateway
	}
	return r.normal()
}

// In returns r as a route of ours in another table. If it is a unicast route, src becomes its
// preferred source; the zero Addr keeps what it has. A lifetime stays: the copy ends with r.
func (r Route) In(table uint32, src netip.Addr) Route {
	r.Table, r.Protocol, r.Dead, r.LinkDown, r.deadHops = table, Protocol, false, false, 0
	if src.IsValid() && r.shown().Type == unix.RTN_UNICAST {
		r.Src = src
	}
	return r
}

// Equal reports whether r and o are the same route, whatever is left of their lifetimes and
// whatever the state of the link.
func (r Route) Equal(o Route) bool { return r.Dst == o.Dst && r.key() == o.key() }

func (r Route) key() Route {
	r = r.normal()
	r.Expires, r.Dead, r.LinkDown, r.deadHops = 0, false, false, 0
	return r
}

// normal returns r, a request, as the kernel shows it after it was added.
func (r Route) normal() Route {
	r = r.shown()
	if r.Family == unix.AF_INET6 && r.Metric == 0 {
		r.Metric = MetricIPv6
	}
	return r
}

// shown returns r with what has one meaning in one form.
func (r Route) shown() Route {
	if r.Type == unix.RTN_UNSPEC {
		r.Type = unix.RTN_UNICAST
	}
	r.Gateway = r.Gateway.WithZone("")
	if r.Family != unix.AF_INET6 {
		r.Pref, r.Expires = 0, 0
		return r
	}
	r.TOS, r.Scope = 0, unix.RT_SCOPE_UNIVERSE
	switch r.Type {
	case unix.RTN_BLACKHOLE, unix.RTN_UNREACHABLE, unix.RTN_PROHIBIT, unix.RTN_THROW:
		r.Index = 0 // they come with lo
	}
	return r
}

// viaGateway reports whether the kernel looks for the way to a gateway when r is added.
func (r Route) viaGateway() bool { return r.Gateway.IsValid() || r.Multipath || r.NexthopID != 0 }

// place is what a table has one route for. The kernel lets others follow if they are appended: in
// IPv4 as spares behind the first, in IPv6 as links or gateways that share the traffic.
type place struct {
	dst, from netip.Prefix
	tos       uint8
	metric    uint32
}

func (r Route) place() place { return place{r.Dst, r.From, r.TOS, r.Metric} }

// Spread returns routes of one table with metrics raised so that no two stand in one place, where
// the kernel would refuse the second: the routes that a second router advertises for instance. The
// preferred one, or the earlier of equals, keeps its metric; doubles are left out.
func Spread(routes []Route) []Route {
	rank := func(pref uint8) int { return [4]int{PrefHigh: 0, PrefMedium: 1, 2: 1, PrefLow: 2}[pref&3] }
	sorted := make([]Route, len(routes))
	for i, r := range routes {
		sorted[i] = r.normal()
	}
	slices.SortStableFunc(sorted, func(a, b Route) int {
		return cmp.Or(cmp.Compare(a.Metric, b.Metric), cmp.Compare(rank(a.Pref), rank(b.Pref)))
	})
	seen := make(map[Route]bool)
	taken := make(map[place]bool)
	var spread []Route
	for _, r := range sorted {
		if seen[r.key()] {
			continue
		}
		seen[r.key()] = true
		for taken[r.place()] && r.Metric < ^uint32(0) {
			r.Metric++
		}
		taken[r.place()] = true
		spread = append(spread, r)
	}
	return spread
}

// check returns why r, as normal returns it, cannot be added; nil if it can.
func (r Route) check() error {
	bits := 32
	switch r.Family {
	case unix.AF_INET:
	case unix.AF_INET6:
		bits = 128
	default:
		return fmt.Errorf("family %d: %w", r.Family, unix.EAFNOSUPPORT)
	}
	is := func(a netip.Addr) bool { return !a.IsValid() || a.BitLen() == bits && a.Zone() == "" }
	switch {
	case !r.Dst.IsValid() || !is(r.Dst.Addr()) || r.Dst != r.Dst.Masked():
		return fmt.Errorf("%v is no destination of this family", r.Dst)
	case r.From.IsValid() && (bits == 32 || !is(r.From.Addr()) || r.From != r.From.Masked()):
		return fmt.Errorf("%v is no source of this family", r.From)
	case !is(r.Src):
		return fmt.Errorf("%v is no source address of this family", r.Src)
	case bits == 128 && !is(r.Gateway):
		return fmt.Errorf("%v is no gateway of this family", r.Gateway)
	case r.Table == 0:
		return errors.New("a route needs a table")
	case r.Type == unix.RTN_UNICAST && r.Index == 0 && !r.Multipath && r.NexthopID == 0:
		return errors.New("a unicast route needs a link")
	case r.Expires < 0:
		return errors.New("its lifetime is over")
	}
	return nil
}

// MarshalText returns r as a text that UnmarshalText reads, with all that the kernel told.
func (r Route) MarshalText() ([]byte, error) {
	return base64.StdEncoding.AppendEncode(nil, r.normal().encodeWhole()), nil
}

// UnmarshalText sets r to what MarshalText made a text of.
func (r *Route) UnmarshalText(text []byte) error {
	body, err := base64.StdEncoding.AppendDecode(nil, text)
	if err != nil {
		return err
	}
	*r, _, err = parseRoute(body)
	return err
}

// encode returns r, as normal returns it, as struct rtmsg and attributes. What it leaves out means
// none when the message adds, but mostly any when it deletes.
func (r Route) encode() []byte {
	var flags uint32
	if r.Onlink {
		flags = unix.RTNH_F_ONLINK
	}
	// The header has one byte for the table: the attribute goes first.
	b := []byte{byte(r.Family), byte(r.Dst.Bits()), byte(max(r.From.Bits(), 0)), r.TOS, unix.RT_TABLE_UNSPEC, r.Protocol, r.Scope, r.Type}
	b = native.AppendUint32(b, flags)
	b = appendUint32(b, unix.RTA_TABLE, r.Table)
	if r.Dst.Bits() > 0 {
		b = appendAttribute(b, unix.RTA_DST, r.Dst.Addr().AsSlice())
	}
	if r.From.IsValid() {
		b = appendAttribute(b, unix.RTA_SRC, r.From.Addr().AsSlice())
	}
	if r.Metric != 0 {
		b = appendUint32(b, unix.RTA_PRIORITY, r.Metric)
	}
	if r.Src.IsValid() {
		b = appendAttribute(b, unix.RTA_PREFSRC, r.Src.AsSlice())
	}
	if r.Pref != PrefMedium {
		b = appendAttribute(b, unix.RTA_PREF, []byte{r.Pref})
	}
	if r.Expires > 0 {
		b = appendUint32(b, unix.RTA_EXPIRES, uint32(r.Expires))
	}
	if r.NexthopID != 0 {
		b = appendUint32(b, rtaNexthopID, r.NexthopID)
	} else {
		switch {
		case !r.Gateway.IsValid():
		case r.Family == unix.AF_INET && r.Gateway.Is6():
			via := native.AppendUint16(nil, unix.AF_INET6)
			b = appendAttribute(b, unix.RTA_VIA, append(via, r.Gateway.AsSlice()...))
		default:
			b = appendAttribute(b, unix.RTA_GATEWAY, r.Gateway.AsSlice())
		}
		if r.Index != 0 {
			b = appendUint32(b, unix.RTA_OIF, uint32(r.Index))
		}
	}
	// rest was read attribute by attribute, so the error cannot come back.
	_ = eachAttributeAsIs([]byte(r.rest), func(typ uint16, value []byte) {
		switch typ & attributeType {
		case unix.RTA_MULTIPATH, unix.RTA_ENCAP, unix.RTA_ENCAP_TYPE, unix.RTA_FLOW:
			if r.NexthopID != 0 {
				return // is the object's, and is refused beside it
			}
		}
		b = appendAttribute(b, typ, value)
	})
	return b
}

// unspecifiedOf returns the address of a family that stands for none.
func unspecifiedOf(family int) (addr netip.Addr, known bool) {
	switch family {
	case unix.AF_INET:
		return netip.IPv4Unspecified(), true
	case unix.AF_INET6:
		return netip.IPv6Unspecified(), true
	}
	return netip.Addr{}, false
}

// parseRoute reads the body of an RTM_NEWROUTE or RTM_DELROUTE, and reports whether it is a clone:
// a cached result of a lookup, which belongs to the route that it comes from.
func parseRoute(b []byte) (r Route, cloned bool, err error) {
	if len(b) < unix.SizeofRtMsg {
		return Route{}, false, errMalformed
	}
	flags := native.Uint32(b[8:])
	r = Route{
		Family: int(b[0]), TOS: b[3], Table: uint32(b[4]), Protocol: b[5], Scope: b[6], Type: b[7],
		Onlink: flags&unix.RTNH_F_ONLINK != 0, Dead: flags&unix.RTNH_F_DEAD != 0, LinkDown: flags&unix.RTNH_F_LINKDOWN != 0,
	}
	unspecified, known := unspecifiedOf(r.Family)
	if !known {
		return Route{}, false, errMalformed
	}
	var bad bool
	addr := func(value []byte) netip.Addr {
		a, ok := netip.AddrFromSlice(value)
		bad = bad || !ok
		return a
	}
	own := func(value []byte) netip.Addr {
		a := addr(value)
		bad = bad || a.BitLen() != unspecified.BitLen()
		return a
	}
	dst, from := unspecified, unspecified
	var rest []byte
	err = eachAttributeAsIs(b[unix.SizeofRtMsg:], func(typ uint16, value []byte) {
		switch typ & attributeType {
		case unix.RTA_UNSPEC, unix.RTA_PAD, unix.RTA_IIF:
		case unix.RTA_TABLE:
			r.Table = uint32Of(value)
		case unix.RTA_DST:
			dst = own(value)
		case unix.RTA_SRC:
			from = own(value)
		case unix.RTA_PRIORITY:
			r.Metric = uint32Of(value)
		case unix.RTA_PREFSRC:
			r.Src = own(value)
		case unix.RTA_OIF:
			r.Index = int(int32(uint32Of(value)))
		case unix.RTA_GATEWAY:
			r.Gateway = own(value)
		case unix.RTA_VIA:
			r.Gateway = addr(value[min(2, len(value)):])
		case unix.RTA_PREF:
			if len(value) > 0 {
				r.Pref = value[0]
			}
		case unix.RTA_EXPIRES: // in requests
			r.Expires = int(int32(uint32Of(value)))
		case unix.RTA_CACHEINFO: // in answers, the third number
			if len(value) >= 12 {
				r.Expires = seconds(int32(native.Uint32(value[8:])))
			}
		case rtaNexthopID:
			r.NexthopID = uint32Of(value)
		default:
			value, whole := r.keep(typ&attributeType, value)
			bad = bad || !whole
			rest = appendAttribute(rest, typ, value)
		}
	})
	r.Dst = netip.PrefixFrom(dst, int(b[1])).Masked()
	if b[2] != 0 {
		r.From = netip.PrefixFrom(from, int(b[2])).Masked()
		bad = bad || !r.From.IsValid()
	}
	if bad || !r.Dst.IsValid() {
		err = errMalformed
	}
	r.rest = string(rest)
	return r.shown(), flags&unix.RTM_F_CLONED != 0, err
}

// keep returns what is kept of an attribute that has no field of its own, and whether it is well-formed.
func (r *Route) keep(typ uint16, value []byte) (kept []byte, whole bool) {
	switch typ {
	case unix.RTA_MULTIPATH:
		r.Multipath = true
		value = slices.Clone(value)
		r.deadHops, whole = clearNexthopState(value)
		return value, whole
	case unix.RTA_ENCAP:
		r.Encap = true
	}
	return value, true
}

// seconds rounds up clock ticks, away from zero: what is over by less than a second is over.
func seconds(ticks int32) int {
	if ticks < 0 {
		return (int(ticks) - clockTicks + 1) / clockTicks
	}
	return (int(ticks) + clockTicks - 1) / clockTicks
}
