package install

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// placer is the routes of one uplink in the kernel: in its table, and what of them main lost to the table.
type placer struct {
	env *Env

	table      uint32        // 0: no lease
	taken      []route.Route // what main lost to the table, as it was there
	fresh      []route.Route // of that, what was deleted from main after the last event that was heard
	spent      []route.Route // what was fresh before the link was down: the events of its deletion are still to come
	newer      []route.Route // what was fresh at the last event that tells of a loss
	last       []route.Route // what main had over the link, when the link was up last, and what others took of it
	others     []route.Route // what others of the link took, or gave back to main, and what main had beside taken
	strange    []route.Route // of what others took, what came to main after the last event that was heard
	lost       []route.Route // of that, what went with the link
	placed     int           // routes in the table after the last sync
	added      int           // by the last sync
	hasDefault bool
	shared     bool          // main has routes with several next hops over the link
	isBelow    bool          // that one is of the link which a macvlan is on
	metric     uint32        // of the best default route in the table, if hasDefault
	gateway    netip.Addr    // of that route
	source     netip.Addr    // of traffic that is bound to nothing, as main says
	toAll      bool          // the plan has had a default route since the lease stands
	down       bool          // the link is down, as of the last look
	wasDown    bool          // it has been down since
	went       []netip.Addr  // IPv4 addresses that were deleted from it since
	heir       bool          // a holder before this process filled the table
	unbroken   bool          // and since it took routes out of main, the link was up and had the address
	upAnew     bool          // the link-local address of IPv6 says that the link came up since then
	judging    *witnesses    // of that one, until it is known what main would have lost since
	unread     bool          // what that one took out of main could not be read yet
	unsure     bool          // holders of other addresses may not have noted yet what main lost
	deadEnd    bool          // main keeps its default routes, which was said
	expires    int           // seconds until the first route of the table ends; 0: none does
	carried    []route.Route // default routes of ours in the table that a large main filled; nil: the table has to be read
	below      []route.Route // of that table, the routes by the gateways of the link that a macvlan is on
	filling    *filling      // of a table that a large main fills; nil: it is filled
	again      []route.Route // of what was taken, what main has had again; it had lost these before, if that is heard while they are fresh
	looked     version       // of main, at the last look
	seen       version       // of main, when the table was filled last
}

// maxLost bounds what is remembered of a link that may go down. Whoever has more routes has a daemon for them.
const maxLost = 1000

// look reads what a plan is made from, and reports whether the link is up and has the address: routes wait for both.
func (p *placer) look(u uplink.Uplink, link route.Link) (m uplink.Main, up, ready bool, err error) {
	if p.down = !link.Up; p.down {
		p.spent = append(p.spent, p.fresh...)
		p.wasDown, p.fresh, p.newer, p.filling = true, nil, nil, nil
		return m, false, false, nil
	}
	var addresses []route.Address
	if p.env.Picture != nil {
		addresses, m, p.looked, err = p.env.Picture.on(u, link.Index)
	} else {
		addresses, m, err = readLink(p.env.Kernel, u, link.Index)
	}
	if err != nil {
		return m, false, false, err
	}
	if m.Below, err = p.defaultsBelow(u, link); err != nil {
		return m, false, false, err
	}
	for _, a := range addresses {
		ready = ready || a.Addr == u.Addr()
		m.Addresses = append(m.Addresses, uplink.Address{Addr: a.Addr, Network: a.Network().Masked(), Local: a.Created == 0})
	}
	m.Bare = u.Addr().Is4() && p.env.Picture.largeMain(u.Family()) == nil &&
		!slices.ContainsFunc(addresses, func(a route.Address) bool { return a.Created != 0 }) // others are routes of type local
	p.shared = slices.ContainsFunc(m.Routes, func(r route.Route) bool { return r.Multipath })
	m.Taken, m.Lost = p.taken, p.lost
	if u.Settings.Routes == uplink.MoveRoutes {
		if m.OfHost, err = p.ofHost(u, m); err != nil {
			return m, true, false, err
		}
		if len(addresses) > 1 {
			others, err := p.takenByOthers(u, link.Index)
			if err != nil {
				return m, true, false, err
			}
			m.Taken = slices.Concat(p.taken, others)
		}
	}
	return m, true, ready, nil
}

