package uplink

import (
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
)

// Main is what a plan of routes is made from: what the table main of one family says about the
// link of an uplink, and about the links that are no uplinks.
type Main struct {
	Index     int           // of the link
	Addresses []Address     // of the link
	Routes    []route.Route // of main, with a next hop over the link, in main's order
	// Taken are routes that move took out of main, for this address or for another one of the link,
	// as they were there. Lost are those that went when the link was down.
	Taken, Lost []route.Route
	// DeadEnd reports that main has a default route that leads nowhere.
	DeadEnd bool
	// Local are routes of main over links that are no uplinks: bridges of containers, networks
	// behind this host, tunnels.
	Local []route.Route
	// Below are default routes of main over the link that a macvlan is on, if the address is in a network of that link.
	Below []route.Route
	// OfHost are addresses on lo, if a default route over the link may have one as its source, and move takes routes.
	OfHost []netip.Addr
	// Bare reports that the link is up without an IPv4 address of its own: what main has over it beside other links is dead.
	Bare bool
	// Ties are the exceptions from "main first", if the uplink wants that.
	Ties []Tie
	// Ranges are addresses that table local gives to the link, beside single ones.
	Ranges []netip.Prefix
	// OnLink reports that the caller gave the network of the address before the address was on
	// the link, so that the network is on the link whatever main says.
	OnLink bool
}

// LostDefault is what a holder says is missing if main has no default route over the link any more.
const LostDefault = "the default route that main had over the link"

// Address is an address of a link, and the network that is on the link with it: of the far end of a
// point-to-point link.
type Address struct {
	Addr    netip.Addr
	Network netip.Prefix
	Local   bool // by a route of type local, which keeps no routes on the link
}

// Plan returns the routes that a lease of table has to hold for the uplink: those that main would
// have on a host with this one uplink. That are main's routes over the link, with the address as
// their source, then what the caller gave and main has not, then, where there is no default route, those by the
// gateways of the link below, then the routes over links that are no uplinks. No two of them share destination, TOS and metric: see route.Spread.
func (u Uplink) Plan(m Main, table uint32) []route.Route {
	if !u.Settings.PlacesRoutes() {
		return nil
	}
	var routes []route.Route
	for _, group := range byDestination(m.all()) {
		for _, r := range u.own(m, group) {
			routes = append(routes, r.In(table, u.Addr()))
		}
	}
	for _, r := range u.Given(m, table) {
		if !slices.ContainsFunc(routes, func(have route.Route) bool { return SameWay(have, r) }) {
			routes = append(routes, r)
		}
	}
	routes = append(routes, u.below(m, routes, table)...)
	return route.Spread(append(routes, u.local(m, routes, table)...))
}

// below returns default routes by the gateways of the link that a macvlan is on, unless own has a default route.
// Their metrics put them behind the routes of that link.
func (u Uplink) below(m Main, own []route.Route, table uint32) (routes []route.Route) {
	if slices.ContainsFunc(own, func(r route.Route) bool { return r.Dst.Bits() == 0 }) {
		return nil
	}
	for _, r := range m.Below {
		if u.Carries(r) && r.Gateway.IsValid() && r.Gateway.Is4() == u.Addr().Is4() {
			to := route.NewRoute(table, r.Dst, r.Gateway, m.Index)
			to.Src, to.Metric = u.Addr(), max(r.Metric, r.Metric+1)
			if r.Gateway.Is4() || !r.Gateway.IsLinkLocalUnicast() { // "onlink" is refused in IPv6, since main has the gateway on the link below
				link := route.NewRoute(table, netip.PrefixFrom(r.Gateway, r.Gateway.BitLen()), netip.Addr{}, m.Index)
				link.Src, link.Metric = u.Addr(), to.Metric
				routes = append(routes, link)
			}
			routes = append(routes, to)
		}
	}
	return routes
}

// ByBelow returns the part of a plan that leads by the gateways of the link below.
func (u Uplink) ByBelow(m Main, table uint32) []route.Route {
	if len(m.Below) == 0 {
		return nil
	}
	without := m
	without.Below = nil
	rest := u.Plan(without, table)
	return slices.DeleteFunc(u.Plan(m, table), func(r route.Route) bool { return slices.ContainsFunc(rest, r.Equal) })
}

