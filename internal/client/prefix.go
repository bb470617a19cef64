package client

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// checkPrefixesIn is this long after the first event of a swarm.
const checkPrefixesIn = 100 * time.Millisecond

// checkPrefixes compares the delegated prefixes of all sessions with the other uplinks, and makes the rules follow.
func (l *loop) checkPrefixes() {
	delegating := l.delegating()
	l.prefixAt, l.prefixes = 0, len(delegating) > 0
	for _, s := range l.all() {
		if s.serves() && l.checkPrefix(s, delegating) {
			s.warn("place the rules", s.inst.Place(s.lease.table))
		}
	}
}

// checkPrefixesSoon has the prefixes compared in a moment: events come in swarms, and each comparison reads the addresses
// and the routes of all uplinks.
func (l *loop) checkPrefixesSoon() {
	if l.prefixAt == 0 && (l.prefixes || len(l.delegating()) > 0) {
		l.prefixAt = wire.Now() + checkPrefixesIn
	}
}

// delegating are the sessions whose uplinks delegate a prefix.
func (l *loop) delegating() (all []*session) {
	for _, s := range l.sessions {
		if s.lease.uplink.Settings.Prefix.IsValid() {
			all = append(all, s)
		}
	}
	return all
}

// checkPrefix reports whether a session needs other rules than before, since a delegated prefix takes traffic of
// another uplink, or takes it no longer.
func (l *loop) checkPrefix(s *session, delegating []*session) bool {
	before := s.inst.Rules
	s.inst.Rules.Delegated = slices.ContainsFunc(delegating, func(other *session) bool {
		return other.inst.Index != s.inst.Index && other.serves() && other.inst.Rules.Delegates(s.addr)
	})
	prefix := s.lease.uplink.Settings.Prefix
	var c claim
	if prefix.IsValid() {
		var err error
		c, err = l.claimOf(s, prefix.Masked())
		s.warn("compare the delegated prefix with other uplinks", err)
		if err != nil {
			s.inst.Rules.Delegated = before.Delegated
			return false // as it is
		}
	}
	s.inst.Rules.NoPrefix, s.inst.Rules.Parts = c.why != "", c.parts
	if text := fmt.Sprint(prefix, c.why, c.parts); c.why != "" && s.leftOut != text {
		s.leftOut = text
		what := "a value is left out, since it cannot be right"
		if len(c.parts) > 0 {
			what = "a value counts no more, but for what links behind this host have of it"
		}
		s.log.Warn(what, "option", "--prefix", "value", prefix.String(), "why", c.why)
	}
	return before.NoPrefix != s.inst.Rules.NoPrefix || before.Delegated != s.inst.Rules.Delegated || !slices.Equal(before.Parts, c.parts)
}

// claim is what becomes of a prefix that an uplink says is delegated to this host.
type claim struct {
	why   string         // it cannot be this uplink's; empty: it can
	parts []netip.Prefix // that stay this uplink's nevertheless
}

// siteBits is the length of the largest prefix that a site is given (RFC 6177). An uplink that says it has more of the
// Internet speaks for its neighbours, too.
const siteBits = 48

// claimOf compares a prefix with the other uplinks: one that has a part of it, as a link with a lease and a default route
// of its own, takes it away. Links behind this host, which have parts of the prefix, have no default. If the prefix
// was in force before the other uplink got that part, it stays in force for these links: else any uplink could
// have their packets leave elsewhere, by an address that it gives this host.
func (l *loop) claimOf(s *session, prefix netip.Prefix) (c claim, err error) {
	v, err := l.rivalsOf(s)
	if err != nil {
		return c, err
	}
	uplinks, why, err := l.rivalLinks(v, s.family(), prefix)
	if err != nil {
		return c, err
	}
	if theirs := v.delegated(prefix); theirs.IsValid() {
		why = fmt.Sprintf("another uplink has the prefix %s", theirs)
	}
	c.why = why
	inForce := v.inForce(prefix)
	if c.why == "" || len(inForce) == 0 || prefix.Bits() < siteBits {
		return c, nil
	}
	parts, err := l.partsBehind(prefix, inForce, s.family(), uplinks, v.addresses)
	c.parts = slices.DeleteFunc(parts, func(part netip.Prefix) bool { return v.delegated(part).IsValid() })
	return c, err
}

// rivalLinks returns which links are uplinks, and what another one has of a prefix.
func (l *loop) rivalLinks(v rivals, family int, prefix netip.Prefix) (uplinks map[int]bool, why string, err error) {
	uplinks = map[int]bool{v.index: true}
	for _, table := range slices.Sorted(maps.Keys(v.links)) {
		index := v.links[table]
		part, leads, err := l.partOf(prefix, family, table, index, v.addresses)
		if err != nil {
			return nil, "", err
		}
		uplinks[index] = uplinks[index] || leads
		if leads && part.IsValid() && why == "" {
			why = fmt.Sprintf("another uplink has %s", part)
		}
	}
	return uplinks, why, nil
}

// rivals are the other uplinks, to one uplink.
type rivals struct {
	table     uint32 // of the one uplink
	index     int    // of its link
	links     map[uint32]int
	rules     []route.Rule // of ours that lead from an address or prefix to a table
	addresses []route.Address
}