// ofHost returns the addresses of lo, if main has a default route over the link whose source is none of the link.
func (p *placer) ofHost(u uplink.Uplink, m uplink.Main) (all []netip.Addr, err error) {
	if !slices.ContainsFunc(m.Routes, func(r route.Route) bool {
		return r.Dst.Bits() == 0 && r.Src.IsValid() && !slices.ContainsFunc(m.Addresses, func(a uplink.Address) bool { return a.Addr == r.Src })
	}) {
		return nil, nil
	}
	const loopback = 1 // its ifindex, in every network namespace
	addresses, err := p.env.Kernel.AddressesOn(u.Family(), loopback)
	for _, a := range addresses {
		all = append(all, a.Addr)
	}
	return all, err
}

// defaultsBelow returns the default routes of main, also those that move took, over the link that a macvlan is on, for an
// address of one of that link's networks: keepalived has virtual addresses on such links, and no routes over them. The
// client of one address does not look there.
func (p *placer) defaultsBelow(u uplink.Uplink, link route.Link) ([]route.Route, error) {
	picture := p.env.Picture
	if picture == nil || !picture.follow(link) {
		return nil, nil
	}
	addresses, lower, seen, err := picture.on(u, link.Below)
	p.looked.link += seen.link
	if err != nil || !slices.ContainsFunc(addresses, func(a route.Address) bool { return a.Network().Contains(u.Addr()) }) {
		return nil, err
	}
	taken, err := p.takenByOthers(u, link.Below)
	var routes []route.Route
	for _, r := range slices.Concat(lower.Routes, taken) {
		if r.Dst.Bits() == 0 {
			routes = append(routes, r.Legs(link.Below)...)
		}
	}
	return routes, err
}

// takenByOthers returns what the holders of the link's other addresses moved out of main, which this address needs, too.
func (p *placer) takenByOthers(u uplink.Uplink, index int) ([]route.Route, error) {
	files, err := movedOn(u.Family(), index)
	if err != nil {
		return nil, err
	}
	return files.readOthers(u)
}

// place fills table; main keeps what it has until cleanMain, so that nothing is without a
// route before the rules stand.
func (p *placer) place(u uplink.Uplink, m uplink.Main, table uint32) error {
	p.seen, p.carried = p.looked, nil
	var adoptErr error // the table gets its routes all the same
	if p.table != table || p.unread {
		adoptErr = p.adopt(u, &m, table)
		p.table = table
		if p.heir && !p.unbroken { // since when the address may have gone for a moment
			p.went = append(p.went, u.Addr())
		}
		p.heir = false // this process fills the next table
	}
	had := len(p.taken) // as it is written down
	if image := p.env.Picture.largeMain(u.Family()); image != nil {
		if p.unread {
			return adoptErr
		}
		p.noteLoss(u, &m, false)
		p.noteDefault(u, m, u.Plan(m, table))
		p.below = u.ByBelow(m, table)
		return errors.Join(adoptErr, p.standing(u, m, had), p.syncLarge(u, m, table, image))
	}
	p.filling = nil
	have, err := p.env.Kernel.Routes(u.Family(), table)
	if err != nil {
		return errors.Join(adoptErr, err)
	}
	if p.unread && slices.ContainsFunc(have, ours) {
		return adoptErr // main may not have what is in there
	}
	p.noteLoss(u, &m, !slices.ContainsFunc(have, func(r route.Route) bool { return ours(r) && r.Index == m.Index }))
	err = errors.Join(adoptErr, p.standing(u, m, had))
	plan := u.Plan(m, table)
	p.noteDefault(u, m, plan)
	p.expires = 0
	for _, r := range plan {
		p.toAll = p.toAll || r.Dst.Bits() == 0
		if r.Expires > 0 && (p.expires == 0 || r.Expires < p.expires) {
			p.expires = r.Expires
		}
	}
	added, deleted, syncErr := p.env.Kernel.SyncRoutesFrom(have, u.Family(), table, plan)
	p.env.logRoutes("route added", u, added...)
	p.env.logRoutes("route removed", u, deleted...)
	p.placed, p.added = len(plan), len(added)
	return errors.Join(err, syncErr)
}

func (p *placer) writeTaken(u uplink.Uplink, index int) error {
	if p.env.takers.another(p, u, index) { // the file is of that one
		return nil
	}
	files, err := movedOn(u.Family(), index)
	if err != nil {
		return err
	}
	taken := movedRoutes{Table: p.table, Routes: p.taken, Order: p.env.order.of(p.taken)}
	if len(p.taken) > 0 {
		if taken.Since, err = p.since(u, index); err != nil {
			return err
		}
	}
	return files.write(u, taken)
}

