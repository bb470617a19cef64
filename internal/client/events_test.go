package client

import (
	"maps"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/install"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestDigest: each event reaches the sessions that it is about, and no other one.
func TestDigest(t *testing.T) {
	const index, table = 7, 10000
	marking := wire.Marking{Mark: 0x02000000, Mask: 0xff000000, Block: 9002, Fallback: 15002}
	env := &install.Env{}
	s := &session{lease: newMachine(cable(), true, false), addr: cable().Addr()}
	s.inst = env.New(cable(), nil, nil)
	s.inst.Index, s.inst.Rules.Marking = index, marking
	rule := func(priority, table uint32, deleted bool) route.Event {
		return route.Event{Kind: route.RuleChanged, Family: unix.AF_INET, Priority: priority, Table: table, Protocol: route.Protocol, Deleted: deleted}
	}
	address := func(text string, index int, deleted bool) route.Event {
		return route.Event{Kind: route.AddressChanged, Family: unix.AF_INET, Addr: netip.MustParseAddr(text), Index: index, Deleted: deleted}
	}
	inMain := func(index int, protocol uint8) route.Event {
		return route.Event{Kind: route.RouteChanged, Family: unix.AF_INET, Table: unix.RT_TABLE_MAIN, Index: index, Protocol: protocol,
			Route: &route.Route{Dst: netip.MustParsePrefix("10.99.0.0/16")}}
	}
	toAll := func(protocol uint8, deleted bool) route.Event {
		return route.Event{Kind: route.RouteChanged, Family: unix.AF_INET, Table: unix.RT_TABLE_MAIN, Index: 8, Protocol: protocol, Deleted: deleted,
			Route: &route.Route{Dst: netip.MustParsePrefix("0.0.0.0/0")}}
	}
	inTable := func(table uint32, index int, deleted bool) route.Event {
		return route.Event{Kind: route.RouteChanged, Family: unix.AF_INET, Table: table, Index: index, Protocol: route.Protocol, Deleted: deleted, Route: &route.Route{}}
	}
	// What there may be to know: concerns, boundTo and lostLookups of the session, routes of main, its default
	// routes, lost routes.
	const concerns, bound, lookups, followed, defaults, lost = "concerns", "bound", "lookups", "main", "defaults", "routes"
	for _, tt := range []struct {
		name  string
		event route.Event
		want  []string
	}{
		{"its address", address("10.77.0.2", index, false), []string{concerns}},
		{"its address on another link", address("10.77.0.2", 8, true), []string{concerns}},
		{"another address", address("10.77.0.3", index, false), nil},
		{"its link", route.Event{Kind: route.LinkChanged, Index: index, Name: "x"}, []string{concerns}},
		{"another link that has the name now", route.Event{Kind: route.LinkChanged, Index: 8, Name: "wan0"}, nil},
		{"lost events", route.Event{Kind: route.Overrun}, []string{bound}},
		{"a guard", rule(9003, 0, false), []string{bound}},
		{"a guard with fallback, deleted", rule(15003, 0, true), []string{bound}},
		{"a lookup", rule(9002, table, false), nil},
		{"a lookup, deleted", rule(9002, table, true), []string{lookups}},
		{"a guard of another interface", rule(9005, 0, true), nil},
		{"a route of main", inMain(index, unix.RTPROT_BOOT), []string{followed}},
		{"a route of main that is ours", inMain(index, route.Protocol), nil},
		{"a route of main by several links", inMain(0, unix.RTPROT_BOOT), []string{followed}},
		{"a route of main by another link", inMain(8, unix.RTPROT_BOOT), nil},
		{"a default route of main", toAll(unix.RTPROT_BOOT, false), []string{defaults}},
		{"a default route of main, deleted", toAll(unix.RTPROT_RA, true), []string{defaults}},
		{"a default route of main that is ours", toAll(route.Protocol, false), nil},
		{"a route of its table", inTable(table, index, false), nil},
		{"a route of its table, deleted", inTable(table, index, true), []string{lost}},
		{"a route of its table over another link, deleted", inTable(table, 8, true), []string{lost}},
		{"a route of another table, deleted", inTable(table+1, index, true), nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := digest([]route.Event{address("192.0.2.9", 9, true), tt.event})
			var got []string
			for name, is := range map[string]bool{
				concerns: n.concerns(s), bound: n.boundTo(s), lookups: n.lostLookups(s),
				followed: n.mainOn[linkOf{unix.AF_INET, index}] || n.mainOn[linkOf{unix.AF_INET, 0}], lost: n.lost[tableOf{unix.AF_INET, table}],
				defaults: n.defaults[unix.AF_INET],
			} {
				if is {
					got = append(got, name)
				}
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}

	n := digest([]route.Event{address("10.77.0.2", 8, false), address("10.77.0.2", 8, true), address("10.77.0.2", index, true)})
	if got := n.went[s.addr]; !slices.Equal(got, []int{8, index}) || !n.came[onLink{s.addr, 8}] || n.came[onLink{s.addr, index}] {
		t.Errorf("deleted from %v, came to %v", got, n.came)
	}
	if s.noteLeaving(n); s.left != index {
		t.Errorf("it left link %d, want %d", s.left, index)
	}
	if n := digest([]route.Event{{Kind: route.LinkChanged, Index: 8, Down: true}, {Kind: route.LinkChanged, Index: 8}, address("10.77.0.3", 9, true)}); !maps.Equal(n.silent, map[int]bool{8: true, 9: true}) || len(n.history) != 2 {
		t.Errorf("links that may have lost routes without an event: %v, %v", n.silent, n.history)
	}
	if n := digest([]route.Event{rule(10000, table, true), rule(10000, table+1, false)}); !n.tables[table] || n.tables[table+1] {
		t.Errorf("lost rules of tables %v", n.tables)
	}
}

// TestStale: a rule goes when no client uses it any more.
func TestStale(t *testing.T) {
	const mine, dead, filled = 10000, 10001, 10002
	from := func(text string, table uint32) route.Rule {
		return route.Rule{Priority: 10000, Src: netip.MustParsePrefix(text), Table: table, Protocol: route.Protocol}
	}
	block := func(text string) route.Rule {
		return route.Rule{Priority: 10001, Src: netip.MustParsePrefix(text), Action: route.Unreachable, Protocol: route.Protocol}
	}
	unbound := func(table uint32) route.Rule {
		return route.Rule{Priority: 91000, Traffic: route.Traffic{Iif: "lo"}, Table: table, Protocol: route.Protocol}
	}
	foreign := from("10.77.0.9/32", dead)
	foreign.Protocol = unix.RTPROT_STATIC
	rules := []route.Rule{from("10.77.0.2/32", mine), from("10.77.0.3/32", dead)}
	s := &session{lease: newMachine(cable(), false, true), addr: netip.MustParseAddr("10.77.0.4")}
	h := &host{loop: &loop{sessions: []*session{s}}}
	served := map[netip.Addr]bool{netip.MustParseAddr("10.77.0.2"): true, s.addr: true}
	inTable := func(table uint32, src string) route.Route {
		return route.Route{Family: unix.AF_INET, Table: table, Protocol: route.Protocol, Src: netip.MustParseAddr(src)}
	}
	routes := []route.Route{
		inTable(dead, "10.77.0.3"), inTable(dead, "10.77.0.2"), // over a link that was no uplink when that table was filled
		inTable(filled, "10.77.0.2"), // and its rules will follow
	}
	in := h.use(unix.AF_INET, served, rules, routes)
	for _, tt := range []struct {
		name string
		rule route.Rule
		want bool
	}{
		{"of an address that has a holder", rules[0], false},
		{"of an address that has none", rules[1], true},
		{"unbound, of a table in use", unbound(mine), false},
		{"unbound, of no table in use", unbound(dead), true},
		{"unbound, of a table that a holder fills", unbound(filled), false},
		{"a block of an address that has a holder", block("10.77.0.2/32"), false},
		{"a block of an address that has none", block("10.77.0.3/32"), true},
		{"a block of an address that waits for a lease", block("10.77.0.4/32"), true},
		{"of another program", foreign, false},
	} {
		if got := in.stale(tt.rule); got != tt.want {
			t.Errorf("%s: stale: %v", tt.name, got)
		}
	}
}
