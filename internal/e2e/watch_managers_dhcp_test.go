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

// given6 is the address that the servers of DHCPv6 give out in a network.
func given6(n, i int) string { return strings.TrimSuffix(prefix6(n, i), "/64") + "100" }

// dhclient has nothing of ours in its script, and its IPv6 addresses no route of their own.
func TestWatchManagersDhclient(t *testing.T) {
	h := newHome(t, 2)
	h.prepareDhclient()
	h.watched()
	addrs := make(map[string]int)
	for n, isp := range h.isps {
		h.dnsmasq6At(n)
		h.dhclient(isp.ifname, "-e", fmt.Sprintf("IF_METRIC=%d", 100+n))
		h.dhclient6(isp.ifname)
		addrs[given[n]], addrs[given6(n, 0)] = n, n
	}
	for n, isp := range h.isps {
		dev := " dev " + isp.ifname
		h.waitServed(n, given[n], isp.network+dev, "default via "+isp.gateway+dev)
		h.waitServed(n, given6(n, 0), prefix6(n, 0)+dev, "default via "+router6+dev)
		h.mainHolds("default via "+isp.gateway+dev, prefix6(n, 0)+dev, "default via "+router6+dev+" proto ra")
	}
	stop := h.flows(addrs)
	for _, isp := range h.isps { // renewals change nothing
		h.waitReason(isp.ifname, "RENEW", 0)
	}
	stop()
	h.waitExactly(given[0], given[1], given6(0, 0), given6(1, 0))
	h.waitHealthy()

	h.dhclient6("wan0", "-r")
	h.waitNothing(given6(0, 0))
	h.dhclient("wan0", "-x")
	h.waitNothing(given[0])
	h.waitExactly(given[1], given6(1, 0))
	h.waitServed(1, given[1], "192.168.1.0/24 dev wan1", "default via 192.168.1.1 dev wan1")
}

// A server that gives another address at a renewal, and at the next one another router with
// it: of a router alone Debian's dhclient-script makes nothing.
func TestWatchManagersDhclientChanges(t *testing.T) {
	h := newHome(t, 3)
	h.prepareDhclient()
	h.watched()
	h.isps[2].ns.IP(t, "address add 10.64.2.2/24 dev lan")
	lease := dhcpLease{addr: "10.64.2.30", mask: "255.255.255.0", router: "10.64.2.1", seconds: 600, renew: 1}
	server := h.dhcp(2, lease)
	h.dhclient("wan2")
	h.waitServed(2, "10.64.2.30", "10.64.2.0/24 dev wan2", "default via 10.64.2.1 dev wan2")
	lease.addr = "10.64.2.31"
	server.set(func(d *dhcpServer) { d.lease = lease })
	h.waitNothing("10.64.2.30")
	h.waitServed(2, "10.64.2.31", "10.64.2.0/24 dev wan2", "default via 10.64.2.1 dev wan2")
	lease.addr, lease.router = "10.64.2.32", "10.64.2.2"
	server.set(func(d *dhcpServer) { d.lease = lease })
	h.waitNothing("10.64.2.31")
	h.waitServed(2, "10.64.2.32", "10.64.2.0/24 dev wan2", "default via 10.64.2.2 dev wan2")
	h.waitExactly("10.64.2.32")
}

// dhcpd of ISC gives short leases and dies: the address ends, and what it had.
func TestWatchManagersDhcpd6(t *testing.T) {
	h := newHome(t, 1)
	h.prepareDhclient()
	h.watched()
	h.advertise(0, "AdvDefaultLifetime 30; AdvManagedFlag on; "+prefixOption(prefix6(0, 0), 600, 300, "AdvAutonomous off;"))
	server := h.dhcpd6At(0, `default-lease-time 6; preferred-lifetime 4; option dhcp-renewal-time 1; option dhcp-rebinding-time 3;
		subnet6 `+prefix6(0, 0)+` { range6 `+given6(0, 0)+` `+given6(0, 0)+`; }`)
	h.dhclient6("wan0")
	routes := []string{prefix6(0, 0) + " dev wan0", "default via " + router6 + " dev wan0"}
	h.waitServed(0, given6(0, 0), routes...)
	stop := h.flows(map[string]int{given6(0, 0): 0})
	after := len(h.reasons("wan0"))
	h.waitReason("wan0", "RENEW6", after)
	h.waitReason("wan0", "RENEW6", len(h.reasons("wan0")))
	stop()
	server.kill()
	h.waitNothing(given6(0, 0))
	h.waitExactly()
}