// cleanMain deletes from main what the table has now: routes that are moved, and those of fallBack.
func (p *placer) cleanMain(u uplink.Uplink, m uplink.Main) error {
	if p.unread {
		return nil // else the file would be written anew
	}
	if p.env.takers.another(p, u, m.Index) {
		return nil
	}
	p.sayDeadEnd(u, m)
	if m.DeadEnd && len(p.taken) > 0 {
		return errors.Join(p.putBack(u, m), p.writeTaken(u, m.Index))
	}
	takes := u.Takes(m)
	if len(takes) == 0 {
		return p.withdraw(u, m)
	}
	have, err := p.defaultsOfTable(u.Family())
	if err != nil {
		return err
	}
	takes = slices.DeleteFunc(takes, func(r route.Route) bool {
		// What was not carried over stays where it is of use.
		return !slices.ContainsFunc(have, func(h route.Route) bool { return ours(h) && uplink.SameWay(h, r) })
	})
	return errors.Join(p.take(u, m.Index, takes), p.withdraw(u, m))
}

// sayDeadEnd says that move leaves main its default routes, and why, and the end of that.
func (p *placer) sayDeadEnd(u uplink.Uplink, m uplink.Main) {
	ends := m.DeadEnd && u.Settings.Routes == uplink.MoveRoutes
	if ends == p.deadEnd {
		return
	}
	p.deadEnd = ends
	what := "main has no default route that leads nowhere any more, and loses its other ones again"
	if ends {
		what = "main keeps its default routes, since it has one that leads nowhere: no rule behind main would be asked"
	}
	p.env.Log.Warn(what, "ifname", u.Key.Ifname, "addr", u.Key.Address, "family", u.Key.Family.String(), "table", p.table)
}

// take deletes routes from main. What somebody else has deleted meanwhile is not taken. What cannot be written down stays in
// main: a holder that comes after one that was killed could not put it back.
func (p *placer) take(u uplink.Uplink, index int, routes []route.Route) error {
	if len(routes) == 0 {
		return nil
	}
	before, others := slices.Clone(p.taken), slices.Clone(p.others)
	p.env.takers.succeed(p, u, index) // the one that had done so before may have ended
	err := p.note(u, index, routes)
	if err != nil {
		p.taken, p.others = before, others
		return fmt.Errorf("leave them in main: %w", err)
	}
	deleted, deleteErr := p.delete(u, routes)
	p.fresh = append(p.fresh, deleted...)
	if len(deleted) < len(routes) {
		p.taken = append(before, deleted...)
		err = errors.Join(err, p.writeTaken(u, index))
	}
	return errors.Join(err, deleteErr)
}

// note notes routes before main loses them: a client that is killed in between leaves a file of routes that main still
// has.
func (p *placer) note(u uplink.Uplink, index int, routes []route.Route) error {
	all, err := p.defaultsOfMain(u.Family())
	if err != nil {
		return err
	}
	if p.env.Picture == nil && len(p.taken) == 0 { // a watch takes for all addresses
		if p.env.order.before, err = takenByAll(u); err != nil {
			p.env.Log.Warn("cannot read what other clients moved", "err", err)
		}
	}
	p.env.order.note(all)
	p.taken = append(p.taken, routes...)
	for _, r := range all { // what stands beside them is no newer route
		if slices.ContainsFunc(routes, func(t route.Route) bool { return samePlace(t, r) && !t.Equal(r) }) {
			p.others = append(p.others, r)
		}
	}
	return p.writeTaken(u, index)
}

func (p *placer) delete(u uplink.Uplink, routes []route.Route) (deleted []route.Route, err error) {
	return p.changeMain(u, routes, func(r route.Route) (bool, error) {
		if have, known := p.env.Picture.toAll(r.Family); known && r.Dst.Bits() == 0 {
			deleted, err := p.env.Kernel.DeleteRouteFrom(have, r)
			if deleted && err == nil {
				p.env.Picture.forget(r)
			}
			return deleted, err
		}
		return p.env.Kernel.DeleteRoute(r)
	}, "route deleted from main")
}

