package e2e

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// rebind is for reserved: after two seconds more any other server may take the address over.
const rebind = "option dhcp-rebinding-time 4; "

// routed6 is an advertisement of a router that leaves addresses to DHCPv6.
func routed6(n int) string {
	return "AdvDefaultLifetime 30; AdvManagedFlag on; " + prefixOption(prefix6(n, 0), 600, 300, "AdvAutonomous off;")
}

// DHCP and DHCPv6 on the links to two providers, by the same hook: both families come up,
// are renewed and go, each for itself.
func TestDhclient6(t *testing.T) {
	h := newHookedHome(t, 2, "ROUTES=move")
	h.prepareDhclient()
	addrs := make(map[string]int)
	for n, isp := range h.isps {
		h.dnsmasqAt(n)
		h.advertise(n, routed6(n))
		h.dhcpd6At(n, h.reserved(n, given6(n, 0), "option dhcp6.name-servers "+router6At(n, 0)+", fe80::1;"))
		h.dhclient(isp.ifname)
		h.dhclient6(isp.ifname)
		addrs[given[n]], addrs[given6(n, 0)] = n, n
	}
	var tables []string
	for n, isp := range h.isps {
		dev := " dev " + isp.ifname
		h.waitServed(n, given[n], isp.network+dev, "default via "+isp.gateway+dev)
		h.waitServed(n, given6(n, 0), h.routesOf(n)...)
		h.mainHolds(prefix6(n, 0)+dev, "default via "+router6+dev+" proto ra")
		tables = append(tables, h.tableOf(given6(n, 0)))
	}
	h.waitExactly(given[0], given[1], given6(0, 0), given6(1, 0))
	servers := func(n int) []string {
		return []string{"server=192.168.1.1@" + given[n],
			"server=" + router6At(n, 0) + "@" + given6(n, 0), "server=fe80::1%" + h.isps[n].ifname + "@" + given6(n, 0)}
	}
	h.waitServers(slices.Concat(servers(0), servers(1))...)

	stop := h.flows(addrs)
	for _, isp := range h.isps {
		for _, reason := range []string{"RENEW", "RENEW6"} {
			h.waitReason(isp.ifname, reason, len(h.reasons(isp.ifname)))
		}
	}
	// Who is killed and comes again flushes nothing that was leased, and is bound anew.
	before := len(h.reasons("wan0"))
	h.sh("kill -9 $(cat /run/dhclient6.wan0.pid)")
	h.dhclient6("wan0")
	h.waitReason("wan0", "PREINIT6", before)
	h.waitReason("wan0", "BOUND6", before)
	stop()
	for n := range h.isps {
		if got := h.tableOf(given6(n, 0)); got != tables[n] {
			t.Errorf("table of %s after renewals: got %s, want %s", given6(n, 0), got, tables[n])
		}
	}

	stop = h.flows(map[string]int{given[0]: 0, given[1]: 1, given6(1, 0): 1})
	h.dhclient6("wan0", "-r")
	h.waitReason("wan0", "RELEASE6", 0)
	h.waitNothing(given6(0, 0))
	h.waitExactly(given[0], given[1], given6(1, 0))
	h.waitServers(append(servers(1), "server=192.168.1.1@"+given[0])...)
	stop()
	stop = h.flows(map[string]int{given[0]: 0, given6(1, 0): 1})
	h.dhclient("wan1", "-r")
	h.waitNothing(given[1])
	stop()
	h.dhclient6("wan1", "-x")
	h.waitReason("wan1", "STOP6", 0)
	h.waitNothing(given6(1, 0))
	h.waitExactly(given[0])
	h.waitServers("server=192.168.1.1@" + given[0])
	h.dhclient("wan0", "-r")
	h.waitClean()
	h.waitRules6()
}

