package route

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

func TestSyncRoutes(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name                    string
		family                  int
		group                   Groups
		link, all               string
		gateways                [2]string
		src, moved, far         string
		foreign                 []string
		first, second, foreign2 string
	}{
		{
			name: "inet", family: unix.AF_INET, group: Routes4, link: "192.0.2.0/24", all: "0.0.0.0/0", gateways: [2]string{"192.0.2.1", "192.0.2.254"},
			src: "192.0.2.5", moved: "192.0.2.6", far: "198.51.100.0/24",
			foreign: []string{"-4 route add 10.9.0.0/16 dev eth0 table 10000 proto static", "-4 route add default dev eth0 table 10000 metric 9 proto 115", "-4 route add default dev eth0 table 10001 proto 116"},
			first: `default via 192.0.2.1 dev #2 table 10000 proto 116 src 192.0.2.5
default dev #2 table 10000 proto 115 scope link metric 9
default via 192.0.2.254 dev #2 table 10000 proto 116 src 192.0.2.5 metric 100
10.9.0.0/16 dev #2 table 10000 proto 4 scope link
192.0.2.0/24 dev #2 table 10000 proto 116 scope link src 192.0.2.5
198.51.100.0/24 via 192.0.2.1 dev #2 table 10000 proto 116 src 192.0.2.5
`,
			second: `default via 192.0.2.254 dev #2 table 10000 proto 116 src 192.0.2.6
default dev #2 table 10000 proto 115 scope link metric 9
10.9.0.0/16 dev #2 table 10000 proto 4 scope link
192.0.2.0/24 dev #2 table 10000 proto 116 scope link src 192.0.2.6
198.51.100.0/24 via 192.0.2.1 dev #2 table 10000 proto 116 src 192.0.2.6 metric 1
`,
			foreign2: "default dev #2 table 10000 proto 115 scope link metric 9\n10.9.0.0/16 dev #2 table 10000 proto 4 scope link\n",
		},
		{
			name: "inet6", family: unix.AF_INET6, group: Routes6, link: "fd00::/64", all: "::/0", gateways: [2]string{"fd00::1", "fe80::1"},
			src: "fd00::5", moved: "fd00::6", far: "2001:db8::/32",
			foreign: []string{"-6 route add fd09::/64 dev eth0 table 10000 proto static", "-6 route add default dev eth0 table 10000 metric 9 proto 115", "-6 route add default dev eth0 table 10001 proto 116"},
			first: `2001:db8::/32 via fd00::1 dev #2 table 10000 proto 116 src fd00::5 metric 1024 pref medium
fd00::/64 dev #2 table 10000 proto 116 src fd00::5 metric 1024 pref medium
fd09::/64 dev #2 table 10000 proto 4 metric 1024 pref medium
default dev #2 table 10000 proto 115 metric 9 pref medium
default via fe80::1 dev #2 table 10000 proto 116 src fd00::5 metric 100 pref medium
default via fd00::1 dev #2 table 10000 proto 116 src fd00::5 metric 1024 pref medium
`,
			second: `2001:db8::/32 via fd00::1 dev #2 table 10000 proto 116 src fd00::6 metric 1 pref medium
fd00::/64 dev #2 table 10000 proto 116 src fd00::6 metric 1024 pref medium
fd09::/64 dev #2 table 10000 proto 4 metric 1024 pref medium
default dev #2 table 10000 proto 115 metric 9 pref medium
default via fe80::1 dev #2 table 10000 proto 116 src fd00::6 metric 1024 pref medium
`,
			foreign2: "fd09::/64 dev #2 table 10000 proto 4 metric 1024 pref medium\ndefault dev #2 table 10000 proto 115 metric 9 pref medium\n",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			n, c, eth0, _ := uplink(t)
			for _, r := range test.foreign {
				n.IP(t, r)
			}
			route := func(dst, gateway, src string, metric uint32) Route {
				var via netip.Addr
				if gateway != "" {
					via = addr(gateway)
				}
				r := NewRoute(10000, prefix(dst), via, eth0).In(10000, addr(src))
				r.Metric = metric
				return r
			}
			// Gateways come first, as callers need not know.
			first := []Route{
				route(test.far, test.gateways[0], test.src, 0), route(test.all, test.gateways[0], test.src, 0),
				route(test.all, test.gateways[1], test.src, 100), route(test.link, "", test.src, 0),
			}
			mustSyncRoutes(t, c, test.family, 10000, first, 4, 0)
			checkRoutes(t, n, test.family, "10000", test.first)
			quiet(t, n, func() {
				mustSyncRoutes(t, c, test.family, 10000, first, 0, 0)
				slices.Reverse(first)
				mustSyncRoutes(t, c, test.family, 10000, append(first, first...), 0, 0)
			})
			// Another source and gateway take the places; another metric is another place.
			second := []Route{
				route(test.far, test.gateways[0], test.moved, 1), route(test.all, test.gateways[1], test.moved, 0), route(test.link, "", test.moved, 0),
			}
			w := watch(t, n, test.group)
			mustSyncRoutes(t, c, test.family, 10000, second, 3, 4)
			gone := Event{Kind: RouteChanged, Family: test.family, Table: 10000, Index: eth0, Protocol: Protocol, Deleted: true}
			events := slices.DeleteFunc(await(t, w, gone), byKernel)
			if i := slices.Index(events, gone); i != 3 {
				t.Errorf("deletes before adds: %+v", events)
			}
			checkRoutes(t, n, test.family, "10000", test.second)
			quiet(t, n, func() { mustSyncRoutes(t, c, test.family, 10000, second, 0, 0) })
			mustSyncRoutes(t, c, test.family, 10000, nil, 0, 3)
			checkRoutes(t, n, test.family, "10000", test.foreign2)
			quiet(t, n, func() { mustSyncRoutes(t, c, test.family, 10000, nil, 0, 0) })
			if got := ipRoutes(t, n, test.family, "10001"); strings.Count(got, "\n") != 1 {
				t.Errorf("table 10001 has\n%s", got)
			}

			// Ours behind others at one place, as `append` makes them, are brought in order.
			version := strings.Fields(test.foreign[0])[0]
			for _, r := range []string{"default via " + test.gateways[0] + " dev eth0", "default dev eth0", "default via " + test.gateways[1] + " dev eth0"} {
				n.IP(t, version+" route append table 10000 proto 116 "+r)
			}
			if _, _, err := c.SyncRoutes(test.family, 10000, second[1:]); err != nil {
				t.Error(err)
			}
			ours := slices.DeleteFunc(mustRoutes(t, c, test.family, 10000), func(r Route) bool { return r.Protocol != Protocol })
			if len(ours) != 2 || !slices.ContainsFunc(ours, second[1].Equal) || !slices.ContainsFunc(ours, second[2].Equal) {
				t.Errorf("ours are\n%s", lines(ours))
			}
		})
	}
}

