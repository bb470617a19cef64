package route

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// TestLegs: defaults of two links with one metric, which two programs added, are one route for
// whoever lists them.
func TestLegs(t *testing.T) {
	n := nettest.New(t, "host")
	far := nettest.New(t, "far")
	for _, name := range []string{"eth0", "eth1"} {
		nettest.Veth(t, n, name, far, name)
	}
	n.IP(t, "-6 route append default via fe80::1 dev eth0 metric 1024 proto static")
	n.IP(t, "-6 route append default via fe80::2 dev eth1 metric 1024 proto ra")
	c := dialIn(t, n)
	eth1, _, err := c.LinkByName("eth1")
	if err != nil {
		t.Fatal(err)
	}
	routes, err := c.Routes(unix.AF_INET6, unix.RT_TABLE_MAIN)
	if err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(routes, func(r Route) bool { return r.Dst.Bits() == 0 })
	if at < 0 || !routes[at].Multipath {
		t.Fatalf("the kernel shows them apart: %v", routes)
	}
	legs := routes[at].Legs(eth1.Index)
	if len(legs) != 1 || legs[0].Gateway != addr("fe80::2") || legs[0].Index != eth1.Index || legs[0].Multipath {
		t.Fatalf("over eth1: got %v", legs)
	}
	if legs := routes[at].Legs(77); legs != nil {
		t.Errorf("over no link of them: got %v", legs)
	}
	// A leg can be added elsewhere.
	if err := c.AddRoute(legs[0].In(10000, legs[0].Src)); err != nil {
		t.Fatal(err)
	}
	if got := n.IP(t, "-6 route show table 10000"); !strings.HasPrefix(got, "default via fe80::2 dev eth1 proto 116 metric 1024 ") || strings.Count(got, "\n") != 1 {
		t.Errorf("the copy: %s", got)
	}
}

// TestLegsOfObjects: nexthop objects are read for the links and gateways that they give routes, also
// where the kernel tells only their number.
func TestLegsOfObjects(t *testing.T) {
	for _, compat := range []string{"1", "0"} {
		t.Run("nexthop_compat_mode="+compat, func(t *testing.T) {
			n, c, index, peer := uplink(t)
			nettest.Veth(t, n, "eth1", peer, "eth1")
			n.Run(t, "sysctl", "-qw", "net.ipv4.nexthop_compat_mode="+compat)
			n.IP(t, "address add 198.51.100.2/24 dev eth1")
			for _, command := range []string{
				"nexthop add id 1 via 192.0.2.1 dev eth0", "nexthop add id 2 via 198.51.100.1 dev eth1",
				"nexthop add id 3 via fd00::1 dev eth0", "nexthop add id 4 group 1/3,7", "nexthop add id 5 dev eth0",
				"nexthop add id 6 group 1/2",
				"route add 10.1.0.0/16 nhid 1", "route add 10.2.0.0/16 nhid 6", "route add 10.3.0.0/16 nhid 3",
				"route add 10.4.0.0/16 nhid 4", "-6 route add fd01::/64 nhid 3",
			} {
				n.IP(t, command)
			}
			for _, tt := range []struct {
				dst  string
				want []string // gateways of eth0
			}{
				{"10.1.0.0/16", []string{"192.0.2.1"}},
				{"10.2.0.0/16", []string{"192.0.2.1"}},
				{"10.3.0.0/16", []string{"fd00::1"}},
				{"10.4.0.0/16", []string{"192.0.2.1", "fd00::1"}},
				{"fd01::/64", []string{"fd00::1"}},
			} {
				dst := prefix(tt.dst)
				family := unix.AF_INET
				if dst.Addr().Is6() {
					family = unix.AF_INET6
				}
				routes, err := c.RoutesOn(family, unix.RT_TABLE_MAIN, index)
				if err != nil {
					t.Fatal(err)
				}
				image, err := c.ReadImage(family, unix.RT_TABLE_MAIN, 0)
				if err != nil {
					t.Fatal(err)
				}
				routes = slices.DeleteFunc(routes, func(r Route) bool { return r.Dst != dst })
				for name, routes := range map[string][]Route{"dump": routes, "image": image.To(dst)} {
					var got []string
					for _, r := range routes {
						for _, leg := range r.Legs(index) {
							got = append(got, leg.Gateway.String())
							if err := c.AddRoute(leg.In(10000, leg.Src)); err != nil {
								t.Errorf("%s, %s: %v", tt.dst, name, err)
							}
						}
					}
					if !slices.Equal(got, tt.want) {
						t.Errorf("%s, %s: got %v, want %v", tt.dst, name, got, tt.want)
					}
				}
			}
		})
	}
}

// TestAlive: what is left of a route of several next hops while links are down can be added elsewhere.
func TestAlive(t *testing.T) {
	n := nettest.New(t, "host")
	far := nettest.New(t, "far")
	var hops string
	for i, name := range []string{"eth0", "eth1", "eth2"} {
		nettest.Veth(t, n, name, far, name)
		n.IP(t, "address add 10.0."+string(rune('0'+i))+".2/24 dev "+name)
		hops += " nexthop via 10.0." + string(rune('0'+i)) + ".1 dev " + name
	}
	n.IP(t, "route add 10.9.0.0/16"+hops)
	c := dialIn(t, n)
	alive := func() Route {
		t.Helper()
		routes, err := c.Routes(unix.AF_INET, unix.RT_TABLE_MAIN)
		if err != nil {
			t.Fatal(err)
		}
		return routes[slices.IndexFunc(routes, func(r Route) bool { return r.Multipath })].Alive()
	}
	for _, down := range []struct{ link, want string }{
		{"", "10.9.0.0/16 proto 116 \tnexthop via 10.0.0.1 dev eth0 weight 1 \tnexthop via 10.0.1.1 dev eth1 weight 1 \tnexthop via 10.0.2.1 dev eth2 weight 1"},
		{"eth1", "10.9.0.0/16 proto 116 \tnexthop via 10.0.0.1 dev eth0 weight 1 \tnexthop via 10.0.2.1 dev eth2 weight 1"},
		{"eth0", "10.9.0.0/16 via 10.0.2.1 dev eth2 proto 116"},
	} {
		if down.link != "" {
			n.IP(t, "link set "+down.link+" down")
		}
		if _, _, err := c.SyncRoutes(unix.AF_INET, 10000, []Route{alive().In(10000, netip.Addr{})}); err != nil {
			t.Fatal(err)
		}
		got := strings.TrimSpace(strings.NewReplacer("\n", "", " \n", "").Replace(n.IP(t, "route show table 10000")))
		if strings.Join(strings.Fields(got), " ") != strings.Join(strings.Fields(down.want), " ") {
			t.Errorf("with %s down, too: %s\nwant %s", down.link, got, down.want)
		}
	}
}
