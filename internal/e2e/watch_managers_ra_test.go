package e2e

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"testing"
)

// Two providers with routers of the same link-local address: each SLAAC address gets a
// table with the network and the router of its own link, and main keeps what it has.
func TestWatchManagersSLAAC(t *testing.T) {
	h := newHome(t, 2)
	h.watched()
	addrs := make(map[string]int)
	var list []string
	for n, isp := range h.isps {
		h.advertise(n, "AdvDefaultLifetime 30; "+prefixOption(prefix6(n, 0), 600, 300))
		addr := h.waitAddress(isp.ifname, prefix6(n, 0), slaac)
		addrs[addr] = n
		list = append(list, addr)
	}
	for addr, n := range addrs {
		dev := " dev " + h.isps[n].ifname
		h.waitServed(n, addr,
			prefix6(n, 0)+dev+" proto 116 src "+addr,
			"default via "+router6+dev+" proto 116 src "+addr)
		h.mainHolds(prefix6(n, 0)+dev+" proto kernel", "default via "+router6+dev+" proto ra")
	}
	h.waitExactly(list...)
	h.waitHealthy()
}

// The lifetime of a router: extended by each advertisement, over with a last one, with a
// lifetime of 0, or by itself.
func TestWatchManagersRouterLifetime(t *testing.T) {
	h := newHome(t, 2)
	h.watched()
	options := func(lifetime int) string {
		return fmt.Sprintf("AdvDefaultLifetime %d; ", lifetime) + prefixOption(prefix6(0, 0), 600, 300)
	}
	d := h.advertise(0, options(6))
	addr := h.waitAddress("wan0", prefix6(0, 0), slaac)
	network, router := prefix6(0, 0)+" dev wan0", "default via "+router6+" dev wan0"
	h.waitServed(0, addr, network, router)

	stop := h.flows(map[string]int{addr: 0})
	for range 2 { // more than one whole lifetime
		h.waitExpiry(addr, func(left int) bool { return left <= 4 })
		h.waitExpiry(addr, func(left int) bool { return left >= 5 })
	}
	stop()

	d.change(options(0))
	h.waitServedWithout(addr, network)
	d.change(options(6))
	h.waitServed(0, addr, network, router)
	d.end()
	h.waitServedWithout(addr, network)
	d = h.advertise(0, options(6))
	h.waitServed(0, addr, network, router)
	d.kill()
	h.waitServedWithout(addr, network)
	h.waitExactly(addr)
}

// waitExpiry waits until what is left of the default route of the table of addr is as
// wanted, in seconds.
func (h *home) waitExpiry(addr string, want func(int) bool) {
	h.t.Helper()
	eventually(h.t, "the lifetime of the default route of "+addr+" is another", func() error {
		out := h.ns.IP(h.t, "-6 route show default table "+h.tableOf(addr))
		_, rest, ok := strings.Cut(out, " expires ")
		if !ok {
			h.t.Fatalf("the default route of %s has no lifetime: %q", addr, out)
		}
		left, err := strconv.Atoi(strings.TrimSuffix(strings.Fields(rest)[0], "sec"))
		if err != nil || !want(left) {
			return errors.New(out)
		}
		return nil
	})
}

// waitServedWithout waits until the table of addr holds these routes and no default.
func (h *home) waitServedWithout(addr string, want ...string) {
	h.t.Helper()
	eventually(h.t, "the table of "+addr+" has lost its default", func() error {
		return matchRoutes(h.routes6(h.tableOf(addr)), want)
	})
}

// A provider renumbers overnight: the old network deprecated, the new one beside it, and
// then alone.
func TestWatchManagersRenumbering(t *testing.T) {
	h := newHome(t, 2)
	h.watched()
	router := "default via " + router6 + " dev wan0"
	// The kernel lets nobody shorten a lifetime of more than two hours, so it is short from
	// the beginning.
	d := h.advertise(0, "AdvDefaultLifetime 30; "+prefixOption(prefix6(0, 0), 12, 10))
	addr := h.waitAddress("wan0", prefix6(0, 0), slaac)
	h.waitServed(0, addr, prefix6(0, 0)+" dev wan0", router)
	table := h.tableOf(addr)

	d.change("AdvDefaultLifetime 30; " + prefixOption(prefix6(0, 0), 12, 0) + prefixOption(prefix6(0, 1), 600, 300))
	renumbered := h.waitAddress("wan0", prefix6(0, 1), slaac)
	h.waitAddress("wan0", prefix6(0, 0), func(a address) bool { return a.Deprecated })
	h.waitServed(0, renumbered, prefix6(0, 1)+" dev wan0", router)
	h.waitServed(0, addr, prefix6(0, 0)+" dev wan0", router)
	if got := h.tableOf(addr); got != table {
		t.Errorf("table of the deprecated address: got %s, want %s", got, table)
	}
	h.waitExactly(addr, renumbered)

	d.change("AdvDefaultLifetime 30; " + prefixOption(prefix6(0, 1), 600, 300))
	stop := h.flows(map[string]int{renumbered: 0})
	h.waitNothing(addr)
	stop()
	h.waitServed(0, renumbered, prefix6(0, 1)+" dev wan0", router)
	h.waitExactly(renumbered)
}

