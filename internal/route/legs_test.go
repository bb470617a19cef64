package route

import (
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// TestLegs: defaults of two links with one metric, which two programs added, are one route for
// whoever lists them.
func TestLegs(t *testing.T) {
	n := nettest.New(t, "host")
	far := nettest.New(t, "far")
	for _, name := range []string{"eth0", "eth1"} {
		nettest.Veth(t, n, name, far, name)
	}
	n.IP(t, "-6 route append default via fe80::1 dev eth0 metric 1024 proto static")
	n.IP(t, "-6 route append default via fe80::2 dev eth1 metric 1024 proto ra")
	c := dialIn(t, n)
	eth1, _, err := c.LinkByName("eth1")
	if err != nil {
		t.Fatal(err)
	}
	routes, err := c.Routes(unix.AF_INET6, unix.RT_TABLE_MAIN)
	if err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(routes, func(r Route) bool { return r.Dst.Bits() == 0 })
	if at < 0 || !routes[at].Multipath {
		t.Fatalf("the kernel shows them apart: %v", routes)
	}
	legs := routes[at].Legs(eth1.Index)
	if len(legs) != 1 || legs[0].Gateway != addr("fe80::2") || legs[0].Index != eth1.Index || legs[0].Multipath {
		t.Fatalf("over eth1: got %v", legs)
	}
	if legs := routes[at].Legs(77); legs != nil {
		t.Errorf("over no link of them: got %v", legs)
	}
	// A leg can be added elsewhere.
	if err := c.AddRoute(legs[0].In(10000, legs[0].Src)); err != nil {
		t.Fatal(err)
	}
	if got := n.IP(t, "-6 route show table 10000"); !strings.HasPrefix(got, "default via fe80::2 dev eth1 proto 116 metric 1024 ") || strings.Count(got, "\n") != 1 {
		t.Errorf("the copy: %s", got)
	}
}
