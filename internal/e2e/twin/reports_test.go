package twin

import (
	"fmt"
	"strings"
	"testing"
)

// TestTwinReports has hosts as people report them, which no seed makes up. Each lives through its changes with copy, with
// move and with main first.
func TestTwinReports(t *testing.T) {
	modes := []watchSettings{{Routes: "copy", OnLoss: "fallback"}, {Routes: "move", OnLoss: "block"}, {Routes: "copy", OnLoss: "block", SpecificFirst: true}}
	var all []*host
	for _, r := range reports {
		if refused := r.refused(t); len(refused) > 0 {
			t.Errorf("%s: the kernel refuses %q", r.name, refused)
		}
		for _, mode := range modes {
			all = append(all, r.host(mode))
		}
	}
	sum, err := live(all, *workers, func(h *host, stock *twins) (finding, error) { return life(h, stock, patience) })
	if err != nil {
		t.Error(err)
	}
	t.Logf("%d hosts, %d answers, %d wrong in %d hosts", sum.hosts, sum.answers, sum.wrong, sum.bad)
	report(t, sum)
}

// reported is a host as somebody reports it, and its changes: lines for ip, and "uplink NAME" for a new link. A "default"
// is IPv4's.
type reported struct {
	name    string
	build   string
	changes []string
}

// host is the host in a mode. Its watch is killed before its last change.
func (r reported) host(mode watchSettings) *host {
	h := &host{watch: mode, phases: []string{atStart, eachChange, afterKill, atEnd}}
	h.watch.Ifname, h.watch.exclude = "*", []string{"lo"}
	index := 10
	for _, c := range linesToCommands(r.build, &index) {
		h.build = append(h.build, step{name: r.name, commands: []string{c}})
	}
	for i, text := range r.changes {
		phase := eachChange
		if i == len(r.changes)-1 {
			phase = afterKill
		}
		h.changes = append(h.changes, step{name: r.name, commands: linesToCommands(text, &index), phase: phase})
	}
	return h
}

// refused are the commands that fail on a host without the product.
func (r reported) refused(t *testing.T) (refused []string) {
	t.Helper()
	n, err := newNamespace("reported")
	if err != nil {
		t.Fatal(err)
	}
	defer n.close()
	h := r.host(watchSettings{})
	commands := h.buildCommands()
	for _, s := range h.changes {
		commands = append(commands, s.commands...)
	}
	failed, err := n.run(commands)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range failed {
		refused = append(refused, commands[i])
	}
	return refused
}

// linesToCommands are the commands of lines. index is that of the next link.
func linesToCommands(text string, index *int) (commands []string) {
	for line := range strings.Lines(text) {
		line = strings.ReplaceAll(strings.TrimSpace(line), "default", anywhere(true))
		name, isLink := strings.CutPrefix(line, "uplink ")
		switch {
		case line == "":
		case isLink:
			commands = append(commands, fmt.Sprintf("ip link add %[1]s index %[2]d address 02:00:00:00:00:%02[2]x type veth peer name x%[1]s index %[3]d", name, *index, 1000+*index),
				"ip link set "+name+" addrgenmode eui64", "ip link set "+name+" up", "ip link set x"+name+" up")
			*index++
		default:
			commands = append(commands, "ip "+line)
		}
	}
	return commands
}

