package e2e

import (
	"strings"
	"testing"
)

// TestBindSubflows: further subflows that come in at the other uplink get no answer of a program under run, and carry none of
// its data. At an endpoint with a port the kernel itself listens: run and bound name it, until it is gone.
func TestBindSubflows(t *testing.T) {
	c := newCrossing(t)
	c.ns.Run(t, "ip", "mptcp", "limits", "set", "add_addr_accepted", "4", "subflows", "4")
	c.internet.Run(t, "ip", "mptcp", "limits", "set", "add_addr_accepted", "4", "subflows", "4")
	inet, inet6 := at(0)
	announce := func(more ...string) {
		t.Helper()
		c.ns.Run(t, "ip", "mptcp", "endpoint", "flush")
		for _, addr := range []string{inet, inet6} {
			c.ns.Run(t, "ip", append([]string{"mptcp", "endpoint", "add", addr, "dev", "wan0", "signal"}, more...)...)
		}
	}
	names := func(want bool) {
		t.Helper()
		r := c.do("run", "--ifname", "wan1", "true")
		if r.code != 0 || strings.Contains(r.stderr, "ip mptcp endpoint delete id") != want {
			t.Errorf("run: %+v", r)
		}
		r = c.do("bound")
		if (r.code == 1) != want || strings.Contains(r.stdout, "MPTCP") != want {
			t.Errorf("bound: %+v", r)
		}
	}
	p := c.bound("wan1")
	announce()
	names(false)
	heard := c.sniff(0)
	for _, far := range [][2]string{{"4", far4}, {"6", far6}} {
		p.want("ok", "new s mptcp%s\nconnect s %s", far[0], far[1])
		for range 5 { // the far end opens subflows once it has data
			p.do("ask s")
		}
		p.want("ok", "close s")
	}
	if lines := heard.stop(); len(lines) > 0 {
		t.Errorf("the other provider heard %q", lines)
	}
	announce("port", "4444")
	names(true)
	c.ns.Run(t, "ip", "mptcp", "endpoint", "flush")
	for _, addr := range []string{"10.2.0.2", "fd02::2"} { // its own link is held
		c.ns.Run(t, "ip", "mptcp", "endpoint", "add", addr, "dev", "wan1", "signal", "port", "4444")
	}
	names(false)
}
