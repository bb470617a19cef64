package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// TestNetnsPattern: a namespace on a pattern of links uses the first that has a lease, stays there, and takes the next one when
// that is gone. By a link that is not of the pattern nothing leaves.
func TestNetnsPattern(t *testing.T) {
	c := newNamespaces(t)
	if r := c.do("netns", "add", "work", "--ifname", "wan["); r.code != 2 || !strings.Contains(r.stderr, "no pattern like") {
		t.Errorf("a wrong pattern: %+v", r)
	}
	if r := c.do("netns", "add", "later", "--ifname", "wwan*", "--resolv", "192.0.2.53"); r.code != 0 || !strings.Contains(r.stderr, "no lease now") {
		t.Errorf("links that may come: %+v", r)
	}
	c.must("netns", "add", "work", "--ifname", "wan*", "--resolv", "192.0.2.53")
	c.must("netns", "add", "one", "--ifname", "wan[1-9]", "--resolv", "192.0.2.53")
	service := c.start(c.here(bin(t, clientBin), "netns", "serve", "--debug"))
	service.waitLog("serving namespaces")
	p, one, later := c.inNamespace("work"), c.inNamespace("one"), c.inNamespace("later")
	c.only(0, func() { fourProbes(p, 0) })
	c.only(1, func() { fourProbes(one, 1) })
	c.nothing(func() { t.Log("links that may come:", startProbes(later)) })
	ready := func(n int) {
		t.Helper()
		eventually(t, fmt.Sprintf("the namespace is on wan%d", n), func() error {
			for _, r := range c.namespaces() {
				if r.Name == "work" && (r.Ifname != fmt.Sprint("wan", n) || r.Pattern != "wan*" || len(r.Tables) == 0 || r.Missing != "") {
					return fmt.Errorf("%+v", r)
				}
			}
			return c.throughBoth(p)
		})
	}
	c.ns.IP(t, "link del wan0")
	ready(1)
	c.only(1, func() { fourProbes(p, 1) })
	c.connect(0)
	c.address(0)
	c.waitTables(0)
	c.only(1, func() { fourProbes(p, 1) })
	c.ns.IP(t, "link del wan1")
	ready(0)
	c.only(0, func() { fourProbes(p, 0) })
	c.nothing(func() { t.Log("without a link of the pattern:", startProbes(one)) })
	// The next service goes on with the link, and another one is chosen by hand.
	service.kill()
	c.connect(1)
	c.address(1)
	c.waitTables(1)
	service = c.start(c.here(bin(t, clientBin), "netns", "serve", "--debug"))
	service.waitLog("serving namespaces")
	c.only(0, func() { fourProbes(p, 0) })
	c.must("netns", "set", "work", "--ifname", "wan1")
	c.only(1, func() { fourProbes(p, 1) })
	c.must("netns", "set", "work", "--ifname", "wan[0-9]") // it has a lease
	c.only(1, func() { fourProbes(p, 1) })
	service.kill()
	c.must("netns", "del", "--all", "--kill", "5")
	if left := c.namespaceTraces(); left != "" {
		t.Errorf("left:\n%s", left)
	}
}

// throughBoth connects from a namespace in both families.
func (c *crossing) throughBoth(p *probing) error {
	for kind, to := range map[string]string{"tcp4": far4, "tcp6": far6} {
		p.do("new s %s", kind)
		if got := p.do("start s %s", to); got != "ok" {
			return errors.New(kind + ": " + got)
		}
	}
	return nil
}
