//go:build integration

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// TestDelegation: both providers delegate a prefix by DHCPv6, and the link lan0 has a network of each. What hosts there send
// leaves by the uplink whose prefix their address is of, as dhcpcd's hook knows it.
func TestDelegation(t *testing.T) {
	t.Parallel()
	for _, suite := range suites {
		t.Run(suite, func(t *testing.T) {
			t.Parallel()
			delegation(t, suite)
		})
	}
}

func delegation(t *testing.T, suite string) {
	files, err := debs()
	if err != nil {
		t.Fatal(err)
	}
	m := boot(t, debian(suite, nextUp))
	i := m.behind(2)
	i.dhcp()
	for n := 1; n <= 2; n++ {
		i.delegates(n)
	}
	box := nettest.New(t, "box")
	nettest.Veth(t, box, "eth0", m.ns, "lan0")
	m.ns.IP(t, "address add fe80::1/64 dev lan0 nodad")
	box.Batch(t, "address add fd01:0:0:f1::2/64 dev eth0 nodad", "address add fd02:0:0:f2::2/64 dev eth0 nodad", "route add default via fe80::1 dev eth0")
	m.install(files[0])
	m.sh(`sysctl -qw net.ipv6.conf.all.forwarding=1`)
	m.write("/etc/dhcpcd.conf", nodev["/etc/dhcpcd.conf"]+"denyinterfaces lan0\ninterface wan1\nia_pd 1 lan0/1/64\ninterface wan2\nia_pd 2 lan0/2/64\n", 0o644)
	m.sh(`systemd-run --unit=dhcpcd dhcpcd --nobackground --noarp wan1 wan2`)
	i.waitUplinks()
	for n := 1; n <= 2; n++ {
		i.routesTo(n)
	}
	wantPrefixes := func() {
		t.Helper()
		for n := 1; n <= 2; n++ {
			m.wait("there is a rule", `ip -6 rule | grep "from $1 lookup"`, fmt.Sprintf("fd0%d:0:0:f0::/60", n))
			addr := fmt.Sprintf("fd0%d:0:0:f%[1]d::2", n)
			m.wait("lan0 has its network", `ip -6 address show dev lan0 | grep "$1"`, fmt.Sprintf("fd0%d:0:0:f%[1]d:", n))
			if got := box.Run(t, "curl", "--silent", "--show-error", "--globoff", "--max-time", "5", "--retry", "20", "--retry-all-errors", "--interface", addr, "http://["+nettest.Far6+"]/"); got != addr+"\n" {
				t.Errorf("from %s: got %q", addr, got)
			}
		}
		i.waitUplinks()
		m.wait("status finds no fault", `table-allocator-client status`)
	}
	wantPrefixes()
	m.sh(`dhcpcd --rebind wan2`)
	wantPrefixes()

	// The leases end, and the rules with them. dhcpcd 9 may lose a signal.
	m.wait("the rules are gone", `systemctl kill --signal=ALRM dhcpcd || :; sleep 1; ! { ip rule; ip -6 rule; } | grep "proto 116\|proto table-allocator"`)
}

