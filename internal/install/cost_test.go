package install

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestCostOfChange: how many routes are read from the kernel and compared for one change of main does not depend on how
// many main has. A choice that is made, changed and taken back reads no more than the first of them.
func TestCostOfChange(t *testing.T) {
	for _, routes := range []int{large + 500, 3 * large} {
		t.Run(fmt.Sprint(routes), func(t *testing.T) { costIn(t, routes) })
	}
}

// costIn changes a main that has routes.
func costIn(t *testing.T, routes int) {
	const table = 10000
	n, far := nettest.New(t, "host"), nettest.New(t, "far")
	nettest.Veth(t, n, "wan0", far, "wan0")
	n.IP(t, "address add 192.0.2.5/24 dev wan0")
	n.IP(t, "route add default via 192.0.2.1 metric 5")
	var b strings.Builder
	for i := range routes {
		fmt.Fprintf(&b, "route add 10.%d.%d.0/24 via 192.0.2.1 proto bgp\n", i/256, i%256)
	}
	batch(t, n, b.String())
	var kernel *route.Conn
	var watcher *route.Watcher
	var err error
	n.Do(func() {
		if kernel, err = route.Dial(); err == nil {
			watcher, err = route.Watch(route.Routes4)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer kernel.Close()
	defer watcher.Close()
	if err := watcher.AllRules(); err != nil { // else it hears of each route that is added to the table
		t.Fatal(err)
	}
	wan0, _, err := kernel.LinkByName("wan0")
	if err != nil {
		t.Fatal(err)
	}
	env := &Env{Kernel: kernel, Log: slog.New(slog.DiscardHandler), OtherHolder: func(wire.Key) (bool, error) { return false, nil }}
	env.Picture = NewPicture(kernel, func(index int) bool { return index == wan0.Index }, 0)
	u := uplink.Uplink{
		Key: wire.Key{Family: wire.Inet, Ifname: "wan0", Address: "192.0.2.5"}, Network: netip.MustParsePrefix("192.0.2.5/24"),
		Priorities: uplink.OriginalPriorities, Settings: uplink.Settings{Routes: uplink.CopyRoutes, OnLoss: uplink.Fallback},
	}
	inst := env.New(u, env.Log, func(what string, err error) {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	})
	inst.Index, inst.Present, inst.Usable = wan0.Index, true, true
	if err := inst.Place(table); err != nil {
		t.Fatal(err)
	}
	for inst.routes.filling != nil {
		inst.Follow(table, false)
	}
	cost := func(what string, do func()) {
		read, compared := kernel.RoutesRead(), env.compared
		do()
		read, compared = kernel.RoutesRead()-read, env.compared-compared
		if t.Logf("%s: %d read, %d compared", what, read, compared); read > 10 || compared > 10 {
			t.Errorf("%s: %d read, %d compared", what, read, compared)
		}
	}
	for _, command := range []string{
		"route add 172.16.0.0/24 via 192.0.2.1 proto bgp",
		"route replace 10.0.0.0/24 via 192.0.2.2 proto bgp",
		"route del 10.0.1.0/24",
		"route add default via 192.0.2.2 metric 6",
	} {
		n.IP(t, command)
		n.IP(t, "route add unreachable 172.31.0.1 table 77")
		n.IP(t, "route del unreachable 172.31.0.1 table 77")
		cost(command, func() {
			for marked := false; !marked; {
				events, err := watcher.Next()
				if err != nil {
					t.Fatal(err)
				}
				marked = slices.ContainsFunc(events, func(e route.Event) bool { return e.Table == 77 && e.Deleted })
				changes, _ := env.Picture.Hear(unix.AF_INET, events)
				inst.FollowChanges(table, changes, events)
			}
		})
	}
	choose := func(what, via string) {
		var c Choice
		if via != "" {
			r := uplink.ChoiceRoute(route.NewRoute(table, netip.MustParsePrefix("0.0.0.0/0"), netip.MustParseAddr(via), wan0.Index), u.Addr())
			c.Route = &r
		}
		before := kernel.RoutesRead()
		n.Do(func() {
			if changed, err := env.SyncChoice(unix.AF_INET, c); err != nil || !changed {
				t.Errorf("%s: %v, %v", what, changed, err)
			}
		})
		if read := kernel.RoutesRead() - before; read > large {
			t.Errorf("%s: %d routes read", what, read)
		}
		if got := n.IP(t, "route show default metric 1"); (via == "") != (got == "") || !strings.Contains(got, via) {
			t.Errorf("%s: main has %q", what, got)
		}
	}
	choose("a choice", "192.0.2.1")
	choose("another choice", "192.0.2.2")
	choose("no choice", "")
}
