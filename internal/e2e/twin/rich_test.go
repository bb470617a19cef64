package twin

import (
	"fmt"
	"net/netip"
	"strings"
)

// rich makes a host of all the pieces that hosts have.
func (g *generator) rich(phases []string) {
	g.settings()
	for i := range pick(g, 1, 2, 2, 2, 3, 3) {
		g.uplink(i)
	}
	g.defaults()
	for _, piece := range []struct {
		chance int
		add    func()
	}{
		{45, g.lan}, {35, g.bridge}, {30, g.vpn}, {15, g.service}, {70, g.statics}, {50, g.statics}, {20, g.errorRoute},
		{15, g.errorDefault}, {15, g.multipath}, {20, g.group}, {12, g.othersRule}, {10, g.localRoute}, {15, g.sourceSpecific},
		{10, g.tos}, {10, g.secondDefault}, {10, g.sameNetwork}, {25, g.optionalLink}, {15, g.unnumbered},
	} {
		if g.chance(piece.chance) {
			piece.add()
		}
	}
	g.life(phases)
}

func (g *generator) settings() {
	w := &g.h.watch
	if g.chance(35) {
		w.Routes = "move"
	}
	if g.chance(25) {
		w.OnLoss = "block"
	}
	w.SpecificFirst = g.chance(25)
	if g.chance(30) {
		w.Ifname = "wan*"
	}
	w.clients = g.chance(12)
}

// uplink adds a link with one to three IPv4 networks, and up to two IPv6 ones.
func (g *generator) uplink(i int) {
	l := g.newLink(fmt.Sprintf("wan%d", i))
	l.uplink = true
	for len(l.nets) == 0 { // one that is taken is not given
		g.firstAddress(l, i)
	}
	for range pick(g, 0, 0, 0, 0, 0, 1, 1, 2) {
		g.secondAddress(l, i)
	}
	if g.chance(60) {
		n := g.in(pick(g, fmt.Sprintf("2001:db8:%d::/64", i+1), fmt.Sprintf("2001:db8:%d::/64", i+1), fmt.Sprintf("2001:db8:%d::8/127", i+1), fmt.Sprintf("2001:db8:%d::/56", i+1)))
		switch {
		case g.chance(15): // as DHCPv6 gives it
			n = network{netip.PrefixFrom(n.addr.Addr(), 128), netip.MustParseAddr("fe80::1")}
		case g.chance(40):
			n.gateway = netip.MustParseAddr(fmt.Sprintf("fe80::%d", i+1))
		}
		g.give(l, n, pick(g, "", "", "", "noprefixroute"))
		if g.chance(30) {
			g.give(l, g.in(pick(g, fmt.Sprintf("2001:db8:%d:1::/64", i+1), fmt.Sprintf("fd00:%d::/64", i+1), fmt.Sprintf("2001:db8:%d::/64", i+1))), pick(g, "", "", "preferred_lft 0"))
		}
	}
}

// firstAddress gives an uplink its IPv4 address: in a network, or in none, with a router that is
// reached all the same.
func (g *generator) firstAddress(l *link, i int) {
	n := g.in(pick(g, g.network4(i), g.network4(i), "172.16.0.0/12", fmt.Sprintf("10.%d.0.0/9", 128*(i%2))))
	host := func(n network) network { return network{netip.PrefixFrom(n.addr.Addr(), 32), n.gateway} }
	switch g.IntN(20) {
	case 0: // a cloud's: the router by a host route
		n = host(n)
		g.give(l, n, "")
		g.add("router of "+l.name, "route add %s dev %s", n.gateway, l.name)
		return
	case 1: // a tunnel
		n = host(n)
		g.add("address "+n.addr.String(), "address add %s peer %s dev %s", n.addr.Addr(), n.gateway, l.name)
		l.nets = append(l.nets, n)
		return
	case 2: // a data centre's: the router has no IPv4
		n = host(n)
		n.gateway = netip.MustParseAddr("fe80::77")
	case 3:
		first := n.addr.Masked().Addr()
		n = network{netip.PrefixFrom(first, 31), first.Next()}
	case 4: // a router outside
		n.gateway = netip.MustParseAddr("192.0.2.254").Prev()
		g.give(l, n, "")
		g.add("router of "+l.name, "route add %s dev %s", n.gateway, l.name)
		return
	}
	more := pick(g, "", "", "", "", "metric 100", "noprefixroute")
	g.give(l, n, more)
	if more == "noprefixroute" && g.chance(60) { // as NetworkManager does
		g.add("network of "+l.name, "route add %s dev %s proto static metric 100 src %s", n.addr.Masked(), l.name, n.addr.Addr())
	}
	if g.chance(15) {
		g.add("setting of "+l.name, "sysctl -qw net.ipv4.conf.%s.promote_secondaries=1", l.name)
	}
}