// TestDelegationNetworkd: networkd has a prefix of each provider for a link behind this host. It does not say to which uplink a
// prefix belongs: doctor asks for a call of the client, which does, and the watch goes on with that, also when it starts again.
func TestDelegationNetworkd(t *testing.T) {
	t.Parallel()
	for _, suite := range suites {
		t.Run(suite, func(t *testing.T) {
			t.Parallel()
			files, err := debs()
			if err != nil {
				t.Fatal(err)
			}
			m := boot(t, debian(suite, base))
			i := m.behind(2)
			i.dhcp()
			m.install(files[0])
			m.write("/etc/table-allocator/watch.json", `{"links": [{"ifname": "*"}], "exclude": ["lo", "lan*"]}`, 0o644)
			m.sh(`sysctl -qw net.ipv6.conf.all.forwarding=1; systemctl enable --now table-allocator-watch`)
			var boxes []*nettest.Namespace
			for n := 1; n <= 2; n++ {
				i.delegates(n)
				number := fmt.Sprint(n)
				box := nettest.New(t, "box"+number)
				nettest.Veth(t, box, "eth0", m.ns, "lan"+number)
				box.Batch(t, expand("address add fd0{N}:0:0:f{N}::2/64 dev eth0 nodad", number), "route add default via fe80::1 dev eth0")
				boxes = append(boxes, box)
				m.write("/run/systemd/network/wan"+number+".network", expand(networkd["/run/systemd/network/wan{N}.network"]+"[DHCPv6]\nWithoutRA=solicit\nUseAddress=no\n", number), 0o644)
				m.write("/run/systemd/network/lan"+number+".network", expand("[Match]\nName=lan{N}\n[Network]\nAddress=fe80::1/64\nIPv6SendRA=no\nDHCPPrefixDelegation=yes\n[DHCPPrefixDelegation]\nUplinkInterface=wan{N}\nSubnetId={N}\nAnnounce=no\n", number), 0o644)
			}
			m.sh(`sed -i 's/DHCP=ipv4/DHCP=yes/' /run/systemd/network/wan*.network; ` + startNetworkd)
			i.waitUplinks()
			for n := 1; n <= 2; n++ {
				i.routesTo(n)
				m.wait("the link has its network", `ip -6 address show dev "lan$1" | grep "fd0$1::f$1:"`, fmt.Sprint(n))
				m.wait("doctor names the prefix, and the uplink that it may be of", `table-allocator-client doctor | grep "if it is of wan$1: .*--prefix fd0$1:0:0:f0::/60"`, fmt.Sprint(n))
				m.sh(`table-allocator-client -6 -a "$(ip -6 -o address show dev "wan$1" scope global | awk '{ print $4 }' | cut -d/ -f1 | head -n 1)" -i "wan$1" --routes copy --prefix "fd0$1:0:0:f0::/60"`, fmt.Sprint(n))
			}
			for _, script := range []string{`true`, `systemctl restart table-allocator-watch`, `systemctl restart systemd-networkd`} {
				m.sh(script)
				for n, box := range boxes {
					addr := fmt.Sprintf("fd0%d:0:0:f%[1]d::2", n+1)
					m.wait("there is a rule", `ip -6 rule | grep "from $1 lookup"`, fmt.Sprintf("fd0%d:0:0:f0::/60", n+1))
					if got := box.Run(t, "curl", "--silent", "--show-error", "--globoff", "--max-time", "5", "--retry", "20", "--retry-all-errors", "--interface", addr, "http://["+nettest.Far6+"]/"); got != addr+"\n" {
						t.Errorf("from %s: got %q", addr, got)
					}
				}
				i.waitUplinks()
				m.wait("nothing is wrong", `table-allocator-client status; table-allocator-client doctor --only delegated-prefix`)
			}
		})
	}
}

// delegates runs a server of DHCPv6 at provider n, which delegates fd0N:0:0:f0::/60.
func (i *internet) delegates(n int) {
	i.m.t.Helper()
	dir := i.m.t.TempDir()
	config := fmt.Sprintf(`authoritative; default-lease-time 600; preferred-lifetime 400; option dhcp-renewal-time 5; option dhcp-rebinding-time 300;
		subnet6 fd0%d::/64 { prefix6 fd0%[1]d:0:0:f0:: fd0%[1]d:0:0:f0:: /60; }`, n)
	for name, text := range map[string]string{"conf": config, "leases": ""} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			i.m.t.Fatal(err)
		}
	}
	i.daemon(n, "dhcpd", "-6", "-f", "-d", "-user", "root", "-group", "root", "-cf", filepath.Join(dir, "conf"), "-lf", filepath.Join(dir, "leases"), "-pf", filepath.Join(dir, "pid"), "lan")
}

// routesTo has provider n send what is for its delegated prefix to the machine, as its server of DHCPv6 would tell it.
func (i *internet) routesTo(n int) {
	i.m.t.Helper()
	local := i.m.sh(`ip -6 -o address show dev "wan$1" scope link | awk '{ print $4 }' | cut -d/ -f1 | head -n 1`, fmt.Sprint(n))
	i.Providers[n-1].IP(i.m.t, fmt.Sprintf("-6 route replace fd0%d:0:0:f0::/60 via %s dev lan", n, strings.TrimSpace(local)))
}