// all returns the routes that main would have if nothing had been taken or lost. A newer route replaces the
// taken one in its place, and any route to a destination what the link lost: whoever configures
// the link is putting its routes back. Nobody puts back one by a gateway whose network has gone,
// nor the next hop of one. That of a link-local gateway goes with the link's last address of that kind,
// as when the link becomes a port of a bridge.
func (m Main) all() []route.Route {
	all := slices.Concat(m.Standing(), m.Routes)
	known := make(map[destination]bool, len(all))
	for _, r := range all {
		known[destinationOf(r)] = true
	}
	var lost []route.Route
	for _, r := range m.Lost {
		lost = append(lost, r.Legs(m.Index)...)
	}
	onLink := slices.DeleteFunc(slices.Concat(all, lost), func(r route.Route) bool { return r.Gateway.IsValid() || r.Multipath })
	return append(all, slices.DeleteFunc(lost, func(r route.Route) bool {
		sameFamily := r.Gateway.Is4() == (r.Family == unix.AF_INET) // else main has no network of the gateway's kind
		return known[destinationOf(r)] || r.Gateway.IsValid() && sameFamily && !r.Onlink &&
			!slices.ContainsFunc(onLink, func(o route.Route) bool { return o.Dst.Contains(r.Gateway) })
	})...)
}

// destination is what the kernel compares before metrics: routes that differ in it are no
// alternatives to each other.
type destination struct {
	dst, from netip.Prefix
	tos       uint8
}

func destinationOf(r route.Route) destination { return destination{r.Dst, r.From, r.TOS} }

// byDestination returns routes in groups of one destination, each in the order of routes.
func byDestination(routes []route.Route) [][]route.Route {
	at := make(map[destination]int, len(routes))
	var groups [][]route.Route
	for _, r := range routes {
		i, known := at[destinationOf(r)]
		if !known {
			i = len(groups)
			at[destinationOf(r)] = i
			groups = append(groups, nil)
		}
		groups[i] = append(groups[i], r)
	}
	return groups
}

// own returns the routes of main to one destination that belong into the table of the address,
// each reduced to its next hops over the link. Where two providers share a link, a route whose
// gateway is in the network of another address is left out if there is one of this address, and one with
// another address as its source if there is one with this address.
func (u Uplink) own(m Main, group []route.Route) []route.Route {
	var legs []route.Route
	for _, r := range group {
		if m.Bare {
			r = r.Alive()
		}
		if u.Carries(r) {
			legs = append(legs, r.Legs(m.Index)...)
		}
	}
	if len(legs) < 2 {
		return legs
	}
	networks, others := u.networks(m)
	named := slices.ContainsFunc(legs, func(r route.Route) bool { return r.Src == u.Addr() })
	ofOther := func(r route.Route) bool {
		return named && r.Src != u.Addr() && slices.ContainsFunc(m.Addresses, func(a Address) bool { return a.Addr == r.Src })
	}
	mine := func(r route.Route) bool { return r.Src == u.Addr() || contain(networks, r.Gateway) && !ofOther(r) }
	if !slices.ContainsFunc(legs, mine) {
		return legs
	}
	return slices.DeleteFunc(legs, func(r route.Route) bool {
		return !mine(r) && (contain(others, r.Gateway) || ofOther(r))
	})
}

// Carries reports whether the table of the uplink follows a route of main. Routes that lead
// nowhere belong to no link, and a route to the address itself is the local table's.
func (u Uplink) Carries(r route.Route) bool {
	return r.Protocol != route.Protocol && r.Type == unix.RTN_UNICAST && !r.Dst.Addr().IsMulticast() && r.Dst != u.Host()
}

// contain reports whether one of networks has an address; none has the zero Addr.
func contain(networks []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(networks, func(n netip.Prefix) bool { return n.Contains(a) })
}

// networks returns the networks of the address as it is on the link, perhaps with several lengths, and those of the link's other
// addresses. Link-local ones count as nobody's: a router advertises itself with such an address to all.
func (u Uplink) networks(m Main) (networks, others []netip.Prefix) {
	addr := u.Addr()
	for _, a := range m.Addresses {
		switch {
		case a.Addr == addr:
			networks = append(networks, a.Network)
		case !a.Addr.IsLinkLocalUnicast() || a.Addr.Is4():
			others = append(others, a.Network)
		}
	}
	return networks, others
}

