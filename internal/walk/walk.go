// Package walk goes through the rules of a host as the kernel does for a packet, and says of each why it does not
// decide. The kernel names the route that it finds (RTM_GETROUTE) and not the rule. The package is pure: rules, routes
// and links in, steps out. A test compares it with the kernel.
package walk

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
)

// World is what decides where the packets of one family go.
type World struct {
	Rules  []route.Rule             // in the kernel's order
	Tables map[uint32][]route.Route // of those that rules name
	Links  map[int]route.Link
	// IgnoreLinkdown are the links on which routes without carrier do not count, by their sysctl.
	IgnoreLinkdown map[int]bool
}

// Packet is what is looked up.
type Packet struct {
	route.Question
	// Bound says that the packet is of a socket that is bound to Oif. IPv6 then takes no route over another link, also
	// where RTM_GETROUTE does.
	Bound bool
}

// Step is one rule on the way.
type Step struct {
	Rule route.Rule
	Why  string // the lookup goes on with the next rule; empty: this rule decided
	// Differs says that the rule is for other packets.
	Differs bool
}

// Answer is where a packet goes.
type Answer struct {
	Steps []Step
	// Route is what the last rule found; without a table, none. It may have several next hops.
	Route route.Route
	// OnLink says that no rule found a route, and that IPv4 then takes the destination as a neighbour of Oif.
	OnLink bool
	Err    syscall.Errno // 0: the packet goes
	// Unknown are selectors of a rule that this version does not know: the answer may be wrong.
	Unknown string
}

// Rule returns the rule that decided.
func (a Answer) Rule() (route.Rule, bool) {
	if len(a.Steps) == 0 || a.Steps[len(a.Steps)-1].Why != "" {
		return route.Rule{}, false
	}
	return a.Steps[len(a.Steps)-1].Rule, true
}

// Walk goes through the rules.
func (w World) Walk(p Packet) Answer {
	var a Answer
	for i := 0; i < len(w.Rules); i++ {
		rule := w.Rules[i]
		selectors := rule.Selectors()
		if selectors.Unknown != "" && a.Unknown == "" {
			a.Unknown = fmt.Sprintf("rule %q", rule)
		}
		why := w.differs(rule, selectors, p)
		if rule.Flags&invert != 0 {
			if why == "" {
				why = "is for all others"
			} else {
				why = ""
			}
		}
		differs := why != ""
		if why == "" {
			if rule.Action == route.Goto {
				if at := slices.IndexFunc(w.Rules, func(r route.Rule) bool { return r.Priority >= rule.Goto }); at > i && w.Rules[at].Priority == rule.Goto {
					a.Steps = append(a.Steps, Step{Rule: rule, Why: fmt.Sprintf("goes on at %d", rule.Goto)})
					i = at - 1
					continue
				}
			}
			var found *route.Route
			if found, why, a.Err = w.act(rule, selectors, p); found != nil {
				a.Route = *found
			}
		}
		a.Steps = append(a.Steps, Step{rule, why, differs})
		if why == "" {
			return w.finish(a, p)
		}
	}
	a.Err = unix.ENETUNREACH
	return w.finish(a, p)
}

// finish turns a failure into a neighbour where IPv4 does.
func (w World) finish(a Answer, p Packet) Answer {
	if a.Err != 0 && p.Oif != 0 && p.Dst.Is4() {
		a.OnLink, a.Err = true, 0
		a.Route = route.Route{}
	}
	return a
}

const invert = 0x02 // FIB_RULE_INVERT

// differs says which selector of a rule a packet does not have; "" if it has all.
func (w World) differs(r route.Rule, s route.Selectors, p Packet) string {
	iif := p.Iif
	if iif == 0 {
		iif = loopbackIndex
	}
	switch {
	case r.Iif != "" && w.Links[iif].Name != r.Iif:
		if p.Iif == 0 {
			return "is for packets that arrive by " + r.Iif
		} else if r.Iif == loopback {
			return "is for what this host sends"
		}
		return "other link of arrival"
	case r.Oif != "" && (p.Oif == 0 || w.Links[p.Oif].Name != r.Oif):
		return "is for sockets bound to " + r.Oif
	case (r.Mark^p.Mark)&r.Mask != 0:
		return "other mark"
	case s.Tunnel || s.VRF:
		return "is for a tunnel or VRF"
	case r.UIDs.Set && (p.UID < r.UIDs.First || p.UID > r.UIDs.Last):
		return "other user"
	case r.Dst.IsValid() && !contains(r.Dst, p.Dst):
		return "other destination"
	case r.Src.IsValid() && !p.Src.IsValid() && p.Dst.Is6():
		return "no source yet"
	case r.Src.IsValid() && !contains(r.Src, source(p)):
		if !p.Src.IsValid() {
			return "no source yet"
		}
		return "other source"
	case s.TOS != 0 && s.TOS != dsfield(p), (s.DSCP^p.TOS)&s.DSCPMask != 0:
		return "other TOS"
	case s.FlowLabel&s.FlowMask != 0: // sockets have none unless they ask for one
		return "other flow label"
	case r.IPProto != 0 && r.IPProto != protocol(p):
		return "other protocol"
	case !r.Sports.Match(p.Sport, s.SportMask), !r.Dports.Match(p.Dport, s.DportMask):
		return "other port"
	}
	return ""
}

