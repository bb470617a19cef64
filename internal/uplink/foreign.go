package uplink

import (
	"net/netip"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// A rule for a user or a port also selects what has an address of another uplink, whose packets the provider of this
// one drops. In IPv4 only the program can have chosen such an address, as a server does that is asked there: the rules
// of that address are right. In IPv6 the kernel itself chooses one when the guard answered that there is no route, and
// asks again: so nothing with such an address may leave.

// ForeignRules are the rules for traffic that is bound to an interface and has the address of another uplink. rules are ours of
// the family, in the order of the kernel; own reports whether an address is on the interface.
func ForeignRules(m wire.Marking, rules []route.Rule, own func(netip.Addr) bool) []route.Rule {
	first := make(map[netip.Prefix]uint32) // where the rules of an address begin
	var leased []netip.Prefix
	for _, r := range rules {
		if r.Protocol != route.Protocol || !IsHost(r) || r.Traffic != (route.Traffic{}) {
			continue
		}
		if _, seen := first[r.Src]; !seen {
			first[r.Src] = r.Priority
		}
		if !LeavesTable(r) && !own(r.Src.Addr()) {
			leased = append(leased, r.Src)
		}
	}
	var want []route.Rule
	for _, guard := range GuardsOf(m, rules) {
		for _, src := range leased {
			r := route.Rule{Priority: ForeignPriority(m), Src: src, Traffic: guard.Traffic, Action: route.Unreachable, Protocol: route.Protocol}
			if src.Addr().Is4() {
				r.Action, r.Goto = route.Goto, first[src]
			}
			if HasForeign(guard) && first[src] > r.Priority {
				want = append(want, r)
			}
		}
	}
	return want
}

// HasForeign reports whether a rule is a guard that needs ForeignRules. What has a mark has the lock instead, and what comes
// from a network namespace has no address of an uplink.
func HasForeign(guard route.Rule) bool {
	return IsGuard(guard) && guard.Action == route.Unreachable && guard.Mask == 0 && guard.Iif == ""
}

// ForeignPriority is where the foreign rules of an interface are: before its lookups.
func ForeignPriority(m wire.Marking) uint32 { return m.Block - 1 }

// IsForeign reports whether a rule has the form of those that ForeignRules returns.
func IsForeign(r route.Rule) bool {
	if !IsHost(r) || r.Traffic == (route.Traffic{}) || r.Mask != 0 || r.Action != route.Unreachable && r.Action != route.Goto {
		return false
	}
	return r == route.Rule{Priority: r.Priority, Src: r.Src, Traffic: r.Traffic, Action: r.Action, Goto: r.Goto, Protocol: route.Protocol}
}
