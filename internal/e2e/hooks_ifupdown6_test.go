package e2e

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

// auto6 is an advertisement of a router that lets hosts choose their addresses.
func auto6(n int) string {
	return "AdvDefaultLifetime 30; " + prefixOption(prefix6(n, 0), 600, 300)
}

// What ifupdown can say of IPv6, beside IPv4 on the same links: static addresses, those of
// router advertisements, and those of DHCPv6 with others beside them. Each has its table from
// ifup to ifdown.
func TestIfupdown6(t *testing.T) {
	h := newHookedHome(t, 3)
	h.prepareDhclient()
	h.write("/etc/network/interfaces", `
iface wan0 inet static
	address 192.168.1.20/24
	gateway 192.168.1.1
	dns-nameservers 192.168.1.1 2001:db8::53
iface wan0 inet static
	address 192.168.1.21/24
iface wan0 inet6 static
	address 2001:db8:1000::20/64
	gateway 2001:db8:1000::1
	metric 7
	dns-nameservers fe80::1 192.168.1.1 2001:db8:1000::1
iface wan0 inet6 static
	address 2001:db8:1001::21/64

iface wan1 inet dhcp
iface wan1 inet6 auto

iface wan2 inet6 dhcp
	accept_ra 1
`)
	h.dnsmasqAt(1)
	h.advertise(1, auto6(1))
	h.advertise(2, "AdvManagedFlag on; "+auto6(2))
	h.dhcpd6At(2, h.reserved(2, given6(2, 0), ""))
	for _, isp := range h.isps {
		// dhclient writes to stdout, too.
		h.sh("ifup " + isp.ifname + " >&2")
	}
	const static, second = "2001:db8:1000::20", "2001:db8:1001::21"
	byDefault := "default via 2001:db8:1000::1 dev wan0 proto 116 src 2001:db8:1000::20 metric 7 onlink"
	h.waitServed(0, static, "2001:db8:1000::/64 dev wan0", byDefault)
	h.waitServed(0, second, "2001:db8:1001::/64 dev wan0", "default via 2001:db8:1000::1 dev wan0")
	h.waitServed(0, given[0], "192.168.1.0/24 dev wan0", "default via 192.168.1.1 dev wan0")
	h.waitServed(0, "192.168.1.21", "192.168.1.0/24 dev wan0", "default via 192.168.1.1 dev wan0")
	h.waitServed(1, given[1], "192.168.1.0/24 dev wan1", "default via 192.168.1.1 dev wan1")
	auto := h.waitAddress("wan1", prefix6(1, 0), slaac)
	h.waitServed(1, auto, h.routesOf(1)...)
	beside := h.waitAddress("wan2", prefix6(2, 0), slaac)
	h.waitServed(2, given6(2, 0), h.routesOf(2)...)
	h.waitServed(2, beside, h.routesOf(2)...)
	h.waitMain("wan0")
	all := []string{static, second, given[0], "192.168.1.21", given[1], auto, beside, given6(2, 0)}
	h.waitExactly(all...)
	h.waitServers("server=192.168.1.1@"+given[0], "server=fe80::1%wan0@"+static, "server=2001:db8:1000::1@"+static,
		"server=192.168.1.1@"+given[1])

	// What another ifup, or an address that comes later, adds is served by the same watch.
	watches := func() string { return h.sh("cat /run/table-allocator/links/*/*/watch") }
	before := watches()
	h.sh("ifup --force wan1 >&2")
	if got := watches(); got != before {
		t.Errorf("watches: got %q, want %q", got, before)
	}
	h.ns.IP(t, "address add 2001:db8:2001::77/64 dev wan1 nodad")
	h.waitServed(1, "2001:db8:2001::77", "2001:db8:2001::/64 dev wan1", "default via "+router6+" dev wan1")

	stop := h.flows(map[string]int{given[1]: 1, auto: 1, given6(2, 0): 2, beside: 2})
	h.sh("ifdown wan0 >&2")
	for _, addr := range all[:4] {
		h.waitNothing(addr)
	}
	h.sh("ifup wan0 >&2")
	h.waitServed(0, static, "2001:db8:1000::/64 dev wan0", byDefault)
	stop()
	stop = h.flows(map[string]int{static: 0, given6(2, 0): 2})
	h.sh("ifdown wan1 >&2")
	for _, addr := range []string{given[1], auto, "2001:db8:2001::77"} {
		h.waitNothing(addr)
	}
	stop()
	h.sh("ifdown wan2 >&2")
	h.waitNothing(given6(2, 0))
	h.waitNothing(beside)
	h.waitExactly(all[:4]...)
	h.sh("ifdown wan0 >&2")
	h.waitClean()
	h.waitRules6()
	h.waitServers()
	if left := h.sh("ls -R /run/table-allocator | grep watch || true"); left != "" {
		t.Errorf("left: %s", left)
	}
}

