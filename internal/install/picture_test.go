package install

import (
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestStale: a change of main concerns the uplinks whose tables it changes, and no others.
func TestStale(t *testing.T) {
	n, far := nettest.New(t, "host"), nettest.New(t, "far")
	for i, name := range []string{"wan0", "wan1", "lan0"} {
		nettest.Veth(t, n, name, far, name)
		n.IP(t, fmt.Sprintf("address add 10.%d.0.2/24 dev %s", i, name))
	}
	n.IP(t, "route add default via 10.0.0.1 metric 1")
	n.IP(t, "route add default via 10.1.0.1 metric 2")
	n.IP(t, "nexthop add id 7 via 10.1.0.7 dev wan1")
	var kernel *route.Conn
	var err error
	n.Do(func() { kernel, err = route.Dial() })
	if err != nil {
		t.Fatal(err)
	}
	defer kernel.Close()
	leased := make(map[int]bool)
	env := &Env{Kernel: kernel, Log: slog.New(slog.DiscardHandler), OtherHolder: func(wire.Key) (bool, error) { return false, nil }}
	env.Picture = NewPicture(kernel, func(index int) bool { return leased[index] }, 0)
	var uplinks []*Installation
	for i, first := range []bool{false, false, true} { // the last one has main first
		u := uplink.Uplink{
			Key:        wire.Key{Family: wire.Inet, Ifname: fmt.Sprint("wan", i%2), Address: fmt.Sprintf("10.%d.0.2", i%2)},
			Network:    netip.MustParsePrefix(fmt.Sprintf("10.%d.0.2/24", i%2)),
			Priorities: uplink.OriginalPriorities,
			Settings:   uplink.Settings{Routes: uplink.CopyRoutes, OnLoss: uplink.Fallback, SpecificFirst: first},
		}
		inst := env.New(u, env.Log, func(what string, err error) {
			if err != nil {
				t.Errorf("%s: %v", what, err)
			}
		})
		link, _, err := kernel.LinkByName(u.Key.Ifname)
		if err != nil {
			t.Fatal(err)
		}
		inst.Index, inst.Present, inst.Usable = link.Index, true, true
		if err := inst.Place(uint32(10000 + i)); err != nil {
			t.Fatal(err)
		}
		uplinks = append(uplinks, inst)
	}
	for _, tt := range []struct {
		change string
		want   [3]bool // of wan0, of wan1, of wan0 with main first
	}{
		{"route add 10.90.0.0/16 via 10.0.0.9", [3]bool{true, false, true}},
		{"route add 10.91.0.0/16 via 10.1.0.9", [3]bool{false, true, true}},
		{"route replace 10.91.0.0/16 via 10.0.0.9", [3]bool{true, true, true}}, // it has no event of its own for wan1
		{"route add 10.92.0.0/16 via 10.2.0.9", [3]bool{true, true, true}},     // lan0 is no uplink
		{"route add 10.93.0.0/16 nexthop via 10.0.0.9 nexthop via 10.2.0.9", [3]bool{true, false, true}},
		{"route add 10.94.0.0/16 nhid 7", [3]bool{false, true, true}},
		{"nexthop del id 7", [3]bool{false, true, true}},
		{"route add blackhole 10.95.0.0/16", [3]bool{false, false, true}},
		{"route add unreachable default metric 9", [3]bool{true, true, true}},
		{"route add 10.96.0.0/16 via 10.0.0.9 table 77", [3]bool{}},
		{"route add default via 10.2.0.1 metric 3", [3]bool{true, true, true}}, // lan0 is one now
		{"route add 10.97.0.0/16 via 10.2.0.9", [3]bool{false, false, true}},
	} {
		n.IP(t, tt.change)
		env.Picture.Invalidate()
		for i, inst := range uplinks {
			if got := inst.Stale(); got != tt.want[i] {
				t.Errorf("%s: uplink %d is stale: %v", tt.change, i, got)
			}
			inst.Follow(uint32(10000+i), false)
			if inst.Stale() {
				t.Errorf("%s: uplink %d is stale when it has followed", tt.change, i)
			}
		}
	}
	// Main has the same again, and the tables do not.
	lan, _, err := kernel.LinkByName("lan0")
	if err != nil {
		t.Fatal(err)
	}
	n.IP(t, "route del default via 10.2.0.1")
	env.Picture.Invalidate()
	uplinks[0].Follow(10000, false)
	if was := n.IP(t, "route show table 10000"); !strings.Contains(was, "lan0") {
		t.Errorf("the table has\n%s", was)
	}
	n.IP(t, "link set lan0 down")
	n.IP(t, "link set lan0 up")
	env.Picture.Invalidate()
	env.Picture.Emptied(map[int]bool{lan.Index: true})
	if !uplinks[0].Stale() {
		t.Error("lan0 was down, and that concerns nobody")
	}
	n.IP(t, "route add default via 10.2.0.1 metric 3")
	env.Picture.Invalidate()
	// Nothing of main changes, but what the link is.
	link, _, err := kernel.LinkByName("lan0")
	if err != nil {
		t.Fatal(err)
	}
	n.IP(t, "route del default via 10.2.0.1")
	env.Picture.Invalidate()
	uplinks[0].Follow(10000, false)
	leased[link.Index] = true
	env.Picture.Invalidate()
	if !uplinks[0].Stale() {
		t.Error("lan0 is an uplink now, and that concerns nobody")
	}
}
