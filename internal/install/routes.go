package install

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// placer is the routes of one uplink in the kernel: in its table, and what of them has to
// be in main.
type placer struct {
	env *Env

	table    uint32        // 0: no lease
	taken    []route.Route // what main lost to the table
	last     []route.Route // what main had of this uplink, when the link was up last
	kept     []route.Route // of that, what went with the link
	placed   int           // routes in the table after the last sync
	wasDown  bool          // the link was seen down since
	expires  int           // seconds until the first route of the table ends; 0: none does
	remarked map[string]bool
}

// look reads what a plan is made from. It reports false while the address is not on the link, or the link is not up.
func (p *placer) look(u uplink.Uplink, link route.Link) (v uplink.View, ok bool, err error) {
	v.Index = link.Index
	if !link.Up {
		p.wasDown = true
		return v, false, nil
	}
	on, err := p.on(u.Family(), link.Index)
	if err != nil {
		return v, false, err
	}
	for _, a := range on.addresses {
		if a.Addr == u.Addr() {
			v.Network, ok = a.Network(), true
		} else {
			v.Others = append(v.Others, a.Network())
		}
	}
	if !ok {
		return v, false, nil
	}
	v.Main = slices.DeleteFunc(on.main, func(r route.Route) bool {
		if r.Family != unix.AF_INET6 || !r.Multipath || r.NexthopID != 0 {
			return false
		}
		v.Shared = append(v.Shared, r.Legs(link.Index)...)
		return true
	})
	if u.Settings.Routes == uplink.MoveRoutes && len(v.Others) > 0 {
		v.Borrowed, err = p.borrow(u, v)
	}
	return v, err == nil, err
}

func (p *placer) on(family, index int) (onLinkOf, error) {
	if p.env.Glance != nil {
		return p.env.Glance.at(family, index)
	}
	return readLink(p.env.Kernel, family, index)
}

// borrow looks for gateways in the tables of the link's other addresses: with move, the
// first holder takes the routes out of main that the others need, too.
func (p *placer) borrow(u uplink.Uplink, v uplink.View) ([]route.Route, error) {
	routes, err := p.env.Kernel.RoutesOn(u.Family(), unix.RT_TABLE_UNSPEC, v.Index)
	if err != nil {
		return nil, err
	}
	other := func(a netip.Addr) bool {
		return slices.ContainsFunc(v.Others, func(n netip.Prefix) bool { return n.Addr() == a })
	}
	var borrowed []route.Route
	for _, r := range routes {
		if ours(r) && r.Table != unix.RT_TABLE_MAIN && r.Gateway.IsValid() && other(r.Src) {
			r.Src, r.Protocol, r.Table = netip.Addr{}, unix.RTPROT_BOOT, unix.RT_TABLE_MAIN
			borrowed = append(borrowed, r)
		}
	}
	return borrowed, nil
}

// place fills table; main keeps what it has until cleanMain, so that nothing is without a
// route before the rules stand.
func (p *placer) place(u uplink.Uplink, v uplink.View, table uint32) error {
	if p.table != table {
		if err := p.adopt(u, v, table); err != nil {
			return err
		}
		p.table = table
	}
	have, err := p.env.Kernel.Routes(u.Family(), table)
	if err != nil {
		return err
	}
	if p.wasDown || p.placed > 0 && !slices.ContainsFunc(have, ours) {
		// The kernel empties all tables when a link goes down, and main gets back its
		// network only.
		p.kept = append(p.kept, p.last...)
		// What was advertised comes with an advertisement, or was over.
		p.kept = slices.DeleteFunc(p.kept, func(r route.Route) bool { return r.Expires > 0 })
	}
	p.wasDown = false
	plan := uplink.MakePlan(u, v, table, p.taken, p.kept)
	p.taken = plan.Taken
	p.last = nil
	for _, r := range v.Routes() {
		if r.Protocol != route.Protocol && v.Belongs(r, u.Addr()) && uplink.Unmovable(r) == "" {
			p.last = append(p.last, r)
		}
	}
	current := uplink.Places(p.last)
	p.kept = slices.DeleteFunc(p.kept, func(r route.Route) bool { return current[uplink.PlaceOf(r)] })
	for _, text := range plan.Left {
		p.remark(u, "route left alone", text)
	}
	p.expires = 0
	for _, r := range plan.Table {
		if r.Expires > 0 && (p.expires == 0 || r.Expires < p.expires) {
			p.expires = r.Expires
		}
	}
	added, deleted, err := p.env.Kernel.SyncRoutes(u.Family(), table, plan.Table)
	for _, r := range added {
		p.env.Log.Info("route added", attrs(u, r)...)
	}
	for _, r := range deleted {
		p.env.Log.Info("route removed", attrs(u, r)...)
	}
	p.placed = len(plan.Table)
	return err
}

