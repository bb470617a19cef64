package install

import (
	"errors"
	"hash/maphash"
	"net/netip"
	"slices"
	"time"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

var errTooMany = errors.New("main has more routes of routing daemons than max_routes, so that some are in no table")

// planTo is the part of a plan that leads to one destination, of which main has routes. What a large main has to one
// destination decides alone what the table has to it.
func (p *placer) planTo(u uplink.Uplink, m uplink.Main, table uint32, dst netip.Prefix, routes []route.Route) []route.Route {
	p.env.compared += len(routes)
	m = p.env.Picture.to(m, u.Family(), routes)
	below := func(r route.Route) bool { return r.Gateway == dst.Addr() }
	if len(m.Routes)+len(m.Local) == 0 && dst.Bits() > uplink.Halves(u.Family()) && !u.Gives(dst) && !slices.ContainsFunc(m.Below, below) {
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

// filling is a table on its way to what a large main wants. It is filled in slices, between which the loop answers and
// renews leases. Of each route of the table and of the plan it has a hash, never all routes.
type filling struct {
	table      uint32
	of         version // of main
	seed       maphash.Seed
	have, want map[uint64]struct{}
	keys       []uint64 // of destinations of main
	at         int      // the next one
	gateways   bool     // routes to links are in: the kernel looks for the way to a gateway
	errs       []error
}

// slice is how many destinations of main are carried over in one turn of the loop: some milliseconds.
const slice = 2048

// holdFor is longer than one slice takes on a busy machine.
const holdFor = 10 * time.Second

func (p *placer) newFilling(u uplink.Uplink, table uint32, image *route.Image) (*filling, error) {
	f := &filling{table: table, of: p.looked, seed: maphash.MakeSeed(), have: make(map[uint64]struct{}), want: make(map[uint64]struct{}), keys: image.Keys()}
	err := p.env.Kernel.EachOfOurs(u.Family(), table, func(r route.Route) { f.have[f.sum(r)] = struct{}{} })
	return f, err
}

func (f *filling) sum(r route.Route) uint64 {
	r.Onlink = false // the kernel may have forced it
	return r.Sum(f.seed)
}

// missing returns those of routes that are due now and that the table does not have.
func (f *filling) missing(routes []route.Route) (missing []route.Route) {
	for _, r := range routes {
		hash := f.sum(r)
		f.want[hash] = struct{}{}
		if _, there := f.have[hash]; !there && r.Gateway.IsValid() == f.gateways {
			missing = append(missing, r)
		}
	}
	return missing
}

// replaced notes what was changed in the table meanwhile.
func (f *filling) replaced(had, want []route.Route) {
	if f == nil {
		return
	}
	for _, r := range had {
		delete(f.want, f.sum(r))
	}
	for _, r := range want {
		f.want[f.sum(r)] = struct{}{}
		if !slices.ContainsFunc(had, r.Equal) { // else it was not added: its turn may still come
			f.have[f.sum(r)] = struct{}{}
		}
	}
}

// syncLarge makes the table what a large main wants, or does the next slice of that: then p.filling says what is left.
func (p *placer) syncLarge(u uplink.Uplink, m uplink.Main, table uint32, image *route.Image) (err error) {
	f := p.filling
	if f == nil || f.table != table || f.of != p.looked {
		if f, err = p.newFilling(u, table, image); err != nil {
			return err
		}
	}
	p.filling = f
	var missing []route.Route
	to := min(f.at+slice, len(f.keys))
	image.Some(f.keys[f.at:to], func(dst netip.Prefix, routes []route.Route) {
		missing = append(missing, f.missing(p.planTo(u, m, table, dst, routes))...)
	})
	if f.at = to; to == len(f.keys) {
		for _, r := range u.Plan(m, table) { // also what main has no routes to
			if len(image.To(r.Dst)) == 0 {
				missing = append(missing, f.missing([]route.Route{r})...)
			}
		}
	}
	f.errs = append(f.errs, p.env.Kernel.Replace(nil, missing))
	p.env.Picture.hold(u.Family(), holdFor)
	switch {
	case f.at < len(f.keys):
		return nil
	case !f.gateways:
		f.gateways, f.at = true, 0
		return nil
	}
	return p.finishLarge(u)
}

// finishLarge deletes what a large main does not want.
func (p *placer) finishLarge(u uplink.Uplink) error {
	f := p.filling
	p.filling = nil
	p.env.Picture.hold(u.Family(), 0)
	var stale []route.Route
	carried := []route.Route{}
	err := p.env.Kernel.EachOfOurs(u.Family(), f.table, func(r route.Route) {
		if _, wanted := f.want[f.sum(r)]; !wanted {
			stale = append(stale, r)
		} else if r.Dst.Bits() == 0 {
			carried = append(carried, r)
		}
	})
	if err == nil {
		p.carried = carried
	}
	errs := append(f.errs, err, p.env.Kernel.Replace(stale, nil))
	p.placed = len(f.want)
	return errors.Join(errs...)
}

// follow carries changes of a large main over, at a cost that does not depend on its size.
func (p *placer) follow(u uplink.Uplink, m uplink.Main, table uint32, changes []Change) error {
	var errs []error
	own := m
	own.Below = nil
	for _, c := range changes {
		had, want := p.planTo(u, own, table, c.dst, c.before), p.planTo(u, own, table, c.dst, c.after)
		err := p.replace(had, want)
		errs = append(errs, err)
		if c.dst.Bits() == 0 {
			p.noteDefault(u, m, u.Plan(m, table))
			if p.carried = append([]route.Route{}, want...); err != nil || p.filling != nil { // none is not nil
				p.carried = nil
			}
		}
	}
	if len(changes) > 0 && len(m.Below)+len(p.below) > 0 {
		errs = append(errs, p.followBelow(u, m, table))
	}
	return errors.Join(errs...)
}

// replace replaces routes of a table that is filled, or on its way to that.
func (p *placer) replace(had, want []route.Route) error {
	p.placed += len(want) - len(had)
	err := p.env.Kernel.Replace(had, want)
	p.filling.replaced(had, want)
	return err
}

// followBelow replaces the routes by the gateways of the link that a macvlan is on.
func (p *placer) followBelow(u uplink.Uplink, m uplink.Main, table uint32) error {
	had, want := p.below, u.ByBelow(m, table)
	p.below = want
	without := func(routes, others []route.Route) []route.Route {
		return slices.DeleteFunc(slices.Clone(routes), func(r route.Route) bool { return slices.ContainsFunc(others, r.Equal) })
	}
	return p.replace(without(had, u.Plan(m, table)), without(want, had))
}

// restoreLost adds the routes again that others deleted from the table, as far as they are wanted still. Most of these
// events are of what this process did itself: a route that main lost and got again is there by then, which only a dump of the
// table would tell.
func (p *placer) restoreLost(u uplink.Uplink, m uplink.Main, table uint32, events []route.Event) error {
	var errs []error
	for _, e := range events {
		if e.Kind != route.RouteChanged || !e.Deleted || e.Table != table || e.Family != u.Family() || e.Protocol != route.Protocol || p.env.Kernel.Made(e) {
			continue
		}
		dst := e.Route.Dst
		want := p.planTo(u, m, table, dst, p.env.Picture.largeMain(u.Family()).To(dst))
		want = slices.DeleteFunc(want, func(r route.Route) bool { return !r.Equal(*e.Route) })
		errs = append(errs, p.env.Kernel.Replace(nil, want))
	}
	return errors.Join(errs...)
}
