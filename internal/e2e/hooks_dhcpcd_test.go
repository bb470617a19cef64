package e2e

import (
	"strings"
	"syscall"
	"testing"
)

// dhcpcd starts dhcpcd for the first two uplinks. It writes to a file, since what it starts keeps what it
// writes to. /run/reasons has the reasons for which it calls its hooks.
func (h *home) dhcpcd(config string) *process {
	h.t.Helper()
	h.sh("mkdir -p /run/dhcpcd /var/lib/dhcpcd")
	h.write("/etc/dhcpcd.conf", "nodev\nnoarp\nslaac hwaddr\nnohook resolv.conf, timesyncd.conf, hostname\n"+config)
	h.write("/etc/dhcpcd.exit-hook", `echo "$interface $reason " >>/run/reasons`)
	p := h.daemon("sh", "-c", "exec dhcpcd --nobackground wan0 wan1 >/run/dhcpcd.log 2>&1")
	h.t.Cleanup(func() {
		if h.t.Failed() {
			h.t.Logf("dhcpcd wrote:\n%s", h.read("/run/dhcpcd.log"))
		}
	})
	return p
}

const routedOptions = "option routers, subnet_mask, domain_name_servers, classless_static_routes\n"

// dhcpcd's hook serves what dhcpcd configures: DHCP, router advertisements and DHCPv6, on two uplinks
// whose networks and routers are the same.
func TestDhcpcdUplinks(t *testing.T) {
	h := newHookedHome(t, 2)
	dhcpcd := h.dhcpcd(routedOptions + "ia_na\n")
	uplinks := make(map[string]int)
	for n, isp := range h.isps {
		h.waitQuiet(isp.ifname) // dhcpcd listens to routers instead of the kernel
		h.dnsmasq6At(n, append([]string{"--dhcp-range=" + strings.TrimSuffix(prefix6(n, 1), "/64") + ",slaac,64,1h",
			"--dhcp-option=option:classless-static-route,10.99.0.0/16,192.168.1.254,0.0.0.0/0," + isp.gateway}, noRenewals...)...)
		dev := " dev " + isp.ifname
		auto := h.waitAddress(isp.ifname, prefix6(n, 1), anyAddress)
		uplinks[given[n]], uplinks[given6(n, 0)], uplinks[auto] = n, n, n
		h.waitServed(n, given[n], isp.network+dev, "default via "+isp.gateway+dev, "10.99.0.0/16 via 192.168.1.254"+dev)
		routes := []string{prefix6(n, 0) + dev, prefix6(n, 1) + dev, "default via " + router6 + dev}
		h.waitServed(n, auto, routes...)
		h.waitServed(n, given6(n, 0), routes...)
	}
	h.waitHealthy()
	if err := dhcpcd.cmd.Process.Signal(syscall.SIGALRM); err != nil { // release all
		t.Fatal(err)
	}
	for addr := range uplinks {
		h.waitNothing(addr)
	}
}

// A static address of dhcpcd.conf, and one that another server gives instead of the first.
func TestDhcpcdStatic(t *testing.T) {
	h := newHookedHome(t, 2)
	h.dhcpcd(routedOptions + "interface wan1\nstatic ip_address=192.168.1.150/24\nstatic routers=192.168.1.1\n")
	lease := dhcpLease{addr: "192.168.1.30", mask: "255.255.255.0", router: "192.168.1.1", seconds: 10, renew: 1}
	server := h.dhcp(0, lease)
	h.waitServed(1, "192.168.1.150", "192.168.1.0/24 dev wan1", "default via 192.168.1.1 dev wan1")
	h.waitServed(0, "192.168.1.30", "192.168.1.0/24 dev wan0", "default via 192.168.1.1 dev wan0")
	stop := h.traffic(map[string]int{"192.168.1.30": 0, "192.168.1.150": 1}) // the hook runs for each renewal, and changes nothing
	for range 2 {
		h.waitReason("wan0", "RENEW", len(h.reasons("wan0")))
	}
	stop()
	server.set(func(d *dhcpServer) { d.lease.addr = "192.168.1.31" })
	h.waitServed(0, "192.168.1.31", "192.168.1.0/24 dev wan0", "default via 192.168.1.1 dev wan0")
	h.waitNothing("192.168.1.30")
	h.waitHealthy()
}
