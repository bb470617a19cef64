package uplink

import (
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
)

// View is what the kernel says about the link of an uplink.
type View struct {
	Index   int
	Network netip.Prefix   // the address with the length that it has on the link
	Others  []netip.Prefix // the other addresses of the link, of the same family
	Main    []route.Route  // routes of the link in main
	// Shared are IPv6 routes of the link in main that share their place with those of another:
	// two uplinks whose defaults have one metric. Main keeps them.
	Shared []route.Route
	// Borrowed are what the holders of the other addresses moved out of main before we came, as
	// it was there.
	Borrowed []route.Route
}

// Plan is what is to become of routes.
type Plan struct {
	Table []route.Route // what the leased table has to hold, and nothing else of ours
	Leave []route.Route // of main: to be deleted once their copy stands in the table
	Taken []route.Route // what main has lost to the table, as it was there
	Left  []string      // routes that are left alone, and why
}

// Place is where a table holds one route.
type Place struct {
	dst    netip.Prefix
	tos    uint8
	metric uint32
}

// PlaceOf is the place of a route in its table.
func PlaceOf(r route.Route) Place { return Place{r.Dst, r.TOS, r.Metric} }

// SameWay reports whether two routes lead to the same destination by the same gateway.
func SameWay(a, b route.Route) bool { return a.Dst == b.Dst && a.Gateway == b.Gateway }

// MakePlan decides about the routes of u in a lease of table. taken is what main lost to
// the table so far; kept is what main had before the link went down.
func MakePlan(u Uplink, v View, table uint32, taken, kept []route.Route) Plan {
	var p Plan
	if !u.Settings.PlacesRoutes() {
		return p
	}
	var followed []route.Route
	for i, r := range v.Routes() {
		if !v.Belongs(r, u.Addr()) {
			continue
		}
		if why := Unmovable(r); why != "" {
			p.Left = append(p.Left, fmt.Sprintf("%s: %s", r, why))
			continue
		}
		followed = append(followed, r)
		if u.Settings.Routes == MoveRoutes && movable(r) && i < len(v.Main) {
			p.Leave = append(p.Leave, r)
		}
	}
	newest := Places(followed)
	for _, r := range v.Borrowed {
		if !newest[PlaceOf(r)] && !Places(taken)[PlaceOf(r)] && v.Belongs(r, u.Addr()) {
			followed = append(followed, r)
		}
	}
	if u.Settings.Routes == MoveRoutes {
		// What came to stand in main where a route of the table stood replaces that one.
		for _, r := range taken {
			if !newest[PlaceOf(r)] {
				p.Taken = append(p.Taken, r)
			}
		}
		followed = append(followed, p.Taken...)
		p.Taken = append(p.Taken, p.Leave...)
	} else {
		for _, r := range kept {
			if !newest[PlaceOf(r)] {
				followed = append(followed, r)
			}
		}
	}
	for _, r := range followed {
		p.Table = append(p.Table, r.In(table, u.Addr()))
	}
	for _, r := range u.GivenRoutes(v, table) {
		if !slices.ContainsFunc(followed, func(f route.Route) bool { return SameWay(f, r) }) {
			p.Table = append(p.Table, r)
		}
	}
	p.Table = route.Spread(p.Table)
	return p
}

// Places are the places of routes.
func Places(routes []route.Route) map[Place]bool {
	set := make(map[Place]bool, len(routes))
	for _, r := range routes {
		set[PlaceOf(r)] = true
	}
	return set
}

// Routes are all routes of the link in main.
func (v View) Routes() []route.Route { return slices.Concat(v.Main, v.Shared) }

// Belongs reports whether a route of the link in main is one of the address: by its
// preferred source, or by whose network its gateway or destination is in. What no
// address of the link claims is everybody's.
func (v View) Belongs(r route.Route, addr netip.Addr) bool {
	if r.Protocol == route.Protocol || r.Dst.Addr().IsMulticast() || r.Dst.Addr().Is6() && r.Dst.Addr().IsLinkLocalUnicast() {
		return false
	}
	if r.Dst.IsSingleIP() && r.Dst.Addr() == addr {
		return false // the address itself, which the local table has
	}
	if r.Family == unix.AF_INET6 && r.Protocol == unix.RTPROT_KERNEL && r.Dst.IsSingleIP() && r.Dst != v.Network {
		return false // another address of the link, as DHCPv6 gives it, even after that is gone
	}
	toward := r.Dst.Addr()
	if r.Gateway.IsValid() {
		toward = r.Gateway
	}
	if r.Src.IsValid() {
		// With DHCP main's default prefers one address of a network, and the router serves all.
		return r.Src == addr || r.Dst.Bits() == 0 && v.Network.Contains(toward)
	}
	if toward.Is6() && toward.IsLinkLocalUnicast() {
		return true // a link-local gateway, as in router advertisements, belongs to the link and to no network
	}
	if v.Network.Contains(toward) || toward.Is6() && v.Network.IsSingleIP() {
		return true // a lease of DHCPv6 uses the routes that the link has
	}
	return !slices.ContainsFunc(v.Others, func(n netip.Prefix) bool { return n.Contains(toward) })
}

// Unmovable says why a route cannot be carried over as it is.
func Unmovable(r route.Route) string {
	switch {
	case r.Multipath:
		return "it has several next hops, which may be of other links"
	case r.Encap:
		return "it encapsulates packets"
	case r.Type != unix.RTN_UNICAST:
		return "it leads nowhere"
	}
	return ""
}

// movable reports whether main may lose a route: those of router advertisements the kernel
// would put back.
func movable(r route.Route) bool {
	return r.Family == unix.AF_INET || r.Protocol != unix.RTPROT_KERNEL && r.Protocol != unix.RTPROT_RA
}

// GivenRoutes are the routes that the caller gave, for a table: the network on the link first.
func (u Uplink) GivenRoutes(v View, table uint32) []route.Route {
	to := func(dst netip.Prefix, via netip.Addr, metric uint32) route.Route {
		r := route.NewRoute(table, dst, via, v.Index)
		r.Src, r.Metric = u.Addr(), metric
		r.Onlink = via.IsValid() && !v.Network.Contains(via) && !via.IsLinkLocalUnicast()
		return r
	}
	var routes []route.Route
	if !v.Network.IsSingleIP() {
		routes = append(routes, to(v.Network.Masked(), netip.Addr{}, 0))
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

// Stopgap are the routes that main needs while there is no lease: those that the caller
// gave and main does not have, with the ifindex as metric, so that those of several links
// stand beside each other.
func Stopgap(u Uplink, v View) []route.Route {
	if !u.Settings.PlacesRoutes() {
		return nil
	}
	var routes []route.Route
	used := Places(v.Routes())
	for _, r := range u.GivenRoutes(v, unix.RT_TABLE_MAIN) {
		if slices.ContainsFunc(v.Routes(), func(m route.Route) bool { return SameWay(m, r) }) {
			continue
		}
		for r.Metric = uint32(v.Index); used[PlaceOf(r)]; r.Metric++ {
		}
		used[PlaceOf(r)] = true
		routes = append(routes, r)
	}
	return routes
}

// WithoutGiven drops from taken what an older set of settings had told, too: it was in main
// because of that set, and goes with it.
func WithoutGiven(taken []route.Route, old Uplink, v View) []route.Route {
	told := old.GivenRoutes(v, unix.RT_TABLE_MAIN)
	return slices.DeleteFunc(slices.Clone(taken), func(r route.Route) bool {
		return r.Gateway.IsValid() && slices.ContainsFunc(told, func(t route.Route) bool { return SameWay(t, r) })
	})
}