const (
	loopback      = "lo"
	loopbackIndex = 1
)

// contains is Contains for prefixes with host bits, and without zones.
func contains(p netip.Prefix, a netip.Addr) bool { return p.Masked().Contains(a.WithZone("")) }

// source is the source by which the rules of IPv4 select: 0.0.0.0 is one, too.
func source(p Packet) netip.Addr {
	if !p.Src.IsValid() {
		return netip.IPv4Unspecified()
	}
	return p.Src
}

// protocol is what RTM_GETROUTE takes for a packet's protocol where none is said.
func protocol(p Packet) uint8 {
	if p.IPProto == 0 && p.Dst.Is4() {
		return unix.IPPROTO_UDP
	}
	return p.IPProto
}

// dsfield is what rules and routes with a TOS look at: in IPv4 that of RFC 1349, without the bits of the precedence. The
// two lowest bits are those of ECN.
func dsfield(p Packet) uint8 {
	if p.Dst.Is4() {
		return p.TOS & 0x1c
	}
	return p.TOS & 0xfc
}

// act does what a rule wants. why says why the lookup goes on.
func (w World) act(r route.Rule, s route.Selectors, p Packet) (found *route.Route, why string, err syscall.Errno) {
	switch r.Action {
	case route.Unreachable:
		return nil, "", unix.ENETUNREACH
	case route.Prohibit:
		return nil, "", unix.EACCES
	case route.Blackhole:
		return nil, "", unix.EINVAL
	case route.Nop:
		return nil, "does nothing", 0
	case route.Goto:
		return nil, "leads to a rule that does not exist", 0
	case route.Lookup:
	default:
		return nil, fmt.Sprintf("has the unknown action %d", r.Action), 0
	}
	found = w.find(r.Table, p)
	if found == nil {
		return nil, "the table has nothing for it", 0
	}
	switch found.Type {
	case unix.RTN_BLACKHOLE:
		return found, "", unix.EINVAL
	case unix.RTN_UNREACHABLE:
		return found, "", unix.EHOSTUNREACH
	case unix.RTN_PROHIBIT:
		return found, "", unix.EACCES
	case unix.RTN_THROW:
		return nil, fmt.Sprintf("the table has %q", found), 0
	}
	if found.Dst.Bits() < int(r.MinLength) {
		return nil, fmt.Sprintf("leaves out %q", found.Dst), 0
	}
	if s.HasGroup && w.inGroup(*found, s.Group) {
		return nil, "leaves out links of its group", 0
	}
	return found, "", 0
}

// inGroup reports whether the first next hop of a route leads over a link of a group.
func (w World) inGroup(r route.Route, group uint32) bool {
	links := r.Links()
	return len(links) > 0 && w.Links[links[0]].Group == group
}

// find returns the route of a table for a packet: the longest prefix counts first, then TOS and metric. Of equals the
// first in the kernel's order counts.
func (w World) find(table uint32, p Packet) *route.Route {
	routes := w.Tables[table]
	if p.Dst.Is6() && slices.ContainsFunc(routes, func(r route.Route) bool { return r.From.IsValid() }) {
		return w.findBySource(routes, p)
	}
	return w.best(routes, p)
}

func (w World) best(routes []route.Route, p Packet) *route.Route {
	var fitting []*route.Route
	for i := range routes {
		if r := &routes[i]; contains(r.Dst, p.Dst) && (r.TOS == 0 || r.TOS == dsfield(p)) {
			fitting = append(fitting, r)
		}
	}
	slices.SortStableFunc(fitting, func(a, b *route.Route) int {
		return cmp.Or(cmp.Compare(b.Dst.Bits(), a.Dst.Bits()), cmp.Compare(b.TOS, a.TOS), cmp.Compare(a.Metric, b.Metric))
	})
	if p.Dst.Is6() {
		return w.best6(fitting, p)
	}
	// Where IPv4 cannot use a route that has a nexthop object, it tries none of those with the same address any more,
	// whatever their length.
	var skipped netip.Addr
	for _, r := range fitting {
		switch {
		case r.Dst.Addr() == skipped:
		case w.usable(*r, p):
			return r
		case r.NexthopID != 0:
			skipped = r.Dst.Addr()
		}
	}
	return nil
}

// best6 returns the best of sorted routes. Of those to one destination IPv6 takes the best score among the ones with the
// lowest metric. If it cannot use these, the score alone decides among all others.
func (w World) best6(sorted []*route.Route, p Packet) *route.Route {
	for len(sorted) > 0 {
		n := 1
		for n < len(sorted) && sorted[n].Dst == sorted[0].Dst {
			n++
		}
		first := 1
		for first < n && sorted[first].Metric == sorted[0].Metric {
			first++
		}
		for _, group := range [][]*route.Route{sorted[:first], sorted[first:n]} {
			var best *route.Route
			for _, r := range group {
				if w.usable(*r, p) && (best == nil || score(*r, p) > score(*best, p)) {
					best = r
				}
			}
			if best != nil {
				return best
			}
		}
		sorted = sorted[n:]
	}
	return nil
}

