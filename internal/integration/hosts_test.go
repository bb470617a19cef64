//go:build integration

package integration

import (
	"maps"
	"slices"
	"strings"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// Machines with programs that configure networks. Some conflict with others, so there are four kinds of machines.
var (
	managers = slices.Concat(base, []string{"network-manager", "netplan.io", "systemd-resolved", "ifupdown", "dhcpcd-base", "isc-dhcp-client",
		"udhcpc", "ppp", "firewalld", "ufw", "keepalived", "bird2", "frr", "mptcpd", "prometheus", "wireguard-tools", "wireguard-go", "dnsmasq-base", "iputils-ping", "socat"})
	clouds  = slices.Concat(base, []string{"ifupdown2", "isc-dhcp-client", "cloud-init", "netplan.io", "amazon-ec2-net-utils", "ansible-core", "python3-apt", "podman", "netavark", "aardvark-dns", "crun", "mptcpd", "mptcpd-plugins"})
	engines = slices.Concat(base, []string{"docker.io", "docker-cli"})
	nextUp  = slices.Concat(base, []string{"ifupdown-ng", "isc-dhcp-client", "dhcpcd-base", "connman", "openvpn", "openssl"})
)

// suites are the releases of Debian.
var suites = []string{"bookworm", "trixie"}

// roots are those of all machines.
func roots() (all []nettest.Debian) {
	for _, suite := range suites {
		for _, packages := range [][]string{base, managers, clouds, engines, nextUp} {
			all = append(all, debian(suite, packages))
		}
	}
	return append(all, debian("trixie", programs))
}

// debian is a root with those of the packages that a release has.
func debian(suite string, packages []string) nettest.Debian {
	if suite == "bookworm" { // docker.io has the command
		packages = slices.DeleteFunc(slices.Clone(packages), func(name string) bool { return name == "docker-cli" })
	}
	return nettest.Debian{Suite: suite, Packages: packages}
}

// networkd configures both uplinks.
var networkd = map[string]string{"/run/systemd/network/wan{N}.network": "[Match]\nName=wan{N}\n[Network]\nDHCP=ipv4\nIPv6AcceptRA=yes\n[DHCPv4]\nRouteMetric={N}00\n[IPv6AcceptRA]\nRouteMetric={N}00\n"}

// beside adds files to those of a program that configures links.
func beside(manager, files map[string]string) map[string]string {
	all := maps.Clone(manager)
	maps.Copy(all, files)
	return all
}

const startNetworkd = "systemctl start systemd-networkd\n"

// inet are the addresses of both uplinks in IPv4.
var inet = []string{"10.1.0.", "10.2.0."}

var neighbours = []neighbour{
	{
		name: "networkd", packages: base, files: networkd, start: startNetworkd,
		then: []string{`systemctl restart systemd-networkd`, `networkctl reload; networkctl reconfigure wan2`, `networkctl renew wan1`},
	},
	{
		name: "a read-only root", packages: base, files: networkd,
		start: `for dir in etc home opt root srv usr; do mount --bind /$dir /$dir; mount -o remount,bind,ro /$dir; done; if touch /usr/new || touch /etc/new; then exit 1; fi
			systemctl restart table-allocator-server table-allocator-watch; ` + startNetworkd,
		then: []string{`systemctl restart table-allocator-server`, `
			systemd-run --quiet --wait --pipe table-allocator-client run wan2 curl --silent --max-time 5 http://` + nettest.Far4 + `/ | grep "^10[.]2[.]"
			systemctl start table-allocator-netns; table-allocator-client netns add work -i wan2 --resolv 192.0.2.53
			systemd-run --quiet --wait --pipe table-allocator-client netns exec work curl --silent --max-time 5 http://` + nettest.Far4 + `/ | grep "^10[.]2[.]"; table-allocator-client netns del work`},
	},
	{
		name:  "netplan",
		files: map[string]string{"/etc/netplan/wan{N}.yaml": "network:\n  version: 2\n  renderer: networkd\n  ethernets:\n    wan{N}: { dhcp4: true, accept-ra: true, dhcp4-overrides: { route-metric: {N}00 } }\n"},
		start: `netplan generate; systemctl start systemd-networkd`,
		// One after the other: networkd 252 that reconfigures a link twice at once may lose its address for a lease's length.
		then: []string{`netplan generate; networkctl reload`, `networkctl reconfigure wan1`, `systemctl restart systemd-networkd`},
	},
	{
		name: "NetworkManager", files: networkManager, start: startNetworkManager,
		then: []string{`nmcli device reapply wan2`, reconnect, `systemctl restart NetworkManager`},
	},
	{
		name: "NetworkManager by its hook", hooks: true, files: networkManager, prefixes: inet,
		start: startNetworkManager,
		then:  []string{reconnect, `systemctl restart NetworkManager`},
	},
	{
		name: "ifupdown with dhcpcd", files: withDhcpcd, start: `rm /sbin/dhclient /sbin/udhcpc; ifup wan1 wan2`,
		then: []string{ifupDhcpcd},
	},
	{
		name: "ifupdown with dhcpcd by its hook", hooks: true, files: withDhcpcd, start: `rm /sbin/dhclient /sbin/udhcpc; ifup wan1 wan2`,
		then: []string{ifupDhcpcd},
	},
	{
		name: "ifupdown with dhclient", files: interfaces, start: `rm /sbin/dhcpcd /sbin/udhcpc; ifup wan1 wan2`,
		then: []string{`ifdown wan2; ifup wan2`},
	},
	{
		name: "ifupdown with dhclient by its hook", hooks: true, prefixes: inet, files: interfaces, start: `rm /sbin/dhcpcd /sbin/udhcpc; ifup wan1 wan2`,
		then: []string{`ifdown wan2; ifup wan2`},
	},
	{
		name: "dhcpcd", files: nodev, start: `systemd-run --unit=dhcpcd dhcpcd --nobackground --noarp wan1 wan2`,
		then: []string{`dhcpcd --rebind wan2`, restartDhcpcd},
	},
	{
		name: "dhcpcd by its hook", hooks: true, files: nodev, start: `systemd-run --unit=dhcpcd dhcpcd --nobackground --noarp wan1 wan2`,
		then: []string{`dhcpcd --rebind wan2`, restartDhcpcd},
	},
	{
		name: "udhcpc by its hook", hooks: true, prefixes: inet,
		start: `for n in 1 2; do systemd-run --unit=udhcpc$n udhcpc -f -i wan$n -s /usr/lib/table-allocator/udhcpc; done`,
		then:  []string{`systemctl stop udhcpc2; ip address flush dev wan2; systemd-run --unit=udhcpc3 udhcpc -f -i wan2 -s /usr/lib/table-allocator/udhcpc`},
	},
	{
		name: "ifupdown with aliases", files: aliases, prefixes: aliased, start: `ifup wan1 wan2 wan1:1 wan2:1`,
		then: []string{`ifdown wan2:1; ifup wan2:1`},
	},
	{
		name: "ifupdown with aliases by its hook", hooks: true, files: aliases, prefixes: aliased, start: `ifup wan1 wan2 wan1:1 wan2:1`,
		then: []string{`ifdown wan2:1; ifup wan2:1`},
	},
	{name: "ifupdown2", packages: clouds, files: interfaces, start: `mkdir -p /run/network; ifup wan1 wan2`, then: []string{`ifreload -a`, `ifdown wan2; ifup wan2`}},
	{name: "ifupdown-ng", packages: nextUp, files: interfaces, start: ng + `ng up wan1 wan2`, then: []string{ng + `ng down wan2; ng up wan2`}},
	{
		name: "ifupdown2 by its hook", packages: clouds, hooks: true, prefixes: statics,
		files: map[string]string{"/etc/network/interfaces": twoFamilies("inet static", "inet6 static")}, start: `mkdir -p /run/network; ifup wan1 wan2`,
		then: []string{`ifreload -a`, `ifdown wan2; ifup wan2`},
	},
	{
		name: "ifupdown2 without families by its hook", packages: clouds, hooks: true, prefixes: statics,
		files: map[string]string{"/etc/network/interfaces": twoFamilies("", "")}, start: `mkdir -p /run/network; ifup wan1 wan2`,
		then: []string{`ifdown wan2; ifup wan2`},
	},
	{
		name: "ifupdown-ng by its hook", packages: nextUp, hooks: true, prefixes: statics,
		files: map[string]string{"/etc/network/interfaces": twoFamilies("", "")}, start: ng + `ng up wan1 wan2`,
		then: []string{ng + `ng down wan2; ng up wan2`},
	},
	{
		name: "connman", packages: nextUp, suites: suites[1:], files: connman, start: `systemctl start connman` + "\n" + connmanGateway,
		then: []string{`connmanctl config $(connmanctl services | grep -o "ethernet_$(tr -d : </sys/class/net/wan1/address)[^ ]*") ipv4 dhcp`, `systemctl restart table-allocator-watch`},
	},
	{
		name: "networkd with bridges", packages: base, files: bridged, start: portsWithout6 + startNetworkd,
		then: []string{`networkctl reconfigure br2`, `networkctl reconfigure wan2`, `systemctl restart systemd-networkd`},
	},
	{
		name: "ifupdown2 with bridges", packages: clouds, start: portsWithout6 + `mkdir -p /run/network; ifup wan1 wan2 br1 br2`,
		files: map[string]string{"/etc/network/interfaces": "auto lo\niface lo inet loopback\niface wan1\niface wan2\niface br1 inet dhcp\n\tbridge-ports wan1\niface br2 inet dhcp\n\tbridge-ports wan2\n"},
		then:  []string{`ifdown br2; ifup br2`, `systemctl restart table-allocator-watch`},
	},
	{
		name: "firewalld", files: networkd, start: startNetworkd + `systemctl start firewalld`,
		then: []string{`until firewall-cmd --reload; do sleep 1; done`, `systemctl stop firewalld`},
	},
	{
		name: "ufw", files: networkd, start: startNetworkd + `ufw --force enable; ufw status | grep -q "Status: active"`,
		then: []string{`ufw reload`},
	},
	{
		name: "keepalived", start: startNetworkd + `systemctl start keepalived`,
		files: beside(networkd, map[string]string{"/etc/keepalived/keepalived.conf": `
			vrrp_instance one { state MASTER
				interface wan1
				virtual_router_id 1
				virtual_ipaddress { 10.1.0.200/32 } }`}),
		then: []string{`until ip address show wan1 | grep 10.1.0.200; do sleep 0.1; done`, `systemctl restart keepalived`},
	},
	{
		name: "keepalived with addresses of their own links", start: startNetworkd + `systemctl start keepalived`,
		files: beside(networkd, map[string]string{"/etc/keepalived/keepalived.conf": `
			vrrp_instance one { state MASTER
				interface wan1
				virtual_router_id 1
				use_vmac vrrp.1
				virtual_ipaddress { 10.1.0.200/32 } }
			vrrp_instance two { state MASTER
				interface wan2
				virtual_router_id 2
				use_vmac vrrp.2
				virtual_ipaddress { 10.2.0.200/32 } }
			vrrp_instance six { state MASTER
				interface wan2
				virtual_router_id 2
				use_vmac vrrp6.2
				virtual_ipaddress {
					fe80::200
					fd02::200/128
				} }`}),
		then:     []string{`systemctl restart keepalived`, `networkctl reconfigure wan2`},
		prefixes: []string{"10.1.0.200", "10.2.0.200", "fd02::200", "10.1.0.", "10.2.0.", "fd01:", "fd02:"},
	},
	{
		name: "NetworkManager with MPTCP", files: withEndpoints(networkManager), start: `sysctl -qw net.mptcp.enabled=1` + "\n" + startNetworkManager,
		then: []string{wantEndpoints, reconnect + "\n" + wantEndpoints},
	},
	{
		name: "mptcpd", packages: clouds, suites: suites[1:], files: withEndpoints(networkd), start: startNetworkd + wantEndpoints + "\nsystemctl start mptcp", // which has none for addresses that were there
		then: []string{wantEndpoints, `systemctl restart table-allocator-watch` + "\n" + wantEndpoints},
	},
	{
		name: "bird", start: startNetworkd + `systemctl start bird`,
		files: beside(networkd, map[string]string{"/etc/bird/bird.conf": `
			router id 10.1.0.99;
			protocol device { }
			ipv4 table further;
			protocol kernel { ipv4 { export all; }; }
			protocol kernel second { ipv4 { table further; export all; }; kernel table 777; }
			protocol static { ipv4; route 10.99.0.0/16 via 10.1.0.1; }
			protocol static third { ipv4 { table further; }; route 10.98.0.0/16 via 10.2.0.1; }`}),
		then:  []string{`until birdc configure; do sleep 0.1; done`, `systemctl restart bird; until ip route show table 777 | grep 10.98; do sleep 0.1; done; until ip route | grep 10.99; do sleep 0.1; done`},
		keeps: []string{"10.99.0.0/16 via 10.1.0.1 dev wan1 proto bird"},
	},
	{
		name: "FRR", start: startNetworkd + `chown frr: /etc/frr/frr.conf; systemctl start frr`,
		files: beside(networkd, map[string]string{"/etc/frr/frr.conf": "ip route 10.99.0.0/16 10.1.0.1\nip route 10.98.0.0/16 10.2.0.1 table 777\n"}),
		then:  []string{`until ip route show table 777 | grep 10.98; do sleep 0.1; done; until ip route | grep 10.99; do sleep 0.1; done`, `systemctl restart frr`},
	},
	{
		name: "containers", files: networkd, start: startNetworkd,
		then: []string{`
			sysctl -qw net.ipv4.ip_forward=1
			ip link add docker0 type bridge; ip address add 172.17.0.1/16 dev docker0; ip link set docker0 up
			ip netns add box; ip link add veth0 type veth peer name eth0 netns box; ip link set veth0 master docker0 up
			ip -n box address add 172.17.0.2/16 dev eth0; ip -n box link set eth0 up; ip -n box route add default via 172.17.0.1
			nft add table ip nat; nft add chain ip nat post "{ type nat hook postrouting priority srcnat; }"
			nft add rule ip nat post ip saddr 172.17.0.0/16 oifname != docker0 masquerade
			until ip netns exec box curl --silent --max-time 3 http://` + nettest.Far4 + `/ | grep "^10.1.0."; do sleep 0.1; done`},
	},
	{
		name: "podman", packages: clouds, suites: suites[1:], start: startNetworkd,
		files: beside(networkd, map[string]string{"/etc/containers/storage.conf": "[storage]\ndriver = \"vfs\"\nrunroot = \"/run/containers\"\ngraphroot = \"/var/lib/containers\"\n"}),
		then: []string{`mkdir /box; mount --bind / /box; podman run --detach --name box --network podman ` + contain + ` sleep 1000`,
			`podman run --rm --network podman ` + contain + asked,
			`podman network create further; podman run --rm --network further ` + contain + asked,
			`podman rm --force --time 0 box; podman network rm further`},
	},
	{
		name: "docker", packages: engines,
		files: beside(networkd, map[string]string{"/etc/docker/daemon.json": `{"storage-driver": "vfs"}`}),
		start: startNetworkd + `systemctl start docker; ` + importBox,
		then: []string{`docker run --rm box` + asked,
			`docker network create further; docker run --rm --network further box` + asked,
			`systemctl restart docker; docker run --rm box ` + asked + `; docker network rm further`},
	},
	{
		name: "rules of clouds and tunnels", files: networkd, start: startNetworkd,
		then: []string{`
			ip rule add priority 10002 from 10.2.0.99 lookup 10002; ip route add default via 10.2.0.1 dev wan2 table 10002
			ip rule add priority 5210 fwmark 0x80000/0xff0000 lookup main; ip rule add priority 5270 lookup 52
			ip -6 rule add priority 5210 fwmark 0x80000/0xff0000 lookup main; ip -6 rule add priority 5270 lookup 52
			ip link add tailscale0 type veth peer name far0; ip link set tailscale0 up; ip link set far0 up; ip route add 100.100.100.100 dev tailscale0 table 52`,
			`systemctl restart table-allocator-server table-allocator-watch`},
		keeps: []string{"10002:	from 10.2.0.99 lookup 10002", "5270:	from all lookup 52"},
	},
	{
		name: "ec2-net-utils", packages: clouds, start: startNetworkd,
		files: beside(networkd, map[string]string{"/run/systemd/network/wan{N}.network.d/ec2net_policy.conf": `
			[Network]
			DHCP=yes
			[Route]
			Table=1000{N}
			Gateway=_dhcp4
			[RoutingPolicyRule]
			From=10.{N}.0.77
			Priority=1000{N}
			Table=1000{N}`}),
		then:  []string{`systemctl restart systemd-networkd`},
		keeps: []string{"10001:	from 10.1.0.77 lookup 10001 proto static"},
	},
	{
		name: "cloud-init", packages: clouds,
		files: map[string]string{
			"/etc/cloud/cloud.cfg.d/99-test.cfg":    "datasource_list: [ NoCloud ]\nsystem_info: { network: { renderers: [ netplan ] } }\n",
			"/var/lib/cloud/seed/nocloud/meta-data": "instance-id: one\n",
			"/var/lib/cloud/seed/nocloud/user-data": "#cloud-config\n{}\n",
			"/var/lib/cloud/seed/nocloud/network-config": `version: 2
ethernets:
  wan1: { dhcp4: true, accept-ra: true, dhcp4-overrides: { route-metric: 100 } }
  wan2: { dhcp4: true, accept-ra: true, dhcp4-overrides: { route-metric: 200 }, routing-policy: [ { from: 10.2.0.77, table: 101, priority: 101 } ] }
`,
		},
		start: `cloud-init init --local; netplan generate; systemctl start systemd-networkd`,
		then:  []string{`networkctl reconfigure wan2`},
		keeps: []string{"101:	from 10.2.0.77 lookup 101"},
	},
}

// connman configures both uplinks. It gives main the default route of one alone, and status says so of the other; the client gets
// its gateway, and the watch goes on with that. Which of the two has the route changes, so both get their gateway.
var connman = map[string]string{"/etc/connman/main.conf": "[General]\nNetworkInterfaceBlacklist=lo\n"}

const connmanGateway = `until [ "$(table-allocator-client status --no-legend | grep -c " 10[.]")" = 2 ]; do sleep 0.1; done
	table-allocator-client status --no-legend | awk '$2 ~ /^10[.]/ { split($2, a, "."); print $1, $2, "10." a[2] ".0.1" }' | while read -r ifname addr gateway; do
		table-allocator-client -4 -a "$addr" -i "$ifname" --routes copy --gateway "$gateway"
	done`

// bridged makes a bridge of each uplink, as hosts of virtual machines have them.
var bridged = map[string]string{
	"/run/systemd/network/br{N}.netdev":   "[NetDev]\nName=br{N}\nKind=bridge\n",
	"/run/systemd/network/wan{N}.network": "[Match]\nName=wan{N}\n[Network]\nBridge=br{N}\n",
	"/run/systemd/network/br{N}.network":  strings.ReplaceAll(networkd["/run/systemd/network/wan{N}.network"], "wan", "br"),
}

// portsWithout6 takes the addresses of routers from links that become ports. networkd 252 leaves them there.
const portsWithout6 = `for n in 1 2; do sysctl -qw "net.ipv6.conf.wan$n.disable_ipv6=1"; done; `

// ng is the function ng in scripts: ifup or ifdown of ifupdown-ng, by the names that the releases have for them.
const ng = `mkdir -p /run/network; ng() { command=if$1; shift; "$(command -v "$command-ng" || echo "$command")" "$@"; }; `

// interfaces is what ifupdown and its siblings read.
var interfaces = map[string]string{"/etc/network/interfaces": "auto lo wan1 wan2\niface lo inet loopback\niface wan1 inet dhcp\niface wan2 inet dhcp\n"}

// twoFamilies is a file of ifupdown's successors with the addresses of statics, two of each family and link. A stanza without a family may have both.
func twoFamilies(inet, inet6 string) string {
	text := "auto lo wan1 wan2\niface lo inet loopback\n"
	for _, n := range []string{"1", "2"} {
		text += expand("iface wan{N} "+inet+"\n\taddress 10.{N}.0.2/24\n\taddress 10.{N}.0.3/24\n\tgateway 10.{N}.0.1\n\tmetric {N}00\n", n)
		if inet6 != "" {
			text += expand("iface wan{N} "+inet6+"\n", n)
		}
		text += expand("\taddress fd0{N}::2/64\n\taddress fd0{N}::3/64\n\tgateway fd0{N}::1\n", n)
	}
	return text
}

var statics = []string{"10.1.0.2", "10.1.0.3", "10.2.0.2", "10.2.0.3", "fd01::2", "fd01::3", "fd02::2", "fd02::3"}

// withEndpoints has the watch add MPTCP endpoints where no other program does.
func withEndpoints(files map[string]string) map[string]string {
	all := maps.Clone(files)
	all["/etc/table-allocator/watch.json"] = `{"links": [{"ifname": "wan*", "mptcp": true}]}`
	return all
}

// wantEndpoints waits until there are endpoints, one for each address.
const wantEndpoints = `until ip mptcp endpoint | grep -q "^10.1.0" && ip mptcp endpoint | grep -q "^10.2.0"; do sleep 0.1; done
	ip mptcp endpoint; [ -z "$(ip mptcp endpoint | cut -d" " -f1 | sort | uniq -d)" ]`

// contain is a container with the files of the machine, which asks the Internet by the first uplink.
const (
	contain = `--cgroups=disabled --security-opt seccomp=unconfined --rootfs /box`
	asked   = ` /usr/bin/curl --silent --max-time 3 --retry 20 --retry-all-errors http://` + nettest.Far4 + `/ | grep "^10.1.0."`
)

// importBox gives docker an image with a program of the machine and its libraries.
const importBox = `tar -C / -c --dereference $(ldd /usr/bin/curl | grep -o "/[^ ]*" | cut -c2-) usr/bin/curl | docker import - box`

// aliases are addresses with a label, which have the gateway of their link.
var aliases = map[string]string{"/etc/network/interfaces": `auto lo
iface lo inet loopback
iface wan1 inet static
	address 10.1.0.2/24
	gateway 10.1.0.1
	metric 100
iface wan1:1 inet static
	address 10.1.0.77/32
iface wan2 inet static
	address 10.2.0.2/24
	gateway 10.2.0.1
	metric 200
iface wan2:1 inet static
	address 10.2.0.77/32
`}

// aliased are their addresses and those of their links.
var aliased = []string{"10.1.0.2", "10.1.0.77", "10.2.0.2", "10.2.0.77"}

// withDhcpcd is that for dhcpcd, which also has its own file.
var withDhcpcd = map[string]string{"/etc/network/interfaces": interfaces["/etc/network/interfaces"], "/etc/dhcpcd.conf": nodev["/etc/dhcpcd.conf"]}

// nodev: no udevd says that the links are there.
var nodev = map[string]string{"/etc/dhcpcd.conf": "nodev\nnoarp\nslaac hwaddr\noption subnet_mask, routers, domain_name_servers, classless_static_routes\n"}

// networkManager has a connection for each uplink.
var networkManager = map[string]string{
	"/etc/NetworkManager/conf.d/test.conf": "[main]\nplugins=keyfile\nno-auto-default=*\n[keyfile]\nunmanaged-devices=none\n",
	"/etc/NetworkManager/system-connections/wan{N}.nmconnection": "[connection]\nid=wan{N}\ntype=ethernet\ninterface-name=wan{N}\n" +
		"[ipv4]\nmethod=auto\nroute-metric={N}00\n[ipv6]\nmethod=auto\naddr-gen-mode=eui64\nip6-privacy=0\nroute-metric={N}00\n",
}

// NetworkManager leaves links alone that are up when it starts.
const startNetworkManager = `ip link set wan1 down; ip link set wan2 down; systemctl enable --quiet NetworkManager-dispatcher; systemctl start NetworkManager; nm-online --quiet --timeout 100 || :`

// reconnect takes a connection down, unless it is down or on its way, and up.
const reconnect = `nmcli --wait 60 connection down wan2 || :; ` + networkManagerUp

// ifupDhcpcd configures wan2 again. dhcpcd 9 may lose the signal of ifdown; it lives on then, and the next one leaves the link to it.
const ifupDhcpcd = `ifdown wan2; pkill -KILL -f '[d]hcpcd: .*wan2' || :; ifup wan2`

// restartDhcpcd stops dhcpcd and starts another one. dhcpcd 9 may lose the SIGTERM that comes while it rebinds.
const restartDhcpcd = `systemctl stop --no-block dhcpcd
	while systemctl is-active dhcpcd | grep -Eq '^(active|deactivating)'; do systemctl kill dhcpcd || :; sleep 1; done
	systemd-run --unit=dhcpcd2 dhcpcd --nobackground --noarp wan1 wan2`
