package uplink

import (
	"net/netip"
	"slices"

	"github.com/table-allocator/table-allocator/internal/route"
)

// Tie is an exception from "main first": a prefix for which the table counts, since main has routes to it over the
// link of the uplink and over another one, or within such a prefix one for which main counts again.
type Tie struct {
	Prefix netip.Prefix
	Main   bool
	Level  uint32 // how many others it lies within
}

// maxLevel bounds how deep ties lie within each other. Each level has a priority of its own.
const maxLevel = 4

// leastMainFirst is the lowest priority of a source rule that leaves room for these rules.
const leastMainFirst = 4 + maxLevel

// Ties returns the exceptions from "main first" for the uplink of a link, from all routes of main.
func Ties(main []route.Route, index int) []Tie {
	type owners struct{ own, other bool }
	prefixes := make(map[netip.Prefix]owners)
	for _, r := range main {
		if r.Dst.Bits() <= Halves(r.Family) || r.TOS != 0 || r.From.IsValid() || r.Protocol == route.Protocol ||
			r.Dst.Addr().IsLinkLocalUnicast() || r.Dst.Addr().IsMulticast() {
			continue
		}
		links := r.Links()
		o := prefixes[r.Dst]
		o.own = o.own || slices.Contains(r.Alive().Links(), index) // a dead next hop is in no table
		o.other = o.other || len(links) == 0 || slices.ContainsFunc(links, func(i int) bool { return i != index })
		prefixes[r.Dst] = o
	}
	sorted := make([]netip.Prefix, 0, len(prefixes))
	for p := range prefixes {
		sorted = append(sorted, p)
	}
	slices.SortFunc(sorted, func(a, b netip.Prefix) int { // those that contain others first
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits()
	})
	var ties, within []Tie // of the prefix at hand
	for _, p := range sorted {
		for len(within) > 0 && !within[len(within)-1].Prefix.Contains(p.Addr()) {
			within = within[:len(within)-1]
		}
		tie, inMain := Tie{Prefix: p}, true
		if len(within) > 0 {
			last := within[len(within)-1]
			tie.Level, inMain = last.Level+1, last.Main
		}
		o := prefixes[p]
		tie.Main = !o.own
		if !o.other || tie.Main == inMain || tie.Level > maxLevel {
			continue
		}
		ties, within = append(ties, tie), append(within, tie)
	}
	return ties
}
