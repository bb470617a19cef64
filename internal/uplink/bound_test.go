package uplink

import (
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

var (
	testMarking = wire.Marking{Mark: 0x02000000, Mask: 0xff000000, Block: 9002, Fallback: 15002}
	testUser    = route.Traffic{UIDs: route.UIDs{First: 1000, Last: 1000, Set: true}}
)

// TestGuards: guards and lookups are told from all other rules, by their own fields alone.
func TestGuards(t *testing.T) {
	strict, loose := GuardOf(testMarking, testUser, Block), GuardOf(testMarking, testUser, Fallback)
	for _, tt := range []struct {
		rule          route.Rule
		text          string
		guard, lookup bool
	}{
		{strict, "9003: from all uidrange 1000-1000 unreachable proto 116", true, false},
		{loose, "15003: from all uidrange 1000-1000 nop proto 116", true, false},
		{LookupOf(strict, 10000), "9002: from all uidrange 1000-1000 lookup 10000 proto 116", false, true},
		{LookupOf(loose, 10000), "15002: from all uidrange 1000-1000 lookup 10000 proto 116", false, true},
		{route.Rule{Priority: 9003, Traffic: testUser, Action: route.Unreachable, Protocol: unix.RTPROT_STATIC},
			"9003: from all uidrange 1000-1000 unreachable proto 4", false, false},
		{route.Rule{Priority: 9003, Action: route.Unreachable, Protocol: route.Protocol}, "9003: from all unreachable proto 116", false, false},
		{route.Rule{Priority: 9003, Oif: "eth0", Traffic: testUser, Action: route.Unreachable, Protocol: route.Protocol},
			"9003: from all oif eth0 uidrange 1000-1000 unreachable proto 116", false, false},
		{GuardOf(testMarking, route.Traffic{Iif: "tav1"}, Block), "9003: from all iif tav1 unreachable proto 116", true, false},
		{LookupOf(GuardOf(testMarking, route.Traffic{Iif: "tav1"}, Block), 10000), "9002: from all iif tav1 lookup 10000 proto 116", false, true},
		{route.Rule{Priority: 9003, Traffic: route.Traffic{Iif: "lo"}, Action: route.Unreachable, Protocol: route.Protocol},
			"9003: from all iif lo unreachable proto 116", false, false},
		{route.Rule{Priority: 9003, Flags: 2, Traffic: testUser, Action: route.Unreachable, Protocol: route.Protocol},
			"9003: not from all uidrange 1000-1000 unreachable proto 116", false, false},
		{Uplink{Replies: true, Priorities: OriginalPriorities}.reply(10000), "10000: from all fwmark 0x1002710 lookup 10000 proto 116", false, false},
		{route.Rule{Priority: 91000, Traffic: route.Traffic{Iif: "lo"}, Table: 10000, Protocol: route.Protocol}, "91000: from all iif lo lookup 10000 proto 116", false, false},
	} {
		if got := tt.rule.String(); got != tt.text {
			t.Errorf("got %s, want %s", got, tt.text)
		}
		if got := IsGuard(tt.rule); got != tt.guard {
			t.Errorf("%s: a guard: %v", tt.text, got)
		}
		if got := IsLookup(tt.rule); got != tt.lookup {
			t.Errorf("%s: a lookup: %v", tt.text, got)
		}
	}
	other := GuardOf(wire.Marking{Mark: 0x04000000, Mask: 0xff000000, Block: 9004, Fallback: 15004}, testUser, Block)
	swapped := strict // the action of the one at the priority of the other
	swapped.Action = route.Nop
	rules := []route.Rule{LookupOf(strict, 10000), strict, other, loose, swapped}
	if got := GuardsOf(testMarking, rules); len(got) != 2 || got[0] != strict || got[1] != loose {
		t.Errorf("guards are %v", got)
	}
	if got := GuardsOf(wire.Marking{}, rules); got != nil {
		t.Errorf("without a mark there are guards %v", got)
	}
	if got := MarkFor(testMarking, Fallback); got != 0x03000000 || MarkFor(testMarking, Block) != 0x02000000 {
		t.Errorf("the mark of fallback is %#x", got)
	}
}

// TestNamespaceRule: the rule to a namespace is neither that of a network nor of anything bound, so that no watch takes it
// for a stale one.
func TestNamespaceRule(t *testing.T) {
	for addr, want := range map[string]string{
		"172.24.0.3": "8990: from all to 172.24.0.3 lookup main suppress_prefixlength 30 proto 116",
		"fd00::3":    "8990: from all to fd00::3 lookup main suppress_prefixlength 126 proto 116",
	} {
		r, err := NamespaceRule(testMarking, netip.MustParseAddr(addr))
		if err != nil || r.String() != want {
			t.Errorf("got %s, %v, want %s", r, err, want)
		}
		if !IsNamespace(r) || IsShared(r) || IsGuard(r) || IsLookup(r) || IsLocal(r) || Orphans(nil)(r) {
			t.Errorf("%s: taken for another rule", r)
		}
	}
	network := route.Rule{Priority: 19999, Dst: netip.MustParsePrefix("192.0.2.4/31"), Table: unix.RT_TABLE_MAIN, MinLength: 31, Protocol: route.Protocol}
	if IsNamespace(network) || !IsShared(network) {
		t.Error("the rule of a network is taken for that of a namespace")
	}
	low := testMarking
	low.Block = 10
	if _, err := NamespaceRule(low, netip.MustParseAddr("172.24.0.3")); err == nil {
		t.Error("a rule before the first one")
	}
}

// TestLookups: programs that may use no other uplink reach the table of an address that they chose, before all others.
func TestLookups(t *testing.T) {
	marked := route.Traffic{Mark: testMarking.Mark, Mask: testMarking.Mask}
	u := Uplink{Key: wire.Key{Family: wire.Inet, Ifname: "wan0", Address: "192.0.2.5"}}
	rules := u.Lookups(testMarking, []route.Rule{GuardOf(testMarking, testUser, Block), GuardOf(testMarking, marked, Block),
		GuardOf(testMarking, route.Traffic{Mark: 0x03000000, Mask: 0xff000000}, Fallback)}, 10000)
	want := []string{
		"9002: from all uidrange 1000-1000 lookup 10000 proto 116",
		"9002: from all fwmark 0x2000000/0xff000000 lookup 10000 proto 116",
		"9000: from 192.0.2.5 fwmark 0x2000000/0xff000000 lookup 10000 proto 116",
		"15002: from all fwmark 0x3000000/0xff000000 lookup 10000 proto 116",
	}
	if len(rules) != len(want) {
		t.Fatalf("got %v, want %q", rules, want)
	}
	for i, r := range rules {
		if r.String() != want[i] {
			t.Errorf("got %s, want %s", r, want[i])
		}
		if own := i == 2; IsOwnLookup(r) != own || IsLookup(r) == own {
			t.Errorf("%s: a lookup: %v, of its own address: %v", r, IsLookup(r), IsOwnLookup(r))
		}
	}
	source := route.Rule{Priority: 10000, Src: u.Host(), Table: 10000, Protocol: route.Protocol}
	if IsOwnLookup(source) {
		t.Errorf("%s: a lookup of bound traffic", source)
	}
	narrow := wire.Marking{Mark: 4, Mask: 6, Block: 9996, Fallback: 32764}
	if got := OwnPriority(narrow); got != 9994 {
		t.Errorf("priority %d, want 9994", got)
	}
}

// TestForeignRules: users and ports with another uplink's address leave by that in IPv4, and not at all in IPv6.
func TestForeignRules(t *testing.T) {
	source := func(priority uint32, addr string, table uint32) route.Rule {
		return route.Rule{Priority: priority, Src: netip.MustParsePrefix(addr), Table: table, Protocol: route.Protocol}
	}
	others := source(10000, "192.0.2.9/32", 10009)
	others.Protocol = unix.RTPROT_STATIC
	rules := []route.Rule{
		source(5000, "192.0.2.4/32", 10004), // before the binding anyway
		LookupOf(GuardOf(testMarking, testUser, Block), 10001),
		source(9998, "192.0.2.6/32", unix.RT_TABLE_MAIN), source(10000, "192.0.2.5/32", 10000), source(10000, "192.0.2.6/32", 10001),
		source(10000, "192.0.2.7/32", 10002), source(10000, "198.51.100.0/24", 10002), source(10000, "2001:db8::5/128", 10000), others,
	}
	marked := route.Traffic{Mark: testMarking.Mark, Mask: testMarking.Mask}
	guards := []route.Rule{GuardOf(testMarking, testUser, Block), GuardOf(testMarking, marked, Block), GuardOf(testMarking, testUser, Fallback)}
	rules = append(rules, guards...)
	want := []string{
		"9001: from 192.0.2.5 uidrange 1000-1000 goto 10000 proto 116",
		"9001: from 192.0.2.6 uidrange 1000-1000 goto 9998 proto 116",
		"9001: from 2001:db8::5 uidrange 1000-1000 unreachable proto 116",
	}
	var got []string
	for _, r := range ForeignRules(testMarking, rules, func(a netip.Addr) bool { return a == netip.MustParseAddr("192.0.2.7") }) {
		got = append(got, r.String())
		if !IsForeign(r) || IsGuard(r) || IsLookup(r) || IsOwnLookup(r) || IsLocal(r) {
			t.Errorf("%s is taken for another rule", r)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	for _, r := range rules {
		if IsForeign(r) {
			t.Errorf("%s is taken for a foreign rule", r)
		}
	}
}

// TestLocalNetworks: networks of bridges and LANs are local, those of uplinks, tunnels and ports of bridges are not.
func TestLocalNetworks(t *testing.T) {
	links := map[int]route.Link{
		1: {Index: 1, Name: "lo", Up: true}, 2: {Index: 2, Name: "wan0", Up: true}, 3: {Index: 3, Name: "docker0", Up: true, Kind: "bridge"},
		4: {Index: 4, Name: "wg0", Up: true, PointToPoint: true}, 5: {Index: 5, Name: "down0"}, 6: {Index: 6, Name: "veth1", Up: true, Master: 3},
	}
	var addresses []route.Address
	for _, a := range []struct {
		index int
		addr  string
	}{{1, "127.0.0.1/8"}, {2, "10.1.0.2/24"}, {3, "172.17.0.1/16"}, {3, "172.17.0.9/16"}, {3, "fd17::1/64"}, {3, "fe80::1/64"}, {3, "192.0.2.1/32"},
		{4, "10.9.0.1/24"}, {5, "10.5.0.1/24"}, {6, "10.6.0.1/24"}} {
		p := netip.MustParsePrefix(a.addr)
		addresses = append(addresses, route.Address{Index: a.index, Addr: p.Addr(), Bits: p.Bits()})
	}
	local := LocalNetworks(links, addresses, map[int]bool{2: true})
	var got []string
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		for _, r := range LocalRules(testMarking, local, family) {
			got = append(got, r.String())
			if !IsLocal(r) || IsLookup(r) || IsGuard(r) || IsOwnLookup(r) || IsShared(r) {
				t.Errorf("%s is taken for another rule", r)
			}
		}
	}
	want := []string{
		"8990: from all to 172.17.0.0/16 fwmark 0x2000000/0xff000000 lookup main proto 116",
		"8990: from all to fd17::/64 fwmark 0x2000000/0xff000000 lookup main proto 116",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	low := wire.Marking{Mark: 2, Mask: 3, Block: 12, Fallback: 20} // no room before
	if rules := LocalRules(low, local, unix.AF_INET); len(rules) != 0 {
		t.Errorf("without room: %v", rules)
	}
}
