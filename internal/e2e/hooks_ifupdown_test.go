package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// ifup with all that a static address can say, and ifdown, which needs no hook.
func TestIfupdown(t *testing.T) {
	s := newSite(t)
	s.serve()
	sysctl(t, s.isps[2].ns, "net/ipv4/conf/lan/proxy_arp", "1") // for a default without a gateway
	s.write("/etc/network/interfaces", `
iface wan0 inet static
	address 192.168.1.20/24
	gateway 192.168.1.1
	metric 7
	dns-nameservers 192.168.1.1 2001:db8::53 192.168.1.2
	up ip route add 10.99.0.0/16 via 192.168.1.77 dev wan0

iface wan1 inet static
	address 192.168.1.150
	netmask 255.255.255.0
	gateway 192.168.1.1
iface wan1 inet static
	address 192.168.1.151
	netmask 255.255.255.0

iface wan2 inet static
	address 10.64.2.20
	netmask 255.255.255.255
	pointopoint 10.64.2.1
	up ip route add default dev wan2 metric 9

iface wan2:1 inet static
	address 10.64.2.21/24
	gateway 10.64.2.1
`)
	for _, isp := range s.isps {
		s.sh("ifup " + isp.ifname)
	}
	s.waitFilled("192.168.1.20", "default via 192.168.1.1 dev wan0 proto 116 src 192.168.1.20 metric 7 onlink",
		"10.99.0.0/16 via 192.168.1.77", "192.168.1.0/24")
	s.waitFilled("192.168.1.150", "default via 192.168.1.1", "192.168.1.0/24")
	s.waitFilled("192.168.1.151", "default via 192.168.1.1", "192.168.1.0/24")
	s.waitFilled("10.64.2.20", "default dev wan2 proto 116 scope link src 10.64.2.20 metric 9", "10.64.2.1 dev wan2")
	for _, isp := range s.isps {
		s.waitMain(isp.ifname)
	}
	s.waitUplink(0, "192.168.1.20")
	s.waitUplink(1, "192.168.1.150")
	s.waitUplink(1, "192.168.1.151")
	s.waitUplink(2, "10.64.2.20")
	s.waitServers("server=192.168.1.1@192.168.1.20", "server=192.168.1.2@192.168.1.20")

	s.sh("ifup wan2:1")
	s.waitFilled("10.64.2.21", "default via 10.64.2.1", "default dev wan2", "10.64.2.0/24")
	s.waitUplink(2, "10.64.2.21")

	stop := s.traffic(map[string]int{"192.168.1.150": 1, "192.168.1.151": 1, "10.64.2.20": 2})
	s.sh("ifdown wan0")
	s.waitGone("192.168.1.20")
	s.waitServers()
	s.sh("ifup wan0")
	s.waitUplink(0, "192.168.1.20")
	stop()
	s.sh("ifdown wan1")
	s.waitGone("192.168.1.150")
	s.waitGone("192.168.1.151")
	s.sh("ifdown wan2:1; ifdown wan2")
	s.waitGone("10.64.2.21")
	s.waitGone("10.64.2.20")
	s.waitUplink(0, "192.168.1.20")
}

// ifup of a link with DHCP: the hook of dhclient does it.
func TestIfupdownDHCP(t *testing.T) {
	s := newSite(t)
	s.prepareDhclient()
	s.serve()
	s.write("/etc/network/interfaces", "iface wan0 inet dhcp\n metric 30\niface wan1 inet dhcp\n")
	for n, ifname := range []string{"wan0", "wan1"} {
		s.dnsmasqAt(n)
		s.sh("ifup " + ifname + " >&2")
		s.waitUplink(n, given[n])
	}
	s.waitFilled(given[0], "default via 192.168.1.1 dev wan0 proto 116 src 192.168.1.20 metric 30", "192.168.1.0/24")
	if diff := unordered(s.leases(), []string{"10000|inet|wan0|192.168.1.20|dhclient|0", "10001|inet|wan1|192.168.1.150|dhclient|0"}); diff != "" {
		t.Errorf("leases: %s", diff)
	}
	s.sh("ifdown wan0")
	s.waitGone(given[0])
	s.waitUplink(1, given[1])
	s.sh("ifdown wan1")
	s.waitClean()
}

// All static links come up without the server of tables, in one go as at boot, and move to
// tables when it comes.
func TestIfupdownNoServer(t *testing.T) {
	s := newSite(t)
	config := ""
	for n, isp := range s.isps {
		config += fmt.Sprintf("auto %s\niface %[1]s inet static\n address %s/24\n gateway %s\n metric %d\n", isp.ifname, given[n], isp.gateway, 10+n)
	}
	s.write("/etc/network/interfaces", config)
	s.sh("ifup -a --exclude lo")
	for n, isp := range s.isps {
		s.waitMain(isp.ifname, fmt.Sprintf("default via %s dev %s metric %d", isp.gateway, isp.ifname, 10+n), isp.network)
	}
	if rules := s.rules(); len(rules) > 0 {
		t.Errorf("rules without a lease: %q", rules)
	}
	s.serve()
	for n, isp := range s.isps {
		s.waitUplink(n, given[n])
		s.waitMain(isp.ifname)
	}
}

