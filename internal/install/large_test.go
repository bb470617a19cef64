package install

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestLarge: a main with thousands of routes is followed by its events alone, and the table has what a plan of the
// whole would give it.
func TestLarge(t *testing.T) {
	n, far := nettest.New(t, "host"), nettest.New(t, "far")
	for _, name := range []string{"wan0", "wan1", "lan0"} {
		nettest.Veth(t, n, name, far, name)
	}
	n.IP(t, "address add 192.0.2.5/24 dev wan0")
	n.IP(t, "address add 198.51.100.5/24 dev wan1")
	n.IP(t, "address add 203.0.113.5/24 dev lan0")
	n.IP(t, "route add default via 198.51.100.1")
	vias := []string{"via 192.0.2.1 dev wan0", "via 198.51.100.1 dev wan1", "via 203.0.113.1 dev lan0", "via 192.0.2.2 dev wan0"}
	var b strings.Builder
	const routes = 2 * large
	for i := range routes {
		fmt.Fprintf(&b, "route add 10.%d.%d.0/24 %s proto bgp\n", i/256, i%256, vias[i%len(vias)])
	}
	batch(t, n, b.String())

	var kernel *route.Conn
	var watcher *route.Watcher // from when all is in place
	var err error
	n.Do(func() { kernel, err = route.Dial() })
	if err != nil {
		t.Fatal(err)
	}
	defer kernel.Close()
	wan0, _, err := kernel.LinkByName("wan0")
	if err != nil {
		t.Fatal(err)
	}
	env := &Env{Kernel: kernel, Log: slog.New(slog.DiscardHandler), OtherHolder: func(wire.Key) (bool, error) { return false, nil }}
	env.Picture = NewPicture(kernel, func(index int) bool { return index == wan0.Index }, 0)
	u := uplink.Uplink{
		Key:        wire.Key{Family: wire.Inet, Ifname: "wan0", Address: "192.0.2.5"},
		Network:    netip.MustParsePrefix("192.0.2.5/24"),
		Priorities: uplink.OriginalPriorities,
		Settings: uplink.Settings{Routes: uplink.CopyRoutes, OnLoss: uplink.Fallback, Gateways: []netip.Addr{netip.MustParseAddr("192.0.2.1")},
			Static: []uplink.StaticRoute{{Dst: netip.MustParsePrefix("172.16.0.0/12"), Via: netip.MustParseAddr("192.0.2.9")}}},
	}
	const table = 10000
	inst := env.New(u, env.Log, func(what string, err error) {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	})
	inst.Index, inst.Present, inst.Usable = wan0.Index, true, true
	n.Do(func() { watcher, err = route.Watch(route.Routes4) })
	if err != nil {
		t.Fatal(err)
	}
	defer watcher.Close()
	if err := watcher.AllRules(); err != nil { // else the queue of events is too short for what is added
		t.Fatal(err)
	}
	if err := inst.Place(table); err != nil {
		t.Fatal(err)
	}
	check := func(when string) {
		t.Helper()
		all, err := kernel.Routes(unix.AF_INET, unix.RT_TABLE_MAIN)
		if err != nil {
			t.Fatal(err)
		}
		m := &main{versions: make(map[int]int)}
		m.take(all, nil, env.Picture.isUplink)
		whole := uplink.Main{Index: wan0.Index, Addresses: []uplink.Address{{Addr: u.Addr(), Network: u.Network.Masked()}}, Routes: m.links[wan0.Index], Local: m.local}
		have, err := kernel.Routes(unix.AF_INET, table)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := text(have), text(u.Plan(whole, table)); got != want {
			t.Fatalf("%s: the table differs from the plan:\n%s", when, difference(got, want))
		}
		if len(have) < routes/2 || inst.Routes() != len(have) {
			t.Errorf("%s: %d routes, %d counted", when, len(have), inst.Routes())
		}
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	change := func(round int) {
		t.Helper()
		var b strings.Builder
		for range 200 {
			verb := []string{"replace", "del", "add", "append"}[rnd.IntN(4)]
			fmt.Fprintf(&b, "route %s 10.%d.%d.0/24 %s proto bgp\n", verb, rnd.IntN(20), rnd.IntN(256), vias[rnd.IntN(len(vias))])
		}
		fmt.Fprintf(&b, "route add 172.31.0.%d via 192.0.2.1 table 77\n", round)
		batch(t, n, b.String())
		for marked := false; !marked; {
			events, err := watcher.Next()
			if err != nil {
				t.Fatal(err)
			}
			marked = slices.ContainsFunc(events, func(e route.Event) bool { return e.Table == 77 })
			changes, isLarge := env.Picture.Hear(unix.AF_INET, events)
			if !isLarge {
				t.Fatal("the picture is none of a large main")
			}
			inst.FollowChanges(table, changes, events)
		}
	}
	filled := func() int {
		t.Helper()
		have, err := kernel.Routes(unix.AF_INET, table)
		if err != nil {
			t.Fatal(err)
		}
		return len(have)
	}
	blocked := func() bool {
		t.Helper()
		rules, err := kernel.Rules(unix.AF_INET)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Contains(fmt.Sprint(rules), "from 192.0.2.5 unreachable")
	}
	// The table is filled in slices, and the address is blocked until that is done. What changes meanwhile is carried over.
	last := 0
	for i := 0; inst.routes.filling != nil; i++ {
		if now := filled(); now-last > slice || !blocked() || inst.RefreshAt == 0 {
			t.Errorf("slice %d: %d routes, of %d before; blocked %v; due at %v", i, now, last, blocked(), inst.RefreshAt)
		}
		change(100 + i)
		if i > 10*routes/slice {
			t.Fatal("the filling has no end")
		}
		m := env.Picture.mains[unix.AF_INET]
		m.stale, m.since = true, 1 // as after an append, when the last look is long ago
		last = filled()
		inst.Follow(table, false)
	}
	if last < large/4 || blocked() {
		t.Errorf("%d routes before the last slice; blocked %v", last, blocked())
	}
	reread := func() {
		if m := env.Picture.mains[unix.AF_INET]; m.stale { // after an append, say
			m.since = 1
			inst.Follow(table, false)
		}
		for inst.routes.filling != nil {
			inst.Follow(table, false)
		}
	}
	reread()
	check("at the start")
	for round := range 5 {
		change(round)
		reread()
		check(fmt.Sprintf("after %d changes", 200*(round+1)))
	}
}

func text(routes []route.Route) string {
	var all []string
	for _, r := range routes {
		all = append(all, r.String())
	}
	slices.Sort(all)
	return strings.Join(all, "\n")
}

func difference(got, want string) string {
	var b strings.Builder
	count := make(map[string]int)
	for line := range strings.Lines(got) {
		count[strings.TrimSpace(line)]++
	}
	for line := range strings.Lines(want) {
		count[strings.TrimSpace(line)]--
	}
	for line, n := range count {
		if n != 0 {
			fmt.Fprintf(&b, "%+d %s\n", n, line)
		}
	}
	return b.String()
}

func batch(t *testing.T, n *nettest.Namespace, commands string) {
	t.Helper()
	cmd := exec.Command("ip", "-force", "-batch", "-")
	cmd.Stdin = strings.NewReader(commands)
	if err := n.Start(cmd); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // some are refused: what they add is there, what they delete is not
}
