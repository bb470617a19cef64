package install

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Picture is what the host has of addresses and of routes in main, for the many addresses of a host of which one
// after the other wants to know that of the same few links. A main of ordinary size is read when it is asked for
// after an event, and again after 100 ms, since the kernel sends no event when a lifetime is extended. One with very
// many routes is read once and follows the events.
type Picture struct {
	kernel    *route.Conn
	isUplink  func(index int) bool // a link has a lease, or is about to
	most      int                  // routes of routing daemons that are followed
	mains     map[int]*main        // by family
	addresses map[linkOf]local
	since     time.Duration             // of addresses
	networks  map[linkOf][]netip.Prefix // that addresses have on a link, as read last
	addressed map[linkOf]bool           // links whose addresses changed since
	below     map[int]int               // by ifindex, the link whose routes a macvlan follows
}

type linkOf struct{ family, index int }

// local is what a link has of the host's addresses.
type local struct {
	addresses []route.Address
	ranges    []netip.Prefix
}

// main is what the table main of a family has.
type main struct {
	since time.Duration // 0: it has to be read again

	// Of an ordinary main:
	all   []route.Route
	links map[int][]route.Route // by ifindex
	local []route.Route         // over links that are no uplinks

	image *route.Image  // of a large one
	stale bool          // the image is not certain
	gone  []route.Route // default routes of the image that this process has deleted, and of which the events are still to come
	held  time.Duration // not before then is it read again: tables are being filled from it

	defaults map[int]bool // links over which there is a default route, or the half of one
	ends     bool         // there is a default route that leads nowhere

	kept Kept

	// versions count changes, so that an uplink can tell whether one concerns it.
	versions map[int]int // by ifindex
	common   int         // of local and ends
	whole    int         // of anything
}

// version is what main had of a link when an uplink was planned.
type version struct{ link, common, whole int }

const (
	pictureLasts = 100 * time.Millisecond
	large        = 2000 // routes
	// A large main is read again no more often than this, and takes no more than a tenth of the time.
	rereadEvery = time.Second
	rereadShare = 10
)

// NewPicture returns a picture that is not taken yet. isUplink reports whether a link has a lease, or is about to.
// Of the routes that routing daemons made no more than most are followed.
func NewPicture(kernel *route.Conn, isUplink func(index int) bool, most int) *Picture {
	return &Picture{kernel: kernel, isUplink: isUplink, most: most, mains: make(map[int]*main), below: make(map[int]int),
		networks: make(map[linkOf][]netip.Prefix), addressed: make(map[linkOf]bool)}
}

// Invalidate makes the picture be taken anew. A nil Picture is none.
func (p *Picture) Invalidate() {
	if p == nil {
		return
	}
	clear(p.addresses)
	for _, m := range p.mains {
		if m.image == nil { // a large one follows the events
			m.since = 0
		}
	}
}

// Addressed says that addresses of links were added or deleted. Those of links that were never looked at, as of containers that
// come and go, concern nobody.
func (p *Picture) Addressed(links map[int]bool) {
	if p == nil {
		return
	}
	for index := range links {
		for _, link := range []linkOf{{unix.AF_INET, index}, {unix.AF_INET6, index}} {
			if _, known := p.networks[link]; known {
				p.addressed[link] = true
			}
		}
	}
}

// hold puts off that a large main is read again, since that begins the filling of a table anew: slice after slice, on a
// busy machine, with no end.
func (p *Picture) hold(family int, pause time.Duration) { p.mains[family].held = wire.Now() + pause }

// Emptied says that the kernel may have deleted routes over links from all tables, without events. Where main has the
// same again nothing else would tell that the tables lack them.
func (p *Picture) Emptied(links map[int]bool) {
	if p == nil {
		return
	}
	for _, m := range p.mains {
		if slices.ContainsFunc(m.local, func(r route.Route) bool { _, ok := links[r.Index]; return ok || r.Multipath }) {
			m.common++
		}
	}
}

// Lost says that a large main may have changed without an event for each route: with a link, say.
func (p *Picture) Lost() {
	if p == nil {
		return
	}
	for _, m := range p.mains {
		m.stale = m.image != nil
	}
}

// Change is what happened to the routes of a large main to one destination.
type Change struct {
	dst           netip.Prefix
	before, after []route.Route
}