func (l *loop) rivalsOf(s *session) (v rivals, err error) {
	v = rivals{table: s.lease.table, index: s.inst.Index}
	v.rules, err = l.kernel.RulesWhere(s.family(), func(r *route.Rule) bool {
		return r.Protocol == route.Protocol && r.Src.IsValid() && !uplink.LeavesTable(*r)
	})
	if err != nil {
		return v, err
	}
	v.addresses, err = l.kernel.Addresses(s.family())
	v.links = otherUplinks(v.rules, v.addresses, v.index)
	return v, err
}

// inForce is what rules of the one uplink lead from: the prefix, or parts of it.
func (v *rivals) inForce(prefix netip.Prefix) (prefixes []netip.Prefix) {
	for _, r := range v.rules {
		if r.Table == v.table && !uplink.IsHost(r) && within(prefix, r.Src) {
			prefixes = append(prefixes, r.Src)
		}
	}
	return prefixes
}

// delegated returns the prefix of a rival that shares a part with prefix, if there is one.
func (v *rivals) delegated(prefix netip.Prefix) (theirs netip.Prefix) {
	stands := slices.ContainsFunc(v.rules, func(r route.Rule) bool { return r.Src == prefix && r.Table == v.table })
	for _, r := range v.rules {
		index, other := v.links[r.Table]
		if !other || uplink.IsHost(r) || !r.Src.Overlaps(prefix) || isNetworkOf(index, r.Src, v.addresses) {
			continue
		}
		if !stands || r.Table < v.table { // of two that came at once, one stays
			return r.Src
		}
	}
	return theirs
}

// within reports whether a prefix has all of another one.
func within(prefix, part netip.Prefix) bool {
	return part.Bits() >= prefix.Bits() && prefix.Contains(part.Addr())
}

// maxParts bounds the rules that one prefix can have.
const maxParts = 64

// partsBehind are the networks in a prefix that this host has over links that are no uplinks. What is in force of the
// prefix already stays, since such a link may be down for a moment.
func (l *loop) partsBehind(prefix netip.Prefix, inForce []netip.Prefix, family int, uplinks map[int]bool, addresses []route.Address) ([]netip.Prefix, error) {
	networks := slices.DeleteFunc(inForce, func(n netip.Prefix) bool { return n == prefix })
	behind := make(map[int]bool)
	for _, a := range addresses {
		if !uplinks[a.Index] && prefix.Contains(a.Addr) {
			behind[a.Index] = true
			networks = append(networks, a.Network().Masked())
		}
	}
	for index := range behind {
		routes, err := l.kernel.RoutesOn(family, unix.RT_TABLE_MAIN, index)
		if err != nil {
			return nil, err
		}
		for _, r := range routes {
			networks = append(networks, r.Dst) // behind a router of that link, too
		}
	}
	return widest(networks, prefix), nil
}

// widest are the networks in a prefix that are in no other one of them.
func widest(networks []netip.Prefix, prefix netip.Prefix) (parts []netip.Prefix) {
	slices.SortFunc(networks, func(a, b netip.Prefix) int {
		return cmp.Or(cmp.Compare(a.Bits(), b.Bits()), a.Addr().Compare(b.Addr()))
	})
	for _, n := range networks {
		has := func(part netip.Prefix) bool { return within(part, n) }
		if within(prefix, n) && !n.IsSingleIP() && !slices.ContainsFunc(parts, has) && len(parts) < maxParts {
			parts = append(parts, n)
		}
	}
	return parts
}

// otherUplinks are the tables of addresses on other links than index, and their links.
func otherUplinks(rules []route.Rule, addresses []route.Address, index int) map[uint32]int {
	links := make(map[netip.Addr][]int)
	for _, a := range addresses {
		links[a.Addr] = append(links[a.Addr], a.Index)
	}
	others := make(map[uint32]int)
	for _, r := range rules {
		if on := links[r.Src.Addr()]; uplink.IsHost(r) && len(on) > 0 && !slices.Contains(on, index) {
			others[r.Table] = on[0]
		}
	}
	return others
}

// isNetworkOf reports whether a prefix is the network of a link, which has a rule if this host forwards for it.
func isNetworkOf(index int, prefix netip.Prefix, addresses []route.Address) bool {
	return slices.ContainsFunc(addresses, func(a route.Address) bool { return a.Index == index && a.Network().Masked() == prefix })
}

// firstPart returns the first address or on-link network of a link that is in a prefix; the zero Prefix if there is none.
func firstPart(prefix netip.Prefix, index int, addresses []route.Address, routes []route.Route) netip.Prefix {
	for _, a := range addresses {
		if a.Index == index && prefix.Contains(a.Addr) {
			return a.Network()
		}
	}
	for _, r := range routes {
		if !r.Gateway.IsValid() && r.Dst.Bits() >= prefix.Bits() && prefix.Contains(r.Dst.Addr()) {
			return r.Dst
		}
	}
	return netip.Prefix{}
}

// partOf returns an address or on-link network of a link that is in a prefix, if there is one, and reports whether the
// table of the link or main has a default route over it.
func (l *loop) partOf(prefix netip.Prefix, family int, table uint32, index int, addresses []route.Address) (part netip.Prefix, leads bool, err error) {
	routes, err := l.kernel.RoutesOn(family, table, index)
	if err != nil {
		return part, false, err
	}
	part = firstPart(prefix, index, addresses, routes)
	leads = slices.ContainsFunc(routes, func(r route.Route) bool { return r.Dst.Bits() <= uplink.Halves(family) })
	if leads || !part.IsValid() {
		return part, leads, nil
	}
	main, err := l.kernel.RoutesOn(family, unix.RT_TABLE_MAIN, index)
	return part, uplink.Defaults(main)[index], err
}
