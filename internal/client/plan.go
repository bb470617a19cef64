package client

import (
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
)

// view is what the kernel says about the link of an uplink.
type view struct {
	index   int
	network netip.Prefix   // the address with the length that it has on the link
	others  []netip.Prefix // the other addresses of the link, of the same family
	main    []route.Route  // routes of the link in main
	// shared are IPv6 routes of the link in main that share their place with those of another:
	// two uplinks whose defaults have one metric. Main keeps them.
	shared []route.Route
	// borrowed are what the holders of the other addresses moved out of main before we came, as
	// it was there.
	borrowed []route.Route
}

// plan is what is to become of routes.
type plan struct {
	table []route.Route // what the leased table has to hold, and nothing else of ours
	leave []route.Route // of main: to be deleted once their copy stands in the table
	taken []route.Route // what main has lost to the table, as it was there
	left  []string      // routes that are left alone, and why
}

// place is where a table holds one route.
type place struct {
	dst    netip.Prefix
	tos    uint8
	metric uint32
}

func placeOf(r route.Route) place { return place{r.Dst, r.TOS, r.Metric} }

// sameWay tells whether two routes lead to the same destination by the same gateway.
func sameWay(a, b route.Route) bool { return a.Dst == b.Dst && a.Gateway == b.Gateway }

// makePlan decides about the routes of u in a lease of table. taken is what main lost to
// the table so far; kept is what main had before the link went down.
func makePlan(u Uplink, v view, table uint32, taken, kept []route.Route) plan {
	var p plan
	if !u.Settings.placesRoutes() {
		return p
	}
	var followed []route.Route
	for i, r := range v.routes() {
		if !v.belongs(r, u.addr()) {
			continue
		}
		if why := unmovable(r); why != "" {
			p.left = append(p.left, fmt.Sprintf("%s: %s", r, why))
			continue
		}
		followed = append(followed, r)
		if u.Settings.Routes == MoveRoutes && movable(r) && i < len(v.main) {
			p.leave = append(p.leave, r)
		}
	}
	newest := places(followed)
	for _, r := range v.borrowed {
		if !newest[placeOf(r)] && !places(taken)[placeOf(r)] && v.belongs(r, u.addr()) {
			followed = append(followed, r)
		}
	}
	if u.Settings.Routes == MoveRoutes {
		// What came to stand in main where a route of the table stood replaces that one.
		for _, r := range taken {
			if !newest[placeOf(r)] {
				p.taken = append(p.taken, r)
			}
		}
		followed = append(followed, p.taken...)
		p.taken = append(p.taken, p.leave...)
	} else {
		for _, r := range kept {
			if !newest[placeOf(r)] {
				followed = append(followed, r)
			}
		}
	}
	for _, r := range followed {
		p.table = append(p.table, r.In(table, u.addr()))
	}
	for _, r := range u.told(v, table) {
		if !slices.ContainsFunc(followed, func(f route.Route) bool { return sameWay(f, r) }) {
			p.table = append(p.table, r)
		}
	}
	p.table = route.Spread(p.table)
	return p
}

func places(routes []route.Route) map[place]bool {
	set := make(map[place]bool, len(routes))
	for _, r := range routes {
		set[placeOf(r)] = true
	}
	return set
}

// routes are all routes of the link in main.
func (v view) routes() []route.Route { return slices.Concat(v.main, v.shared) }

// belongs tells whether a route of the link in main is one of the address: by its
// preferred source, or by whose network its gateway or destination is in. What no
// address of the link claims is everybody's.
func (v view) belongs(r route.Route, addr netip.Addr) bool {
	if r.Protocol == route.Protocol || r.Dst.Addr().IsMulticast() || r.Dst.Addr().Is6() && r.Dst.Addr().IsLinkLocalUnicast() {
		return false
	}
	if r.Dst.IsSingleIP() && r.Dst.Addr() == addr {
		return false // the address itself, which the local table has
	}
	if r.Family == unix.AF_INET6 && r.Protocol == unix.RTPROT_KERNEL && r.Dst.IsSingleIP() && r.Dst != v.network {
		return false // another address of the link, as DHCPv6 gives it, even after that is gone
	}
	toward := r.Dst.Addr()
	if r.Gateway.IsValid() {
		toward = r.Gateway
	}
	if r.Src.IsValid() {
		// With DHCP main's default prefers one address of a network, and the router serves all.
		return r.Src == addr || r.Dst.Bits() == 0 && v.network.Contains(toward)
	}
	if toward.Is6() && toward.IsLinkLocalUnicast() {
		return true // as routers advertise themselves: it tells the link and no network
	}
	if v.network.Contains(toward) || toward.Is6() && v.network.IsSingleIP() {
		return true // a lease of DHCPv6 uses the routes that the link has
	}
	return !slices.ContainsFunc(v.others, func(n netip.Prefix) bool { return n.Contains(toward) })
}

// unmovable says why a route cannot be carried over as it is.
func unmovable(r route.Route) string {
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

// movable tells whether main may lose a route: those of router advertisements the kernel
// would put back.
func movable(r route.Route) bool {
	return r.Family == unix.AF_INET || r.Protocol != unix.RTPROT_KERNEL && r.Protocol != unix.RTPROT_RA
}

// told are the routes that the caller gave, for a table: the network on the link first.
func (u Uplink) told(v view, table uint32) []route.Route {
	to := func(dst netip.Prefix, via netip.Addr, metric uint32) route.Route {
		r := route.NewRoute(table, dst, via, v.index)
		r.Src, r.Metric = u.addr(), metric
		r.Onlink = via.IsValid() && !v.network.Contains(via) && !via.IsLinkLocalUnicast()
		return r
	}
	var routes []route.Route
	if !v.network.IsSingleIP() {
		routes = append(routes, to(v.network.Masked(), netip.Addr{}, 0))
	}
	for _, s := range u.Settings.Static {
		routes = append(routes, to(s.Dst, s.Via, u.Settings.Metric))
	}
	metric := u.Settings.Metric
	if metric == 0 && u.addr().Is6() {
		metric = route.MetricIPv6 // else the second gateway would come before the first
	}
	for i, gateway := range u.Settings.Gateways {
		routes = append(routes, to(defaultPrefix(u.addr().Is4()), gateway, metric+uint32(i)))
	}
	return routes
}

// stopgap are the routes that main needs while there is no lease: those that the caller
// gave and main does not have, with the ifindex as metric, so that those of several links
// stand beside each other.
func stopgap(u Uplink, v view) []route.Route {
	if !u.Settings.placesRoutes() {
		return nil
	}
	var routes []route.Route
	used := places(v.routes())
	for _, r := range u.told(v, unix.RT_TABLE_MAIN) {
		if slices.ContainsFunc(v.routes(), func(m route.Route) bool { return sameWay(m, r) }) {
			continue
		}
		for r.Metric = uint32(v.index); used[placeOf(r)]; r.Metric++ {
		}
		used[placeOf(r)] = true
		routes = append(routes, r)
	}
	return routes
}

// forget drops from taken what an older set of settings had told, too: it was in main
// because of that set, and goes with it.
func forget(taken []route.Route, old Uplink, v view) []route.Route {
	told := old.told(v, unix.RT_TABLE_MAIN)
	return slices.DeleteFunc(slices.Clone(taken), func(r route.Route) bool {
		return r.Gateway.IsValid() && slices.ContainsFunc(told, func(t route.Route) bool { return sameWay(t, r) })
	})
}