// Hear takes over the events of routes in a large main, and returns what changed. Of an ordinary main it returns
// nothing, and false.
func (p *Picture) Hear(family int, events []route.Event) (changes []Change, large bool) {
	if p == nil {
		return nil, false
	}
	m := p.mains[family]
	if m == nil || m.image == nil {
		return nil, false
	}
	before := make(map[netip.Prefix][]route.Route)
	short := false
	for _, e := range events {
		if e.Kind != route.RouteChanged || e.Table != unix.RT_TABLE_MAIN || e.Family != family {
			continue
		}
		if at := slices.IndexFunc(m.gone, e.Route.Equal); at >= 0 && (!e.Deleted || p.kernel.Made(e)) {
			m.gone = slices.Delete(m.gone, at, at+1)
		}
		dst := e.Route.Dst
		if _, known := before[dst]; !known {
			before[dst] = m.image.To(dst)
		}
		short = short || dst.Bits() <= uplink.Halves(family)
		m.stale = !m.image.Apply(e) || m.stale
	}
	if short {
		defaults := m.defaults
		if m.sortImage(); !maps.Equal(defaults, m.defaults) {
			m.common++ // other links are uplinks now
		}
	}
	for dst, routes := range before {
		changes = append(changes, Change{dst, routes, m.image.To(dst)})
	}
	return changes, true
}

// forget notes that this process has deleted a default route from a large main. The event of that may come after others that have
// tables looked at, for which main would have it again.
func (p *Picture) forget(r route.Route) { p.mains[r.Family].gone = append(p.mains[r.Family].gone, r) }

// without are routes of a large main but for those that this process has deleted.
func (m *main) without(routes []route.Route) []route.Route {
	if len(m.gone) == 0 {
		return routes
	}
	return slices.DeleteFunc(slices.Clone(routes), func(r route.Route) bool { return slices.ContainsFunc(m.gone, r.Equal) })
}

// Uncertain reports whether a large main has to be read again.
func (p *Picture) Uncertain(family int) bool {
	return p != nil && p.mains[family] != nil && p.mains[family].stale
}

// main returns what main has, no older than the last event.
func (p *Picture) main(family int) (*main, error) {
	m := p.mains[family]
	if m == nil {
		m = &main{versions: make(map[int]int)}
		p.mains[family] = m
	}
	now := wire.Now()
	if m.image != nil {
		pause := max(rereadEvery, rereadShare*m.image.Took())
		if !m.stale || now-m.since < pause || now < m.held {
			return m, nil
		}
		return m, p.readImage(family, m)
	}
	if m.since != 0 && now-m.since < pictureLasts {
		return m, nil
	}
	routes, all, err := p.kernel.RoutesAtMost(family, unix.RT_TABLE_MAIN, large)
	if err != nil {
		return nil, err
	}
	if !all {
		return m, p.readImage(family, m)
	}
	own, err := p.ownAddresses(family, routes)
	if err != nil {
		return nil, err
	}
	m.noteDefaults(routes)
	m.take(slices.DeleteFunc(routes, uplink.IsChoiceRoute), own, p.isUplink)
	m.since = now
	return m, nil
}

// ownAddresses returns the destinations of main that are addresses of this host. The kernel has a route to each IPv6
// address of full length, as DHCPv6 gives them: table local answers for it.
func (p *Picture) ownAddresses(family int, routes []route.Route) (map[netip.Prefix]bool, error) {
	if family != unix.AF_INET6 || !slices.ContainsFunc(routes, func(r route.Route) bool { return r.Dst.IsSingleIP() && r.Protocol == unix.RTPROT_KERNEL }) {
		return nil, nil
	}
	addresses, err := p.kernel.Addresses(family)
	own := make(map[netip.Prefix]bool, len(addresses))
	for _, a := range addresses {
		own[netip.PrefixFrom(a.Addr, a.Addr.BitLen())] = true
	}
	return own, err
}

// readImage reads a large main, or finds that it is an ordinary one by now.
func (p *Picture) readImage(family int, m *main) (err error) {
	if m.image == nil {
		m.image, err = p.kernel.ReadImage(family, unix.RT_TABLE_MAIN, p.most)
	} else {
		err = m.image.Read(p.kernel)
	}
	if err != nil {
		m.image = nil
		return err
	}
	m.all, m.links, m.local = nil, nil, nil
	m.stale, m.gone = false, nil
	m.whole++
	m.common++
	m.sortImage()
	m.since = wire.Now()
	if m.image.Len() < large/2 {
		m.image, m.since = nil, 0
		_, err = p.main(family)
	}
	return err
}