// secondAddress gives an uplink another address: in its network, in one that is part of that, in
// another one or in none.
func (g *generator) secondAddress(l *link, i int) {
	first := l.nets[0]
	switch g.IntN(5) {
	case 0:
		if first.addr.Bits() < 30 {
			g.give(l, network{netip.PrefixFrom(g.within(first.addr, true), first.addr.Bits()), first.gateway}, "")
		}
	case 1:
		if first.addr.Bits() < 27 {
			g.give(l, g.in(netip.PrefixFrom(g.within(first.addr, true), first.addr.Bits()+2+g.IntN(2)).Masked().String()), "")
		}
	case 2:
		g.give(l, network{netip.PrefixFrom(g.within(netip.MustParsePrefix("198.51.100.0/24"), true), 32), first.gateway}, "")
	default:
		g.give(l, g.in(pick(g, fmt.Sprintf("198.51.100.%d/28", 16*i), fmt.Sprintf("10.20%d.0.0/16", i), "198.18.0.0/15")), "")
	}
}

// gatewayWords are "via GATEWAY" for a destination of a family.
func gatewayWords(is4 bool, gateway netip.Addr) string {
	if is4 && gateway.Is6() {
		return "via inet6 " + gateway.String()
	}
	return "via " + gateway.String()
}

// defaults gives the uplinks their default routes, in one of the ways that hosts have.
func (g *generator) defaults() {
	way := pick(g, "metrics", "metrics", "metrics", "metrics", "one metric", "multipath", "group", "first only")
	for _, is4 := range []bool{true, false} {
		if way == "multipath" || way == "group" {
			g.joint(way, anywhere(is4), is4, g.uplinks()...)
			continue
		}
		for i, l := range g.uplinks() {
			if way == "first only" && i > 0 {
				break
			}
			for k, n := range g.networks(is4, l) {
				if k > 0 && !g.chance(25) {
					continue
				}
				g.oneDefault(l, n, is4, way == "one metric")
			}
		}
	}
}

// oneDefault adds a default route over a link by the router of a network.
func (g *generator) oneDefault(l *link, n network, is4, sameMetric bool) {
	g.metric += 1 + g.IntN(50)
	metric := g.metric
	verb := "add"
	if sameMetric {
		metric, verb = 100, "append"
	} else if is4 && len(l.metrics) == 0 && l.index == 10 && g.chance(25) {
		metric = 0
	}
	if is4 {
		l.metrics = append(l.metrics, metric)
	}
	more := pick(g, "", "", "", "src "+n.addr.Addr().String(), "onlink")
	if !is4 && sameMetric {
		more = "" // the kernel makes one route of them, which has one of all else
	} else if !is4 && g.chance(40) {
		more = pick(g, "proto ra", "proto ra pref high", "proto ra expires 1800")
	}
	to := fmt.Sprintf("%s dev %s", gatewayWords(is4, n.gateway), l.name)
	if is4 && g.chance(5) {
		to, more = "dev "+l.name, "" // point to point
	}
	g.add("default over "+l.name, "route %s %s %s metric %d %s", verb, anywhere(is4), to, metric, more)
}

// joint adds a route with a leg over each of some links.
func (g *generator) joint(way, dst string, is4 bool, links ...*link) {
	var legs, group []string
	var s step
	for _, l := range links {
		for k, n := range g.networks(is4, l) {
			if k > 0 && !g.chance(20) || !n.gateway.IsValid() {
				continue
			}
			legs = append(legs, fmt.Sprintf("nexthop %s dev %s", gatewayWords(is4, n.gateway), l.name))
			if is4 && n.gateway.Is6() {
				legs[len(legs)-1] = ""
			}
			g.nhid++
			group = append(group, fmt.Sprint(g.nhid))
			made := g.step("", "nexthop replace id %d via %s dev %s", g.nhid, n.gateway, l.name)
			s.commands = append(s.commands, made.commands...)
		}
	}
	if len(legs) == 0 {
		return
	}
	g.metric++
	if way == "multipath" {
		g.add("multipath route", "route add %s metric %d %s", dst, g.metric, strings.Join(legs, " "))
		return
	}
	g.nhid++
	made := g.step("", "nexthop replace id %d group %s\nroute add %s metric %d nhid %d", g.nhid, strings.Join(group, "/"), dst, g.metric, g.nhid)
	s.name, s.commands = "nexthop group", append(s.commands, made.commands...)
	g.h.build = append(g.h.build, s)
}