// What the kernel refuses keeps nothing else from its place, and comes as soon as it can. A gateway that no route leads to
// is on the link by force.
func TestSyncRoutesRefused(t *testing.T) {
	t.Parallel()
	n, c, eth0, _ := uplink(t)
	n.IP(t, "route add 10.9.0.0/16 dev eth0 table 10000 proto static")
	to := func(dst, gateway string) Route { return NewRoute(10000, prefix(dst), addr(gateway), eth0) }
	want := []Route{
		to("0.0.0.0/0", "198.51.100.1"),
		to("10.1.0.0/16", "192.0.2.1"),
		to("10.2.0.0/16", "192.0.2.1").In(10000, addr("192.0.2.7")),
		to("10.9.0.0/16", "192.0.2.1"),
		to("10.1.0.0/16", "192.0.2.2"),
		to("10.3.0.0/16", "192.0.2.1").In(10001, netip.Addr{}),
		NewRoute(10000, prefix("192.0.2.0/24"), netip.Addr{}, eth0),
	}
	for range 2 {
		added, deleted, err := c.SyncRoutes(unix.AF_INET, 10000, want)
		if len(deleted) != 0 || !errors.Is(err, unix.EINVAL) || !errors.Is(err, unix.EEXIST) {
			t.Errorf("added\n%sdeleted\n%s%v", lines(added), lines(deleted), err)
		}
		if got := strings.ReplaceAll(err.Error(), ".\n", "\n"); got != `add route "10.1.0.0/16 via 192.0.2.2 dev #2 table 10000 proto 116": another route is wanted in its place
add route "10.3.0.0/16 via 192.0.2.1 dev #2 table 10001 proto 116": is not for family 2 and table 10000, or not ours
add route "10.2.0.0/16 via 192.0.2.1 dev #2 table 10000 proto 116 src 192.0.2.7": invalid argument: Invalid prefsrc address
add route "10.9.0.0/16 via 192.0.2.1 dev #2 table 10000 proto 116": "10.9.0.0/16 dev #2 table 10000 proto 4 scope link" is in its place: file exists` {
			t.Errorf("error is\n%s", got)
		}
		checkRoutes(t, n, unix.AF_INET, "10000", `default via 198.51.100.1 dev #2 table 10000 proto 116 onlink
10.1.0.0/16 via 192.0.2.1 dev #2 table 10000 proto 116
10.9.0.0/16 dev #2 table 10000 proto 4 scope link
192.0.2.0/24 dev #2 table 10000 proto 116 scope link
`)
	}
	n.IP(t, "addr add 192.0.2.7/24 dev eth0")
	n.IP(t, "addr add 198.51.100.5/24 dev eth0")
	n.IP(t, "route del 10.9.0.0/16 dev eth0 table 10000 proto static")
	mustSyncRoutes(t, c, unix.AF_INET, 10000, append(want[:4:4], want[6]), 2, 0)
}

