package install

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestCostOfChange: how many routes are read from the kernel and compared for one change of main does not depend on how
// many main has, also when move takes a default route out of main. A choice that is made, changed and taken back reads no
// more than the first of them.
func TestCostOfChange(t *testing.T) {
	for _, routes := range []int{large + 500, 3 * large} {
		for name, of := range costsOf {
			t.Run(fmt.Sprintf("%s %d", name, routes), func(t *testing.T) { newCosts(t, of, routes).test() })
		}
	}
}

// TestLargeMacvlan: while main is large, the address of a macvlan leaves by the gateway that the link below has now, and by
// a gateway of its own where it has one.
func TestLargeMacvlan(t *testing.T) {
	for name, of := range costsOf {
		t.Run(name, func(t *testing.T) {
			c := newCosts(t, of, large+500)
			c.onMacvlan()
			c.place()
			const all = 2 * large // another link is an uplink now: the table is filled anew
			for _, step := range []struct {
				command string
				most    int
				want    []string // gateways of the table
			}{
				{"", 0, []string{c.via(1)}},
				{fmt.Sprintf("route replace %s via %s metric 5", c.all(), c.via(2)), 10, []string{c.via(2)}},
				{fmt.Sprintf("route add %s via %s dev wan0 metric 9", c.all(), c.via(3)), 10, []string{c.via(2), c.via(3)}},
				{fmt.Sprintf("route del %s via %s", c.all(), c.via(2)), 10, []string{c.via(3)}},
				{fmt.Sprintf("route add %s via %s dev vrrp0 metric 50", c.all(), c.via(4)), all, []string{c.via(4)}},
				{fmt.Sprintf("route add %s via %s dev wan0 metric 8", c.all(), c.via(2)), 10, []string{c.via(4)}},
				{fmt.Sprintf("route del %s via %s dev vrrp0", c.all(), c.via(4)), all, []string{c.via(2), c.via(3)}},
				{fmt.Sprintf("route del %s via %s", c.all(), c.via(3)), 10, []string{c.via(2)}},
				{fmt.Sprintf("route del %s via %s", c.all(), c.via(2)), all, nil},
				{fmt.Sprintf("route add %s via %s dev wan0 metric 3", c.all(), c.via(1)), all, []string{c.via(1)}},
			} {
				if step.command != "" {
					c.change(step.most, step.command)
				}
				c.fill()
				var got []string
				for line := range strings.Lines(c.defaults(fmt.Sprint("table ", costTable))) {
					got = append(got, strings.Fields(line)[2])
				}
				if !slices.Equal(got, step.want) {
					t.Errorf("after %q the table has default routes by %q, want %q", step.command, got, step.want)
				}
			}
		})
	}
}

// onMacvlan has the address on a macvlan instead, beside another address of the network.
func (c *costs) onMacvlan() {
	c.t.Helper()
	c.ns.Batch(c.t, "link add link wan0 name vrrp0 type macvlan mode private", "link set vrrp0 up",
		"address add "+c.via(200)+map[int]string{unix.AF_INET: "/32 dev vrrp0", unix.AF_INET6: "/128 dev vrrp0 nodad"}[c.family],
		"route add "+c.via(4)+" dev vrrp0")
	link, _, err := c.kernel.LinkByName("vrrp0")
	if err != nil {
		c.t.Fatal(err)
	}
	u := c.inst.Uplink
	addr := netip.MustParseAddr(c.via(200))
	u.Key.Ifname, u.Key.Address, u.Network = "vrrp0", addr.String(), netip.PrefixFrom(addr, addr.BitLen())
	c.inst.Uplink, c.inst.Rules.Uplink, c.inst.Index = u, u, link.Index
}

var costsOf = map[string]costOf{
	"inet": {family: unix.AF_INET, addr: "192.0.2.5/24", gateway: "192.0.2.%d", prefix: func(i int) string {
		return fmt.Sprintf("10.%d.%d.0/24", i/256, i%256)
	}},
	"inet6": {family: unix.AF_INET6, addr: "2001:db8:1::5/64", gateway: "2001:db8:1::%d", prefix: func(i int) string {
		return fmt.Sprintf("fd00:0:%x::/48", i)
	}},
}

// costOf is what TestCostOfChange has of a family.
type costOf struct {
	family  int
	addr    string
	gateway string // with the number of a router
	prefix  func(i int) string
}

func (of costOf) via(n int) string { return fmt.Sprintf(of.gateway, n) }

func (of costOf) all() string {
	if of.family == unix.AF_INET6 {
		return "::/0"
	}
	return "0.0.0.0/0"
}

// costs is an address on a host with a large main.
type costs struct {
	costOf
	t       *testing.T
	ns      *nettest.Namespace
	kernel  *route.Conn
	watcher *route.Watcher
	env     *Env
	inst    *Installation
}

// costTable is the table of its lease.
const costTable = 10000