// Given returns the routes that the caller gave, for a table: the network of the address first, if
// it has to be on the link whatever main says.
func (u Uplink) Given(m Main, table uint32) []route.Route {
	var networks []netip.Prefix
	if len(u.Settings.Static)+len(u.Settings.Gateways) > 0 { // else a thousand addresses of the link need not be looked at
		networks, _ = u.networks(m)
	}
	to := func(dst netip.Prefix, via netip.Addr, metric uint32) route.Route {
		r := route.NewRoute(table, dst, via, m.Index)
		r.Src, r.Metric = u.Addr(), metric
		r.Onlink = via.IsValid() && !contain(networks, via) && !via.IsLinkLocalUnicast()
		return r
	}
	var routes []route.Route
	if m.OnLink && u.Network.IsValid() && !u.Network.IsSingleIP() {
		routes = append(routes, to(u.Network.Masked(), netip.Addr{}, 0))
	}
	for _, s := range u.Settings.Static {
		routes = append(routes, to(s.Dst, s.Via, u.Settings.Metric))
	}
	metric := u.Settings.Metric
	if metric == 0 && u.Addr().Is6() {
		metric = route.MetricIPv6 // else the second gateway would come before the first
	}
	for i, gateway := range u.Settings.Gateways {
		routes = append(routes, to(defaultPrefix(u.Addr().Is4()), gateway, metric+uint32(i)))
	}
	return routes
}

// Gives reports whether the caller gave a route to a destination.
func (u Uplink) Gives(dst netip.Prefix) bool {
	return slices.ContainsFunc(u.Settings.Static, func(s StaticRoute) bool { return s.Dst == dst }) || dst == u.Network.Masked()
}

// local returns main's routes over links that are no uplinks, as main has them, but for
// destinations that the uplink's own routes have, and for defaults and the halves that VPNs make
// of them.
func (u Uplink) local(m Main, own []route.Route, table uint32) []route.Route {
	taken := make(map[destination]bool, len(own))
	for _, r := range own {
		taken[destinationOf(r)] = true
	}
	var routes []route.Route
	for _, r := range m.Local {
		if u.Settings.OwnLinkOnly {
			break
		}
		if u.Carries(r) && !taken[destinationOf(r)] && r.Dst.Bits() > Halves(r.Family) && !r.Dst.Addr().IsLinkLocalUnicast() {
			r = r.In(table, netip.Addr{})
			r.Scope = unix.RT_SCOPE_UNIVERSE // no gateway of the uplink is looked for there
			routes = append(routes, r)
		}
	}
	return routes
}

// Halves returns the length up to which a prefix counts as a default route or a part of one. VPNs
// divide the default route into halves or more, and nobody is allotted a network as large: IPv4
// has none shorter than /8, IPv6 none shorter than fc00::/7.
func Halves(family int) int {
	if family == unix.AF_INET6 {
		return 6
	}
	return 7
}

// Way is where a route leads: its destination, gateway and link.
type Way struct {
	destination
	gateway netip.Addr
	index   int
}

// WayOf returns the way of a route.
func WayOf(r route.Route) Way { return Way{destinationOf(r), r.Gateway, r.Index} }

// SameWay reports whether two routes lead to the same destination by the same gateway and link.
func SameWay(a, b route.Route) bool { return WayOf(a) == WayOf(b) }

// Standing returns the routes of Taken that main would have still, had they stayed there: no newer one
// is in their place.
func (m Main) Standing() []route.Route {
	replaced := make(map[place]bool)
	for _, r := range m.Routes {
		// A taken one that main has is there again, or still, since a client was killed: it replaces nothing.
		replaced[placeOf(r)] = replaced[placeOf(r)] || !slices.ContainsFunc(m.Taken, r.Equal)
	}
	return slices.DeleteFunc(slices.Clone(m.Taken), func(r route.Route) bool {
		return replaced[placeOf(r)] || slices.ContainsFunc(m.Routes, r.Equal)
	})
}

// WithoutSource returns what the kernel leaves of routes if the source addresses of some are gone: it deletes the source
// of IPv6 routes, and IPv4 routes as a whole.
func WithoutSource(routes []route.Route, gone func(route.Route) bool) (left []route.Route) {
	for _, r := range routes {
		if r.Src.IsValid() && gone(r) {
			r.Src = netip.Addr{}
			if r.Family == unix.AF_INET {
				continue
			}
		}
		left = append(left, r)
	}
	return left
}

