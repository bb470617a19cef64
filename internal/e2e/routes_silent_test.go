package e2e

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
)

// The kernel deletes routes without an event: those over a link that goes down, and those with the source of an
// address that goes. Tables have routes over links that no lease is for, too.

// TestTablesKeepLocalNetworks: a table gets back what it loses over a link that is no uplink.
func TestTablesKeepLocalNetworks(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.link("lan0", "10.79.0.2/24")
	h.ns.IP(t, "address add 2001:db8:1::2/64 dev lan0 nodad")
	h.ns.IP(t, "address add 2001:db8::2/64 dev wan0 nodad")
	h.serve()
	h.watch("--ifname", "wan*")
	table := h.served("10.77.0.2")
	want := []string{ourNetwork, "10.79.0.0/24 dev lan0 proto 116 src 10.79.0.2"}
	h.waitRoutes(table, want...)
	for _, change := range []string{
		"link set lan0 down\nlink set lan0 up",
		"address del 10.79.0.2/24 dev lan0\naddress add 10.79.0.2/24 dev lan0",
		"route del 10.79.0.0/24 table " + table, // another program
	} {
		h.batch(change)
		h.waitRoutes(table, want...)
	}
}

// TestAddressByRoute: an address that a route of type local makes is served no more when the kernel deletes that route with the
// last other address of the link, or with its nexthop object.
func TestAddressByRoute(t *testing.T) {
	for name, tt := range map[string]struct{ before, route, end string }{
		"last address": {"", "dev wan0", "address del 10.77.0.2/24 dev wan0"},
		"flush":        {"address add 10.77.0.3/24 dev wan0", "dev wan0", "address flush dev wan0"},
		"object":       {"nexthop add id 7 dev wan0", "nhid 7", "nexthop del id 7"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.link("wan0", "10.77.0.2/24")
			h.ns.IP(t, "route add default via 10.77.0.1")
			if tt.before != "" {
				h.ns.IP(t, tt.before)
			}
			h.ns.IP(t, "route add local 192.0.2.9 table local proto bird "+tt.route)
			h.serve()
			h.watch("-c", h.watchFile(`{"links":[{"ifname":"wan0","routes":"copy"}],"reconcile_seconds":3600}`))
			h.served("10.77.0.2")
			h.served("192.0.2.9")
			h.ns.IP(t, tt.end)
			h.waitNotServed("192.0.2.9")
		})
	}
}