// Another server of DHCPv6 takes the address back at a renewal and gives another one.
func TestWatchManagersDhcpd6Changes(t *testing.T) {
	h := newHome(t, 1)
	h.prepareDhclient()
	h.watched()
	h.advertise(0, routed6(0))
	first, second := given6(0, 0), given6(0, 0)+"1"
	server := h.dhcpd6At(0, h.reserved(0, first, rebind))
	h.dhclient6("wan0")
	h.waitServed(0, first, h.routesOf(0)...)
	server.kill()
	if err := os.Remove(h.dhcpd6Files(0) + ".leases"); err != nil {
		t.Fatal(err)
	}
	h.dhcpd6At(0, h.reserved(0, second, ""))
	h.waitReason("wan0", "REBIND6  "+second, 0)
	h.waitNothing(first)
	h.waitServed(0, second, h.routesOf(0)...)
	h.waitExactly(second)
	h.waitHealthy()
}

// dhcpcd does all by itself: DHCP, router advertisements and DHCPv6.
func TestWatchManagersDhcpcd(t *testing.T) {
	h := newHome(t, 3)
	h.watched()
	h.sh("mkdir -p /run/dhcpcd /var/lib/dhcpcd")
	h.write("/etc/dhcpcd.conf", `nodev
noarp
slaac hwaddr
option routers, subnet_mask
nohook resolv.conf, timesyncd.conf, hostname
ia_na
`)
	// What dhcpcd starts keeps what it writes to, so it writes to a file.
	dhcpcd := h.daemon("sh", "-c", "exec dhcpcd --nobackground wan0 wan1 wan2 >/run/dhcpcd.log 2>&1")
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("dhcpcd wrote:\n%s", h.read("/run/dhcpcd.log"))
		}
	})
	for _, ifname := range []string{"wan0", "wan1"} {
		h.waitQuiet(ifname) // dhcpcd listens to routers instead of the kernel
	}
	lease := dhcpLease{addr: "10.64.2.30", mask: "255.255.255.0", router: "10.64.2.1", seconds: 10, renew: 1}
	server := h.dhcp(2, lease)
	var all []string
	for n, isp := range h.isps[:2] {
		h.dnsmasq6At(n, "--dhcp-range="+strings.TrimSuffix(prefix6(n, 1), "/64")+",slaac,64,1h",
			// It renews from no address of its own, and so asks the wrong one of two servers that
			// have the same address.
			"--dhcp-option=option:T1,1800", "--dhcp-option=option:T2,3000")
		dev := " dev " + isp.ifname
		auto := h.waitAddress(isp.ifname, prefix6(n, 1), anyAddress)
		all = append(all, given[n], given6(n, 0), auto)
		h.waitServed(n, given[n], isp.network+dev, "default via "+isp.gateway+dev)
		// The network of the /128 address is nobody's on this link, and so everybody's.
		routes := []string{prefix6(n, 0) + dev, prefix6(n, 1) + dev, "default via " + router6 + dev}
		h.waitServed(n, auto, routes...)
		h.waitServed(n, given6(n, 0), routes...)
	}
	h.waitServed(2, "10.64.2.30", "10.64.2.0/24 dev wan2", "default via 10.64.2.1 dev wan2")
	h.waitExactly(append(all, "10.64.2.30")...)
	h.waitHealthy()
	stop := h.flows(map[string]int{all[0]: 0, all[1]: 0, all[5]: 1})
	lease.addr = "10.64.2.31"
	server.set(func(d *dhcpServer) { d.lease = lease })
	h.waitServed(2, "10.64.2.31", "10.64.2.0/24 dev wan2", "default via 10.64.2.1 dev wan2")
	// dhcpcd 9 leaves the old address for what was left of its lease, while main has no route for it; dhcpcd 10 takes it away.
	eventually(t, "the old address is served as long as it is there", func() error {
		err := errors.Join(h.filled("10.64.2.30", []string{"10.64.2.0/24 dev wan2", "default via 10.64.2.1 dev wan2"}), h.pass(2, "10.64.2.30", answers))
		if !slices.ContainsFunc(h.addresses("wan2"), func(a address) bool { return a.Local == "10.64.2.30" }) {
			return nil
		}
		return err
	})
	h.wantOwnOnly()
	h.waitNothing("10.64.2.30")
	h.waitExactly(append(all, "10.64.2.31")...)
	stop()
	if err := dhcpcd.cmd.Process.Signal(syscall.SIGALRM); err != nil { // release all
		t.Fatal(err)
	}
	for _, addr := range all {
		h.waitNothing(addr)
	}
	h.waitExactly()
}