// sortImage finds the default routes of a large main.
func (m *main) sortImage() {
	var short []route.Route
	m.image.All(func(dst netip.Prefix, routes []route.Route) {
		if dst.Bits() <= uplink.Halves(routes[0].Family) {
			short = append(short, slices.DeleteFunc(slices.Clone(routes), uplink.IsChoiceRoute)...)
		}
	})
	m.links = make(map[int][]route.Route)
	for _, r := range short {
		for _, index := range r.Links() {
			m.links[index] = append(m.links[index], r)
		}
	}
	m.defaults, m.ends = uplink.Defaults(short), slices.ContainsFunc(short, uplink.IsDeadEnd)
	m.noteDefaults(short)
}

// noteDefaults finds out what a default route of the choice would stand beside.
func (m *main) noteDefaults(routes []route.Route) {
	m.kept = Kept{}
	for _, r := range routes {
		if uplink.KeepsDefault(r) {
			m.kept.Any = true
			if r.Metric <= uplink.ChoiceMetric {
				m.kept.Front = append(m.kept.Front, r)
			}
		}
	}
}

// take sorts the routes of an ordinary main, and counts what changed. own are destinations that are this host's.
func (m *main) take(routes []route.Route, own map[netip.Prefix]bool, isUplink func(int) bool) {
	links := make(map[int][]route.Route)
	defaults := uplink.Defaults(routes)
	ends := slices.ContainsFunc(routes, uplink.IsDeadEnd)
	for _, r := range routes {
		for _, index := range r.Links() {
			links[index] = append(links[index], r)
		}
	}
	local := make([]route.Route, len(routes))
	for i, r := range routes {
		local[i] = r.Alive()
	}
	local = slices.DeleteFunc(local, func(r route.Route) bool {
		// A route of the kernel to one address with a lifetime is left of an own address of DHCPv6.
		left := r.Protocol == unix.RTPROT_KERNEL && r.Dst.IsSingleIP() && r.Expires > 0
		return own[r.Dst] || left || !isLocal(r, defaults, isUplink)
	})
	for index := range m.links {
		if links[index] == nil {
			m.versions[index]++
		}
	}
	for index, now := range links {
		if !slices.EqualFunc(m.links[index], now, route.Route.Equal) {
			m.versions[index]++
		}
	}
	if ends != m.ends || !slices.EqualFunc(m.local, local, route.Route.Equal) {
		m.common++
	}
	if !slices.EqualFunc(m.all, routes, route.Route.Equal) {
		m.whole++
	}
	m.all, m.links, m.local, m.defaults, m.ends = routes, links, local, defaults, ends
}

// isLocal reports whether a route leads to links that are no uplinks.
func isLocal(r route.Route, defaults map[int]bool, isUplink func(int) bool) bool {
	over := r.Links()
	return len(over) > 0 && !slices.ContainsFunc(over, func(index int) bool { return defaults[index] || isUplink(index) })
}

// on returns what the link of an uplink has: its addresses, and what main knows of it. Of a large main these are the
// default routes only, see planTo.
func (p *Picture) on(u uplink.Uplink, index int) ([]route.Address, uplink.Main, version, error) {
	family := u.Family()
	m, err := p.main(family)
	if err != nil {
		return nil, uplink.Main{}, version{}, err
	}
	of, err := p.local(m, linkOf{family, index})
	if err != nil {
		return nil, uplink.Main{}, version{}, err
	}
	others := slices.DeleteFunc(slices.Clone(m.local), func(r route.Route) bool { return slices.Contains(r.Links(), index) })
	on := uplink.Main{Index: index, Routes: m.without(m.links[index]), Local: others, DeadEnd: m.ends, Ranges: of.ranges}
	if u.Settings.SpecificFirst {
		on.Ties = uplink.Ties(m.all, index)
	}
	return of.addresses, on, m.version(u, index), nil
}

// local returns what a link has of addresses, no older than the last event. If these are in other networks than before, a router
// may be in that of another address now, or in none: all addresses of the link are planned again. For a large main that would
// cost too much.
func (p *Picture) local(m *main, link linkOf) (of local, err error) {
	if now := wire.Now(); now-p.since > pictureLasts || p.addresses == nil {
		p.since, p.addresses = now, make(map[linkOf]local)
	}
	of, known := p.addresses[link]
	if known {
		return of, nil
	}
	if of.addresses, of.ranges, err = p.kernel.Local(link.family, link.index); err != nil {
		return of, err
	}
	p.addresses[link] = of
	delete(p.addressed, link)
	if _, known := p.networks[link]; !known {
		p.networks[link] = nil
	}
	var networks []netip.Prefix
	for _, a := range of.addresses {
		if n := a.Network().Masked(); !n.IsSingleIP() && !slices.Contains(networks, n) {
			networks = append(networks, n)
		}
	}
	if slices.SortFunc(networks, netip.Prefix.Compare); !slices.Equal(networks, p.networks[link]) && m.image == nil {
		p.networks[link] = networks
		m.versions[link.index]++
	}
	return of, nil
}