// lan adds a link that leads to no provider, with sites behind it.
func (g *generator) lan() {
	l := g.newLink(pick(g, "lan0", "eth9", "mgmt"))
	n := g.in(pick(g, "192.168.77.0/24", "10.3.7.0/24", "172.18.4.0/22", "100.65.4.0/24"))
	g.give(l, n, "")
	if g.chance(50) {
		g.add("site behind "+l.name, "route add %s via %s dev %s", pick(g, "10.0.0.0/8", "192.168.0.0/16", "100.64.0.0/10", "10.99.0.0/16"), n.gateway, l.name)
	}
	if g.chance(40) {
		n := g.in(pick(g, "fd00:77::/64", "2001:db8:1:77::/64"))
		g.give(l, n, "")
		if g.chance(50) {
			g.add("site behind "+l.name, "route add fd00::/8 via %s dev %s", n.gateway, l.name)
		}
	}
}

// bridge adds a bridge of containers, with one of them.
func (g *generator) bridge() {
	l := &link{name: pick(g, "docker0", "br-0123456789ab", "br0"), index: g.next}
	g.next += 2
	g.add("bridge "+l.name, `link add %[1]s index %[2]d address 02:00:00:00:00:%02[2]x type bridge
		link set %[1]s up
		link add veth%[2]d index %[3]d type veth peer name xveth%[2]d index %[4]d
		link set veth%[2]d master %[1]s
		link set veth%[2]d up
		link set xveth%[2]d up`, l.name, l.index, l.index+1, 1000+l.index)
	g.links = append(g.links, l)
	g.give(l, network{addr: netip.MustParsePrefix(pick(g, "172.17.0.1/16", "172.18.0.1/16", "10.1.77.1/24", "192.168.0.1/25"))}, "")
	if g.chance(40) {
		g.give(l, network{addr: netip.MustParsePrefix("fd00:d0c::1/64")}, "")
	}
}

// vpn adds a tunnel which has the halves of all addresses, some networks, or a default.
func (g *generator) vpn() {
	l := &link{name: pick(g, "wg0", "tun0"), index: g.next}
	if g.chance(50) {
		g.next++
		g.links = append(g.links, l)
		g.add("link "+l.name, "%s", g.linkCommands(l))
	} else {
		l.index = 0 // its number comes by itself
		g.links = append(g.links, l)
		g.add("link "+l.name, "tuntap add dev %s mode tun\nlink set %s addrgenmode none\nlink set %s up", l.name, l.name, l.name)
	}
	g.tunnels++
	g.give(l, network{addr: netip.MustParsePrefix(fmt.Sprintf("10.8.%d.2/%d", g.tunnels, pick(g, 24, 32)))}, "")
	is6 := g.chance(50)
	if is6 {
		g.give(l, network{addr: netip.MustParsePrefix(fmt.Sprintf("fd00:8:%d::2/64", g.tunnels))}, "")
	}
	switch g.IntN(3) {
	case 0:
		g.add("halves over "+l.name, "route add 0.0.0.0/1 dev %s\nroute add 128.0.0.0/1 dev %s", l.name, l.name)
		if is6 {
			g.add("halves over "+l.name, "route add %s dev %s", pick(g, "2000::/3", "::/1"), l.name)
		}
	case 1:
		g.add("sites behind "+l.name, "route add 10.9.0.0/16 dev %s\nroute add 192.168.64.0/18 dev %s", l.name, l.name)
		if is6 {
			g.add("sites behind "+l.name, "route add fd00:9::/32 dev %s", l.name)
		}
	case 2:
		g.metric++
		g.add("default over "+l.name, "route add 0.0.0.0/0 dev %s metric %d", l.name, pick(g, 50+g.tunnels, g.metric))
	}
}

// unnumbered adds a link without an address, and what lies behind it.
func (g *generator) unnumbered() {
	l := g.newLink(fmt.Sprintf("ptp%d", g.next))
	g.add("site behind "+l.name, "route add %s dev %s", pick(g, "10.77.0.0/16", "100.80.0.0/12", "192.168.128.0/17"), l.name)
	if g.chance(30) {
		g.metric++
		g.add("default over "+l.name, "route add 0.0.0.0/0 dev %s metric %d", l.name, g.metric)
	}
}

// service adds addresses that are a service and no uplink.
func (g *generator) service() {
	if g.chance(50) {
		g.add("address of a service", "address add %s/32 dev lo", g.within(netip.MustParsePrefix("198.51.100.192/28"), true))
		return
	}
	g.add("addresses of services", "link add kube-ipvs0 index %d type bridge\naddress add 10.96.0.1/32 dev kube-ipvs0\naddress add 10.96.0.10/32 dev kube-ipvs0", g.next)
	g.next++
}

