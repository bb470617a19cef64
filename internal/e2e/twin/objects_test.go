package twin

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// rtaNexthop is RTA_NH_ID, which package unix does not have.
const rtaNexthop = 30

// leg is one next hop of a route: a link, and a router there or nobody.
type leg struct {
	index   int
	gateway netip.Addr // zero: the destination itself is on the link
}

// route is a route as the kernel dumps it, without what passes by itself (ages, use counts).
type route struct {
	family   int
	table    uint32
	dst      netip.Prefix
	from     netip.Prefix // of source-specific IPv6 routes; zero for others
	tos      uint8
	metric   uint32
	typ      uint8
	scope    uint8
	protocol uint8
	source   netip.Addr // the preferred one
	legs     []leg
	dead     []bool // of the legs: the link is down
	weights  []uint8
	nexthop  uint32            // of a nexthop object
	pref     uint8             // of a router, IPv6
	others   map[uint16]string // attributes that nobody here looks into
}

// place is what tells a route of a table from another one: of those in one place the kernel
// takes any, or the first.
type place struct {
	dst, from netip.Prefix
	tos       uint8
	metric    uint32
}

func (r route) place() place { return place{r.dst, r.from, r.tos, r.metric} }

func (r route) isDefault() bool { return r.dst.Bits() == 0 }

// isHalf reports whether a route is short enough that VPNs use two or eight of its length in the
// place of a default: no registry gives networks of that length to anybody.
func (r route) isHalf() bool {
	if r.family == unix.AF_INET {
		return r.dst.Bits() <= 7
	}
	return r.dst.Bits() <= 6
}

// isError reports whether a route leads to an error.
func (r route) isError() bool {
	return slices.Contains([]uint8{unix.RTN_BLACKHOLE, unix.RTN_UNREACHABLE, unix.RTN_PROHIBIT, unix.RTN_THROW}, r.typ)
}

// with is the route with some of its legs, and whether there are any.
func (r route) with(keep func(i int, l leg) bool) (route, bool) {
	some := r
	some.legs, some.dead, some.weights = nil, nil, nil
	for i, l := range r.legs {
		if keep(i, l) {
			some.legs, some.dead, some.weights = append(some.legs, l), append(some.dead, r.dead[i]), append(some.weights, r.weights[i])
		}
	}
	return some, len(some.legs) > 0
}

// parseRoute reads a message, and reports whether it is a route of the tables: the kernel's
// dumps have clones and exceptions, too.
func parseRoute(b []byte) (route, bool) {
	r := route{family: int(b[0]), tos: b[3], table: uint32(b[4]), protocol: b[5], scope: b[6], typ: b[7], others: make(map[uint16]string)}
	flags := native.Uint32(b[8:])
	dst, from := anyOf(r.family), netip.Addr{}
	single := leg{}
	attributes(b[12:], func(typ uint16, value []byte) {
		switch typ {
		case unix.RTA_DST:
			dst = addrOf(value)
		case unix.RTA_SRC:
			from = addrOf(value)
		case unix.RTA_TABLE:
			r.table = uint32Of(value)
		case unix.RTA_PRIORITY:
			r.metric = uint32Of(value)
		case unix.RTA_PREFSRC:
			r.source = addrOf(value)
		case unix.RTA_OIF:
			single.index = int(uint32Of(value))
		case unix.RTA_GATEWAY, unix.RTA_VIA:
			single.gateway = gatewayOf(typ, value)
		case unix.RTA_MULTIPATH:
			r.parseLegs(value)
		case rtaNexthop:
			r.nexthop = uint32Of(value)
		case unix.RTA_PREF:
			r.pref = value[0]
		case unix.RTA_CACHEINFO, unix.RTA_UID, unix.RTA_IIF:
		default:
			r.others[typ] = fmt.Sprintf("%x", value)
		}
	})
	r.dst = netip.PrefixFrom(dst, int(b[1]))
	if from.IsValid() {
		r.from = netip.PrefixFrom(from, int(b[2]))
	}
	if len(r.legs) == 0 && single.index != 0 {
		r.legs, r.dead, r.weights = []leg{single}, []bool{flags&unix.RTNH_F_DEAD != 0}, []uint8{0}
	}
	return r, flags&unix.RTM_F_CLONED == 0
}