// defaultsOfMain returns the default routes of main, and may return others. A large main is not read for that.
func (p *placer) defaultsOfMain(family int) ([]route.Route, error) {
	if routes, known := p.env.Picture.toAll(family); known {
		return routes, nil
	}
	return p.env.Kernel.Routes(family, unix.RT_TABLE_MAIN)
}

// defaultsOfTable is defaultsOfMain for the table of the lease.
func (p *placer) defaultsOfTable(family int) ([]route.Route, error) {
	if p.carried != nil {
		return p.carried, nil
	}
	return p.env.Kernel.Routes(family, p.table)
}

// changeMain adds routes to main, or deletes them, and logs each. It returns those that it changed.
func (p *placer) changeMain(u uplink.Uplink, routes []route.Route, change func(route.Route) (bool, error), done string) (changed []route.Route, err error) {
	var errs []error
	for _, r := range routes {
		p.env.Picture.Invalidate()
		ok, err := change(r)
		errs = append(errs, err)
		if ok && err == nil {
			changed = append(changed, r)
			p.env.logRoutes(done, u, r)
		}
	}
	return changed, errors.Join(errs...)
}

// adopt takes over what a holder before this one took out of main, perhaps one that was killed.
func (p *placer) adopt(u uplink.Uplink, m *uplink.Main, table uint32) error {
	if u.Settings.Routes != uplink.MoveRoutes {
		return nil
	}
	if p.table != 0 && !p.unread { // the server gave another one
		p.table = table
		return p.writeTaken(u, m.Index)
	}
	p.unread = true // until all is known: it is tried again
	files, err := movedOn(u.Family(), m.Index)
	if err != nil {
		return err
	}
	before, known, err := files.read(u)
	if errors.Is(err, outside.ErrSilent) {
		return err
	}
	if err != nil {
		p.env.Log.Warn("cannot read what was moved before; looking for it in the table", "table", table, "err", err)
	}
	if !known {
		rules, err := p.env.Kernel.RulesWhere(u.Family(), func(r *route.Rule) bool { return r.Protocol == route.Protocol })
		if err != nil {
			return err
		}
		if uplink.LeadsPastMain(rules, table) {
			if before.Routes, err = p.adoptOlder(u, *m, table); err != nil {
				return err
			}
		}
	}
	if known {
		if before.Routes, err = files.standing(u, before); err != nil {
			return err
		}
	}
	p.unread = false
	addresses, err := p.env.Kernel.Addresses(u.Family())
	p.taken = uplink.WithoutSource(before.Routes, func(r route.Route) bool {
		return err == nil && !slices.ContainsFunc(addresses, func(a route.Address) bool {
			return a.Addr == r.Src && (r.Family == unix.AF_INET || a.Index == r.Index)
		})
	})
	for _, r := range before.Order { // what stood beside what was taken is no newer route, also if main got it back meanwhile
		if !slices.ContainsFunc(p.taken, r.Equal) {
			p.others = append(p.others, r)
		}
	}
	p.table, p.heir = table, before.Table == table
	if len(p.taken) > 0 && before.Since.known() {
		now, err := p.since(u, m.Index)
		p.unbroken = err == nil && now == before.Since
		p.upAnew = err == nil && now.Link != 0 && now.Link != before.Since.Link
	}
	p.judging = &before.Since
	p.env.takers.succeed(p, u, m.Index)
	p.env.order.note(before.Order)
	m.Taken = slices.Concat(p.taken, m.Taken) // in the order of look
	return errors.Join(err, p.writeTaken(u, m.Index))
}

// fallBack gives main what it needs while there is no lease.
func (p *placer) fallBack(u uplink.Uplink, m uplink.Main) error {
	_, deleteErr := p.delete(u, slices.DeleteFunc(slices.Clone(m.Routes), func(r route.Route) bool { return !u.LostSource(m, r) }))
	_, err := p.changeMain(u, u.Stopgap(m), func(r route.Route) (bool, error) { return true, p.env.Kernel.AddRoute(r) }, "no lease: route added to main")
	return errors.Join(deleteErr, err)
}

// putBack gives main back what it lost, before the rules go: nobody is cut off because a
// lease ends. What main would have lost meanwhile, with the link or its last address, stays away.
func (p *placer) putBack(u uplink.Uplink, m uplink.Main) error {
	if u.Settings.Routes != uplink.MoveRoutes || p.table == 0 {
		return nil
	}
	unheard, err := p.wentUnheard(u, m)
	switch {
	case p.succeeded(u, m.Index):
		p.taken = nil
	case p.wasDown || unheard || p.bare(u, m):
		p.lose(true)
	}
	err = errors.Join(err, p.restore(u, p.stands(m)))
	m.Routes = slices.Concat(m.Routes, p.taken)
	p.taken = nil
	return errors.Join(err, p.leaveBehind(u, m))
}