// statics adds one to three routes to places behind routers.
func (g *generator) statics() {
	for range 1 + g.IntN(3) {
		l := pick(g, g.links...)
		if len(l.nets) == 0 {
			continue
		}
		n := pick(g, l.nets...)
		is4 := n.addr.Addr().Is4()
		dst := pick(g, "10.0.0.0/8", "10.50.0.0/16", "100.64.0.0/10", "192.168.0.0/16", "172.16.0.0/12", "10.50.7.0/24", "198.51.100.77/32", "203.0.113.99/32", "8.0.0.0/7", "11.0.0.0/8")
		if !is4 {
			dst = pick(g, "fd00::/8", "fd00:50::/32", "2001:db8:50::/48", "2001:db8:50::7/128", "2600::/12")
		}
		to := "dev " + l.name
		if n.gateway.IsValid() && g.chance(80) {
			to = gatewayWords(is4, n.gateway) + " " + to
		}
		more := pick(g, "", "", "", "", "metric 50", "metric 500", "proto static", "src "+n.addr.Addr().String())
		g.add("static route", "route %s %s %s %s", pick(g, "add", "add", "append"), dst, to, more)
	}
}

// errorRoute adds a route that leads to an error.
func (g *generator) errorRoute() {
	g.add("error route", "route add %s %s metric %d", pick(g, "blackhole", "unreachable", "prohibit"),
		pick(g, "10.66.0.0/16", "10.50.7.0/25", "203.0.113.64/26", "192.168.0.0/16", "fd00:66::/32", "2001:db8:1::/48"), pick(g, 20, 1000))
}

// errorDefault adds a last default that leads to an error.
func (g *generator) errorDefault() {
	g.add("error default", "route add unreachable %s metric 4278198272", anywhere(g.chance(60)))
}

func (g *generator) multipath() {
	is4 := g.chance(60)
	dst := pick(g, "10.60.0.0/16", "100.96.0.0/11")
	if !is4 {
		dst = "fd00:60::/32"
	}
	g.joint("multipath", dst, is4, g.links...)
}

func (g *generator) group() {
	is4 := g.chance(60)
	dst := pick(g, "10.61.0.0/16", "100.112.0.0/12")
	if !is4 {
		dst = "fd00:61::/32"
	}
	g.joint("group", dst, is4, pick(g, g.links...), pick(g, g.links...))
}

// othersRule adds a rule of somebody else's, before ours or behind.
func (g *generator) othersRule() {
	l := pick(g, g.uplinks()...)
	n := l.nets[0]
	if g.chance(60) {
		g.add("rule of others", "rule add from %s/9 to 100.70.0.0/16 lookup 500 pref 5000\nroute add 0.0.0.0/0 %s dev %s table 500", n.addr.Addr(), gatewayWords(true, n.gateway), l.name)
		return
	}
	g.add("rule of others", "rule add to 100.70.0.0/16 lookup 600 pref 30000\nroute add 0.0.0.0/0 %s dev %s table 600", gatewayWords(true, n.gateway), l.name)
}

// localRoute adds an address that is local by a route, as clouds have in front of an uplink.
func (g *generator) localRoute() {
	l := pick(g, g.uplinks()...)
	// In a batch ip takes a name behind a number for that number, where it has seen the name before.
	g.add("local route", "route add local 192.0.2.%d dev %s proto bird table 255", 100+g.IntN(20), l.name)
}

// sourceSpecific adds an IPv6 default for one provider's addresses only.
func (g *generator) sourceSpecific() {
	for _, l := range g.uplinks() {
		for _, n := range g.networks(false, l) {
			if g.chance(60) {
				g.add("source-specific default", "route add ::/0 from %s via %s dev %s metric %d", netip.PrefixFrom(n.addr.Addr(), min(64, n.addr.Bits())).Masked(), n.gateway, l.name, 300+l.index)
			}
		}
	}
}

func (g *generator) tos() {
	l := pick(g, g.uplinks()...)
	dst := "10.50.0.0/16"
	if g.chance(50) && !g.tosDefault { // two in one place would be one too many where the first is moved away
		dst, g.tosDefault = "0.0.0.0/0", true
	}
	g.add("route for a type of service", "route add %s tos 0x10 %s dev %s", dst, gatewayWords(true, l.nets[0].gateway), l.name)
}

// secondDefault adds a worse default by another router of a network.
func (g *generator) secondDefault() {
	l := pick(g, g.uplinks()...)
	n := l.nets[0]
	if n.is4() && n.addr.Bits() < 30 {
		g.metric++
		g.add("second default", "route add 0.0.0.0/0 via %s dev %s metric %d", g.within(n.addr, false), l.name, 900+g.metric)
	}
}

// sameNetwork gives two links addresses in one network.
func (g *generator) sameNetwork() {
	n := pick(g, "192.168.1.0/24", "100.64.9.0/24")
	for _, l := range g.uplinks() {
		g.give(l, g.in(n), "")
	}
}
