package twin

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
)

// generator makes up a host out of the numbers that follow from its seed.
type generator struct {
	*rand.Rand
	h      *host
	links  []*link
	next   int // the next index of a link
	metric int // a metric that no default has yet
	nhid   int // the next id of a nexthop object
	past   history

	tunnels    int
	named      int // names that links got later
	tosDefault bool
	kernel     kernel
}

// link is a link of the host, as far as the generator has to remember it.
type link struct {
	name    string
	index   int
	uplink  bool
	nets    []network // those of its addresses, in order
	metrics []int     // of its IPv4 default routes
}

// network is an address with its network, and a router there.
type network struct {
	addr    netip.Prefix
	gateway netip.Addr
}

func (n network) is4() bool { return n.addr.Addr().Is4() }

// generate returns the host of a seed, with changes for some phases of its life; if there are none,
// the seed draws one or two. A plain-looking host has two or three uplinks with one network each,
// distinct metrics, and static routes, and just starts if no phases are given.
func generate(seed uint64, rich bool, phases []string, k kernel) *host {
	g := &generator{
		Rand:   rand.New(rand.NewPCG(seed, 0x7a)),
		h:      &host{seed: seed, watch: watchSettings{Ifname: "*", Routes: "copy", OnLoss: "fallback", exclude: []string{"lo", "docker*", "br-*"}}},
		next:   10,
		metric: 100,
		nhid:   1,
		kernel: k,
	}
	if rich {
		g.rich(phases)
	} else {
		g.plain()
		if len(phases) > 0 {
			g.life(phases)
		}
	}
	return g.h
}

// chance reports true n times of a hundred.
func (g *generator) chance(n int) bool { return g.IntN(100) < n }

func pick[T any](g *generator, of ...T) T { return of[g.IntN(len(of))] }

// add makes a step of commands, each a line for "ip" or a whole command.
func (g *generator) step(name string, format string, args ...any) step {
	s := step{name: name}
	for line := range strings.Lines(fmt.Sprintf(format, args...)) {
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "sysctl ") {
			line = "ip " + line
		}
		s.commands = append(s.commands, line)
	}
	return s
}

func (g *generator) add(name string, format string, args ...any) {
	g.h.build = append(g.h.build, g.step(name, format, args...))
}

// newLink adds a link that is up. Its hardware address follows from its index, so that the
// addresses which follow from that are those of the plain host.
func (g *generator) newLink(name string) *link {
	l := &link{name: name, index: g.next}
	g.next++
	g.add("link "+name, "%s", g.linkCommands(l))
	g.links = append(g.links, l)
	return l
}

func (g *generator) linkCommands(l *link) string {
	return fmt.Sprintf(`link add %[1]s index %[2]d address 02:00:00:00:00:%02[2]x type veth peer name x%[1]s index %[3]d
		link set %[1]s addrgenmode eui64
		link set %[1]s up
		link set x%[1]s up`, l.name, l.index, 1000+l.index)
}

// give adds an address to a link. Of one that two links have nobody can say where its packets go.
func (g *generator) give(l *link, n network, more string) {
	if slices.ContainsFunc(g.networks(n.is4(), g.links...), func(o network) bool { return o.addr.Addr() == n.addr.Addr() }) {
		return
	}
	g.add("address "+n.addr.String(), "%s", giveCommand(l, n, more))
	l.nets = append(l.nets, n)
	g.h.nets = append(g.h.nets, n)
}

func giveCommand(l *link, n network, more string) string {
	if !n.is4() {
		more += " nodad"
	}
	return fmt.Sprintf("address add %s dev %s %s", n.addr, l.name, more)
}

// within returns an address in a network, neither its first nor its last if it has others. Those of
// the host are odd, and those of routers even, so that no router is the host itself.
func (g *generator) within(n netip.Prefix, odd bool) netip.Addr {
	host := n.Addr().BitLen() - n.Bits()
	number := 0
	switch {
	case host == 0:
	case host == 1:
		number = g.IntN(2)
	case odd:
		number = 1 + 2*g.IntN(min(125, 1<<min(host-1, 10)-1))
	default:
		number = 2 + 2*g.IntN(min(125, 1<<min(host-1, 10)-1))
	}
	a := n.Masked().Addr()
	for range number {
		a = a.Next()
	}
	return a
}

// in draws an address and a router in a network.
func (g *generator) in(prefix string) network {
	p := netip.MustParsePrefix(prefix)
	n := network{gateway: g.within(p, false)}
	for {
		if addr := g.within(p, true); addr != n.gateway {
			n.addr = netip.PrefixFrom(addr, p.Bits())
			return n
		}
	}
}

// defaultRoute adds the default route of a network of a link.
func (g *generator) defaultRoute(l *link, n network) {
	g.metric += 1 + g.IntN(50)
	if n.is4() {
		l.metrics = append(l.metrics, g.metric)
	}
	g.add("default over "+l.name, "route add %s via %s dev %s metric %d", anywhere(n.is4()), n.gateway, l.name, g.metric)
}

func anywhere(is4 bool) string {
	if is4 {
		return "0.0.0.0/0"
	}
	return "::/0"
}

// network4 is an IPv4 network of the i-th link.
func (g *generator) network4(i int) string {
	i %= 8
	return pick(g, fmt.Sprintf("10.%d.0.0/16", i+1), fmt.Sprintf("192.168.%d.0/24", i), fmt.Sprintf("203.0.113.%d/27", 32*i), fmt.Sprintf("172.%d.0.0/20", 20+i))
}

// plain makes a plain-looking host.
func (g *generator) plain() {
	g.h.phases = []string{atStart}
	for i := range 2 + g.IntN(2) {
		l := g.newLink(fmt.Sprintf("wan%d", i))
		l.uplink = true
		n := g.in(g.network4(i))
		g.give(l, n, "")
		g.defaultRoute(l, n)
		if i == 1 {
			g.h.second = n
		}
		if g.chance(60) {
			n := g.in(fmt.Sprintf("2001:db8:%d::/64", i+1))
			g.give(l, n, "")
			g.defaultRoute(l, n)
		}
	}
	for i := range g.IntN(4) {
		l := pick(g, g.links...)
		n := pick(g, l.nets...)
		dst := fmt.Sprintf("100.%d.0.0/16", 64+i)
		if !n.is4() {
			dst = fmt.Sprintf("fd%02d::/16", i)
		}
		g.add("static route", "route add %s via %s dev %s", dst, n.gateway, l.name)
	}
}

// networks are all of a family that links have.
func (g *generator) networks(is4 bool, links ...*link) (all []network) {
	for _, l := range links {
		for _, n := range l.nets {
			if n.is4() == is4 {
				all = append(all, n)
			}
		}
	}
	return all
}

func (g *generator) uplinks() []*link {
	return slices.DeleteFunc(slices.Clone(g.links), func(l *link) bool { return !l.uplink })
}
