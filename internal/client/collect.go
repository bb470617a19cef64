package client

import (
	"errors"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/install"
	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// isLeased reports whether a table can be that of a lease.
func isLeased(table uint32) bool { return table != 0 && table != unix.RT_TABLE_MAIN }

// tables are the tables whose rules have to be there.
func (h *host) tables() map[uint32]bool {
	tables := make(map[uint32]bool, len(h.sessions))
	for _, s := range h.sessions {
		if s.serves() {
			tables[s.lease.table] = true
		}
	}
	return tables
}

func (h *host) collectStale() {
	if err := h.collect(); err != nil {
		h.log.Error("cannot remove stale rules and routes", "err", err)
	}
}

// collect removes rules and routes of ours that no client keeps any more: clients died, or addresses were deleted
// while no client ran.
func (h *host) collect() error {
	names, err := peer.HolderNames()
	if err != nil {
		return err
	}
	served := servedBy(names)
	errs := []error{h.dropStale(names), h.env.CollectEndpoints(servedNow(served)), h.env.ReturnOrphans(servedNow(served))}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		errs = append(errs, h.collectFamily(family, served))
	}
	order, err := h.unboundOrder(uplink.Loopback)
	for of := range h.order {
		h.order[of] = slices.DeleteFunc(h.order[of], func(table uint32) bool {
			return err == nil && !slices.Contains(order[of], table) &&
				!slices.ContainsFunc(h.sessions, func(s *session) bool { return s.ordered == table && s.orderedIn == of })
		})
	}
	return errors.Join(append(errs, err)...)
}

// servedBy are the addresses of the names of holders.
func servedBy(names []string) map[netip.Addr]bool {
	served := make(map[netip.Addr]bool, len(names))
	for _, name := range names {
		// IFNAME-ADDR-FAMILY, and a suffix if the client stands in for a holder.
		words := strings.Split(name, "-")
		for _, word := range words[1:] {
			if addr, err := netip.ParseAddr(word); err == nil {
				served[addr] = true
			}
		}
	}
	return served
}

// servedNow reads the names of holders again before it says that an address has none. served are those that had one before.
func servedNow(served map[netip.Addr]bool) install.Served {
	return func(addr netip.Addr) (bool, error) {
		if served[addr] {
			return true, nil
		}
		names, err := peer.HolderNames()
		return servedBy(names)[addr], err
	}
}

// collectFamily is collect for one family. served are the addresses that have a holder.
func (h *host) collectFamily(family int, served map[netip.Addr]bool) error {
	// Rules of ours may lead to tables of the original's clients, whose own rules have no protocol: lookups.
	rules, err := h.kernel.RulesWhere(family, func(r *route.Rule) bool { return r.Protocol == route.Protocol || uplink.IsHost(*r) })
	if err != nil {
		return err
	}
	if h.round != nil && !h.anyStale(family, served, rules, h.round.routes[family]) {
		return nil
	}
	routes, _, err := h.ourRoutes(family) // now: a client may have filled a table in between
	if err != nil {
		return err
	}
	addresses, err := h.kernel.Addresses(family)
	if err != nil {
		return err
	}
	if h.anyStale(family, served, rules, routes) { // a holder has its name before it has rules, so one that has started since is there now
		names, err := peer.HolderNames()
		if err != nil {
			return err
		}
		served = servedBy(names)
	}
	in := h.use(family, served, rules, routes)
	stale := make(map[route.Rule]bool)
	var errs []error
	for _, r := range rules {
		if stale[r] = in.stale(r); stale[r] && uplink.IsHost(r) && !uplink.LeavesTable(r) && !uplink.IsOwnLookup(r) {
			errs = append(errs, h.returnDead(family, r, routes, addresses))
		}
	}
	_, deleted, err := h.kernel.SyncRules(family, func(r route.Rule) bool { return stale[r] }, nil)
	errs = append(errs, err)
	for _, r := range deleted {
		h.log.Info("stale rule removed", "rule", r.String(), "table", r.Table)
	}
	return errors.Join(append(errs, h.flushStale(family, routes, in.tables))...)
}

// anyStale reports whether there is a rule or a route of ours that no client uses.
func (h *host) anyStale(family int, served map[netip.Addr]bool, rules []route.Rule, routes []route.Route) bool {
	in := h.use(family, served, rules, routes)
	return slices.ContainsFunc(rules, in.stale) ||
		slices.ContainsFunc(routes, func(r route.Route) bool { return isLeased(r.Table) && !in.tables[r.Table] })
}

// ourRoutes returns one route of ours for each table, source and link, since there may be very many of them, and how many
// each table has.
func (h *host) ourRoutes(family int) (routes []route.Route, count map[tableOf]int, err error) {
	type kind struct {
		table uint32
		src   netip.Addr
		index int
	}
	seen := make(map[kind]bool)
	count = make(map[tableOf]int)
	err = h.kernel.EachOfOurs(family, unix.RT_TABLE_UNSPEC, func(r route.Route) {
		count[tableOf{family, r.Table}]++
		if of := (kind{r.Table, r.Src, r.Index}); !seen[of] {
			seen[of] = true
			routes = append(routes, r)
		}
	})
	return routes, count, err
}