func (r *route) parseLegs(b []byte) {
	for len(b) >= unix.SizeofRtNexthop {
		n := int(native.Uint16(b))
		if n < unix.SizeofRtNexthop || n > len(b) {
			return
		}
		l := leg{index: int(native.Uint32(b[4:]))}
		attributes(b[unix.SizeofRtNexthop:n], func(typ uint16, value []byte) {
			if typ == unix.RTA_GATEWAY || typ == unix.RTA_VIA {
				l.gateway = gatewayOf(typ, value)
			}
		})
		r.legs = append(r.legs, l)
		r.dead = append(r.dead, b[2]&unix.RTNH_F_DEAD != 0)
		r.weights = append(r.weights, b[3])
		b = b[min(align(n), len(b)):]
	}
}

// gatewayOf reads RTA_GATEWAY, or RTA_VIA, which has a family first.
func gatewayOf(typ uint16, value []byte) netip.Addr {
	if typ == unix.RTA_VIA {
		value = value[2:]
	}
	return addrOf(value)
}

// message is the body of the RTM_NEWROUTE that makes the route in its table. Its gateways are on
// the link whatever the addresses there say, so that the order in which routes are made is free.
func (r route) message() []byte { return r.flagged(unix.RTNH_F_ONLINK) }

// flagged is message with other flags for the legs by a gateway.
func (r route) flagged(onlink byte) []byte {
	b := []byte{byte(r.family), byte(r.dst.Bits()), byte(max(r.from.Bits(), 0)), r.tos, unix.RT_TABLE_UNSPEC, r.protocol, r.scope, r.typ, 0, 0, 0, 0}
	b = attribute32(b, unix.RTA_TABLE, r.table)
	b = attribute(b, unix.RTA_DST, r.dst.Addr().AsSlice())
	if r.from.IsValid() {
		b = attribute(b, unix.RTA_SRC, r.from.Addr().AsSlice())
	}
	b = attribute32(b, unix.RTA_PRIORITY, r.metric)
	if r.family == unix.AF_INET6 && r.pref != 0 {
		b = attribute(b, unix.RTA_PREF, []byte{r.pref})
	}
	if len(r.legs) == 1 {
		if r.legs[0].gateway.IsValid() {
			native.PutUint32(b[8:], uint32(onlink))
			b = r.legs[0].appendGateway(b, r.family)
		}
		return attribute32(b, unix.RTA_OIF, uint32(r.legs[0].index))
	}
	var hops []byte
	for i, l := range r.legs {
		hop := []byte{0, 0, 0, r.weights[i]}
		hop = native.AppendUint32(hop, uint32(l.index))
		if l.gateway.IsValid() {
			hop[2] = onlink
			hop = l.appendGateway(hop, r.family)
		}
		native.PutUint16(hop, uint16(len(hop)))
		hops = append(hops, hop...)
	}
	if len(hops) > 0 {
		b = attribute(b, unix.RTA_MULTIPATH, hops)
	}
	return b
}

func (l leg) appendGateway(b []byte, family int) []byte {
	if familyOf(l.gateway) == family {
		return attribute(b, unix.RTA_GATEWAY, l.gateway.AsSlice())
	}
	return attribute(b, unix.RTA_VIA, append(native.AppendUint16(nil, uint16(familyOf(l.gateway))), l.gateway.AsSlice()...))
}

func (l leg) String() string {
	if l.gateway.IsValid() {
		return fmt.Sprintf("via %s dev %d", l.gateway, l.index)
	}
	return fmt.Sprintf("dev %d", l.index)
}

var typeNames = map[uint8]string{unix.RTN_UNICAST: "unicast", unix.RTN_LOCAL: "local", unix.RTN_BROADCAST: "broadcast",
	unix.RTN_ANYCAST: "anycast", unix.RTN_MULTICAST: "multicast", unix.RTN_BLACKHOLE: "blackhole",
	unix.RTN_UNREACHABLE: "unreachable", unix.RTN_PROHIBIT: "prohibit", unix.RTN_THROW: "throw"}