// The kernel refuses an IPv6 route by a gateway that is on the link by force, for any table, once main leads to the gateway
// over another link, as half of all addresses through a VPN does.
func TestSyncRoutesGatewayElsewhere(t *testing.T) {
	t.Parallel()
	n, c, eth0, _ := uplink(t)
	n.IP(t, "addr add 2001:db8:2::8/127 dev eth0 nodad noprefixroute")
	n.IP(t, "link add wg0 type veth peer name far0")
	n.IP(t, "link set wg0 up")
	n.IP(t, "route add 2000::/3 dev wg0")
	to := NewRoute(10000, prefix("::/0"), addr("2001:db8:2::9"), eth0)
	to.Onlink = true
	checkComesAndGoes(t, n, c, to, "default via 2001:db8:2::9 dev #2 table 10000 proto 116 metric 1024 pref medium\n")

	main := to
	main.Table = unix.RT_TABLE_MAIN
	if added, err := c.RestoreRoute(main, false); !added || err != nil {
		t.Errorf("in main: added %t, %v", added, err)
	}
	if have, err := c.Routes(unix.AF_INET6, unix.RT_TABLE_MAIN); err != nil || !slices.ContainsFunc(have, main.Equal) {
		t.Errorf("main has\n%s%v", lines(have), err)
	}
}

// The kernel refuses an IPv4 route by a gateway that is on the link by force once the gateway is an address of this host. Main
// keeps it, with its packets.
func TestSyncRoutesGatewayOwn(t *testing.T) {
	t.Parallel()
	n, c, eth0, _ := uplink(t)
	n.IP(t, "link add br0 type bridge")
	n.IP(t, "link set br0 up")
	n.IP(t, "addr add 192.0.2.1/25 dev br0")
	to := NewRoute(10000, prefix("0.0.0.0/0"), addr("192.0.2.1"), eth0)
	to.Onlink = true
	checkComesAndGoes(t, n, c, to, "default via 192.0.2.1 dev #2 table 10000 proto 116\n")
}

// checkComesAndGoes has a route come into table 10000 and go, twice: it is one that the kernel does not take as it is.
func checkComesAndGoes(t *testing.T, n *nettest.Namespace, c *Conn, r Route, want string) {
	t.Helper()
	for range 2 {
		mustSyncRoutes(t, c, r.Family, 10000, []Route{r}, 1, 0)
		mustSyncRoutes(t, c, r.Family, 10000, []Route{r}, 0, 0)
		checkRoutes(t, n, r.Family, "10000", want)
		mustSyncRoutes(t, c, r.Family, 10000, nil, 0, 1)
	}
}

