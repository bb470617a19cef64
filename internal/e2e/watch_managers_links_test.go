package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// Another host has one of the addresses: that one gets nothing, all others are served. When
// the other host has left, it is served, too.
func TestWatchManagersDuplicate(t *testing.T) {
	h := newHome(t, 1)
	h.watched()
	h.isps[0].ns.IP(t, "address add 2001:db8:1000::20/64 dev lan nodad")
	h.advertise(0, "AdvDefaultLifetime 30; "+prefixOption(prefix6(0, 0), 600, 300))
	for _, addr := range []string{"2001:db8:1000::20", "2001:db8:1000::21"} {
		h.ns.IP(t, "address add "+addr+"/64 dev wan0")
	}
	routes := []string{prefix6(0, 0) + " dev wan0", "default via " + router6 + " dev wan0"}
	auto := h.waitAddress("wan0", prefix6(0, 0), func(a address) bool { return !strings.HasPrefix(a.Local, "2001:db8:1000::2") })
	h.waitServed(0, auto, routes...)
	h.waitServed(0, "2001:db8:1000::21", routes...)
	eventually(t, "the duplicate is found", func() error {
		addrs := h.addresses("wan0")
		if !slices.ContainsFunc(addrs, func(a address) bool { return a.Local == "2001:db8:1000::20" && a.Dadfailed }) {
			return fmt.Errorf("%+v", addrs)
		}
		return nil
	})
	h.waitNothing("2001:db8:1000::20")
	h.waitExactly(auto, "2001:db8:1000::21")
	if r := h.run(bin(t, clientBin), "status", "--no-legend"); r.code != 1 || strings.Count(r.stdout, "  ok  ") != 2 ||
		!strings.Contains(r.stdout, "duplicate address: another host has it") {
		t.Errorf("status: %+v", r)
	}

	h.isps[0].ns.IP(t, "address del 2001:db8:1000::20/64 dev lan")
	h.ns.IP(t, "address del 2001:db8:1000::20/64 dev wan0")
	h.ns.IP(t, "address add 2001:db8:1000::20/64 dev wan0")
	h.waitServed(0, "2001:db8:1000::20", routes...)
	h.waitExactly(auto, "2001:db8:1000::20", "2001:db8:1000::21")
}

// A link goes down and comes up, quickly and slowly, and loses its carrier: what depends on
// it comes back in both families, and the other link does not notice.
func TestWatchManagersFlap(t *testing.T) {
	h := newHome(t, 2)
	h.watched()
	for n, isp := range h.isps {
		h.advertise(n, "AdvDefaultLifetime 30; "+prefixOption(prefix6(n, 0), 600, 300))
		h.ns.IP(t, "address add "+given[n]+"/24 dev "+isp.ifname)
		h.ns.IP(t, "route add default via "+isp.gateway+" dev "+isp.ifname+" metric "+[]string{"100", "101"}[n])
	}
	var autos []string
	served := func(n int) {
		t.Helper()
		dev := " dev " + h.isps[n].ifname
		h.waitServed(n, given[n], h.isps[n].network+dev, "default via "+h.isps[n].gateway+dev)
		h.waitServed(n, autos[n], prefix6(n, 0)+dev, "default via "+router6+dev)
	}
	for n, isp := range h.isps {
		autos = append(autos, h.waitAddress(isp.ifname, prefix6(n, 0), slaac))
		served(n)
	}
	all := []string{given[0], given[1], autos[0], autos[1]}
	h.waitExactly(all...)

	stop := h.flows(map[string]int{given[1]: 1, autos[1]: 1})
	for range 3 {
		h.ns.IP(t, "link set wan0 down")
		h.ns.IP(t, "link set wan0 up")
		served(0)
		h.waitExactly(all...)
	}
	h.ns.IP(t, "link set wan0 down")
	h.waitNothing(autos[0])
	h.ns.IP(t, "link set wan0 up")
	served(0)
	// Without a carrier nothing goes but the packets.
	h.isps[0].ns.IP(t, "link set lan down")
	h.isps[0].ns.IP(t, "link set lan up")
	h.isps[0].ns.IP(t, "address replace "+router6+"/64 dev lan nodad") // IPv6 addresses went with it
	for i := range 2 {
		h.isps[0].ns.IP(t, "address replace "+router6At(0, i)+"/64 dev lan nodad")
	}
	served(0)
	stop()
	served(1)
	h.waitExactly(all...)
	h.waitHealthy()
}

// All that a table holds ends by itself, while the address stays: nothing is left in it, and
// it stays so.
func TestWatchManagersRoutesEnd(t *testing.T) {
	h := newHome(t, 1)
	h.watched()
	d := h.advertise(0, "AdvDefaultLifetime 4;")
	h.ns.IP(t, "address add 2001:db8:1000::20/128 dev wan0")
	h.waitServed(0, "2001:db8:1000::20", "default via "+router6+" dev wan0")
	d.kill()
	h.waitServedWithout("2001:db8:1000::20")
	for range 200 {
		if routes := h.routes6(h.tableOf("2001:db8:1000::20")); len(routes) > 0 {
			t.Fatalf("a route is back without a router: %q", routes)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