// killWatch is kill -9 for the watch that ifup started for a link. While it lies dying it looks alive.
func (h *home) killWatch(ifname string) {
	h.t.Helper()
	h.sh(`pid=$(sed 's/.*"pid":\([0-9]*\).*/\1/' /run/table-allocator/links/*/"$1"/watch)
		kill -9 $pid; while [ -e /proc/$pid ]; do sleep 0.01; done`, ifname)
}

// A watch that was killed leaves what it had to the next ifup, or else to ifdown.
func TestIfupdown6Killed(t *testing.T) {
	h := newHookedHome(t, 1)
	h.write("/etc/network/interfaces", "iface wan0 inet6 auto\n")
	h.advertise(0, auto6(0))
	h.sh("ifup wan0 >&2")
	addr := h.waitAddress("wan0", prefix6(0, 0), slaac)
	h.waitServed(0, addr, h.routesOf(0)...)
	table := h.tableOf(addr)
	stop := h.flows(map[string]int{addr: 0})
	h.killWatch("wan0")
	h.waitNoClient()
	h.sh("ifup --force wan0 >&2")
	h.waitHealthy()
	stop()
	if got := h.tableOf(addr); got != table {
		t.Errorf("table: got %q, want %s", got, table)
	}
	h.killWatch("wan0")
	h.sh("ifdown wan0 >&2")
	h.waitNoClient()
	h.waitRules6() // its lease ends by itself
	h.waitRoutes6(table)
}

// Without the server of tables, without us, and with options that a watch does not have the
// links come up all the same; and where one can be served later, it is.
func TestIfupdown6WithoutUs(t *testing.T) {
	const config = "iface wan0 inet6 static\n address 2001:db8:1000::20/64\n gateway fe80::1\niface wan1 inet6 auto\n"
	up := func(t *testing.T, h *home) (auto, said string) {
		t.Helper()
		h.write("/etc/network/interfaces", config)
		h.advertise(1, auto6(1))
		r := h.try("ifup wan0 >&2 && ifup wan1 >&2")
		if r.code != 0 {
			t.Fatalf("exit code %d: %s", r.code, r.stderr)
		}
		auto = h.waitAddress("wan1", prefix6(1, 0), slaac)
		eventually(t, "packets pass", func() error { return h.pass(0, "2001:db8:1000::20", answers) })
		return auto, r.stderr
	}
	t.Run("no server", func(t *testing.T) {
		h := newHookedHome(t, 2)
		h.server.kill()
		auto, _ := up(t, h)
		if rules := h.rules6(); len(rules) > 0 {
			t.Errorf("rules without a lease: %q", rules)
		}
		h.serve()
		h.waitServed(0, "2001:db8:1000::20", "2001:db8:1000::/64 dev wan0", "default via fe80::1 dev wan0")
		h.waitServed(1, auto, h.routesOf(1)...)
	})
	t.Run("links left alone", func(t *testing.T) {
		h := newHookedHome(t, 2, "LEAVE_ALONE='wan*'")
		up(t, h)
		h.waitExactly()
		h.waitNoClient()
	})
	t.Run("options", func(t *testing.T) {
		h := newHookedHome(t, 2, "CLIENT_OPTIONS='--no-network-rule'")
		_, said := up(t, h)
		eventually(t, "ifup says why", func() error { // on a busy machine a line may be dropped
			if strings.Contains(said, "no-network-rule") {
				return nil
			}
			said = h.try("ifup --force wan1 >&2").stderr
			return errors.New(said)
		})
		h.waitExactly("2001:db8:1000::20")
	})
	t.Run("no package", func(t *testing.T) {
		h := newHookedHome(t, 2, "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
		if _, said := up(t, h); slices.Contains(strings.Fields(said), "error") {
			t.Errorf("ifup says %s", said)
		}
		h.waitExactly()
	})
}
