package client

import (
	"testing"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

var (
	testMarking = wire.Marking{Mark: 0x02000000, Mask: 0xff000000, Block: 9002, Fallback: 15002}
	testUser    = route.Traffic{UIDs: route.UIDs{First: 1000, Last: 1000, Set: true}}
)

// TestOwnsLookups: lookups of a lease go with it; guards are nobody's, and those of others
// stay.
func TestOwnsLookups(t *testing.T) {
	u := uplink.Uplink{Key: wire.Key{Family: wire.Inet, Ifname: "wan0", Address: "192.0.2.5"}}
	r := ruleset{uplink: u, tables: map[uint32]bool{10000: true}, marking: testMarking}
	guard := uplink.GuardOf(testMarking, testUser, uplink.Block)
	for rule, want := range map[route.Rule]bool{
		uplink.LookupOf(guard, 10000): true,
		uplink.LookupOf(guard, 10001): false,
		guard:                         false,
	} {
		if got := r.owns(rule); got != want {
			t.Errorf("%s is owned: %v", rule, got)
		}
	}
	r.guards = []route.Rule{guard}
	want := r.want(10000)
	if got := want[len(want)-1]; got != uplink.LookupOf(guard, 10000) {
		t.Errorf("the last rule is %s", got)
	}
}
