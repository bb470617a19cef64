//go:build integration

package integration

import "strings"

// odd are hosts as administrators have them: what is unusual is how the addresses and routes are configured.
var odd = []neighbour{
	{
		name: "networkd with equal metrics", packages: base,
		files: map[string]string{"/run/systemd/network/wan{N}.network": "[Match]\nName=wan{N}\n[Network]\nDHCP=ipv4\nIPv6AcceptRA=yes\n"},
		start: startNetworkd, then: []string{`networkctl reconfigure wan2`, `networkctl down wan1; networkctl up wan1`, `systemctl restart systemd-networkd`},
	},
	{
		name: "NetworkManager with equal metrics", start: startNetworkManager,
		files: replaced(networkManager, "route-metric={N}00", "route-metric=100"),
		then:  []string{reconnect, `nmcli device reapply wan1`, `systemctl restart NetworkManager`},
	},
	{
		name: "networkd with addresses beside those of DHCP", packages: base,
		files: replaced(networkd, "[Network]\n", "[Network]\nAddress=10.{N}.0.2/24\nAddress=10.{N}.0.3/32\nAddress=fd0{N}::2/64\n"),
		start: startNetworkd, then: []string{`networkctl reconfigure wan2`, `systemctl restart systemd-networkd`},
		prefixes: []string{"10.1.0.2", "10.1.0.3", "10.1.0.[56][0-9]", "10.2.0.2", "10.2.0.3", "10.2.0.[56][0-9]", "fd01::2", "fd02::2", "fd01:", "fd02:"},
	},
	{
		name: "networkd with one gateway address for both", packages: base, provide: `ip address add 172.31.1.1/32 dev lan`,
		files: map[string]string{"/run/systemd/network/wan{N}.network": "[Match]\nName=wan{N}\n[Network]\nAddress=10.{N}.0.2/32\nAddress=fd0{N}::2/64\nIPv6AcceptRA=no\n" +
			"[Route]\nGateway=172.31.1.1\nGatewayOnLink=yes\nMetric={N}00\n[Route]\nGateway=fe80::1\nMetric={N}00\n"},
		start: startNetworkd, then: []string{`networkctl reconfigure wan2`, `systemctl restart table-allocator-watch`},
	},
	{
		name: "NetworkManager with one gateway address for both", provide: `ip address add 172.31.1.1/32 dev lan`,
		files: map[string]string{
			"/etc/NetworkManager/conf.d/test.conf": networkManager["/etc/NetworkManager/conf.d/test.conf"],
			"/etc/NetworkManager/system-connections/wan{N}.nmconnection": "[connection]\nid=wan{N}\ntype=ethernet\ninterface-name=wan{N}\n" +
				"[ipv4]\nmethod=manual\naddress1=10.{N}.0.2/32\ngateway=172.31.1.1\nroute-metric={N}00\n[ipv6]\nmethod=manual\naddress1=fd0{N}::2/64\ngateway=fe80::1\nroute-metric={N}00\n",
		},
		start: startNetworkManager, then: []string{reconnect, `nmcli device reapply wan1`},
	},
	{
		name: "NetworkManager with two profiles of a link",
		files: beside(networkManager, map[string]string{"/etc/NetworkManager/system-connections/other.nmconnection": "[connection]\nid=other\ntype=ethernet\ninterface-name=wan2\nautoconnect=false\n" +
			"[ipv4]\nmethod=manual\naddress1=10.2.0.2/24,10.2.0.1\nroute-metric=50\n[ipv6]\nmethod=manual\naddress1=fd02::2/64,fd02::1\nroute-metric=50\n"}),
		start: startNetworkManager, then: []string{`nmcli --wait 60 connection up other`, networkManagerUp, `nmcli --wait 60 connection up other; systemctl restart NetworkManager`},
	},
	{
		name: "networkd with IPv6 alone", packages: base, prefixes: []string{"fd01:", "fd02:"},
		files: replaced(networkd, "DHCP=ipv4\n", ""), start: startNetworkd, then: []string{`networkctl reconfigure wan2`, `networkctl down wan2; networkctl up wan2`},
	},
	{
		name: "networkd with IPv6 alone on the second link", packages: base, prefixes: []string{"10.1.0.", "fd01:", "fd02:"},
		files: beside(networkd, map[string]string{"/run/systemd/network/wan2.network.d/a.conf": "[Network]\nDHCP=no\n"}), start: startNetworkd, then: []string{`networkctl reconfigure wan2`},
	},
	{
		name: "networkd and NetworkManager, a link each",
		files: map[string]string{
			"/run/systemd/network/wan1.network":                        expand(networkd["/run/systemd/network/wan{N}.network"], "1"),
			"/etc/NetworkManager/conf.d/test.conf":                     "[main]\nplugins=keyfile\nno-auto-default=*\n[keyfile]\nunmanaged-devices=interface-name:wan1\n",
			"/etc/NetworkManager/system-connections/wan2.nmconnection": expand(networkManager["/etc/NetworkManager/system-connections/wan{N}.nmconnection"], "2"),
		},
		start: startNetworkManager + "\n" + startNetworkd, then: []string{reconnect, `networkctl reconfigure wan1`, `systemctl restart systemd-networkd NetworkManager`},
	},
	{
		name: "NetworkManager with a link that is never the default", prefixes: inet, start: startNetworkManager,
		files: networkManager, // the first time wan2 is as wan1
		then:  []string{`nmcli connection modify wan2 ipv4.never-default yes ipv6.never-default yes; nmcli device reapply wan2`, reconnect, `systemctl restart table-allocator-watch`},
	},
	{
		name: "networkd with a table for the second link", packages: base, prefixes: inet,
		files: beside(networkd, map[string]string{"/run/systemd/network/wan2.network.d/a.conf": "[DHCPv4]\nRouteTable=77\n[IPv6AcceptRA]\nRouteTable=77\n[RoutingPolicyRule]\nFrom=10.2.0.0/24\nTable=77\nPriority=77\n"}),
		start: startNetworkd, then: []string{`networkctl reconfigure wan2`},
	},
	{
		name: "NetworkManager with a bridge", files: map[string]string{
			"/etc/NetworkManager/conf.d/test.conf":                       networkManager["/etc/NetworkManager/conf.d/test.conf"],
			"/etc/NetworkManager/system-connections/wan{N}.nmconnection": "[connection]\nid=wan{N}\ntype=ethernet\ninterface-name=wan{N}\nmaster=br{N}\nslave-type=bridge\n",
			"/etc/NetworkManager/system-connections/br{N}.nmconnection": "[connection]\nid=br{N}\ntype=bridge\ninterface-name=br{N}\nautoconnect-slaves=1\n[bridge]\nstp=false\n" +
				"[ipv4]\nmethod=auto\nroute-metric={N}00\n[ipv6]\nmethod=auto\naddr-gen-mode=eui64\nip6-privacy=0\nroute-metric={N}00\n",
		},
		start: startNetworkManager, then: []string{`nmcli --wait 60 connection down br2; until nmcli --wait 60 connection up br2; do sleep 1; done`},
	},
	{
		name: "the kernel's IPv6, with routes of short lives", packages: base, prefixes: []string{"fd01:", "fd02:"}, brief: true,
		start: `for n in 1 2; do sysctl -qw net.ipv6.conf.wan$n.accept_ra=2; ip link set wan$n down; ip link set wan$n up; done`,
		then:  []string{silence + `ip link set wan2 down; ip link set wan2 up`, `systemctl restart table-allocator-watch`},
	},
	{
		name: "networkd's IPv6, with routes of short lives", packages: base, prefixes: []string{"fd01:", "fd02:"}, brief: true,
		files: networkd, start: startNetworkd, then: []string{silence, `networkctl reconfigure wan2`},
	},
	{
		name: "NetworkManager's IPv6, with routes of short lives", prefixes: []string{"fd01:", "fd02:"}, brief: true,
		files: networkManager, start: startNetworkManager, then: []string{silence, reconnect},
	},
}

// silence keeps the routers of wan2 from the host until its default route has ended.
const silence = `nft add table netdev silence; nft 'add chain netdev silence in { type filter hook ingress device wan2 priority 0; }'; nft add rule netdev silence in icmpv6 type nd-router-advert drop
	while ip -6 route show default dev wan2 | grep -q default; do sleep 0.1; done; nft delete table netdev silence; `

// replaced has other text in files.
func replaced(files map[string]string, old, now string) map[string]string {
	all := make(map[string]string)
	for path, text := range files {
		all[path] = strings.ReplaceAll(text, old, now)
	}
	return all
}