// cleanMain deletes from main what the table has now: routes that are moved, and those of fallBack.
func (p *placer) cleanMain(u uplink.Uplink, v uplink.View) error {
	have, err := p.env.Kernel.Routes(u.Family(), p.table)
	if err != nil {
		return err
	}
	leave := slices.DeleteFunc(uplink.MakePlan(u, v, p.table, p.taken, p.kept).Leave, func(r route.Route) bool {
		// What was not carried over stays where it is of use.
		return !slices.ContainsFunc(have, func(h route.Route) bool { return ours(h) && uplink.SameWay(h, r) })
	})
	return errors.Join(p.delete(u, leave), p.withdraw(u, v))
}

func (p *placer) delete(u uplink.Uplink, routes []route.Route) error {
	return p.changeMain(u, routes, p.env.Kernel.DeleteRoute, "route deleted from main")
}

// changeMain adds routes to main, or deletes them, and logs each.
func (p *placer) changeMain(u uplink.Uplink, routes []route.Route, change func(route.Route) error, done string) error {
	var errs []error
	for _, r := range routes {
		p.env.Glance.Invalidate()
		if err := change(r); err != nil {
			errs = append(errs, err)
			continue
		}
		p.env.Log.Info(done, attrs(u, r)...)
	}
	return errors.Join(errs...)
}

// adopt takes over what a holder that was killed left in the table: with move, main does
// not have it any more.
func (p *placer) adopt(u uplink.Uplink, v uplink.View, table uint32) error {
	if u.Settings.Routes != uplink.MoveRoutes || p.table != 0 {
		return nil
	}
	have, err := p.env.Kernel.Routes(u.Family(), table)
	if err != nil {
		return err
	}
	told := u.GivenRoutes(v, table)
	for _, r := range have {
		if !ours(r) || r.Index != v.Index || r.Src != u.Addr() {
			continue
		}
		if r.Gateway.IsValid() && slices.ContainsFunc(told, func(t route.Route) bool { return uplink.SameWay(t, r) }) {
			continue
		}
		p.taken = append(p.taken, asBefore(r, v))
	}
	return nil
}

// asBefore is a route of the table as main may have had it. The network of the link was the kernel's; of others the
// protocol is not known any more.
func asBefore(r route.Route, v uplink.View) route.Route {
	r = r.In(unix.RT_TABLE_MAIN, r.Src)
	r.Protocol = unix.RTPROT_BOOT
	if r.Dst == v.Network.Masked() && !r.Gateway.IsValid() {
		r.Protocol = unix.RTPROT_KERNEL
	}
	return r
}

// fallBack gives main what it needs while there is no lease.
func (p *placer) fallBack(u uplink.Uplink, v uplink.View) error {
	return p.changeMain(u, uplink.Stopgap(u, v), p.env.Kernel.AddRoute, "no lease: route added to main")
}

// putBack gives main back what it lost, before the rules go: nobody is cut off because a
// lease ends.
func (p *placer) putBack(u uplink.Uplink, v uplink.View) error {
	if u.Settings.Routes != uplink.MoveRoutes || p.table == 0 {
		return nil
	}
	err := p.changeMain(u, p.taken, p.env.Kernel.AddRoute, "route restored in main")
	v.Main = append(v.Main, p.taken...)
	p.taken = nil
	return errors.Join(err, p.fallBack(u, v))
}

// drop clears what is known of a table that is being emptied.
func (p *placer) drop() {
	*p = placer{env: p.env, remarked: p.remarked}
}

// withdraw deletes the routes of fallBack from main, also those of an earlier process.
func (p *placer) withdraw(u uplink.Uplink, v uplink.View) error {
	return p.delete(u, slices.DeleteFunc(slices.Clone(v.Main), func(r route.Route) bool {
		return !ours(r) || r.Src != u.Addr()
	}))
}

// remark logs a text once.
func (p *placer) remark(u uplink.Uplink, what, text string) {
	if p.remarked[text] {
		return
	}
	if p.remarked == nil {
		p.remarked = make(map[string]bool)
	}
	p.remarked[text] = true
	p.env.Log.Warn(what, "ifname", u.Key.Ifname, "addr", u.Key.Address, "family", u.Key.Family.String(), "err", text)
}

func ours(r route.Route) bool { return r.Protocol == route.Protocol }

func attrs(u uplink.Uplink, r route.Route) []any {
	return []any{"route", fmt.Sprint(r), "ifname", u.Key.Ifname, "addr", u.Key.Address,
		"family", u.Key.Family.String(), "table", r.Table}
}