// Routes are somebody else's: the tables are leased and stay empty, and main is as without us.
func TestHooksWithoutRoutes(t *testing.T) {
	h := newHookedHome(t, 2, "ROUTES=none")
	h.prepareDhclient()
	h.advertise(0, routed6(0))
	h.dhcpd6At(0, h.reserved(0, given6(0, 0), ""))
	h.dnsmasqAt(0, "--dhcp-option=121,10.99.0.0/16,192.168.1.77,0.0.0.0/0,192.168.1.1")
	h.dhclient("wan0")
	h.dhclient6("wan0")
	h.write("/etc/network/interfaces", `
iface wan1 inet static
	address 192.168.1.150/24
	gateway 192.168.1.1
	metric 7
	dns-nameservers 192.168.1.1
`)
	h.sh("ifup wan1 >&2")
	h.waitServers("server=192.168.1.1@"+given[0], "server=192.168.1.1@192.168.1.150")
	h.waitExactly(given[0], given6(0, 0), "192.168.1.150")
	h.waitMain("wan1", "default via 192.168.1.1 dev wan1 metric 7", "192.168.1.0/24")
	h.mainHolds("default via "+router6+" dev wan0 proto ra", "192.168.1.0/24 dev wan0 proto kernel")
	// Theirs, as with the original.
	for n, addr := range []string{given[0], "192.168.1.150"} {
		h.ns.IP(t, "route add default via 192.168.1.1 dev "+h.isps[n].ifname+" table "+h.tableOf(addr))
		h.waitServed(n, addr, "default via 192.168.1.1 dev "+h.isps[n].ifname)
	}
	h.waitServed(0, given6(0, 0))
}

// The server of DHCPv6 gives another address, in place of the one before and beside it: what
// is there is served, side by side, and what is gone is not.
func TestDhclient6Changes(t *testing.T) {
	h := newHookedHome(t, 1)
	h.prepareDhclient()
	h.advertise(0, routed6(0))
	first, second, third := given6(0, 0), given6(0, 0)+"1", given6(0, 0)+"2"
	dns := func(server string) string { return "option dhcp6.name-servers " + server + ";" }
	server := h.dhcpd6At(0, h.reserved(0, first, rebind+dns("2001:db8:1000::1")))
	h.dhclient6("wan0")
	h.waitServed(0, first, h.routesOf(0)...)
	h.waitServers("server=2001:db8:1000::1@" + first)
	if rules := h.rules6(); len(rules) != 3 { // from it, and for what is bound to nothing
		t.Errorf("an address without a network has %q", rules)
	}

	// Another server: it takes the first one back.
	server.kill()
	if err := os.Remove(h.dhcpd6Files(0) + ".leases"); err != nil {
		t.Fatal(err)
	}
	server = h.dhcpd6At(0, h.reserved(0, second, ""))
	h.waitReason("wan0", "REBIND6  "+second, 0)
	h.waitServed(0, second, h.routesOf(0)...)
	h.waitReason("wan0", "EXPIRE6 "+first, 0)
	h.waitNothing(first)
	h.waitExactly(second)
	h.waitServers()
	table := h.tableOf(second)

	// The same one, which leaves the second one to its lifetime.
	server.kill()
	h.dhcpd6At(0, h.reserved(0, third, dns("fe80::1")))
	h.waitReason("wan0", "BOUND6  "+third, 0)
	h.waitServed(0, third, h.routesOf(0)...)
	h.waitServed(0, second, h.routesOf(0)...)
	if got := h.tableOf(second); got != table {
		t.Errorf("table of the second address: got %s, want %s", got, table)
	}
	h.waitExactly(second, third)
	h.waitServers("server=fe80::1%wan0@"+second, "server=fe80::1%wan0@"+third)
}

// Nobody renews: the address is deprecated, and serves until it expires.
func TestDhclient6Expire(t *testing.T) {
	h := newHookedHome(t, 1)
	h.prepareDhclient()
	h.advertise(0, routed6(0))
	server := h.dhcpd6At(0, `default-lease-time 12; preferred-lifetime 4; option dhcp-renewal-time 1; option dhcp-rebinding-time 2;
		subnet6 `+prefix6(0, 0)+` { range6 `+given6(0, 0)+` `+given6(0, 0)+`; }`)
	h.dhclient6("wan0")
	h.waitServed(0, given6(0, 0), h.routesOf(0)...)
	table := h.tableOf(given6(0, 0))
	h.waitReason("wan0", "RENEW6", 0)
	stop := h.flows(map[string]int{given6(0, 0): 0})
	server.kill()
	h.waitReason("wan0", "DEPREF6", 0)
	h.waitAddress("wan0", prefix6(0, 0), func(a address) bool { return a.Deprecated })
	if got := h.tableOf(given6(0, 0)); got != table {
		t.Errorf("table of the deprecated address: got %q, want %s", got, table)
	}
	h.waitServed(0, given6(0, 0), h.routesOf(0)...)
	stop()
	h.waitReason("wan0", "EXPIRE6", 0)
	h.waitNothing(given6(0, 0))
	h.waitClean()
	h.waitRules6()
}