// An older NetworkManager runs the scripts of ifupdown.
func TestIfupdownForNetworkManager(t *testing.T) {
	s := newSite(t)
	s.serve()
	s.ns.IP(t, "address add 192.168.1.20/24 dev wan0")
	s.ns.IP(t, "route add default via 192.168.1.1 dev wan0 metric 100")
	s.sh("rm /etc/NetworkManager/dispatcher.d/table-allocator")
	// Debian 13 has no such script, which runs those of ifupdown.
	r := s.try(`set -- /etc/NetworkManager/dispatcher.d/01-ifupdown wan0 up
		[ -e "$1" ] || set -- env IFACE=wan0 LOGICAL=wan0 METHOD=NetworkManager ADDRFAM=inet MODE=start PHASE=post-up VERBOSITY=0 run-parts /etc/network/if-up.d
		env IP4_NUM_ADDRESSES=1 IP4_ADDRESS_0='192.168.1.20/24 192.168.1.1' IP4_GATEWAY=192.168.1.1 \
		IP4_NUM_ROUTES=2 IP4_ROUTE_0='192.168.1.0/24 0.0.0.0 100' IP4_ROUTE_1='10.99.0.0/16 192.168.1.7 100' \
		IP4_NAMESERVERS='192.168.1.1 192.168.1.2' NM_DISPATCHER_ACTION=up DEVICE_IP_IFACE=wan0 \
		"$@"`)
	if r.code != 0 {
		t.Fatalf("exit code %d: %s", r.code, r.stderr)
	}
	s.waitFilled("192.168.1.20", "default via 192.168.1.1 dev wan0 proto 116 src 192.168.1.20 metric 100", "192.168.1.0/24", "10.99.0.0/16 via 192.168.1.7")
	s.waitMain("wan0", "default via 192.168.1.1 dev wan0 metric 100", "192.168.1.0/24")
	s.waitUplink(0, "192.168.1.20")
	s.waitServers("server=192.168.1.1@192.168.1.20", "server=192.168.1.2@192.168.1.20")
	if got := s.leases(); len(got) != 1 || !strings.HasSuffix(got[0], "|NetworkManager|0") {
		t.Errorf("leases: %q", got)
	}
}

// TestHooksUnbound: what is bound to nothing goes as main says, though the hooks of ifupdown and dhclient moved main's
// default routes: to links behind this host, through a VPN, by static routes and by those that DHCP told.
func TestHooksUnbound(t *testing.T) {
	s := newSite(t)
	s.prepareDhclient()
	s.serve()
	s.sh(`ip link add lan0 type veth peer name behind; ip link set behind up; ip link set lan0 up; ip address add 10.1.0.1/24 dev lan0
		ip tuntap add vpn0 mode tun; ip link set vpn0 up; ip address add 10.9.0.1/24 dev vpn0; ip route add 172.16.0.0/12 dev vpn0`)
	s.write("/etc/network/interfaces", `
iface wan0 inet static
	address 192.168.1.20/24
	gateway 192.168.1.1
	up ip route add 10.99.0.0/16 via 192.168.1.77 dev wan0
`)
	s.dhcpdAt(2, `option routers 10.64.2.1; option subnet-mask 255.255.255.0; default-lease-time 600;
		option rfc3442-classless-static-routes 24,203,0,113,10,64,2,9, 0,10,64,2,1;`)
	s.sh("ifup wan0")
	s.dhclient("wan2")
	s.waitFilled("192.168.1.20", "default via 192.168.1.1", "10.99.0.0/16 via 192.168.1.77", "192.168.1.0/24")
	s.waitFilled(given[2], "default via 10.64.2.1", "203.0.113.0/24 via 10.64.2.9", "10.64.2.0/24")
	s.waitMain("wan0")
	s.waitMain("wan2")
	for to, want := range map[string]string{
		"10.1.0.50":    "dev lan0 src 10.1.0.1",
		"172.16.9.9":   "dev vpn0 src 10.9.0.1",
		"10.99.1.1":    "via 192.168.1.77 dev wan0",
		"192.168.1.9":  "dev wan0",
		"203.0.113.7":  "via 10.64.2.9 dev wan2",
		"10.64.2.8":    "dev wan2",
		"198.51.100.1": "via 192.168.1.1 dev wan0", // by the table of the first lease
	} {
		eventually(t, "unbound packets to "+to+" go "+want, func() error {
			if out, err := s.ns.Output("ip", "route", "get", to); err != nil || !strings.Contains(out, want) {
				return fmt.Errorf("%s: %v", out, err)
			}
			return nil
		})
	}
}
