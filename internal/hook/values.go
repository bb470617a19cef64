package hook

import (
	"math"
	"math/bits"
	"net/netip"
	"strconv"
	"strings"

	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// variable is a value, or a word of one, with the name of its variable.
type variable struct{ name, value string }

// words returns the words of variables that hold lists.
func (e *event) words(names ...string) (all []variable) {
	for _, name := range names {
		for _, word := range strings.Fields(e.get(name)) {
			all = append(all, variable{name, word})
		}
	}
	return all
}

// none reports whether an address is 0.0.0.0 or ::, which servers and NetworkManager write for "none".
func none(a netip.Addr) bool { return a.IsUnspecified() && a.Zone() == "" }

// parse parses an address of either family.
func (e *event) parse(v variable) (netip.Addr, bool) {
	a, err := netip.ParseAddr(v.value)
	why := wire.Mapped(a)
	if err != nil {
		why = "this is no address"
	}
	if why != "" {
		e.leaveOut(v.name, v.value, why)
		return a, false
	}
	return a, true
}

// parseOwn parses an address of this host, with or without its prefix length.
func (e *event) parseOwn(v variable) (netip.Addr, bool) {
	text, _, _ := strings.Cut(v.value, "/")
	a, ok := e.parse(variable{v.name, text})
	if !ok {
		return a, false
	}
	if !isUnicast(a) || a.Zone() != "" || a.Is6() && a.IsLinkLocalUnicast() {
		e.leaveOut(v.name, v.value, "no table is leased for such an address")
		return a, false
	}
	return a, true
}

// isUnicast reports whether another host can have the address.
func isUnicast(a netip.Addr) bool {
	if a.Is4() && (a.As4()[0] == 0 || a == netip.AddrFrom4([4]byte{255, 255, 255, 255})) {
		return false
	}
	return a.IsValid() && !a.IsUnspecified() && !a.IsMulticast() && !a.IsLoopback()
}

// isRouter reports whether a router of a host with the address own can have the address a.
func isRouter(a netip.Addr, own netip.Prefix) bool {
	if !isUnicast(a) || a == own.Addr() {
		return false
	}
	if !own.IsValid() || own.Addr().Is6() || own.Bits() > 30 || !own.Contains(a) {
		return true
	}
	last := own.Masked().Addr().As4()
	host := uint32(math.MaxUint32) >> own.Bits()
	for i := range last {
		last[i] |= byte(host >> (24 - 8*i))
	}
	return a != own.Masked().Addr() && a != netip.AddrFrom4(last)
}

// gateways returns the routers among all that have the family of own. Those of the other family belong
// to another event.
func (e *event) gateways(own netip.Prefix, all []variable) (list []netip.Addr) {
	for _, v := range all {
		a, ok := e.parse(v)
		if !ok || a.Is4() != own.Addr().Is4() || none(a) {
			continue
		}
		a = a.WithZone("") // the router is on the link of the address
		switch {
		case !isRouter(a, own):
			e.leaveOut(v.name, v.value, "no router has this address")
		case len(list) == maxGateways:
			e.cut(v.name, maxGateways)
		default:
			list = append(list, a)
		}
	}
	return list
}

// nameservers adds the name servers among all that have the family to a lease.
func (e *event) nameservers(l *Lease, family4 bool, all []variable) {
	resolved := e.settings.resolver == uplink.Resolved
	if e.settings.serversFile == "" && !resolved || e.settings.resolver == uplink.NoResolver {
		return
	}
	for _, v := range all {
		a, ok := e.parse(v)
		if !ok || a.Is4() != family4 || none(a) {
			continue
		}
		// The client adds the zone of a link-local address itself.
		if a.Is6() && a.IsLinkLocalUnicast() && a.Zone() == l.Ifname {
			a = a.WithZone("")
		}
		switch {
		case !isUnicast(a) && !a.IsLoopback() || a.Zone() != "":
			e.leaveOut(v.name, v.value, "no name server has this address")
		case len(l.Nameservers) == maxServers:
			e.cut(v.name, maxServers)
		default:
			l.Nameservers = append(l.Nameservers, a)
			l.ServersFile, l.Resolver = e.settings.serversFile, e.settings.resolver
		}
	}
}

// metric returns the metric of the first of count gateways; 0 if the variable is not set.
func (e *event) metric(name string, count int) uint32 {
	text := e.get(name)
	if text == "" {
		return 0
	}
	n, err := strconv.ParseUint(text, 10, 32)
	if err != nil || n+uint64(count) > math.MaxUint32 {
		e.leaveOut(name, text, "this is no metric")
		return 0
	}
	return uint32(n)
}

// static adds routes to a lease of the address own.
func (e *event) static(l *Lease, own netip.Prefix, name string, routes []uplink.StaticRoute) {
	for _, r := range routes {
		text := r.Dst.String()
		if r.Via.IsValid() {
			text += " via " + r.Via.String()
		}
		switch {
		case r.Dst.Addr().IsLoopback(), r.Dst.Addr().Is4In6(), r.Dst.Addr().Is4() != own.Addr().Is4(),
			r.Via.IsValid() && (!isRouter(r.Via, own) || r.Via.Zone() != ""):
			e.leaveOut(name, text, "packets from the address cannot take this route")
		case len(l.Static) == maxRoutes:
			e.cut(name, maxRoutes)
			return
		default:
			l.Static = append(l.Static, r)
		}
	}
}

// placed drops the routes from a lease if another program places them.
func (l *Lease) placed() {
	if l.Routes == uplink.NoRoutes {
		l.Gateways, l.Metric, l.Static = nil, 0, nil
	}
}

// netmask returns the prefix length of an IPv4 mask; 32 if the variable is not set or cannot be right. No
// uplink is larger than a /8, the largest network that was ever assigned.
func (e *event) netmask(name string) int {
	const host, largest = 32, 8
	text := e.get(name)
	if text == "" {
		return host
	}
	if a, err := netip.ParseAddr(text); err == nil && a.Is4() {
		b := a.As4()
		mask := uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
		if ones := bits.LeadingZeros32(^mask); ones >= largest && ones+bits.TrailingZeros32(mask) >= host {
			return ones
		}
	}
	e.leaveOut(name, text, "no uplink has this netmask")
	return host
}

// largest6 is the shortest IPv6 prefix that can be behind one uplink: a whole provider has a /32.
const largest6 = 32

// prefixLength returns the prefix length of an IPv6 address; 128 if the variable is not set or cannot be
// right.
func (e *event) prefixLength(name string) int {
	const host = 128
	text := e.get(name)
	if text == "" {
		return host
	}
	if n, err := strconv.Atoi(text); err == nil && n >= largest6 && n <= host {
		return n
	}
	e.leaveOut(name, text, "no uplink has this prefix length")
	return host
}

// delegated returns a prefix that DHCPv6 delegates, and whether the variable holds one.
func (e *event) delegated(name string) (netip.Prefix, bool) {
	v := variable{name, e.get(name)}
	if v.value == "" {
		return netip.Prefix{}, false
	}
	return e.parseDelegated(v)
}

func (e *event) parseDelegated(v variable) (netip.Prefix, bool) {
	p, err := netip.ParsePrefix(v.value)
	why := "this is no IPv6 prefix"
	if err == nil && p.Addr().Is6() {
		why = uplink.NotDelegated(p)
	}
	if why != "" {
		e.leaveOut(v.name, v.value, why)
		return netip.Prefix{}, false
	}
	return p.Masked(), true
}