// leaveBehind is fallBack for an address that ends. What main gets goes with the address, unless another link has that, too: the
// kernel keeps routes by what is their source anywhere. In IPv6 it stays, behind the default routes of other links, until a
// client of the link starts or the link goes down: without it the address would be cut off now.
func (p *placer) leaveBehind(u uplink.Uplink, m uplink.Main) error {
	if len(u.Stopgap(m)) == 0 {
		return nil
	}
	here := slices.ContainsFunc(m.Addresses, func(a uplink.Address) bool { return a.Addr == u.Addr() })
	addresses, err := p.env.Kernel.Addresses(u.Family())
	if !here || slices.ContainsFunc(addresses, func(a route.Address) bool { return a.Addr == u.Addr() && a.Index != m.Index }) {
		return err
	}
	return errors.Join(err, p.fallBack(u, m))
}

// restore gives main routes back, where they stood.
func (p *placer) restore(u uplink.Uplink, routes []route.Route) error {
	if len(routes) == 0 {
		return nil
	}
	now, err := p.defaultsOfMain(u.Family())
	if err != nil {
		return err
	}
	front, behind := p.env.order.around(now, routes)
	slices.Reverse(front)
	back := func(inFront bool) func(route.Route) (bool, error) {
		return func(r route.Route) (bool, error) { return p.env.Kernel.RestoreRoute(r, inFront) }
	}
	restored, err := p.changeMain(u, behind, back(false), "route restored in main")
	more, frontErr := p.changeMain(u, front, back(true), "route restored in main")
	for _, r := range slices.Concat(restored, more) {
		p.env.returned = append(p.env.returned, returned{Route: r})
	}
	return errors.Join(err, frontErr)
}

// succeeded reports whether the holder of the address for a new name of the link has taken over what was taken.
func (p *placer) succeeded(u uplink.Uplink, index int) bool {
	files, err := movedOn(u.Family(), index)
	if err != nil {
		return false // so that main gets it back once more
	}
	file, known, err := files.read(u)
	return err == nil && known && file.Table != p.table
}

// withdraw deletes the routes of fallBack from main, also those of an earlier process, and a route to a gateway alone: a
// process that was killed while it restored another one by that gateway left it.
func (p *placer) withdraw(u uplink.Uplink, m uplink.Main) error {
	given := u.Given(m, unix.RT_TABLE_MAIN)
	_, err := p.delete(u, slices.DeleteFunc(slices.Clone(m.Routes), func(r route.Route) bool {
		toGateway := r.Dst.IsSingleIP() && !r.Src.IsValid() && !r.Gateway.IsValid()
		same := func(g route.Route) bool { return uplink.SameWay(g, r) }
		// With an IPv6 address the kernel deletes what has it as its source from no table, but the source.
		left := r.Family == unix.AF_INET6 && !r.Src.IsValid() && !uplink.IsChoiceRoute(r) && slices.ContainsFunc(given, same) || u.LostSource(m, r)
		return !ours(r) || r.Src != u.Addr() && !toGateway && !left
	}))
	return err
}

func ours(r route.Route) bool { return r.Protocol == route.Protocol }

// logRoutes logs what happened to routes of an uplink, each as ip prints it. A thousand tables have many routes, and
// most often nobody reads of them.
func (e *Env) logRoutes(what string, u uplink.Uplink, routes ...route.Route) {
	if !e.Log.Enabled(context.Background(), slog.LevelDebug) {
		return
	}
	for _, r := range routes {
		e.Log.Debug(what, "route", e.RouteText(r), "ifname", u.Key.Ifname, "addr", u.Key.Address,
			"family", u.Key.Family.String(), "table", r.Table)
	}
}

// RouteText is a route as `ip route` prints it, with the name of its link.
func (e *Env) RouteText(r route.Route) string {
	text := r.String()
	if link, found, err := e.Kernel.LinkByIndex(r.Index); err == nil && found {
		text = strings.Replace(text, fmt.Sprintf(" dev #%d", r.Index), " dev "+link.Name, 1)
	}
	return text
}