// flushStale empties the tables that no client uses.
func (h *host) flushStale(family int, routes []route.Route, used map[uint32]bool) error {
	var errs []error
	flushed := make(map[uint32]bool)
	for _, r := range routes {
		if !isLeased(r.Table) || used[r.Table] {
			continue
		}
		if !flushed[r.Table] {
			flushed[r.Table] = true
			h.log.Info("stale routes removed", "table", r.Table, "route", r.String())
			errs = append(errs, h.kernel.FlushTable(family, r.Table))
		}
	}
	return errors.Join(errs...)
}

// inUse says which rules and routes of a family a client uses.
type inUse struct {
	served  map[netip.Addr]bool // addresses that have a holder
	tables  map[uint32]bool     // of addresses that have a holder
	waiting map[netip.Addr]bool // addresses that were added again and have no lease, so that main has to do
	orphan  func(route.Rule) bool
}

// use finds out which rules and routes of a family a client uses.
func (h *host) use(family int, served map[netip.Addr]bool, rules []route.Rule, routes []route.Route) inUse {
	in := inUse{served: served, tables: make(map[uint32]bool), waiting: make(map[netip.Addr]bool)}
	sourced := make(map[netip.Addr]bool) // addresses with a rule to a table
	led := make(map[uint32]bool)         // tables that such a rule leads to
	for _, r := range rules {
		if uplink.IsHost(r) && !uplink.LeavesTable(r) {
			sourced[r.Src.Addr()], led[r.Table] = true, true
			in.tables[r.Table] = in.tables[r.Table] || served[r.Src.Addr()]
		}
	}
	for _, r := range routes {
		// A client fills a table before its rule is there. A route over a link that is no uplink has the source of that
		// link, which may be one by now, and says nothing of whose table it is in.
		if !led[r.Table] {
			in.tables[r.Table] = in.tables[r.Table] || served[r.Src]
		}
	}
	h.addSessions(&in, family, sourced)
	in.orphan = uplink.Orphans(slices.DeleteFunc(slices.Clone(rules), func(r route.Rule) bool { return !in.tables[r.Table] }))
	return in
}

// addSessions adds what the sessions of the watch use. sourced are the addresses that have a rule to a table.
func (h *host) addSessions(in *inUse, family int, sourced map[netip.Addr]bool) {
	for _, s := range h.sessions {
		if s.family() == family && s.lease.table != 0 {
			in.tables[s.lease.table] = true
		}
		if s.lease.state == asking && !sourced[s.addr] {
			in.waiting[s.addr] = true
		}
	}
}

// stale reports whether a rule is ours, and no client uses it.
func (in *inUse) stale(r route.Rule) bool {
	switch {
	case r.Protocol != route.Protocol, uplink.IsForeign(r):
		return false
	case !uplink.LeavesTable(r):
		return !in.tables[r.Table]
	case uplink.IsHost(r):
		return !in.served[r.Src.Addr()] || in.waiting[r.Src.Addr()]
	}
	return in.orphan(r)
}

// returnDead undoes what a client did that died: routes go back to main if its address is still there, and its lease
// to the server. source is the rule from the address.
func (h *host) returnDead(family int, source route.Rule, routes []route.Route, addresses []route.Address) error {
	addr := source.Src.Addr()
	if err := h.removeServers(addr); err != nil {
		return err
	}
	index, network := formerLink(source, routes, addresses)
	link, found, err := h.kernel.LinkByIndex(index)
	if err != nil || !found {
		return err
	}
	u := uplink.Uplink{Key: wire.Key{Family: wire.Family(family), Ifname: link.Name, Address: addr.String()}, Network: network}
	h.log.Info("a client died; its lease is released", "ifname", link.Name, "addr", u.Key.Address, "family", u.Key.Family.String(), "table", source.Table)
	err = h.env.ReturnRoutes(u, source.Table)
	h.giveBack(u.Key)
	return err
}

// formerLink returns the link of an address whose client died, 0 if it cannot be found, and the network there.
func formerLink(source route.Rule, routes []route.Route, addresses []route.Address) (index int, network netip.Prefix) {
	addr, network := source.Src.Addr(), source.Src
	for _, r := range routes {
		if r.Table == source.Table && r.Src == addr && r.Index != 0 {
			index = r.Index
		}
	}
	for _, a := range addresses {
		if a.Addr == addr && (index == 0 || index == a.Index) {
			index, network = a.Index, a.Network()
		}
	}
	return index, network
}

// giveBack releases a lease that no session has. It does not wait for the answer: if the request is lost, the lease
// expires.
func (h *host) giveBack(key wire.Key) {
	h.former.drop(key)
	if err := h.sendOnce(wire.Request{Key: key, Cmd: wire.Release}); err != nil {
		h.log.Debug("lease not released", "key", key.String(), "err", err)
	}
}
