//go:build integration

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// TestModems: two links without Ethernet, as modems and PPPoE have them, with the scripts that the package of pppd has. pppd
// itself needs a kernel with PPP, which this one is not; a tunnel to the provider stands for its link, and ip for what it does.
func TestModems(t *testing.T) {
	t.Parallel()
	for _, suite := range suites {
		for _, watch := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, watch %v", suite, watch), func(t *testing.T) {
				t.Parallel()
				modems(t, suite, watch)
			})
		}
	}
}

// installed is a machine behind two providers that has the package.
func installed(t *testing.T, suite string) (*machine, *internet) {
	t.Helper()
	files, err := debs()
	if err != nil {
		t.Fatal(err)
	}
	m := boot(t, debian(suite, managers))
	i := m.behind(2)
	m.install(files[0])
	return m, i
}

func modems(t *testing.T, suite string, watch bool) {
	m, i := installed(t, suite)
	if watch {
		m.sh(`systemctl enable --now table-allocator-watch`)
	}
	for n := 1; n <= 2; n++ {
		i.modem(n)
	}

	// pppd adds the default route of the first link, and refuses the second one.
	m.pppd(1, "10.1.0.129", `ip route add default dev ppp1`)
	m.pppd(2, "10.2.0.129", ``)
	i.waitUplinks("10.1.0.129", "10.2.0.129")
	m.wait("status finds no fault", `table-allocator-client status`)
	m.want(`ip route show default`, "default dev ppp1 scope link")
	m.want(`cut -d@ -f1 /run/table-allocator/dnsmasq.servers | sort`, "server=10.1.0.1", "server=10.2.0.1")

	// The network of such a link is its peer. A table of others with routes to all comes after it.
	m.sh(`ip route add default dev ppp1 table 99; ip rule add priority 25000 lookup 99; trap 'ip rule del priority 25000' EXIT
		for n in 1 2; do ip rule show to 10.$n.0.130 | grep "^20000:"; ip route get 10.$n.0.130 | grep "dev ppp$n "; ping -c 1 -W 3 10.$n.0.130; done
		! ip rule | grep " to 10.2.0.129"`)

	// The second link goes, and comes with another address.
	m.sh(`ip address flush dev ppp2; ip link set ppp2 down; ` + ppp + `/etc/ppp/ip-down ppp2 /dev/ttyUSB2 0 10.2.0.129 10.2.0.130 ""`)
	m.wait("the table is free", `! ip rule | grep 10.2.0.129`)
	m.sh(`ip link set ppp2 up`)
	m.pppd(2, "10.2.0.140", ``)
	i.waitUplinks("10.1.0.129", "10.2.0.140")

	// Routers give each link an IPv6 address, and the kernel a route; a modem manager gives main a second default route.
	if watch {
		m.sh(`for n in 1 2; do ip address add fd0$n::129/128 dev ppp$n nodad; ip -6 route add default dev ppp$n metric ${n}00; done
			ip route add default dev ppp2 metric 1000`)
		i.waitUplinks("10.1.0.129", "10.2.0.140", "fd01::129", "fd02::129")
	}
	m.wait("status finds no fault", `table-allocator-client status`)

	// A peer that dials in gets no table.
	m.sh(`ip tuntap add mode tun name ppp3; ip address add 10.3.0.1 peer 10.3.0.2 dev ppp3; ip link set ppp3 up
		IFNAME=ppp3 IPLOCAL=10.3.0.1 IPREMOTE=10.3.0.2 /etc/ppp/ip-up ppp3 /dev/ttyS3 0 10.3.0.1 10.3.0.2 ""`)
	m.want(`ip rule | grep -c 10.3.0.1 || :`, "0")
}

