package install

import (
	"errors"
	"hash/maphash"
	"net/netip"
	"slices"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

var errTooMany = errors.New("main has more routes of routing daemons than max_routes, so that some are in no table")

// planTo is the part of a plan that leads to one destination, of which main has routes. What a large main has to one
// destination decides alone what the table has to it.
func (p *placer) planTo(u uplink.Uplink, m uplink.Main, table uint32, dst netip.Prefix, routes []route.Route) []route.Route {
	m = p.env.Picture.to(m, u.Family(), routes)
	if len(m.Routes)+len(m.Local) == 0 && dst.Bits() > uplink.Halves(u.Family()) && !u.Gives(dst) {
		return nil // over another uplink, as most are
	}
	var to []route.Route
	for _, r := range u.Plan(m, table) {
		if r.Dst == dst {
			to = append(to, r)
		}
	}
	return to
}

// syncLarge makes the table what a large main wants, without ever having all routes in memory: of each route of the
// table and of the plan it keeps a hash.
func (p *placer) syncLarge(u uplink.Uplink, m uplink.Main, table uint32, image *route.Image) error {
	seed := maphash.MakeSeed()
	sum := func(r route.Route) uint64 {
		r.Onlink = false // the kernel may have forced it
		return r.Sum(seed)
	}
	have, want := make(map[uint64]struct{}), make(map[uint64]struct{})
	err := p.env.Kernel.EachOfOurs(u.Family(), table, func(r route.Route) { have[sum(r)] = struct{}{} })
	if err != nil {
		return err
	}
	var errs []error
	gateways := false
	put := func(r route.Route) {
		hash := sum(r)
		want[hash] = struct{}{}
		if _, there := have[hash]; !there && r.Gateway.IsValid() == gateways {
			errs = append(errs, p.env.Kernel.Replace(nil, []route.Route{r}))
		}
	}
	for _, gateways = range []bool{false, true} { // links first: the kernel looks for the way to a gateway
		image.All(func(dst netip.Prefix, routes []route.Route) {
			for _, r := range p.planTo(u, m, table, dst, routes) {
				put(r)
			}
		})
		for _, r := range u.Plan(m, table) { // also what main has no routes to
			if len(image.To(r.Dst)) == 0 {
				put(r)
			}
		}
	}
	var stale []route.Route
	err = p.env.Kernel.EachOfOurs(u.Family(), table, func(r route.Route) {
		if _, wanted := want[sum(r)]; !wanted {
			stale = append(stale, r)
		}
	})
	errs = append(errs, err)
	for _, r := range stale {
		errs = append(errs, p.env.Kernel.Replace([]route.Route{r}, nil))
	}
	p.placed = len(want)
	if image.Left() > 0 {
		errs = append(errs, errTooMany)
	}
	return errors.Join(errs...)
}

// follow carries changes of a large main over, at a cost that does not depend on its size.
func (p *placer) follow(u uplink.Uplink, m uplink.Main, table uint32, changes []Change) error {
	var errs []error
	for _, c := range changes {
		had, want := p.planTo(u, m, table, c.dst, c.before), p.planTo(u, m, table, c.dst, c.after)
		errs = append(errs, p.env.Kernel.Replace(had, want))
		p.placed += len(want) - len(had)
		if c.dst.Bits() == 0 {
			p.noteDefault(u.Plan(m, table))
		}
	}
	return errors.Join(errs...)
}

// restoreLost adds the routes again that were deleted from the table, as far as they are wanted still: most of these
// events are of what this process did itself.
func (p *placer) restoreLost(u uplink.Uplink, m uplink.Main, table uint32, events []route.Event) error {
	var errs []error
	for _, e := range events {
		if e.Kind != route.RouteChanged || !e.Deleted || e.Table != table || e.Family != u.Family() || e.Protocol != route.Protocol {
			continue
		}
		dst := e.Route.Dst
		want := p.planTo(u, m, table, dst, p.env.Picture.largeMain(u.Family()).To(dst))
		want = slices.DeleteFunc(want, func(r route.Route) bool { return !r.Equal(*e.Route) })
		errs = append(errs, p.env.Kernel.Replace(nil, want))
	}
	return errors.Join(errs...)
}