var reports = []reported{
	{"cloud hosts whose uplinks have one gateway, which is in no network", `
		uplink eth0
		address add 203.0.113.10/32 dev eth0
		route add 172.31.1.1 dev eth0 scope link
		route add default via 172.31.1.1 dev eth0 metric 100
		uplink eth1
		address add 198.51.100.20/32 dev eth1
		route add default via 172.31.1.1 dev eth1 metric 200 onlink
		address add 2001:db8:1::1/64 dev eth0 nodad
		route add ::/0 via fe80::1 dev eth0 metric 1024 onlink
		address add 2001:db8:2::1/128 dev eth1 nodad
		route append ::/0 via fe80::1 dev eth1 metric 1024 onlink`, []string{
		`address add 203.0.113.77/32 dev eth0`,
		`route del default via 172.31.1.1 dev eth1 metric 200
		route add default via 172.31.1.1 dev eth1 metric 50 onlink`,
		`address del 203.0.113.77/32 dev eth0
		address add 203.0.113.78/32 dev eth0`,
	}},
	{"cloud networks of one provider in one supernet, with its metadata address", `
		uplink eth0
		address add 10.0.1.5/24 dev eth0 metric 100
		route add default via 10.0.1.1 dev eth0 proto dhcp src 10.0.1.5 metric 100
		route add 169.254.169.254 via 10.0.1.1 dev eth0 proto dhcp src 10.0.1.5 metric 100
		route add 10.0.0.2 via 10.0.1.1 dev eth0 proto dhcp src 10.0.1.5 metric 100
		uplink eth1
		address add 10.0.2.5/24 dev eth1 metric 200
		route add default via 10.0.2.1 dev eth1 proto dhcp src 10.0.2.5 metric 200
		route add 169.254.169.254 via 10.0.2.1 dev eth1 proto dhcp src 10.0.2.5 metric 200
		route add 10.0.0.2 via 10.0.2.1 dev eth1 proto dhcp src 10.0.2.5 metric 200`, []string{
		`address add 10.0.2.6/24 dev eth1 metric 200`,
		`address add 10.0.2.128/28 dev eth1 noprefixroute`,
		`route replace default via 10.0.2.1 dev eth1 proto dhcp src 10.0.2.6 metric 200`,
	}},
	{"an address of a provider goes that was the source of the default for another one", `
		uplink wan0
		address add 10.1.0.179/16 dev wan0
		route append default via 10.1.0.158 dev wan0 metric 100
		uplink wan1
		address add 172.16.0.241/32 dev wan1
		address add 198.51.100.89/32 dev wan1
		route append default via inet6 fe80::77 dev wan1 metric 100 src 172.16.0.241`, []string{
		`address del 172.16.0.241/32 dev wan1`,
		`route append default via inet6 fe80::77 dev wan1 metric 100`,
	}},
	{"two routers with one metric, and the address for one of them goes", `
		uplink wan0
		address add 172.21.0.107/20 dev wan0
		address add 10.201.0.49/16 dev wan0
		route append default via 172.21.0.160 dev wan0 metric 100
		route append default via 10.201.0.90 dev wan0 metric 100`, []string{
		`address del 172.21.0.107/20 dev wan0`,
	}},
	{"one router of two takes the place of the other", `
		uplink wan0
		address add 203.0.113.87/27 dev wan0
		address add 10.202.0.127/16 dev wan0
		route add default via 203.0.113.82 dev wan0 metric 122 src 203.0.113.87
		route add default via 10.202.0.62 dev wan0 metric 141 src 10.202.0.127`, []string{
		`route replace default via 203.0.113.82 dev wan0 metric 141`,
	}},
	{"PPP and a cable", `
		uplink wan0
		address add 192.168.1.7/24 dev wan0
		route add default via 192.168.1.1 dev wan0 metric 100
		tuntap add dev ppp0 mode tun
		link set ppp0 addrgenmode none
		link set ppp0 up
		address add 100.64.7.9 peer 100.64.0.1/32 dev ppp0
		route add default dev ppp0 scope link metric 50`, []string{
		`address add 100.64.7.10 peer 100.64.0.1/32 dev ppp0
		address del 100.64.7.9 peer 100.64.0.1/32 dev ppp0
		route append default dev ppp0 scope link metric 50`,
		`route replace default dev ppp0 scope link metric 150`,
		`link del ppp0`,
	}},
	{"a VPN of wg-quick, with its rules and table", `
		uplink wan0
		address add 192.0.2.2/24 dev wan0
		route add default via 192.0.2.1 dev wan0 metric 100
		uplink wan1
		address add 198.51.100.2/24 dev wan1
		route add default via 198.51.100.1 dev wan1 metric 200
		tuntap add dev wg0 mode tun
		link set wg0 addrgenmode none
		link set wg0 up
		address add 10.66.0.2/32 dev wg0
		route add 10.66.0.0/24 dev wg0
		route add default dev wg0 table 51820
		rule add not fwmark 51820 table 51820 pref 32764
		rule add table main suppress_prefixlength 0 pref 32763`, []string{
		`route add 10.0.0.0/8 dev wg0`,
		`rule del pref 32764
		rule del pref 32763
		link del wg0`,
	}},
	{"containers and pods", `
		uplink wan0
		address add 172.17.4.2/12 dev wan0
		route add default via 172.16.0.1 dev wan0 metric 100
		uplink wan1
		address add 10.2.0.2/8 dev wan1
		route add default via 10.0.0.1 dev wan1 metric 200
		link add docker0 index 40 type bridge
		address add 172.17.0.1/16 dev docker0
		link set docker0 up
		link add cni0 index 41 type bridge
		address add 10.244.0.1/24 dev cni0
		link set cni0 up
		uplink caliab12
		route add 10.244.1.5 dev caliab12 scope link
		route add blackhole 10.244.1.0/26 proto bird
		route add 10.244.2.0/26 via 10.2.0.3 dev wan1 proto bird onlink
		route add 10.244.3.0/26 via 172.17.4.3 dev wan0 proto bird onlink`, []string{
		`uplink calicd34
		route add 10.244.1.6 dev calicd34 scope link`,
		`route replace 10.244.2.0/26 via 172.17.4.3 dev wan0 proto bird onlink`,
		`route del 10.244.1.5 dev caliab12 scope link
		link del caliab12`,
		`link add br-0123456789ab index 42 type bridge
		address add 172.18.0.1/16 dev br-0123456789ab
		link set br-0123456789ab up`,
	}},
	{"a routing daemon with groups of next hops", `
		uplink wan0
		address add 192.0.2.2/24 dev wan0
		uplink wan1
		address add 198.51.100.2/24 dev wan1
		nexthop add id 1 via 192.0.2.1 dev wan0 proto zebra
		nexthop add id 2 via 198.51.100.1 dev wan1 proto zebra
		nexthop add id 3 via 192.0.2.9 dev wan0 proto zebra
		nexthop add id 10 group 1/2 proto zebra
		nexthop add id 11 group 2/3 proto zebra
		route add default nhid 10 proto bgp metric 20
		route add 10.60.0.0/16 nhid 11 proto bgp metric 20
		route add 10.61.0.0/16 nhid 3 proto bgp metric 20`, []string{
		`nexthop replace id 10 group 2 proto zebra`,
		`nexthop replace id 10 group 1/2/3 proto zebra`,
		`nexthop del id 3`,
		`nexthop replace id 1 via 192.0.2.77 dev wan0 proto zebra`,
		`nexthop replace id 2 via 192.0.2.78 dev wan0 proto zebra`,
		`nexthop replace id 2 via 198.51.100.7 dev wan1 proto zebra`,
	}},
	{"next hops of another family, and a gateway behind a gateway", `
		uplink wan0
		address add 192.0.2.2/24 dev wan0
		address add 2001:db8:1::2/64 dev wan0 nodad
		uplink wan1
		address add 198.51.100.2/31 dev wan1
		address add 2001:db8:2::2/64 dev wan1 nodad
		nexthop add id 1 via 2001:db8:1::1 dev wan0
		route add default nhid 1 metric 20
		route add default via inet6 fe80::9 dev wan1 metric 30
		route add ::/0 nhid 1 metric 20
		route add ::/0 via fe80::9 dev wan1 metric 30`, []string{
		`nexthop replace id 1 via 2001:db8:1::7 dev wan0`,
		`route add 10.0.0.0/8 via inet6 2001:db8:2::1 dev wan1`,
		`nexthop del id 1`,
	}},
	{"tables of others for links, like those of VRFs", `
		uplink wan0
		address add 192.0.2.2/24 dev wan0
		route add default via 192.0.2.1 dev wan0
		uplink wan1
		address add 198.51.100.2/24 dev wan1
		route add default via 198.51.100.1 dev wan1 metric 10
		uplink lan0
		address add 10.5.0.1/24 dev lan0
		route add 10.5.0.0/24 dev lan0 table 10
		route add default via 198.51.100.9 dev wan1 table 10
		route add unreachable default metric 4278198272 table 10
		rule add iif lan0 lookup 10 pref 1000
		rule add oif lan0 lookup 10 pref 1000
		rule add from 10.5.0.0/24 lookup 10 pref 1001`, []string{
		`route replace default via 192.0.2.9 dev wan0 table 10`,
		`rule del iif lan0 lookup 10 pref 1000`,
	}},
	{"several advertised prefixes, one of them no longer preferred", `
		uplink wan0
		address add 2001:db8:1:1::2/64 dev wan0 nodad
		address add 2001:db8:1:2::2/64 dev wan0 nodad preferred_lft 0
		address add fd00:1::2/64 dev wan0 nodad
		route add ::/0 via fe80::1 dev wan0 proto ra metric 1024 expires 1800
		route add 2001:db8:99::/48 via fe80::2 dev wan0 proto ra metric 1024 expires 1800
		uplink wan1
		address add 2001:db8:2:1::2/128 dev wan1 nodad
		address add 2001:db8:2:2::2/64 dev wan1 nodad noprefixroute
		route append ::/0 via fe80::1 dev wan1 proto ra metric 1024 expires 1800
		route add 2001:db8:99::/48 via fe80::2 dev wan1 proto ra metric 2048 expires 1800`, []string{
		`address add 2001:db8:1:3::2/64 dev wan0 nodad`,
		`address del 2001:db8:1:1::2/64 dev wan0`,
		`route add 2001:db8:2:2::/64 dev wan1 proto ra metric 256 expires 1800`,
		`address add 2001:db8:2:1::3/128 dev wan1 nodad`,
	}},
	{"classless routes of DHCP", `
		uplink wan0
		address add 10.1.0.7/20 dev wan0
		route add default via 10.1.0.1 dev wan0
		route add 10.0.0.0/8 via 10.1.0.2 dev wan0
		route add 192.0.2.0/24 via 10.1.0.3 dev wan0
		route add 198.51.100.9 dev wan0 scope link
		uplink wan1
		address add 10.2.0.7/20 dev wan1
		route add default via 10.2.0.1 dev wan1 metric 5
		route add 10.0.0.0/8 via 10.2.0.2 dev wan1 metric 5
		route add 100.64.0.0/10 via 10.2.0.3 dev wan1`, []string{
		`route del 10.0.0.0/8 via 10.1.0.2 dev wan0`,
		`route add 10.0.0.0/9 via 10.1.0.4 dev wan0`,
		`address add 10.1.0.8/20 dev wan0`,
	}},
	{"defaults in one place", `
		uplink wan0
		address add 192.0.2.2/24 dev wan0
		route add default via 192.0.2.1 dev wan0
		uplink wan1
		address add 198.51.100.2/24 dev wan1
		route append default via 198.51.100.1 dev wan1
		uplink wan2
		address add 203.0.113.2/24 dev wan2
		route append default via 203.0.113.1 dev wan2
		route append default via 203.0.113.9 dev wan2`, []string{
		`route prepend 10.0.0.0/8 via 192.0.2.7 dev wan0
		route append 10.0.0.0/8 via 198.51.100.7 dev wan1`,
		`route del 10.0.0.0/8 via 192.0.2.7 dev wan0`,
		`address add 203.0.113.3/24 dev wan2`,
	}},
	{"two uplinks in one network", `
		uplink wan0
		address add 192.168.1.5/24 dev wan0 metric 100
		route add default via 192.168.1.1 dev wan0 metric 100
		uplink wan1
		address add 192.168.1.6/24 dev wan1 metric 200
		route add default via 192.168.1.1 dev wan1 metric 200
		route add 192.168.2.0/24 via 192.168.1.254 dev wan0`, []string{
		`route add 192.168.2.0/24 via 192.168.1.254 dev wan1 metric 10`,
		`route del 192.168.2.0/24 via 192.168.1.254 dev wan0`,
		`address add 192.168.1.7/24 dev wan1 metric 200`,
	}},
	{"a network within that of another uplink", `
		uplink wan0
		address add 10.0.0.5/8 dev wan0
		route add default via 10.0.0.1 dev wan0 metric 100
		uplink wan1
		address add 10.7.0.5/24 dev wan1
		route add default via 10.7.0.1 dev wan1 metric 200
		route add 10.7.1.0/24 via 10.7.0.9 dev wan1`, []string{
		`route add 10.7.0.128/25 via 10.0.0.9 dev wan0`,
		`address add 10.7.0.200/32 dev wan0`,
		`route replace 10.7.1.0/24 via 10.0.0.77 dev wan0`,
	}},
	{"a LAN within the network of an uplink, whose address goes", `
		uplink wan0
		address add 2001:db8:1::5/56 dev wan0 nodad
		route add ::/0 via 2001:db8:1::1 dev wan0 metric 100
		address add 10.1.0.5/16 dev wan0
		route add default via 10.1.0.1 dev wan0 metric 100
		uplink lan0
		address add 2001:db8:1:77::5/64 dev lan0 nodad
		route add fd00:50::/32 via 2001:db8:1:77::9 dev lan0
		address add 10.1.77.5/24 dev lan0
		route add 10.50.0.0/16 via 10.1.77.9 dev lan0
		address add 192.168.9.1/24 dev lan0`, []string{
		`address del 2001:db8:1:77::5/64 dev lan0
		address del 10.1.77.5/24 dev lan0`,
		`address add 2001:db8:1::6/56 dev wan0 nodad
		address add 10.1.0.6/16 dev wan0`,
		`address del 2001:db8:1::5/56 dev wan0`,
	}},
	{"a gateway that half of all addresses through a VPN lead to", `
		uplink wan0
		address add 2001:db8:2::8/127 dev wan0 nodad noprefixroute
		address add fd00:2::5/64 dev wan0 nodad
		route add ::/0 via 2001:db8:2::9 dev wan0 metric 160 onlink
		uplink wan1
		address add 2001:db8:1::5/64 dev wan1 nodad
		route add ::/0 via 2001:db8:1::1 dev wan1 metric 200
		uplink wg0
		address add fd00:8::2/64 dev wg0 nodad
		route add 2000::/3 dev wg0`, []string{
		`route del ::/0 via 2001:db8:1::1 dev wan1 metric 200`,
		`address add fd00:2::6/64 dev wan0 nodad`,
		`route del 2000::/3 dev wg0`,
	}},
	{"a default over two uplinks, of which one keeps only an address that is a route of type local", `
		uplink wan0
		address add 203.0.113.17/27 dev wan0
		uplink wan1
		address add 172.21.0.207/20 dev wan1
		route add default metric 101 nexthop via 203.0.113.12 dev wan0 nexthop via 172.21.0.110 dev wan1
		route add 10.8.0.0/16 metric 101 nexthop via 203.0.113.12 dev wan0 nexthop via 172.21.0.110 dev wan1
		route add 10.9.0.0/16 via 172.21.0.9 dev wan1`, []string{
		`address del 203.0.113.17/27 dev wan0
		route add local 192.0.2.109 dev wan0 proto bird table 255
		route add default via 203.0.113.12 dev wan0 metric 300 onlink`,
		`address add 203.0.113.18/27 dev wan0`,
		`address del 203.0.113.18/27 dev wan0`,
	}},
}
