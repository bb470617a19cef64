package uplink

import (
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// What is bound to an interface the kernel itself records: a guard for each kind of traffic,
// behind the rules that look up the tables of the interface's leases. Whoever binds places
// guards, and they outlive all leases. The holder of a lease places one lookup for each.

// Loopback is the link that rules name for what this host sends itself.
const Loopback = "lo"

// MarkFor is what sockets have to carry within the mask of m to be bound.
func MarkFor(m wire.Marking, onLoss OnLoss) uint32 {
	if onLoss == Fallback {
		return m.Mark | m.Mask&-m.Mask
	}
	return m.Mark
}

// GuardOf is the guard of traffic that is bound.
func GuardOf(m wire.Marking, t route.Traffic, onLoss OnLoss) route.Rule {
	if onLoss == Fallback {
		return route.Rule{Priority: m.Fallback + 1, Traffic: t, Action: route.Nop, Protocol: route.Protocol}
	}
	return route.Rule{Priority: m.Block + 1, Traffic: t, Action: route.Unreachable, Protocol: route.Protocol}
}

// mayBind reports whether traffic can be bound. All that this host sends is not: rules for that are the unbound ones.
func mayBind(t route.Traffic) bool { return t != (route.Traffic{}) && t.Iif != Loopback }

// IsGuard reports whether a rule is a guard of some interface.
func IsGuard(r route.Rule) bool {
	if !mayBind(r.Traffic) || r.Action != route.Unreachable && r.Action != route.Nop {
		return false
	}
	return r == route.Rule{Priority: r.Priority, Traffic: r.Traffic, Action: r.Action, Protocol: route.Protocol}
}

// GuardsOf are the guards among rules that an interface with this marking has.
func GuardsOf(m wire.Marking, rules []route.Rule) []route.Rule {
	if m == (wire.Marking{}) {
		return nil
	}
	var guards []route.Rule
	for _, r := range rules {
		if IsGuard(r) && (r == GuardOf(m, r.Traffic, Block) || r == GuardOf(m, r.Traffic, Fallback)) {
			guards = append(guards, r)
		}
	}
	return guards
}

// LookupOf is the rule that sends what a guard is for to a table.
func LookupOf(guard route.Rule, table uint32) route.Rule {
	return route.Rule{Priority: guard.Priority - 1, Traffic: guard.Traffic, Table: table, Protocol: route.Protocol}
}

// IsLookup reports whether a rule is the lookup of something bound.
func IsLookup(r route.Rule) bool {
	return mayBind(r.Traffic) && r.Action == route.Lookup && !IsReply(r) &&
		r == LookupOf(route.Rule{Priority: r.Priority + 1, Traffic: r.Traffic}, r.Table)
}

// IsStrict reports whether a rule is the guard of programs that may leave by no other uplink.
func IsStrict(r route.Rule) bool {
	return IsGuard(r) && r.Action == route.Unreachable && r.Mask != 0
}

// OwnPriority is the priority of own lookups: before all marks have theirs, since one of a mark comes before its lookups.
func OwnPriority(m wire.Marking) uint32 { return m.Block - m.Mark/(m.Mask&-m.Mask) }

// Lookups are the rules that send what the guards of an interface are for to the table of this uplink. A program that
// binds its socket to the address needs the table of that address, and not that of another one of the interface: the
// two may have different gateways.
func (u Uplink) Lookups(m wire.Marking, guards []route.Rule, table uint32) []route.Rule {
	var rules []route.Rule
	for _, guard := range guards {
		rules = append(rules, LookupOf(guard, table))
		if IsStrict(guard) {
			own := LookupOf(guard, table)
			own.Priority, own.Src = OwnPriority(m), u.Host()
			rules = append(rules, own)
		}
	}
	return rules
}

// IsOwnLookup reports whether a rule is the lookup of bound traffic that has the address of the table.
func IsOwnLookup(r route.Rule) bool {
	without := r
	without.Src = netip.Prefix{}
	return r.Mask != 0 && IsHost(r) && IsLookup(without)
}

// Local is a link to networks of the host itself, as a bridge for containers.
type Local struct {
	Index    int
	Networks []netip.Prefix
	Addrs    []netip.Addr // of the link
}

// LocalNetworks are the networks on links that are up, and lead to no single neighbour as a tunnel does. uplinks are
// links that do not count.
func LocalNetworks(links map[int]route.Link, addresses []route.Address, uplinks map[int]bool) []Local {
	var all []Local
	for _, a := range addresses {
		link, network := links[a.Index], a.Network().Masked()
		if uplinks[a.Index] || link.Name == Loopback || !link.Up || link.PointToPoint || link.Master != 0 || !a.Addr.IsGlobalUnicast() {
			continue
		}
		at := slices.IndexFunc(all, func(l Local) bool { return l.Index == a.Index })
		if at < 0 {
			all, at = append(all, Local{Index: a.Index}), len(all)
		}
		all[at].Addrs = append(all[at].Addrs, a.Addr)
		if !network.IsSingleIP() && !slices.Contains(all[at].Networks, network) {
			all[at].Networks = append(all[at].Networks, network)
		}
	}
	return slices.DeleteFunc(all, func(l Local) bool { return len(l.Networks) == 0 })
}

// beforeOwn is how far before OwnPriority the rules are that lead to local networks.
const beforeOwn = 10

// LocalRules are the rules by which what has a mark reaches local networks of a family, by the routes of main.
func LocalRules(m wire.Marking, local []Local, family int) []route.Rule {
	var rules []route.Rule
	if OwnPriority(m) <= beforeOwn {
		return nil
	}
	for _, l := range local {
		for _, network := range l.Networks {
			if network.Addr().Is4() == (family == unix.AF_INET) {
				rules = append(rules, route.Rule{Priority: OwnPriority(m) - beforeOwn, Dst: network, Table: unix.RT_TABLE_MAIN,
					Traffic: route.Traffic{Mark: m.Mark, Mask: m.Mask}, Protocol: route.Protocol})
			}
		}
	}
	return rules
}

// IsLocal reports whether a rule leads bound traffic to a local network.
func IsLocal(r route.Rule) bool {
	return r.Mask != 0 && r.Dst.IsValid() && r == route.Rule{Priority: r.Priority, Dst: r.Dst, Table: unix.RT_TABLE_MAIN, Traffic: r.Traffic, Protocol: route.Protocol}
}

// NamespaceRule is the rule that leads to the address of a network namespace by the route that main has for the two
// addresses of its link, before all rules of leases: the network of an uplink, or a route of another program, may
// contain the address.
func NamespaceRule(m wire.Marking, addr netip.Addr) (route.Rule, error) {
	if OwnPriority(m) <= beforeOwn {
		return route.Rule{}, fmt.Errorf("no rule has room before those of marks, which begin at %d: set a greater bind_priority in the server's configuration", OwnPriority(m))
	}
	return route.Rule{Priority: OwnPriority(m) - beforeOwn, Dst: netip.PrefixFrom(addr, addr.BitLen()), Table: unix.RT_TABLE_MAIN,
		MinLength: uint8(addr.BitLen() - 1), Protocol: route.Protocol}, nil
}

// IsNamespace reports whether a rule has the form of NamespaceRule.
func IsNamespace(r route.Rule) bool {
	return r.Dst.IsValid() && r.Dst.IsSingleIP() && r == route.Rule{Priority: r.Priority, Dst: r.Dst, Table: unix.RT_TABLE_MAIN,
		MinLength: uint8(r.Dst.Bits() - 1), Protocol: route.Protocol}
}

// IsHost reports whether a rule is for what comes from a single address.
func IsHost(r route.Rule) bool { return r.Src.IsValid() && r.Src.IsSingleIP() }