// place is where IPv4 tables hold a route, and a newer one replaces it.
type place struct {
	destination
	metric uint32
}

func placeOf(r route.Route) place { return place{destinationOf(r), r.Metric} }

// Takes returns the routes of main that move takes: the defaults over this one link, which would serve
// the traffic that is bound to nothing instead of the unbound rules. Beside a default that leads nowhere
// they stay, since without them no unbound rule would be reached.
func (u Uplink) Takes(m Main) []route.Route {
	if u.Settings.Routes != MoveRoutes || m.DeadEnd {
		return nil
	}
	return slices.DeleteFunc(slices.Clone(m.Routes), func(r route.Route) bool { return !Movable(r, m.Index, m.OfHost) })
}

// Stopgap returns the routes that main needs while there is no lease: those that the caller
// gave and main does not have, with the ifindex in the metric, so that those of several links
// stand beside each other.
func (u Uplink) Stopgap(m Main) []route.Route {
	if !u.Settings.PlacesRoutes() {
		return nil
	}
	used := make(map[place]bool)
	for _, r := range m.Routes {
		used[placeOf(r)] = true
	}
	var routes []route.Route
	for _, r := range u.Given(m, unix.RT_TABLE_MAIN) {
		if slices.ContainsFunc(m.Routes, func(have route.Route) bool { return SameWay(have, r) }) {
			continue
		}
		for r.Metric = u.stopgapMetric(m); used[placeOf(r)]; r.Metric++ {
		}
		used[placeOf(r)] = true
		routes = append(routes, r)
	}
	return routes
}

// stopgapMetric is the least one of these routes. The kernel keeps those of IPv6 when their address goes, without their source, and
// nobody may be there to delete them: they come behind the default routes of other links.
func (u Uplink) stopgapMetric(m Main) uint32 {
	if u.Addr().Is6() {
		return route.MetricIPv6 + uint32(m.Index)
	}
	return uint32(m.Index)
}

// LostSource reports whether a route of ours in main is a stopgap of an address that went, this one or another one of its link.
func (u Uplink) LostSource(m Main, r route.Route) bool {
	return r.Family == unix.AF_INET6 && r.Protocol == route.Protocol && !r.Src.IsValid() && r.Gateway.IsValid() && r.Metric >= u.stopgapMetric(m)
}

// WithoutGiven drops from routes those by gateways that the uplink's caller gave: they were in main because
// of that, and end with it.
func (u Uplink) WithoutGiven(m Main, routes []route.Route) []route.Route {
	given := u.Given(m, unix.RT_TABLE_MAIN)
	return slices.DeleteFunc(slices.Clone(routes), func(r route.Route) bool {
		return r.Gateway.IsValid() && slices.ContainsFunc(given, func(g route.Route) bool { return SameWay(g, r) })
	})
}

// Movable reports whether a route of main is a default over the one link that move takes. One of router advertisements
// the kernel would put back, one of several links is not this uplink's alone, one of a nexthop object changes and goes
// with the object, and one for some sources or a TOS serves these only. One with an address of the host, which is on lo, gives traffic
// that is bound to nothing a source that no table has.
func Movable(r route.Route, index int, ofHost []netip.Addr) bool {
	return !slices.Contains(ofHost, r.Src) && r.Dst.Bits() == 0 && r.Type == unix.RTN_UNICAST && r.Index == index && !r.Multipath && r.NexthopID == 0 && !r.From.IsValid() && r.TOS == 0 &&
		r.Protocol != route.Protocol &&
		(r.Family == unix.AF_INET || r.Protocol != unix.RTPROT_KERNEL && r.Protocol != unix.RTPROT_RA)
}

// IsDeadEnd reports whether a route is a default that leads nowhere. The kernel takes it for the answer of a
// lookup.
func IsDeadEnd(r route.Route) bool {
	switch r.Type {
	case unix.RTN_BLACKHOLE, unix.RTN_UNREACHABLE, unix.RTN_PROHIBIT:
		return r.Dst.Bits() == 0 && !r.From.IsValid()
	}
	return false
}
