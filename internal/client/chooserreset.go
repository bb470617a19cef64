package client

import (
	"errors"
	"maps"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/choice"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// resetDead cuts, if the configuration wants that, the connections from addresses of a link that unbound traffic has left since it
// is dead, where the new uplink works: else they would wait for the end of their time, which TCP sets to a quarter of an hour.
// Beside the loop, since a host may have many.
func (c *chooser) resetDead(family int, from string, all []choice.Candidate, to uint32) {
	works := slices.ContainsFunc(all, func(o choice.Candidate) bool { return o.Table == to && o.State.Works() })
	if c.config.Probes == nil || c.config.Probes.Reset != ResetDead || from == "" || !works {
		return
	}
	dead, blocks := c.deadAddresses(family, from)
	if len(dead) == 0 {
		return
	}
	addresses, err := c.kernel.Addresses(family)
	bound, boundErr := c.kernel.RulesWhere(family, func(r *route.Rule) bool { return r.Protocol == route.Protocol && r.SelectsSockets() })
	if err = errors.Join(err, boundErr); err != nil {
		c.log.Error("cannot read addresses and rules, so connections of a dead uplink stay", "ifname", from, "err", err)
		return
	}
	cut, unblock := resettable(dead, addresses, bound), c.block(family, blocks)
	c.readers.Go(func() {
		n, err := route.ResetSockets(cut)
		if err != nil {
			c.log.Warn("cannot reset all connections of a dead uplink", "ifname", from, "err", err)
		}
		c.log.Info("connections of a dead uplink reset", "ifname", from, "family", wire.Family(family).String(), "count", n)
		c.handLast(unblock)
	})
}

// block adds rules that stay until unblock is called: the kernel sends a reset for each connection, which must not leave by
// another uplink. Those that are there already stay.
func (c *chooser) block(family int, rules []route.Rule) (unblock func()) {
	var added []route.Rule
	sync := func(r route.Rule, want ...route.Rule) {
		now, _, err := c.kernel.SyncRules(family, func(o route.Rule) bool { return o == r }, want)
		added = append(added, now...)
		if err != nil {
			c.log.Error("cannot add or delete the rule that keeps resets of a dead uplink from leaving by another one", "rule", r.String(), "err", err)
		}
	}
	for _, r := range rules {
		sync(r, r)
	}
	return func() {
		for _, r := range added {
			sync(r)
		}
	}
}

// deadAddresses are those of a link that no uplink has which may work, and rules that keep them from other uplinks.
func (c *chooser) deadAddresses(family int, ifname string) (dead map[netip.Addr]bool, blocks []route.Rule) {
	dead, rules := make(map[netip.Addr]bool), make(map[netip.Addr]route.Rule)
	var works []netip.Addr
	for key, p := range c.uplinks {
		addr, err := netip.ParseAddr(key.Address)
		switch {
		case err != nil || (key.Family == wire.Inet) != (family == unix.AF_INET):
		case key.Ifname == ifname && p.isDead():
			dead[addr] = true
			if p.health.State == choice.NoCarrier {
				rules[addr] = p.block
			}
		case p.session != nil && !p.isDead():
			works = append(works, addr)
		}
	}
	for _, addr := range works {
		delete(dead, addr)
		delete(rules, addr)
	}
	return dead, slices.Collect(maps.Values(rules))
}

// isDead reports whether nothing gets through. An address may also be out of service since its link has another name, is left to
// others or gave the address to another link.
func (p *probed) isDead() bool {
	return p.health.State == choice.Dead || p.health.State == choice.NoCarrier && p.dark
}

// resettable reports whether a connection is from a dead address to another network. What was bound to an uplink, by its link or
// by one of the rules, stays, since it was to use no other; and so does what goes to a neighbour, which the link may still reach.
func resettable(dead map[netip.Addr]bool, addresses []route.Address, bound []route.Rule) func(route.Socket) bool {
	return func(s route.Socket) bool {
		return dead[s.Local.Addr()] && s.Device == 0 && !s.Remote.Addr().IsLoopback() &&
			!slices.ContainsFunc(bound, func(r route.Rule) bool { return r.HasSocket(s) }) &&
			!slices.ContainsFunc(addresses, func(a route.Address) bool { return a.Network().Masked().Contains(s.Remote.Addr()) })
	}
}