// Main keeps the next hops of a route over several links when the network of a gateway has gone, and so does a table.
func TestSyncRoutesHopElsewhere(t *testing.T) {
	t.Parallel()
	n, c, _, _ := uplink(t)
	n.IP(t, "link add lan0 type veth peer name far0")
	n.IP(t, "link set lan0 up")
	n.IP(t, "link set far0 up")
	for family, add := range map[int][3]string{
		unix.AF_INET: {"addr add 198.51.100.5/24 dev lan0", "addr add 203.0.113.5/24 dev lan0", "route add 10.9.0.0/16 nexthop via 192.0.2.1 dev eth0 nexthop via 198.51.100.1 dev lan0"},
		unix.AF_INET6: {"addr add fd00:77::5/64 dev lan0 nodad", "addr add fd00:78::5/64 dev lan0 nodad",
			"route add fd00:60::/32 nexthop via fe80::2 dev eth0 nexthop via fd00:77::1 dev lan0"},
	} {
		for _, command := range add {
			n.IP(t, command)
		}
		n.IP(t, strings.Replace(strings.TrimSuffix(add[0], " nodad"), " add ", " del ", 1))
		routes, err := c.Routes(family, unix.RT_TABLE_MAIN)
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(routes, func(r Route) bool { return r.Multipath })
		if i < 0 {
			t.Fatalf("main has\n%s", lines(routes))
		}
		want := []Route{routes[i].In(10000, netip.Addr{})}
		mustSyncRoutes(t, c, family, 10000, want, 1, 0)
		mustSyncRoutes(t, c, family, 10000, want, 0, 0)
		if got := n.IP(t, fmt.Sprintf("-%c route show table 10000", "46"[family/unix.AF_INET6])); strings.Count(got, "nexthop") != 2 {
			t.Errorf("the table has %s", got)
		}
		mustSyncRoutes(t, c, family, 10000, nil, 0, 1)
	}
}

// Main keeps the next hops over a link that became a port of a bridge, which has the networks of their gateways now. A table gets
// them although main leads to the gateways over the bridge.
func TestSyncRoutesHopsOfAPort(t *testing.T) {
	t.Parallel()
	n, c, _, _ := uplink(t)
	for _, onlink := range [][2]string{{"", ""}, {" onlink", " onlink"}, {" onlink", ""}} {
		for _, command := range []string{
			"link add lan0 type veth peer name far0", "link set lan0 up", "link set far0 up",
			"addr add fd00:77::5/64 dev lan0 nodad", "addr add fd00:78::5/64 dev lan0 nodad",
			"route add fd00:60::/32 nexthop via fd00:77::1 dev lan0" + onlink[0] + " nexthop via fd00:78::1 dev lan0" + onlink[1] + " nexthop via fe80::2 dev eth0",
			"-6 addr flush dev lan0", "link add br7 type bridge", "link set lan0 master br7", "link set br7 up",
			"addr add fd00:77::5/64 dev br7 nodad", "addr add fd00:78::5/64 dev br7 nodad",
		} {
			n.IP(t, command)
		}
		routes, err := c.Routes(unix.AF_INET6, unix.RT_TABLE_MAIN)
		if err != nil {
			t.Fatal(err)
		}
		var want []Route // as for an address of the bridge
		for _, r := range routes {
			if r.Multipath || r.Dst == prefix("fd00:77::/64") || r.Dst == prefix("fd00:78::/64") {
				want = append(want, r.In(10000, netip.Addr{}))
			}
		}
		if len(want) != 3 {
			t.Fatalf("main has\n%s", lines(routes))
		}
		mustSyncRoutes(t, c, unix.AF_INET6, 10000, want, 3, 0)
		mustSyncRoutes(t, c, unix.AF_INET6, 10000, want, 0, 0)
		if got := n.IP(t, "-6 route show table 10000"); strings.Count(got, "nexthop") != 3 || strings.Count(got, "\n") != 6 {
			t.Errorf("with%q the table has %s", onlink, got)
		}
		mustSyncRoutes(t, c, unix.AF_INET6, 10000, nil, 0, 3)
		for _, command := range []string{"link del lan0", "link del br7", "route del fd00:60::/32"} {
			n.IP(t, command)
		}
	}
}