func newCosts(t *testing.T, of costOf, routes int) *costs {
	c := &costs{costOf: of, t: t, ns: nettest.New(t, "host")}
	nettest.Veth(t, c.ns, "wan0", nettest.New(t, "far"), "wan0")
	nodad := ""
	if of.family == unix.AF_INET6 {
		nodad = " nodad"
	}
	c.ns.IP(t, "address add "+of.addr+" dev wan0"+nodad)
	c.ns.IP(t, fmt.Sprintf("route add %s via %s metric 5", of.all(), of.via(1)))
	var b strings.Builder
	for i := range routes {
		fmt.Fprintf(&b, "route add %s via %s proto bgp\n", of.prefix(i), of.via(1))
	}
	batch(t, c.ns, b.String())
	var err error
	c.ns.Do(func() {
		if c.kernel, err = route.Dial(); err == nil {
			c.watcher, err = route.Watch(route.Routes4 | route.Routes6)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.kernel.Close)
	t.Cleanup(func() { c.watcher.Close() })
	if err := c.watcher.AllRules(); err != nil { // else it hears of each route that is added to the table
		t.Fatal(err)
	}
	wan0, _, err := c.kernel.LinkByName("wan0")
	if err != nil {
		t.Fatal(err)
	}
	c.env = &Env{Kernel: c.kernel, Log: slog.New(slog.DiscardHandler), OtherHolder: func(wire.Key) (bool, error) { return false, nil }}
	c.env.Picture = NewPicture(c.kernel, func(index int) bool { return index == wan0.Index }, 0)
	network := netip.MustParsePrefix(of.addr)
	u := uplink.Uplink{
		Key: wire.Key{Family: wire.Family(of.family), Ifname: "wan0", Address: network.Addr().String()}, Network: network,
		Priorities: uplink.OriginalPriorities, Settings: uplink.Settings{Routes: uplink.CopyRoutes, OnLoss: uplink.Fallback},
	}
	c.inst = c.env.New(u, c.env.Log, func(what string, err error) {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	})
	c.inst.Index, c.inst.Present, c.inst.Usable = wan0.Index, true, true
	return c
}

// place fills the table.
func (c *costs) place() {
	c.t.Helper()
	c.ns.Do(func() {
		if err := c.inst.Place(costTable); err != nil {
			c.t.Fatal(err)
		}
	})
	c.fill()
}

// fill fills the table as far as it is not. If main has to be read again after what was heard, that is done here, and not
// in the middle of a change, if that takes a second.
func (c *costs) fill() {
	c.ns.Do(func() {
		if c.env.Picture.Uncertain(c.family) {
			c.env.Picture.hold(c.family, 0)
			c.env.Picture.mains[c.family].since -= time.Minute
			c.inst.Follow(costTable, false)
		}
		for c.inst.routes.filling != nil {
			c.inst.Follow(costTable, false)
		}
	})
}

// cost does something, and wants that it reads and compares no more than most routes.
func (c *costs) cost(what string, most int, do func()) {
	c.t.Helper()
	read, compared := c.kernel.RoutesRead(), c.env.compared
	c.ns.Do(do)
	read, compared = c.kernel.RoutesRead()-read, c.env.compared-compared
	if c.t.Logf("%s: %d read, %d compared", what, read, compared); read > most || compared > most {
		c.t.Errorf("%s: %d read, %d compared", what, read, compared)
	}
}

// change changes main, and carries that over.
func (c *costs) change(most int, command string) {
	c.t.Helper()
	c.ns.IP(c.t, command)
	end := strings.TrimSuffix(c.all(), "/0") + "9/128"
	if c.family == unix.AF_INET {
		end = "172.31.0.1"
	}
	c.ns.IP(c.t, "route add unreachable "+end+" table 77")
	c.ns.IP(c.t, "route del unreachable "+end+" table 77")
	c.env.Picture.hold(c.family, time.Minute)
	c.cost(command, most, func() {
		for marked := false; !marked; {
			events, err := c.watcher.Next()
			if err != nil {
				c.t.Fatal(err)
			}
			marked = slices.ContainsFunc(events, func(e route.Event) bool { return e.Table == 77 && e.Deleted })
			changes, _ := c.env.Picture.Hear(c.family, events)
			c.inst.FollowChanges(costTable, changes, events)
		}
	})
}

// choose makes the default route by a router that of the choice, or with 0 none.
func (c *costs) choose(what string, n int) {
	c.t.Helper()
	var choice Choice
	if n != 0 {
		r := uplink.ChoiceRoute(route.NewRoute(costTable, netip.MustParsePrefix(c.all()), netip.MustParseAddr(c.via(n)), c.inst.Index), c.inst.Uplink.Addr())
		choice.Route = &r
	}
	c.cost(what, large, func() {
		if changed, err := c.env.SyncChoice(c.family, choice); err != nil || !changed {
			c.t.Errorf("%s: %v, %v", what, changed, err)
		}
	})
	if got := c.defaults("metric 1"); (n == 0) != (got == "") || n != 0 && !strings.Contains(got, c.via(n)) {
		c.t.Errorf("%s: main has %q", what, got)
	}
}

// defaults are the default routes of main.
func (c *costs) defaults(more string) string {
	return c.ns.IP(c.t, fmt.Sprintf("-%s route show %s %s", map[bool]string{true: "6", false: "4"}[c.family == unix.AF_INET6], c.all(), more))
}

func (c *costs) test() {
	c.place()
	for _, command := range []string{
		fmt.Sprintf("route add %s via %s proto bgp", c.prefix(50000), c.via(1)),
		fmt.Sprintf("route replace %s via %s proto bgp", c.prefix(0), c.via(2)),
		"route del " + c.prefix(1),
		fmt.Sprintf("route add %s via %s proto bgp", c.prefix(1), c.via(1)), // heard together with our own deletion from the table
		fmt.Sprintf("route add %s via %s metric 6", c.all(), c.via(2)),
	} {
		c.change(10, command)
	}
	c.choose("a choice", 1)
	c.choose("another choice", 2)
	c.choose("no choice", 0)
	u := c.inst.Uplink
	u.Settings.Routes = uplink.MoveRoutes
	c.ns.Do(func() { c.inst.Update(u, costTable, false) })
	c.place()
	c.change(10, fmt.Sprintf("route add %s via %s metric 7", c.all(), c.via(3)))
	if got := c.defaults(""); got != "" {
		c.t.Errorf("main has %q still", got)
	}
}
