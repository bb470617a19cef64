package twin

import (
	"fmt"
	"net/netip"
	"os"
	"testing"
)

// optional are kinds of links that hosts have, and kernels may lack. Words make one of them, of a
// given name, over another link.
var optional = map[string]string{
	"vlan":    "link add link %[2]s name %[1]s index %[3]d type vlan id 7",
	"macvlan": "link add link %[2]s name %[1]s index %[3]d type macvlan mode bridge",
	"ipvlan":  "link add link %[2]s name %[1]s index %[3]d type ipvlan",
	"bond":    "link add name %[1]s index %[3]d type bond\nlink set %[2]s down\nlink set %[2]s master %[1]s\nlink set %[2]s up",
	"dummy":   "link add name %[1]s index %[3]d type dummy",
	"vrf":     "link add name %[1]s index %[3]d type vrf table 77\nlink set %[2]s master %[1]s",
}

var optionalKinds = []string{"vlan", "macvlan", "ipvlan", "bond", "dummy", "vrf"}

// kernel tells which of them there are: hosts do without the others.
type kernel map[string]bool

// probe asks the kernel.
func probe(t *testing.T) kernel {
	t.Helper()
	k := make(kernel)
	for _, kind := range optionalKinds {
		n, err := newNamespace("probe")
		if err != nil {
			t.Fatal(err)
		}
		g := &generator{h: &host{}}
		g.add("base", "link add base type veth peer name xbase")
		g.add(kind, optional[kind], "probe0", "base", maxIndex)
		failed, err := n.run(append(g.h.build[0].commands, g.h.build[1].commands...))
		n.close()
		if err != nil {
			t.Fatal(err)
		}
		k[kind] = len(failed) == 0
	}
	t.Logf("kinds of links: %v", k)
	if *seed == 0 && *hosts == 0 && os.Getenv("SOAK") != "full" { // fixed seeds mean the same hosts with every kernel
		k = kernel{"macvlan": k["macvlan"]}
	}
	return k
}

// optionalLink adds a link of a kind that not every kernel has.
func (g *generator) optionalLink() {
	kind := pick(g, optionalKinds...)
	if !g.kernel[kind] {
		g.h.without = append(g.h.without, kind)
		return
	}
	g.h.special = kind
	// Over a link of its own: the addresses of an uplink would not be the uplink's any more.
	base := g.newLink(fmt.Sprintf("port%d", g.next))
	l := &link{name: fmt.Sprintf("%s%d", kind, g.next)}
	index := g.next
	g.next++
	g.links = append(g.links, l)
	g.add("link "+l.name, optional[kind]+"\nlink set %[1]s up", l.name, base.name, index)
	n := g.in(fmt.Sprintf("10.150.%d.0/24", base.index))
	switch kind {
	case "vrf":
		g.give(base, n, "")
		g.add("default in a VRF", "route add 0.0.0.0/0 via %s dev %s table 77", n.gateway, base.name)
	case "dummy":
		g.give(l, network{addr: netip.PrefixFrom(n.addr.Addr(), 32)}, "")
	default:
		l.uplink = g.chance(50)
		g.give(l, n, "")
		if l.uplink {
			g.oneDefault(l, n, true, false)
		}
	}
}
