package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// TestChoiceForeign: a default route of another program in place of that of the choice, or before it, is said once and left
// alone. When it goes, the choice counts again.
func TestChoiceForeign(t *testing.T) {
	c := newChooser(t, `{"ifname": "wan0", "rank": 1}, {"ifname": "wan1", "rank": 2}`) // else the better metric were chosen
	c.waitUsed("wan0")
	for _, tt := range []struct {
		name, route string
		family      int
	}{
		{"metric 1", "default via 10.2.0.1 dev wan1 metric 1", 4},
		{"metric 0", "default via 10.2.0.1 dev wan1", 4},
		{"metric 1, IPv6", "default via fd02::1 dev wan1 metric 1", 6},
	} {
		t.Run(tt.name, func(t *testing.T) {
			family := fmt.Sprintf("-%d", tt.family)
			c.ns.IP(t, family+" route replace "+tt.route) // which takes the place of ours
			c.waitWarning(tt.family, "wan1")
			c.waitUnboundOf(tt.family, 1)
			c.waitAsked("wan0", 4)
			if routes := c.ns.IP(t, family+" route show "+tt.route); routes == "" {
				t.Error("the route of the other program is gone")
			}
			c.ns.IP(t, family+" route del "+tt.route)
			c.waitWarning(tt.family, "")
			c.waitUnbound(0)
		})
	}
	t.Run("metric 0, of the chosen uplink", func(t *testing.T) {
		c.ns.IP(t, "route add default via 10.1.0.1 dev wan0")
		c.waitAsked("wan0", 4)
		c.wantUnbound(4, 0)
		for _, one := range c.report().Unbound {
			if one.Warn != "" {
				t.Errorf("%+v", one)
			}
		}
	})
	log := c.watch.log.String()
	if n := strings.Count(log, "unbound traffic may not use the chosen uplink"); n != 3 {
		t.Errorf("it is said %d times, want 3", n)
	}
	for _, bad := range []string{"level=ERROR", "another program deletes what leads"} {
		if strings.Contains(log, bad) {
			t.Errorf("the log has %q", bad)
		}
	}
}

// waitWarning waits until `uplinks` says that a route over a link stands against the choice of a family; "": that nothing does.
func (c *chooser) waitWarning(family int, ifname string) {
	c.t.Helper()
	want := map[int]string{4: "inet", 6: "inet6"}[family]
	eventually(c.t, "what stands against the choice is "+ifname, func() error {
		for _, one := range c.report().Unbound {
			if one.Family != want {
				continue
			}
			if ifname == "" && one.Warn == "" || ifname != "" && strings.Contains(one.Warn, " dev "+ifname) {
				return nil
			}
			return fmt.Errorf("%+v", one)
		}
		return errors.New("nothing is chosen")
	})
}
