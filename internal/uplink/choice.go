package uplink

import (
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
)

const (
	// ChoicePriority is that of the rule that leads unbound traffic to the chosen uplink: before the unbound rules of
	// all uplinks, and behind main, as those are. What is forwarded has the next one.
	ChoicePriority = 90000
	// ChoiceMetric is that of the chosen uplink's default route in main: before those of managers. With 0 their next
	// `ip route add default` would fail.
	ChoiceMetric = 1
)

// ChoiceRules are the rules that lead unbound traffic to the table of the chosen uplink. forwarded also leads what this
// host forwards there, which is for hosts whose main has lost its default routes.
func ChoiceRules(table uint32, forwarded bool) []route.Rule {
	own := lookup(ChoicePriority, table)
	own.Iif = Loopback
	if !forwarded {
		return []route.Rule{own}
	}
	return []route.Rule{own, lookup(ChoicePriority+1, table)}
}

// IsChoice reports whether a rule has the form of those.
func IsChoice(r route.Rule) bool {
	own, forwarded := lookup(ChoicePriority, r.Table), lookup(ChoicePriority+1, r.Table)
	own.Iif = Loopback
	return (r == own || r == forwarded) && r.Table != unix.RT_TABLE_MAIN
}

// PrecedesChoice reports whether a rule of another program leads all that main leaves to a table of its own, before that of the
// choice or in its place.
func PrecedesChoice(r route.Rule) bool {
	const main = 32766
	all := lookup(r.Priority, r.Table)
	all.Protocol = r.Protocol
	own := all
	own.Iif = Loopback
	return r.Protocol != route.Protocol && r.Priority > main && r.Priority <= ChoicePriority && (r == all || r == own)
}

// ChoiceRoute is the default route of the chosen uplink's table as main gets it. Without a source it follows from the link, as mostly
// in IPv6.
func ChoiceRoute(r route.Route, source netip.Addr) route.Route {
	r = r.In(unix.RT_TABLE_MAIN, source)
	r.Metric, r.Expires, r.Src = ChoiceMetric, 0, source
	return r
}

// IsChoiceRoute reports whether a route of main is one of those.
func IsChoiceRoute(r route.Route) bool {
	return r.Table == unix.RT_TABLE_MAIN && r.Protocol == route.Protocol && r.Dst.Bits() == 0 && r.Metric == ChoiceMetric
}

// KeepsDefault reports whether a route of main is a default of somebody else, so that no rule behind main is reached.
func KeepsDefault(r route.Route) bool {
	return r.Dst.Bits() == 0 && r.TOS == 0 && !r.From.IsValid() && !IsChoiceRoute(r)
}

// BestDefault returns the first of the default routes, by metric, that a table has.
func BestDefault(routes []route.Route) (best route.Route, found bool) {
	for _, r := range routes {
		if r.Dst.Bits() == 0 && r.TOS == 0 && !r.From.IsValid() && r.Type == unix.RTN_UNICAST && !r.Dead && (!found || r.Metric < best.Metric) {
			best, found = r, true
		}
	}
	return best, found
}