// TestMobile: addresses as ModemManager hands those of a modem's bearer to a program that configures links: alone without a
// gateway, or in a network of four with one, on links without Ethernet that resolve no addresses.
func TestMobile(t *testing.T) {
	t.Parallel()
	const keyfile = "/etc/NetworkManager/system-connections/ppp%d.nmconnection"
	managers := []neighbour{
		{
			name: "networkd", start: startNetworkd, then: []string{`networkctl reconfigure ppp2`, `systemctl restart systemd-networkd`},
			files: map[string]string{
				"/run/systemd/network/ppp1.network": "[Match]\nName=ppp1\n[Network]\nAddress=10.1.0.129/32\nAddress=fd01::129/64\nIPv6AcceptRA=no\n" +
					"[Route]\nDestination=0.0.0.0/0\nScope=link\nMetric=100\n[Route]\nGateway=fe80::1\nMetric=100\n",
				"/run/systemd/network/ppp2.network": "[Match]\nName=ppp2\n[Network]\nAddress=10.2.0.141/30\nAddress=fd02::129/64\nIPv6AcceptRA=no\n" +
					"[Route]\nGateway=10.2.0.142\nMetric=200\n[Route]\nDestination=::/0\nMetric=200\n",
			},
		},
		{
			name: "NetworkManager", start: `systemctl start NetworkManager; for n in 1 2; do nmcli device set ppp$n managed yes; nmcli --wait 60 connection up ppp$n; done`,
			then: []string{`nmcli device reapply ppp2`, `nmcli --wait 60 connection up ppp2`},
			files: map[string]string{
				"/etc/NetworkManager/conf.d/test.conf": "[main]\nplugins=keyfile\nno-auto-default=*\n[keyfile]\nunmanaged-devices=interface-name:wan*\n",
				fmt.Sprintf(keyfile, 1): "[connection]\nid=ppp1\ntype=tun\ninterface-name=ppp1\n[tun]\nmode=1\npi=true\n[ipv4]\nmethod=manual\naddress1=10.1.0.129/32\n" +
					"route1=0.0.0.0/0,0.0.0.0,100\n[ipv6]\nmethod=manual\naddress1=fd01::129/64,fe80::1\nroute-metric=100\n",
				fmt.Sprintf(keyfile, 2): "[connection]\nid=ppp2\ntype=tun\ninterface-name=ppp2\n[tun]\nmode=1\npi=true\n[ipv4]\nmethod=manual\naddress1=10.2.0.141/30,10.2.0.142\n" +
					"route-metric=200\n[ipv6]\nmethod=manual\naddress1=fd02::129/64\nroute1=::/0,::,200\n",
			},
		},
	}
	for at, n := range managers {
		t.Run(n.name, func(t *testing.T) {
			t.Parallel()
			mobile(t, suites[at], n)
		})
	}
}

func mobile(t *testing.T, suite string, n neighbour) {
	m, i := installed(t, suite)
	for path, text := range n.files {
		m.write(path, text, 0o600)
	}
	m.sh(`chmod 644 /run/systemd/network/* || :; systemctl enable --now table-allocator-watch`)
	for n := 1; n <= 2; n++ {
		i.modem(n)
	}
	for _, script := range slices.Concat([]string{n.start}, n.then) {
		m.sh(script)
		i.waitUplinks("10.1.0.129", "10.2.0.141", "fd01::129", "fd02::129")
		m.wait("status finds no fault after "+script, `table-allocator-client status`)
	}
}

// ppp are the variables that pppd sets for a peer with usepeerdns.
const ppp = `IFNAME=ppp2 USEPEERDNS=1 `

// pppd does what pppd does when the link pppN has an address: it adds the address, perhaps a default route, and runs its script.
func (m *machine) pppd(n int, addr, route string) {
	m.t.Helper()
	m.sh(`ip address add "$2" peer "10.$1.0.130/32" dev "ppp$1"
		`+route+`
		IFNAME=ppp$1 IPLOCAL=$2 IPREMOTE=10.$1.0.130 USEPEERDNS=1 DNS1=10.$1.0.1 /etc/ppp/ip-up "ppp$1" "/dev/ttyUSB$1" 0 "$2" "10.$1.0.130" ""`,
		fmt.Sprint(n), addr)
}

// modem makes the link pppN: a tunnel to provider N, who drops packets that are not from the networks behind it.
func (i *internet) modem(n int) {
	i.m.t.Helper()
	rules := fmt.Sprintf(`
		table inet modem {
			chain raw {
				type filter hook prerouting priority raw
				iifname != modem accept
				ip saddr 10.%[1]d.0.128/25 accept
				ip6 saddr { fe80::/10, fd0%[1]d::/64 } accept
				drop
			}
		}
`, n)
	path := filepath.Join(i.m.t.TempDir(), "modem.nft")
	if err := os.WriteFile(path, []byte(rules), 0o644); err != nil {
		i.m.t.Fatal(err)
	}
	p := i.Providers[n-1]
	p.Run(i.m.t, "nft", "-f", path)
	p.Run(i.m.t, "sh", "-ec", fmt.Sprintf(`ip tuntap add mode tun name modem; ip link set modem up; ip address add 10.%[1]d.0.130/32 dev modem
		ip route add 10.%[1]d.0.128/25 dev modem; ip -6 route add fd0%[1]d::129 dev modem`, n))
	i.daemon(n, "socat", "TUN,tun-name=modem,iff-up", "UDP6-LISTEN:5000")
	i.m.sh(`ip tuntap add mode tun name ppp$1; ip link set ppp$1 up
		systemd-run --quiet --unit=modem$1 -p Restart=always -p RestartSec=1 socat "TUN,tun-name=ppp$1,iff-up" "UDP6:[fe80::1%wan$1]:5000,sourceport=500$1"`, fmt.Sprint(n))
}
