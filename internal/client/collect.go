package client

import (
	"errors"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// isLeased tells whether a rule's table can be of a lease, and not main's or none at all.
func isLeased(table uint32) bool { return table != 0 && table != unix.RT_TABLE_MAIN }

// tables are those whose rules have to be there.
func (h *host) tables() map[uint32]bool {
	tables := make(map[uint32]bool, len(h.sessions))
	for _, s := range h.sessions {
		if s.serves() {
			tables[s.lease.table] = true
		}
	}
	return tables
}

// keptBlock goes on blocking an address that went while what is bound could still be sent from it.
func (h *host) keptBlock(s *session) []route.Rule {
	if s.inst.Present {
		return nil
	}
	keep := s.gone()
	if len(keep) > 0 {
		h.blocked[s.addr] = true
	}
	return keep
}

func (h *host) collectStale() {
	if err := h.collect(); err != nil {
		h.log.Error("cannot remove what others of us left behind", "err", err)
	}
}

// collect removes rules and routes of ours that nobody stands for: of clients that died
// and of addresses that went while nobody looked.
func (h *host) collect() error {
	names, err := peer.HolderNames()
	if err != nil {
		return err
	}
	served := make(map[netip.Addr]bool, len(names))
	for _, name := range names {
		// IFNAME-ADDR-FAMILY, and more for a client whose name somebody had taken.
		words := strings.Split(name, "-")
		for _, word := range words[1:] {
			if addr, err := netip.ParseAddr(word); err == nil {
				served[addr] = true
			}
		}
	}
	errs := []error{h.dropStale(names)}
	clear(h.blocked)
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		errs = append(errs, h.collectFamily(family, served))
	}
	order, err := h.unboundOrder()
	for of := range h.order {
		h.order[of] = slices.DeleteFunc(h.order[of], func(table uint32) bool {
			return err == nil && !slices.Contains(order[of], table) &&
				!slices.ContainsFunc(h.sessions, func(s *session) bool { return s.ordered == table && s.orderedIn == of })
		})
	}
	return errors.Join(append(errs, err)...)
}

func (h *host) collectFamily(family int, served map[netip.Addr]bool) error {
	// The original marks nothing, but rules of ours may lead to its tables, too: for what is bound.
	rules, err := h.kernel.RulesWhere(family, func(r *route.Rule) bool { return r.Protocol == route.Protocol || uplink.IsHost(*r) })
	if err != nil {
		return err
	}
	routes, err := h.kernel.OurRoutes(family)
	if err != nil {
		return err
	}
	live := make(map[uint32]bool)        // tables that an address in service has, or is about to
	sourced := make(map[netip.Addr]bool) // addresses with a rule to a table
	for _, r := range rules {
		if uplink.IsHost(r) && !uplink.LeavesTable(r) {
			sourced[r.Src.Addr()] = true
			live[r.Table] = live[r.Table] || served[r.Src.Addr()]
		}
	}
	for _, r := range routes {
		if served[r.Src] {
			live[r.Table] = true
		}
	}
	for _, s := range h.sessions {
		if s.family() == family && s.lease.table != 0 {
			live[s.lease.table] = true
		}
	}
	addresses, err := h.kernel.Addresses(family)
	if err != nil {
		return err
	}
	there := make(map[netip.Addr]bool, len(addresses))
	for _, a := range addresses {
		there[a.Addr] = true
	}
	keep := uplink.KeptBlocks(rules, there)
	if h.ending {
		clear(keep)
	}
	for r := range keep {
		h.blocked[r.Src.Addr()] = true
	}
	waiting := make(map[netip.Addr]bool) // back, and without a lease: main has to do
	for _, s := range h.sessions {
		if s.lease.state == asking && !sourced[s.addr] {
			waiting[s.addr] = true
		}
	}
	orphan := uplink.Orphans(slices.DeleteFunc(slices.Clone(rules), func(r route.Rule) bool { return !live[r.Table] }))
	stale := func(r route.Rule) bool {
		switch {
		case r.Protocol != route.Protocol:
			return false
		case uplink.LeavesTable(r):
			return uplink.IsHost(r) && (!served[r.Src.Addr()] || waiting[r.Src.Addr()]) && !keep[r] || orphan(r)
		}
		return !live[r.Table]
	}
	var errs []error
	for _, r := range rules {
		if uplink.IsHost(r) && !uplink.LeavesTable(r) && stale(r) {
			errs = append(errs, h.returnDead(family, r, routes))
		}
	}
	_, deleted, err := h.kernel.SyncRules(family, stale, nil)
	errs = append(errs, err)
	for _, r := range deleted {
		h.log.Info("rule of nobody removed", "rule", r.String(), "table", r.Table)
	}
	tables := make(map[uint32]bool)
	for _, r := range routes {
		if isLeased(r.Table) && !live[r.Table] {
			h.log.Info("route of nobody removed", "route", r.String(), "table", r.Table)
			tables[r.Table] = true
		}
	}
	for table := range tables {
		errs = append(errs, h.kernel.FlushTable(family, table))
	}
	return errors.Join(errs...)
}

// returnDead gives main what a client that is dead had moved into its table, if its address is
// still there, and its lease to the server. source is the rule from its address.
func (h *host) returnDead(family int, source route.Rule, routes []route.Route) error {
	addr := source.Src.Addr()
	if err := h.removeServers(addr); err != nil {
		return err
	}
	index := 0 // of its link, as far as anything tells
	for _, r := range routes {
		if r.Table == source.Table && r.Index != 0 {
			index = r.Index
		}
	}
	addresses, err := h.kernel.Addresses(family)
	if err != nil {
		return err
	}
	network := source.Src
	for _, a := range addresses {
		if a.Addr == addr && (index == 0 || index == a.Index) {
			index, network = a.Index, a.Network()
		}
	}
	link, found, err := h.kernel.LinkByIndex(index)
	if err != nil || !found {
		return err
	}
	u := uplink.Uplink{Key: wire.Key{Family: wire.Family(family), Ifname: link.Name, Address: addr.String()}, Network: network}
	h.log.Info("client is dead; its lease is given back", "ifname", link.Name, "addr", u.Key.Address, "family", u.Key.Family.String(), "table", source.Table)
	err = h.env.ReturnRoutes(u, source.Table)
	return errors.Join(err, h.giveBack(u.Key))
}

// giveBack gives a lease back that no session has, without waiting for the answer: if it is
// lost, the lease ends by itself.
func (h *host) giveBack(key wire.Key) error {
	conn, err := peer.Open(key, peer.AsAsker)
	if err != nil {
		return err
	}
	defer conn.Close()
	req := wire.Request{Key: key, Cmd: wire.Release}
	err = h.server.Send(conn, req.Append(nil))
	if err != nil {
		h.log.Debug("lease not released", "key", key.String(), "err", err)
	}
	return nil
}