// score is how IPv6 compares routes: by the preference of RFC 4191, then by whether the link is the one that the socket
// is bound to, or by which the packet arrived.
func score(r route.Route, p Packet) int {
	score := map[uint8]int{route.PrefLow: 2, route.PrefHigh: 6}[r.Pref]
	if r.Pref == route.PrefMedium {
		score = 4
	}
	if link := p.Oif + p.Iif; link == 0 || slices.Contains(r.Links(), link) { // a packet has one of them at most
		score++
	}
	return score
}

// findBySource is find where some routes are for some sources only. The kernel begins at the longest destination that
// has a route for the source or no such routes at all, and only from there goes on to shorter ones, where those for
// all sources count, too.
func (w World) findBySource(routes []route.Route, p Packet) *route.Route {
	bySource := make(map[int][]route.Route) // by length of the destination
	forAll := make(map[int][]route.Route)
	for _, r := range routes {
		switch {
		case !contains(r.Dst, p.Dst):
		case r.From.IsValid():
			bySource[r.Dst.Bits()] = append(bySource[r.Dst.Bits()], r)
		default:
			forAll[r.Dst.Bits()] = append(forAll[r.Dst.Bits()], r)
		}
	}
	source := p.Src
	if !source.IsValid() {
		source = netip.IPv6Unspecified()
	}
	begun := false
	for bits := 128; bits >= 0; bits-- {
		matching := slices.DeleteFunc(slices.Clone(bySource[bits]), func(r route.Route) bool { return !contains(r.From, source) })
		begun = begun || len(matching) > 0 || len(bySource[bits]) == 0 && len(forAll[bits]) > 0 || bits == 0
		if !begun {
			continue
		}
		for from := 128; from >= 0; from-- {
			of := slices.DeleteFunc(slices.Clone(matching), func(r route.Route) bool { return r.From.Bits() != from })
			if found := w.best(of, p); found != nil {
				return found
			}
		}
		if found := w.best(forAll[bits], p); found != nil {
			return found
		}
	}
	return nil
}

// usable reports whether one of a route's next hops may carry the packet.
func (w World) usable(r route.Route, p Packet) bool {
	ipv6 := p.Dst.Is6()
	strict := p.Oif != 0 && (!ipv6 || p.Bound || !p.Src.IsValid() || needsLink(p.Dst))
	switch r.Type {
	case unix.RTN_BLACKHOLE, unix.RTN_UNREACHABLE, unix.RTN_PROHIBIT, unix.RTN_THROW:
		return !(ipv6 && strict) || p.Oif == loopbackIndex // in IPv6 they belong to lo
	}
	links := r.Links()
	if len(links) == 0 {
		return !strict
	}
	return slices.ContainsFunc(links, func(index int) bool {
		return (!strict || index == p.Oif) && w.alive(r, index)
	})
}

// needsLink reports whether an address means nothing without a link.
func needsLink(a netip.Addr) bool { return a.IsLinkLocalUnicast() || a.IsMulticast() }

// alive reports whether a next hop over a link counts.
func (w World) alive(r route.Route, index int) bool {
	link, known := w.Links[index]
	if !known {
		return !r.Dead
	}
	return link.Up && (link.Carrier || !w.IgnoreLinkdown[index])
}

// Connect goes through the rules as often as connect(2) does for a socket. If it has no source address, IPv4 looks
// again with the one that it has just chosen, and IPv6 only after a failure. chosen is that address.
func (w World) Connect(p Packet, chosen netip.Addr) []Answer {
	first := w.Walk(p)
	if p.Src.IsValid() || !chosen.IsValid() || (first.Err == 0) == p.Dst.Is6() {
		return []Answer{first}
	}
	p.Src = chosen
	return []Answer{first, w.Walk(p)}
}

// Agrees reports whether the kernel's answer, of route.Match, is the same. Of IPv6 routes that share a nexthop object the
// kernel names any, since the object has its cache: they have the links in common.
func (a Answer) Agrees(got route.Route, err error) bool {
	var errno syscall.Errno
	switch {
	case err != nil && !errors.As(err, &errno):
		return false
	case a.OnLink: // the kernel says that there is no route, and sends
		return errno == unix.EHOSTUNREACH || errno == unix.ENETUNREACH
	case a.Err != 0 || errno != 0:
		return a.Err == errno
	case got.Family == unix.AF_INET6 && got.NexthopID != 0:
		return slices.ContainsFunc(a.Route.Links(), func(index int) bool { return slices.Contains(got.Links(), index) })
	}
	links := func(r route.Route) []int { return slices.Sorted(slices.Values(r.Links())) } // told in any order
	return slices.Equal(links(a.Route), links(got)) && a.Route.Table == got.Table && a.Route.Dst == got.Dst &&
		a.Route.Type == got.Type && a.Route.Metric == got.Metric && a.Route.Gateway == got.Gateway
}
