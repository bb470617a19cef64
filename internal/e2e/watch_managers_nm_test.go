package e2e

import (
	"errors"
	"testing"
)

// connection writes a connection profile of a link, and brings the connection up.
func (h *home) connection(ifname, ipv4, ipv6 string) {
	h.t.Helper()
	h.profile(ifname, ipv4, "addr-gen-mode=eui64\nip6-privacy=0\n"+ipv6)
	h.sh(`nmcli connection reload && nmcli --wait 50 connection up "$1"`, ifname)
}

// NetworkManager configures three links: static, by DHCP with SLAAC, and by DHCP with
// DHCPv6. Main stays as it wants it.
func TestWatchManagersNetworkManager(t *testing.T) {
	h := newHome(t, 3)
	h.watched()
	h.networkManager()
	h.connection("wan0", "method=manual\naddress1=192.168.1.20/24,192.168.1.1", "method=manual\naddress1=2001:db8:1000::20/64,fe80::1")
	h.dnsmasqAt(1)
	h.advertise(1, "AdvDefaultLifetime 30; "+prefixOption(prefix6(1, 0), 600, 300))
	h.connection("wan1", "method=auto", "method=auto")
	h.dnsmasq6At(2)
	h.connection("wan2", "method=auto", "method=auto")

	auto := h.waitAddress("wan1", prefix6(1, 0), slaac)
	leased := h.waitAddress("wan2", prefix6(2, 0), ofDHCP)
	for n, addrs := range [][2]string{{given[0], "2001:db8:1000::20"}, {given[1], auto}, {given[2], leased}} {
		dev := " dev " + h.isps[n].ifname
		h.waitServed(n, addrs[0], h.isps[n].network+dev, "default via "+h.isps[n].gateway+dev)
		h.waitServed(n, addrs[1], prefix6(n, 0)+dev, "default via "+router6+dev)
		h.mainHolds(h.isps[n].network+dev, "default via "+h.isps[n].gateway+dev, prefix6(n, 0)+dev, "default via "+router6+dev)
	}
	all := []string{given[0], given[1], given[2], "2001:db8:1000::20", auto, leased}
	h.waitExactly(all...)
	h.waitHealthy()

	stop := h.flows(map[string]int{given[1]: 1, auto: 1, given[2]: 2, leased: 2})
	h.sh("nmcli connection modify wan0 +ipv4.addresses 192.168.1.21/24 ipv4.routes '10.98.0.0/16 192.168.1.1' && nmcli device reapply wan0")
	h.waitServed(0, "192.168.1.21", "192.168.1.0/24 dev wan0", "10.98.0.0/16 via 192.168.1.1 dev wan0", "default via 192.168.1.1 dev wan0")
	stop()
	h.waitExactly(append(all, "192.168.1.21")...)

	h.sh("nmcli connection down wan0; nmcli connection down wan2")
	for _, addr := range []string{given[0], given[2], "192.168.1.21", "2001:db8:1000::20", leased} {
		h.waitNothing(addr)
	}
	h.waitExactly(given[1], auto)
	h.waitServed(1, auto, prefix6(1, 0)+" dev wan1", "default via "+router6+" dev wan1")
}

// NetworkManager's own DHCP client gets another address at a renewal, and tells nobody; nor
// does it when a lease is over.
func TestWatchManagersNetworkManagerSilence(t *testing.T) {
	h := newHome(t, 3)
	h.watched()
	h.networkManager()
	lease := dhcpLease{addr: "10.64.2.30", mask: "255.255.255.0", router: "10.64.2.1", seconds: 600, renew: 1}
	server := h.dhcp(2, lease)
	h.connection("wan2", "method=auto", "method=disabled")
	h.waitServed(2, "10.64.2.30", "10.64.2.0/24 dev wan2", "default via 10.64.2.1 dev wan2")
	// The dispatcher is at rest.
	eventually(t, "the dispatcher has told of the link", func() error {
		if events := h.read("/run/events"); events == "" {
			return errors.New("nothing yet")
		}
		return nil
	})
	events := h.read("/run/events")
	lease.addr, lease.seconds = "10.64.2.31", 8
	server.set(func(d *dhcpServer) { d.lease = lease })
	h.waitNothing("10.64.2.30")
	h.waitServed(2, "10.64.2.31", "10.64.2.0/24 dev wan2", "default via 10.64.2.1 dev wan2")
	h.waitExactly("10.64.2.31")
	if now := h.read("/run/events"); now != events {
		t.Logf("the dispatcher has told of the change after all: %q, before: %q", now, events)
	}
	// The server is gone, and the lease ends.
	h.isps[2].ns.Run(t, "nft", "insert rule inet provider raw udp dport 67 drop")
	h.waitNothing("10.64.2.31")
	h.waitExactly()
}