// largeMain returns the image of a large main, or nil.
func (p *Picture) largeMain(family int) *route.Image {
	if p == nil || p.mains[family] == nil {
		return nil
	}
	return p.mains[family].image
}

// toAll returns the default routes of a large main, in its order. It reports false if main is not large, or has to be
// read again.
func (p *Picture) toAll(family int) (routes []route.Route, known bool) {
	image := p.largeMain(family)
	if image == nil || p.mains[family].stale {
		return nil, false
	}
	zero := netip.IPv4Unspecified()
	if family == unix.AF_INET6 {
		zero = netip.IPv6Unspecified()
	}
	return p.mains[family].without(image.To(netip.PrefixFrom(zero, 0))), true
}

// to is m for one destination of a large main, which has routes.
func (p *Picture) to(m uplink.Main, family int, routes []route.Route) uplink.Main {
	m.Routes, m.Local = nil, nil
	for _, r := range routes {
		switch {
		case slices.Contains(r.Links(), m.Index):
			m.Routes = append(m.Routes, r)
		case isLocal(r.Alive(), p.mains[family].defaults, p.isUplink):
			m.Local = append(m.Local, r.Alive())
		}
	}
	return m
}

// Defaults returns the links over which main has a default route, or the half of one, of either family.
func (p *Picture) Defaults() (map[int]bool, error) {
	defaults := make(map[int]bool)
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		m, err := p.main(family)
		if err != nil {
			return nil, err
		}
		maps.Copy(defaults, m.defaults)
	}
	return defaults, nil
}

// HasRoutes reports whether main has routes over a link, but for those to link-local addresses. Of a large main the
// default routes count.
func (p *Picture) HasRoutes(family, index int) (bool, error) {
	m, err := p.main(family)
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(m.links[index], func(r route.Route) bool { return !r.Dst.Addr().IsLinkLocalUnicast() }), nil
}

// Leaves reports whether packets from an address can reach other networks by main, see uplink.Leaves.
func (p *Picture) Leaves(a route.Address) (bool, error) {
	if !uplink.IsLinkLocal4(a.Addr) {
		return uplink.Leaves(nil, a), nil
	}
	m, err := p.main(unix.AF_INET)
	if err != nil {
		return false, err
	}
	return uplink.Leaves(m.links[a.Index], a), nil
}

// WithoutRouter is uplink.WithoutRouter.
func (p *Picture) WithoutRouter(addresses []route.Address, a route.Address) bool {
	m, err := p.main(unix.AF_INET)
	return err == nil && uplink.WithoutRouter(m.links[a.Index], addresses, a) // Leaves says what cannot be read
}

// Follows reports whether addresses on a link may use the default routes of the link below.
func Follows(link route.Link) bool {
	return link.Below != 0 && (link.Kind == "macvlan" || link.Kind == "ipvlan")
}

// follow has the versions of a macvlan change with the routes over the link below, too. It reports whether there is one.
func (p *Picture) follow(link route.Link) bool {
	if !Follows(link) {
		delete(p.below, link.Index)
		return false
	}
	p.below[link.Index] = link.Below
	return true
}

// version is what an uplink depends on.
func (m *main) version(u uplink.Uplink, index int) version {
	v := version{m.versions[index], m.common, 0}
	if u.Settings.SpecificFirst {
		v.whole = m.whole
	}
	return v
}

// readLink is on for a process that serves one address, at the cost of the one link. It has no routes over others.
func readLink(kernel *route.Conn, u uplink.Uplink, index int) ([]route.Address, uplink.Main, error) {
	m := uplink.Main{Index: index}
	addresses, ranges, err := kernel.Local(u.Family(), index)
	if err != nil {
		return nil, m, err
	}
	m.Ranges = ranges
	if m.Routes, err = kernel.RoutesOn(u.Family(), unix.RT_TABLE_MAIN, index); err != nil {
		return nil, m, err
	}
	if u.Settings.Routes == uplink.MoveRoutes {
		ends, err := kernel.ErrorRoutes(u.Family(), unix.RT_TABLE_MAIN)
		if err != nil {
			return nil, m, err
		}
		m.DeadEnd = slices.ContainsFunc(ends, uplink.IsDeadEnd)
	}
	if u.Settings.SpecificFirst {
		all, err := kernel.Routes(u.Family(), unix.RT_TABLE_MAIN)
		if err != nil {
			return nil, m, err
		}
		m.Ties = uplink.Ties(all, index)
	}
	return addresses, m, nil
}