// batch has all lines of `ip` done before anybody else comes to see the first.
func (h *host) batch(lines string) {
	h.t.Helper()
	cmd := exec.Command("ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(lines + "\n")
	if err := h.ns.Start(cmd); err != nil {
		h.t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		h.t.Fatalf("ip -batch: %v\n%s", err, lines)
	}
}

// TestLinkDownFromTheStart: the table of an address on a link that is down stays empty, and as long as it does its
// packets go by main, if they may.
func TestLinkDownFromTheStart(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.link("wan1", "10.78.0.2/24")
	h.ns.IP(t, "route add default via 10.78.0.1")
	h.ns.IP(t, "link set wan0 down")
	h.serve()
	h.lease("10.77.0.2", "wan0", "--routes", "copy")
	h.waitRules(copyRules("10.77.0.2", "10.77.0.0/24", 10000)...)
	if way := h.ns.IP(t, "route get 192.0.2.9 from 10.77.0.2"); !strings.Contains(way, " via 10.78.0.1 dev wan1 ") {
		t.Errorf("the way is %s", way)
	}
	h.ns.IP(t, "link set wan0 up")
	h.waitRoutes("10000", ourNetwork)
	h.wantRules(copyRules("10.77.0.2", "10.77.0.0/24", 10000)...)
}

// TestGatewayOutOfReach: main keeps a route by a gateway that no route leads to any more, and so does the table.
func TestGatewayOutOfReach(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24", "10.78.0.2/24")
	h.ns.IP(t, "route add default via 10.78.0.1")
	h.serve()
	h.ns.IP(t, "address del 10.78.0.2/24 dev wan0")
	h.lease("10.77.0.2", "wan0", "--routes", "copy")
	h.waitRoutes("10000", ourNetwork, "default via 10.78.0.1 dev wan0 proto 116 src 10.77.0.2 onlink")
	h.ns.IP(t, "address add 10.78.0.2/24 dev wan0")
	h.waitRoutes("10000", ourNetwork, "10.78.0.0/24 dev wan0 proto 116 scope link src 10.77.0.2", "default via 10.78.0.1 dev wan0 proto 116 src 10.77.0.2 onlink")
	h.ns.IP(t, "route del default")
	h.waitRoutes("10000", ourNetwork, "10.78.0.0/24 dev wan0 proto 116 scope link src 10.77.0.2")
}

// TestBlockedAddressMoves: an address that is blocked until it returns may leave by the link that has it now, also if it
// was there before anybody saw it go.
func TestBlockedAddressMoves(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	for i := range 5 {
		link, other := fmt.Sprint("wan", i), fmt.Sprint("wan", i+1)
		h.link(other)
		h.lease("10.77.0.2", link, "--routes", "copy", "--on-loss", "block")
		h.batch(fmt.Sprintf("address del 10.77.0.2/24 dev %s\naddress add 10.77.0.2/24 dev %s", link, other))
		h.waitRules()
	}
}

// TestMovedLinkIsAnUplink: a bridge that only the default route makes an uplink is one still when that has been moved.
func TestMovedLinkIsAnUplink(t *testing.T) {
	h := newHost(t)
	h.link("port0")
	h.ns.IP(t, "link add vmbr0 type bridge")
	h.ns.IP(t, "link set port0 master vmbr0")
	h.ns.IP(t, "link set vmbr0 up")
	h.ns.IP(t, "address add 10.77.0.2/24 dev vmbr0")
	h.ns.IP(t, "route add default via 10.77.0.1")
	h.serve()
	h.watch("--routes", "move")
	h.served("10.77.0.2")
	h.waitRoutes("main", "10.77.0.0/24 dev vmbr0 proto kernel scope link src 10.77.0.2")
	h.ns.IP(t, "address add 10.77.0.3/24 dev vmbr0")
	h.served("10.77.0.3")
}

// TestRouterOfAnotherAddress: a better default by a router in the network of another address of the link belongs to that one, as long
// as the link has the address, also if main has no route to the network.
func TestRouterOfAnotherAddress(t *testing.T) {
	for family, f := range map[string]struct{ own, other, router, better, to string }{
		"-4": {"10.77.1.2/24", "10.77.2.2/24", "10.77.1.1", "10.77.2.1", "198.51.100.1"},
		"-6": {"2001:db8:1::2/64", "2001:db8:2::2/64", "2001:db8:1::1", "2001:db8:2::1", "2001:db8:ffff::1"},
	} {
		t.Run(family, func(t *testing.T) {
			h := newHost(t)
			h.link("wan0", f.own+" nodad")
			change := func(verb string) { h.ns.IP(t, "address "+verb+" "+f.other+" dev wan0 noprefixroute nodad") }
			change("add")
			h.ns.IP(t, family+" route add default via "+f.better+" dev wan0 metric 10 onlink")
			h.ns.IP(t, family+" route add default via "+f.router+" dev wan0 metric 20")
			h.serve()
			h.watch("-c", h.watchFile(`{"links":[{"ifname":"wan0","routes":"copy"}],"reconcile_seconds":3600}`))
			own, _, _ := strings.Cut(f.own, "/")
			want := func(when, router string) {
				t.Helper()
				eventually(t, when+", "+own+" leaves by "+router, func() error {
					out, err := h.ns.Output("ip", family, "route", "get", f.to, "from", own)
					if err != nil || !strings.Contains(out, " via "+router+" ") || !strings.Contains(out, " table 1") {
						return fmt.Errorf("%s %v", out, err)
					}
					return nil
				})
			}
			want("at first", f.router)
			change("del")
			want("without the other address", f.better)
			change("add")
			want("with it again", f.router)
		})
	}
}
