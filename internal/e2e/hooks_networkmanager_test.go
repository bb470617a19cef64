package e2e

import (
	"strings"
	"testing"
)

// NetworkManager brings three uplinks up, by DHCP and static, one of which it keeps out of
// main; it keeps main as it wants it.
func TestNetworkManager(t *testing.T) {
	s := newSite(t)
	s.serve()
	for n := range s.isps {
		s.dnsmasqAt(n)
	}
	s.isps[1].ns.IP(t, "address add 192.168.1.254/24 dev lan")
	s.profile("wan0", "method=auto", "method=disabled")
	s.profile("wan1", "method=manual\naddress1=192.168.1.150/24,192.168.1.1\naddress2=192.168.1.151/24\ndns=192.168.1.1;192.168.1.2;\nroute1=10.99.0.0/16,192.168.1.254,77", "method=disabled")
	s.profile("wan2", "method=auto\nnever-default=true", "method=disabled")
	s.networkManager()
	for _, isp := range s.isps {
		s.sh("nmcli --wait 50 connection up " + isp.ifname)
	}
	for _, addr := range append([]string{"192.168.1.151"}, given...) {
		s.served(addr) // the dispatcher runs its scripts when nmcli has returned
	}
	s.waitUplink(0, given[0])
	s.waitUplink(1, "192.168.1.150")
	s.waitUplink(1, "192.168.1.151")
	s.waitUplink(2, given[2])
	s.waitFilled("192.168.1.151", "default via 192.168.1.1", "192.168.1.0/24", "10.99.0.0/16 via 192.168.1.254")
	s.waitServers("server=192.168.1.1@192.168.1.20", "server=192.168.1.1@192.168.1.150", "server=192.168.1.2@192.168.1.150",
		"server=192.168.1.1@192.168.1.151", "server=192.168.1.2@192.168.1.151", "server=10.64.2.1@10.64.2.20")
	for _, route := range []string{"default via 192.168.1.1 dev wan0 ", "default via 192.168.1.1 dev wan1 ", "192.168.1.0/24 dev wan0 ", "10.64.2.0/24 dev wan2 "} {
		if main := s.routes("main"); !strings.Contains(strings.Join(main, "\n"), route) {
			t.Errorf("main has lost %q: %q", route, main)
		}
	}

	stop := s.traffic(map[string]int{given[0]: 0, "192.168.1.150": 1, given[2]: 2})
	// It changes a route on its own.
	s.sh("nmcli connection modify wan0 ipv4.routes '10.98.0.0/16 192.168.1.1' && nmcli device reapply wan0")
	s.waitFilled(given[0], "default via 192.168.1.1", "192.168.1.0/24", "10.98.0.0/16 via 192.168.1.1")
	s.sh("nmcli connection modify wan0 ipv4.routes '' && nmcli device reapply wan0")
	s.waitFilled(given[0], "default via 192.168.1.1", "192.168.1.0/24")
	// An address more.
	s.sh("nmcli connection modify wan1 +ipv4.addresses 192.168.1.152/24 && nmcli device reapply wan1")
	s.served("192.168.1.152")
	s.waitUplink(1, "192.168.1.152")
	stop()

	s.sh("nmcli connection down wan0")
	s.waitGone(given[0])
	s.waitUplink(1, "192.168.1.150")
	s.ns.IP(t, "link del wan2")
	s.waitGone(given[2])
	s.sh("nmcli connection down wan1")
	for _, addr := range []string{"192.168.1.150", "192.168.1.151", "192.168.1.152"} {
		s.waitGone(addr)
	}
	s.waitServers()
}

// Without the server of tables NetworkManager's own routes serve, and nothing waits.
func TestNetworkManagerNoServer(t *testing.T) {
	s := newSite(t)
	s.profile("wan0", "method=manual\naddress1=192.168.1.20/24,192.168.1.1", "method=disabled")
	s.networkManager()
	s.sh("nmcli --wait 50 connection up wan0")
	s.waitUplink(0, "192.168.1.20")
	s.serve()
	s.waitFilled("192.168.1.20", "default via 192.168.1.1", "192.168.1.0/24")
	s.waitUplink(0, "192.168.1.20")
}

// A modem's control device and a VPN are named elsewhere in the environment.
func TestNetworkManagerNames(t *testing.T) {
	s := newSite(t)
	s.serve()
	sysctl(t, s.isps[2].ns, "net/ipv4/conf/lan/proxy_arp", "1") // for a default without a gateway
	s.ns.IP(t, "address add 10.64.2.20/32 dev wan2")
	s.ns.IP(t, "route add default dev wan2 metric 700")
	s.sh(`env DEVICE_IP_IFACE=wan2 IP4_NUM_ADDRESSES=1 IP4_ADDRESS_0='10.64.2.20/32 0.0.0.0' IP4_GATEWAY=0.0.0.0 \
		/etc/NetworkManager/dispatcher.d/table-allocator cdc-wdm0 up`)
	s.waitFilled("10.64.2.20", "default dev wan2 proto 116 scope link src 10.64.2.20 metric 700")
	s.waitUplink(2, "10.64.2.20")

	s.ns.IP(t, "address add 192.168.1.20/24 dev wan0")
	s.sh(`env DEVICE_IP_IFACE=wan2 VPN_IP_IFACE=wan0 VPN_IP4_NUM_ADDRESSES=1 VPN_IP4_ADDRESS_0='192.168.1.20/24 192.168.1.1' \
		VPN_IP4_GATEWAY=192.168.1.1 DHCP4_ROUTERS=10.64.2.1 IP4_NUM_ADDRESSES=1 IP4_ADDRESS_0='10.64.2.20/32 0.0.0.0' \
		/etc/NetworkManager/dispatcher.d/table-allocator wan0 vpn-up`)
	s.waitUplink(0, "192.168.1.20")
	// With reapply addresses may come a moment later.
	s.sh(`env DEVICE_IP_IFACE=wan0 IP4_NUM_ADDRESSES=1 IP4_ADDRESS_0='192.168.1.20/24 192.168.1.1' IP4_GATEWAY=192.168.1.1 \
		/etc/NetworkManager/dispatcher.d/table-allocator wan0 reapply`)
	for _, addr := range []string{"192.168.1.21", "192.168.1.22"} {
		s.ns.IP(t, "address add "+addr+"/24 dev wan0")
		s.served(addr)
		s.waitUplink(0, addr)
	}

	leases := s.leases()
	for _, args := range []string{"wan0 down", "wan0 vpn-down", "'' connectivity-change", "'' hostname", "wan0 pre-up", ""} {
		s.sh("/etc/NetworkManager/dispatcher.d/table-allocator " + args)
	}
	if diff := unordered(s.leases(), leases); diff != "" {
		t.Errorf("leases: %s", diff)
	}
}
