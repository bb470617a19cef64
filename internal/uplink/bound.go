package uplink

import (
	"net/netip"
	"slices"

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

// IsGuard reports whether a rule is a guard of some interface.
func IsGuard(r route.Rule) bool {
	if r.Traffic == (route.Traffic{}) || r.Action != route.Unreachable && r.Action != route.Nop {
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
	return r.Traffic != (route.Traffic{}) && r.Action == route.Lookup &&
		r == LookupOf(route.Rule{Priority: r.Priority + 1, Traffic: r.Traffic}, r.Table)
}

// Strict is the uplink as what is bound to its interface makes it. A bound program that binds a socket
// to the address itself chooses its uplink by that, and the socket carries no mark: where nothing
// of the program may leave by another uplink, nothing may from the address. Whoever fills the table
// without us is not surprised by that, an empty table may be all that is wanted.
func (u Uplink) Strict(guards []route.Rule) Uplink {
	if u.Settings.PlacesRoutes() && u.CanBlock() && slices.ContainsFunc(guards, IsStrict) {
		u.Settings.OnLoss = Block
	}
	return u
}

// IsStrict reports whether a rule is the guard of programs that may leave by no other uplink.
func IsStrict(r route.Rule) bool {
	return IsGuard(r) && r.Action == route.Unreachable && r.Mask != 0
}

// maxGone is how many IPv6 addresses that went stay blocked.
const maxGone = 32

// KeptBlocks are the rules of addresses that went which are still of use: the newest, and as long as
// programs are bound. rules are in the kernel's order.
func KeptBlocks(rules []route.Rule, there map[netip.Addr]bool) map[route.Rule]bool {
	keep := make(map[route.Rule]bool)
	if !slices.ContainsFunc(rules, IsStrict) {
		return keep
	}
	for _, r := range slices.Backward(rules) {
		if r.Protocol == route.Protocol && IsHost(r) && r.Src.Addr().Is6() && r.Action == route.Unreachable && !there[r.Src.Addr()] && len(keep) < maxGone {
			keep[r] = true
		}
	}
	return keep
}

// IsHost reports whether a rule is for what comes from a single address.
func IsHost(r route.Rule) bool { return r.Src.IsValid() && r.Src.IsSingleIP() }