// Holders that were killed leave what they had to the next call; and without the server of
// tables an address works as without us, until there is one.
func TestDhclient6Killed(t *testing.T) {
	h := newHookedHome(t, 1)
	h.prepareDhclient()
	h.advertise(0, routed6(0))
	h.dhcpd6At(0, h.reserved(0, given6(0, 0), ""))
	kill := func() {
		t.Helper()
		for _, pid := range h.pids(clientBin) {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
	}
	h.server.kill()
	h.dhclient6("wan0")
	h.waitReason("wan0", "BOUND6", 0)
	eventually(t, "packets pass without the server", func() error { return h.pass(0, given6(0, 0), answers) })
	if rules := h.rules6(); len(rules) > 0 {
		t.Errorf("rules without a lease: %q", rules)
	}
	h.serve()
	h.waitServed(0, given6(0, 0), h.routesOf(0)...)
	table := h.tableOf(given6(0, 0))

	kill()
	eventually(t, "a renewal brings a new holder", func() error {
		if pids := h.pids(clientBin); len(pids) != 1 {
			return fmt.Errorf("there are %d", len(pids))
		}
		return nil
	})
	h.waitServed(0, given6(0, 0), h.routesOf(0)...)
	if got := h.tableOf(given6(0, 0)); got != table {
		t.Errorf("table: got %s, want %s", got, table)
	}
	h.quietDhclient("/run/dhclient6.wan0.pid")
	kill()
	h.sh(`env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin reason=RELEASE6 interface=wan0 old_ip6_address=$1 /sbin/dhclient-script`, given6(0, 0))
	h.waitNothing(given6(0, 0))
	h.waitClean()
	h.waitRules6()
	if addrs := h.addresses("wan0"); len(addrs) > 0 {
		t.Errorf("addresses: %+v", addrs)
	}
}

// Stateless DHCPv6 gives name servers and no address: they are asked from the addresses that
// routers gave.
func TestDhclient6Stateless(t *testing.T) {
	h := newHookedHome(t, 1)
	h.prepareDhclient()
	h.advertise(0, "AdvDefaultLifetime 30; AdvOtherConfigFlag on; "+prefixOption(prefix6(0, 0), 600, 300))
	h.dhcpd6At(0, "option dhcp6.name-servers 2001:db8:1000::1; subnet6 "+prefix6(0, 0)+" { }")
	addr := h.waitAddress("wan0", prefix6(0, 0), slaac)
	h.dhclient6("wan0", "-S")
	h.waitServed(0, addr, h.routesOf(0)...)
	h.waitServers("server=2001:db8:1000::1@" + addr)
	h.ns.IP(t, "address flush dev wan0 scope global")
	h.waitNothing(addr)
	h.waitServers()
}

// The link is unplugged: its dhclient ends, and nothing stays of what its addresses held.
func TestUdevRemove6(t *testing.T) {
	h := newHookedHome(t, 1)
	h.prepareDhclient()
	h.advertise(0, routed6(0))
	h.dhcpd6At(0, h.reserved(0, given6(0, 0), ""))
	h.dhclient6("wan0")
	h.waitServed(0, given6(0, 0), h.routesOf(0)...)
	for _, pid := range h.pids(clientBin) {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	pid := strings.TrimSpace(h.read("/run/dhclient6.wan0.pid"))
	h.ns.IP(t, "link del wan0")
	h.sh("INTERFACE=wan0 /usr/local/lib/table-allocator/udev-remove")
	eventually(t, "dhclient has ended", func() error {
		if h.try("kill -0 "+pid).code == 0 {
			return errors.New("it runs")
		}
		return nil
	})
	h.waitNothing(given6(0, 0))
	h.waitRules6()
}
