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
		{route.Rule{Priority: 9003, Iif: "eth0", Traffic: testUser, Action: route.Unreachable, Protocol: route.Protocol},
			"9003: from all iif eth0 uidrange 1000-1000 unreachable proto 116", false, false},
		{route.Rule{Priority: 9003, Flags: 2, Traffic: testUser, Action: route.Unreachable, Protocol: route.Protocol},
			"9003: not from all uidrange 1000-1000 unreachable proto 116", false, false},
		{route.Rule{Priority: 91000, Iif: "lo", Table: 10000, Protocol: route.Protocol}, "91000: from all iif lo lookup 10000 proto 116", false, false},
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

// TestStrict: nothing may leave from an address but by its table while programs are bound to its
// interface that may not.
func TestStrict(t *testing.T) {
	marked := route.Traffic{Mark: testMarking.Mark, Mask: testMarking.Mask}
	for _, tt := range []struct {
		name   string
		guards []route.Rule
		routes RoutesMode
		source uint32
		want   bool
	}{
		{"nothing is bound", nil, CopyRoutes, 10000, false},
		{"programs", []route.Rule{GuardOf(testMarking, testUser, Block), GuardOf(testMarking, marked, Block)}, CopyRoutes, 10000, true},
		{"programs, and routes are moved", []route.Rule{GuardOf(testMarking, marked, Block)}, MoveRoutes, 10000, true},
		{"programs that may leave by others", []route.Rule{GuardOf(testMarking, marked, Fallback)}, CopyRoutes, 10000, false},
		{"a user, who is bound whatever the address", []route.Rule{GuardOf(testMarking, testUser, Block)}, CopyRoutes, 10000, false},
		{"others place the routes", []route.Rule{GuardOf(testMarking, marked, Block)}, NoRoutes, 10000, false},
		{"no room", []route.Rule{GuardOf(testMarking, marked, Block)}, CopyRoutes, 1<<32 - 1, false},
	} {
		u := Uplink{
			Key: wire.Key{Family: wire.Inet, Ifname: "wan0", Address: "192.0.2.5"}, Priorities: Priorities{tt.source, 20000, 91000},
			Settings: Settings{Routes: tt.routes, OnLoss: Fallback},
		}
		if got := slices.Contains(u.Strict(tt.guards).Rules(10000), u.Block()); got != tt.want {
			t.Errorf("%s: blocked: %v", tt.name, got)
		}
		if got := len(u.Strict(tt.guards).BlockOnLoss()) > 0; got != tt.want {
			t.Errorf("%s: guarded while awaited: %v", tt.name, got)
		}
		u.Settings.OnLoss = Block
		if u = u.Strict(tt.guards); u.Settings.OnLoss != Block {
			t.Errorf("%s: an address of its own choice is not blocked", tt.name)
		}
	}
}

// TestKept: of addresses that went the newest stay blocked, if they still can send, and somebody must not.
func TestKept(t *testing.T) {
	var gone []route.Rule
	for i := range maxGone + 3 {
		addr := netip.AddrFrom16([16]byte{0xfd, 15: byte(i)})
		gone = append(gone, route.Rule{Priority: 10001, Src: netip.PrefixFrom(addr, 128), Action: route.Unreachable, Protocol: route.Protocol})
	}
	there := map[netip.Addr]bool{gone[5].Src.Addr(): true}
	foreign, inet, prefix := gone[7], gone[7], gone[7]
	foreign.Protocol = unix.RTPROT_STATIC
	inet.Src = netip.MustParsePrefix("192.0.2.5/32")
	prefix.Src = netip.MustParsePrefix("2001:db8::/64")
	marked := route.Traffic{Mark: testMarking.Mark, Mask: testMarking.Mask}
	strict := GuardOf(testMarking, marked, Block)

	rules := append([]route.Rule{strict, foreign, inet, prefix}, gone...)
	want := make(map[route.Rule]bool)
	for i, r := range gone {
		want[r] = i >= 3 && i != 5
	}
	want[gone[2]] = true // in place of the fifth
	got := KeptBlocks(rules, there)
	for _, r := range rules {
		if got[r] != want[r] {
			t.Errorf("%s: kept: %v", r, got[r])
		}
	}
	for _, guard := range []route.Rule{GuardOf(testMarking, testUser, Block), GuardOf(testMarking, marked, Fallback)} {
		rules[0] = guard
		if got := KeptBlocks(rules, there); len(got) > 0 {
			t.Errorf("%d kept for %s", len(got), guard)
		}
	}
}
