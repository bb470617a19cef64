package install

import (
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestMovedLargeTogether: what two tables took out of a large main stays in them, also if it is heard of the one deletion before the
// other.
func TestMovedLargeTogether(t *testing.T) {
	n, far := nettest.New(t, "host"), nettest.New(t, "far")
	var b strings.Builder
	for i := range 2 {
		name := fmt.Sprint("wan", i)
		nettest.Veth(t, n, name, far, name)
		n.IP(t, fmt.Sprintf("address add 10.%d.0.2/24 dev %s", i, name))
		n.IP(t, fmt.Sprintf("route add default via 10.%d.0.1 dev %s metric %d", i, name, 100+i))
	}
	for i := range 2 * large {
		fmt.Fprintf(&b, "route add 100.64.%d.%d/32 via 10.0.0.1 dev wan0\n", i/256, i%256)
	}
	batch(t, n, b.String())
	var kernel *route.Conn
	var watcher *route.Watcher
	var err error
	n.Do(func() { kernel, err = route.Dial() })
	if err != nil {
		t.Fatal(err)
	}
	defer kernel.Close()
	env := &Env{Kernel: kernel, Log: slog.New(slog.DiscardHandler), OtherHolder: func(wire.Key) (bool, error) { return false, nil }}
	env.Picture = NewPicture(kernel, func(int) bool { return true }, 0)
	n.Do(func() { watcher, err = route.Watch(route.Routes4) })
	if err != nil {
		t.Fatal(err)
	}
	defer watcher.Close()
	if err := watcher.AllRules(); err != nil {
		t.Fatal(err)
	}
	var insts []*Installation
	n.Do(func() {
		for i := range 2 {
			name := fmt.Sprint("wan", i)
			link, _, err := kernel.LinkByName(name)
			if err != nil {
				t.Fatal(err)
			}
			u := uplink.Uplink{
				Key:        wire.Key{Family: wire.Inet, Ifname: name, Address: fmt.Sprintf("10.%d.0.2", i)},
				Network:    netip.MustParsePrefix(fmt.Sprintf("10.%d.0.2/24", i)),
				Priorities: uplink.OriginalPriorities,
				Settings:   uplink.Settings{Routes: uplink.MoveRoutes, OnLoss: uplink.Fallback},
			}
			inst := env.New(u, env.Log, func(what string, err error) {
				if err != nil {
					t.Errorf("%s: %v", what, err)
				}
			})
			inst.Index, inst.Present, inst.Usable = link.Index, true, true
			insts = append(insts, inst)
			if err := inst.Place(uint32(10000 + i)); err != nil {
				t.Fatal(err)
			}
		}
		for insts[0].routes.filling != nil || insts[1].routes.filling != nil { // turns of the loop that hears nothing in between
			for i, inst := range insts {
				if inst.routes.filling != nil {
					inst.Follow(uint32(10000+i), false)
				}
			}
		}
		var all []route.Event
		var deletions []int
		for len(deletions) < len(insts) {
			events, err := watcher.Next()
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range events {
				if all = append(all, e); e.Kind == route.RouteChanged && e.Deleted && e.Table == unix.RT_TABLE_MAIN {
					deletions = append(deletions, len(all))
				}
			}
		}
		for _, events := range [][]route.Event{all[:deletions[0]], all[deletions[0]:]} {
			changes, _ := env.Picture.Hear(unix.AF_INET, events)
			for i, inst := range insts {
				inst.FollowChanges(uint32(10000+i), changes, events)
			}
		}
		for i, inst := range insts {
			for inst.routes.filling != nil {
				inst.Follow(uint32(10000+i), false)
			}
		}
	})
	for i := range 2 {
		if got := n.IP(t, fmt.Sprintf("route show table %d default", 10000+i)); !strings.Contains(got, "default") {
			t.Errorf("table %d has no default route; main has %q", 10000+i, n.IP(t, "route show default"))
		}
		if !insts[i].Moved() {
			t.Errorf("wan%d: not known as moved", i)
		}
	}
}