// A network that is not on the link, as in hotspots, and one that is: neighbours of the first are reached by the router. If
// the router says otherwise later, the table has that, too.
func TestWatchManagersOffLink(t *testing.T) {
	h := newHome(t, 2)
	h.watched()
	options := func(more ...string) string {
		return "AdvDefaultLifetime 30; " + prefixOption(prefix6(0, 0), 600, 300, more...) + prefixOption(prefix6(0, 1), 600, 300)
	}
	d := h.advertise(0, options("AdvOnLink off;"))
	off, on := h.waitAddress("wan0", prefix6(0, 0), slaac), h.waitAddress("wan0", prefix6(0, 1), slaac)
	routes := []string{prefix6(0, 1) + " dev wan0", "default via " + router6 + " dev wan0"}
	h.waitServed(0, off, routes...)
	h.waitServed(0, on, routes...)
	stop := h.flows(map[string]int{off: 0, on: 0})
	d.change(options())
	stop()
	routes = append(routes, prefix6(0, 0)+" dev wan0")
	h.waitServed(0, off, routes...)
	h.waitServed(0, on, routes...)
	h.waitExactly(off, on)
	h.waitHealthy()
}

// Two routers on a link, one of which is preferred, and the other the way to a network.
func TestWatchManagersTwoRouters(t *testing.T) {
	h := newHome(t, 1)
	isp := h.isps[0].ns
	isp.IP(t, "link add lan2 link lan type macvlan mode bridge")
	isp.IP(t, "link set lan2 up")
	isp.IP(t, "address add fe80::2/64 dev lan2 nodad")
	isp.Run(t, "nft", `table inet routers {
		counter lan {}
		counter lan2 {}
		chain raw {
			type filter hook prerouting priority raw - 1
			iifname lan ip6 daddr 2001:db8::/32 ip6 hoplimit 64 udp dport 7 counter name lan
			iifname lan2 ip6 daddr 2001:db8::/32 ip6 hoplimit 64 udp dport 7 counter name lan2
		}
	}`)
	h.watched()
	special := "2001:db8:aaaa::/48"
	first := func(preference string) string {
		return "AdvDefaultLifetime 9; AdvDefaultPreference " + preference + "; " + prefixOption(prefix6(0, 0), 600, 300)
	}
	second := "AdvDefaultLifetime 9; AdvDefaultPreference medium; "
	d := h.advertise(0, first("high"))
	d2 := h.advertiseOn(0, "lan2", second+"route "+special+" { AdvRoutePreference high; AdvRouteLifetime 60; };")
	addr := h.waitAddress("wan0", prefix6(0, 0), slaac)
	network := prefix6(0, 0) + " dev wan0"
	via := func(dst, router string) string {
		return dst + " via " + router + " dev wan0 proto 116 src " + addr + " metric 102"
	}
	h.waitServed(0, addr, network, via("default", "fe80::1")+"4", via("default", "fe80::2")+"5", via(special, "fe80::2")+"4")

	h.wantRouter(addr, internet6, "lan")
	h.wantRouter(addr, special6, "lan2")
	// The preference changes.
	d.change(first("low"))
	h.waitServed(0, addr, network, via("default", "fe80::2")+"4", via("default", "fe80::1")+"5", via(special, "fe80::2")+"4")
	h.wantRouter(addr, internet6, "lan2")
	// The way ends, and then its router.
	d2.change(second)
	d2.change(second + "route " + special + " { AdvRouteLifetime 0; };")
	h.waitServed(0, addr, network, via("default", "fe80::2")+"4", via("default", "fe80::1")+"5")
	d2.end()
	h.waitServed(0, addr, network, via("default", "fe80::1")+"4")
	h.wantRouter(addr, special6, "lan")
	h.waitExactly(addr)
}

// wantRouter fails the test unless packets from addr to target go through a router.
func (h *home) wantRouter(addr, target, router string) {
	h.t.Helper()
	count := func() (count [2]string) {
		for i, name := range []string{"lan", "lan2"} {
			f := strings.Fields(h.isps[0].ns.Run(h.t, "nft", "list", "counter", "inet", "routers", name))
			for j := range f {
				if f[j] == "packets" {
					count[i] = f[j+1]
				}
			}
		}
		return count
	}
	before := count()
	eventually(h.t, "packets to "+target+" pass", func() error { return h.arrives(packet{source: addr, to: target}, addr) })
	after := count()
	used := []bool{after[0] != before[0], after[1] != before[1]}
	if used[0] != (router == "lan") || used[1] != (router == "lan2") {
		h.t.Errorf("packets to %s: the routers had %q packets, then %q; want %s to get them", target, before, after, router)
	}
}

// Temporary addresses come and go in a few seconds, and each takes along what it had.
func TestWatchManagersTemporary(t *testing.T) {
	h := newHome(t, 1)
	for name, value := range map[string]string{
		"use_tempaddr": "2", "temp_valid_lft": "9", "temp_prefered_lft": "6", "max_desync_factor": "0", "regen_max_retry": "1", "dad_transmits": "0",
	} {
		sysctl(t, h.ns, "net/ipv6/conf/wan0/"+name, value)
	}
	h.watched()
	h.advertise(0, "AdvDefaultLifetime 30; "+prefixOption(prefix6(0, 0), 600, 300))
	addr := h.waitAddress("wan0", prefix6(0, 0), slaac)
	routes := []string{prefix6(0, 0) + " dev wan0", "default via " + router6 + " dev wan0"}
	h.waitServed(0, addr, routes...)
	stop := h.flows(map[string]int{addr: 0})
	seen := make(map[string]bool)
	for len(seen) < 3 {
		temp := h.waitAddress("wan0", prefix6(0, 0), func(a address) bool { return a.Temporary && !seen[a.Local] })
		seen[temp] = true
		h.waitServed(0, temp, routes...)
	}
	stop()
	// Enough of them: what is left of all is the other one.
	sysctl(t, h.ns, "net/ipv6/conf/wan0/use_tempaddr", "0")
	for temp := range seen {
		h.waitNothing(temp)
	}
	h.waitExactly(addr)
	h.waitHealthy()
}