// String is everything that tells the route from another one, much as `ip route` shows it.
func (r route) String() string {
	text := fmt.Sprintf("%s %s", typeNames[r.typ], r.dst)
	if r.from.IsValid() {
		text += fmt.Sprintf(" from %s", r.from)
	}
	for i, l := range r.legs {
		text += " " + l.String()
		if r.weights[i] > 0 {
			text += fmt.Sprintf(" weight %d", r.weights[i]+1)
		}
	}
	text += fmt.Sprintf(" table %d proto %d scope %d metric %d", r.table, r.protocol, r.scope, r.metric)
	if r.source.IsValid() {
		text += fmt.Sprintf(" src %s", r.source)
	}
	if r.tos != 0 {
		text += fmt.Sprintf(" tos %#x", r.tos)
	}
	if r.nexthop != 0 {
		text += fmt.Sprintf(" nhid %d", r.nexthop)
	}
	if r.pref != 0 {
		text += fmt.Sprintf(" pref %d", r.pref)
	}
	var more []string
	for typ, value := range r.others {
		more = append(more, fmt.Sprintf(" [%d]=%s", typ, value))
	}
	slices.Sort(more)
	return text + strings.Join(more, "")
}

// routes dumps the routes of all tables, IPv4 first, in the kernel's order.
func (s *socket) routes() (all []route, err error) {
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		messages, err := s.dump(unix.RTM_GETROUTE, append([]byte{family}, make([]byte, 11)...))
		if err != nil {
			return nil, fmt.Errorf("dump routes: %w", err)
		}
		for _, m := range messages {
			if r, ok := parseRoute(m.body); ok {
				all = append(all, r)
			}
		}
	}
	return all, nil
}

// address is an address of a link.
type address struct {
	index   int
	addr    netip.Addr
	network netip.Prefix // of the far end where there is one, else of the address
	message []byte       // as the kernel told it
}

// addresses dumps the addresses of all links.
func (s *socket) addresses() (all []address, err error) {
	messages, err := s.dump(unix.RTM_GETADDR, make([]byte, 8))
	if err != nil {
		return nil, fmt.Errorf("dump addresses: %w", err)
	}
	for _, m := range messages {
		a := address{index: int(native.Uint32(m.body[4:])), message: m.body}
		var local, far netip.Addr
		attributes(m.body[8:], func(typ uint16, value []byte) {
			switch typ {
			case unix.IFA_LOCAL:
				local = addrOf(value)
			case unix.IFA_ADDRESS:
				far = addrOf(value)
			}
		})
		if a.addr = local; !local.IsValid() {
			a.addr = far
		}
		a.network = netip.PrefixFrom(far, int(m.body[1])).Masked()
		all = append(all, a)
	}
	return all, nil
}

// rule is a policy rule.
type rule struct {
	family   int
	priority uint32
	table    uint32
	action   uint8
	protocol uint8
	src, dst netip.Prefix
	iif      string
	text     string // all of it
}

// rules dumps the rules, IPv4 first.
func (s *socket) rules() (all []rule, err error) {
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		messages, err := s.dump(unix.RTM_GETRULE, append([]byte{family}, make([]byte, 11)...))
		if err != nil {
			return nil, fmt.Errorf("dump rules: %w", err)
		}
		for _, m := range messages {
			all = append(all, parseRule(m.body))
		}
	}
	return all, nil
}

func parseRule(b []byte) rule {
	r := rule{family: int(b[0]), table: uint32(b[4]), action: b[7], text: fmt.Sprintf("%x", b)}
	attributes(b[12:], func(typ uint16, value []byte) {
		switch typ {
		case unix.FRA_PRIORITY:
			r.priority = uint32Of(value)
		case unix.FRA_TABLE:
			r.table = uint32Of(value)
		case unix.FRA_PROTOCOL:
			r.protocol = value[0]
		case unix.FRA_SRC:
			r.src = netip.PrefixFrom(addrOf(value), int(b[2]))
		case unix.FRA_DST:
			r.dst = netip.PrefixFrom(addrOf(value), int(b[1]))
		case unix.FRA_IIFNAME:
			r.iif = string(value[:len(value)-1])
		}
	})
	return r
}

// linkNames dumps the names of all links.
func (s *socket) linkNames() (map[int]string, error) {
	messages, err := s.dump(unix.RTM_GETLINK, make([]byte, 16))
	if err != nil {
		return nil, fmt.Errorf("dump links: %w", err)
	}
	names := make(map[int]string)
	for _, m := range messages {
		attributes(m.body[16:], func(typ uint16, value []byte) {
			if typ == unix.IFLA_IFNAME {
				names[int(native.Uint32(m.body[4:]))] = string(value[:len(value)-1])
			}
		})
	}
	return names, nil
}