// An address need not bring a route for its network: gateways are found in the table alone.
func TestSyncRoutesLinksFirst(t *testing.T) {
	t.Parallel()
	n, c, eth0, _ := uplink(t)
	n.IP(t, "addr add 198.51.100.5/32 dev eth0")
	n.IP(t, "addr add 2001:db8::5/128 dev eth0 nodad")
	for family, test := range map[int][3]string{
		unix.AF_INET: {"198.51.100.5", "198.51.100.1/32", "0.0.0.0/0"}, unix.AF_INET6: {"2001:db8::5", "2001:db8::1/128", "::/0"},
	} {
		gateway := prefix(test[1])
		want := []Route{
			NewRoute(10000, prefix(test[2]), gateway.Addr(), eth0).In(10000, addr(test[0])),
			NewRoute(10000, gateway, netip.Addr{}, eth0).In(10000, addr(test[0])),
		}
		if err := c.AddRoute(want[0]); !errors.Is(err, unix.ENETUNREACH) && !errors.Is(err, unix.EHOSTUNREACH) {
			t.Errorf("error is %v", err)
		}
		mustSyncRoutes(t, c, family, 10000, want, 2, 0)
		mustSyncRoutes(t, c, family, 10000, nil, 0, 2)
	}
}

// Routes that stand are never missing from a dump, whatever comes and goes before them.
func TestRoutesDuringChanges(t *testing.T) {
	t.Parallel()
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		n, c, eth0, _ := uplink(t)
		dst := func(i int) netip.Prefix {
			if family == unix.AF_INET {
				return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), 32)
			}
			return netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 1, 14: byte(i >> 8), 15: byte(i)}), 128)
		}
		var standing []Route
		for i := range 800 {
			standing = append(standing, NewRoute(10000, dst(i+500), netip.Addr{}, eth0))
		}
		mustSyncRoutes(t, c, family, 10000, standing, len(standing), 0)
		other := dialIn(t, n)
		stop := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				r := NewRoute(10000, dst(i%500), netip.Addr{}, eth0)
				r.Protocol = 200
				if err := errors.Join(other.change(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, r.encode()),
					other.change(unix.RTM_DELROUTE, 0, r.encode())); err != nil {
					t.Errorf("change routes: %v", err)
				}
			}
		})
		for range 5 {
			routes := slices.DeleteFunc(mustRoutes(t, c, family, 10000), func(r Route) bool { return r.Protocol != Protocol })
			if sorted(lines(routes)) != sorted(lines(standing)) {
				t.Errorf("%d of %d routes seen", len(routes), len(standing))
			}
			mustSyncRoutes(t, c, family, 10000, standing, 0, 0)
		}
		close(stop)
		wg.Wait()
	}
}

// 1,000 routes in main cost those nothing who read another table.
func BenchmarkRoutes(b *testing.B) {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		_, c, eth0, _ := uplink(b)
		for i := range 1000 {
			r := NewRoute(unix.RT_TABLE_MAIN, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), 32), netip.Addr{}, eth0)
			if family == unix.AF_INET6 {
				r = NewRoute(unix.RT_TABLE_MAIN, netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 1, 14: byte(i >> 8), 15: byte(i)}), 128), netip.Addr{}, eth0)
			}
			if err := c.AddRoute(r); err != nil {
				b.Fatal(err)
			}
			if r.Table = 10000; i < 10 {
				if err := c.AddRoute(r); err != nil {
					b.Fatal(err)
				}
			}
		}
		name := map[int]string{unix.AF_INET: "inet", unix.AF_INET6: "inet6"}[family]
		for _, table := range []uint32{10000, unix.RT_TABLE_MAIN} {
			b.Run(fmt.Sprintf("%s/table %d", name, table), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if routes, err := c.Routes(family, table); err != nil || len(routes) < 10 {
						b.Fatalf("%d routes, %v", len(routes), err)
					}
				}
			})
		}
		want := mustRoutes(b, c, family, 10000)
		b.Run(name+"/sync unchanged", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if added, deleted, err := c.SyncRoutes(family, 10000, want); err != nil || len(added)+len(deleted) > 0 {
					b.Fatal(added, deleted, err)
				}
			}
		})
	}
}
