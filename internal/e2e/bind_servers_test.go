package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// asUserProbe starts a prober of user 4711.
func (c *crossing) asUserProbe() *probing {
	c.t.Helper()
	self, err := userProbe()
	if err != nil {
		c.t.Fatal(err)
	}
	return c.prober("setpriv", "--reuid=4711", "--regid=4711", "--clear-groups", "--ambient-caps=-all", self)
}

// foreignAt are the rules of what is bound that has an address.
func (c *crossing) foreignAt(addr string) (rules []string) {
	for _, r := range c.allRules() {
		if strings.Contains(r, "from "+addr+" ") && (strings.Contains(r, "uidrange") || strings.Contains(r, "ipproto")) {
			rules = append(rules, r)
		}
	}
	return rules
}

// TestBindTrafficServers: a user's server that is asked over another uplink answers there in IPv4, and not at all in IPv6;
// nothing leaves by the link with an address that the link does not have.
func TestBindTrafficServers(t *testing.T) {
	c := newCrossing(t)
	user := c.asUserProbe()
	c.must("bind", "--ifname", "wan1", "--uid", "4711")
	asked := func(what string, n int, inet, inet6 string) {
		t.Helper()
		for _, kind := range [][3]string{{"tcp4", inet, "0.0.0.0"}, {"tcp6", "[" + inet6 + "]", "[::]"}, {"mptcp4", inet, "0.0.0.0"}, {"mptcp6", "[" + inet6 + "]", "[::]"}} {
			user.want("ok", "new l %s\nbind l %s:0", kind[0], kind[2])
			c.dial(user, n, kind[1], user.do("listen l"), n == 1 || !strings.HasSuffix(kind[0], "6"))
			user.want("ok", "close l")
		}
	}
	chosen := func(n int, inet, inet6 string) {
		t.Helper()
		c.only(n, func() {
			user.want(inet, "new s udp4\nbind s %s:0\nask s %s", inet, far4)
			user.want(inet, "new s tcp4\nbind s %s:0\nconnect s %s\nask s", inet, far4)
		})
		ask := func() {
			want := map[int]string{0: "ENETUNREACH", 1: inet6}[n]
			user.want(want, "new s udp6\nbind s [%s]:0\nask s %s", inet6, far6)
		}
		if n == 0 {
			c.nothing(ask)
		} else {
			c.only(n, ask)
		}
	}
	for n := range c.isps {
		inet, inet6 := at(n)
		asked("bound", n, inet, inet6)
		chosen(n, inet, inet6)
	}

	// Another lease of the other uplink, after the binding.
	c.ns.IP(t, "address add 10.1.0.9/24 dev wan0")
	c.ns.IP(t, "address add fd01::9/64 dev wan0 nodad")
	eventually(t, "new leases are known to the binding", func() error {
		if n := len(c.foreignAt("10.1.0.9")) + len(c.foreignAt("fd01::9")); n != 2 {
			return fmt.Errorf("%d rules", n)
		}
		return nil
	})
	chosen(0, "10.1.0.9", "fd01::9")
	c.ns.IP(t, "address del 10.1.0.9/24 dev wan0")
	eventually(t, "rules of a lease that ended are deleted", func() error {
		if rules := c.foreignAt("10.1.0.9"); len(rules) > 0 {
			return fmt.Errorf("%q", rules)
		}
		return nil
	})

	// Without its route the user is blocked, unless it chooses another address.
	c.ns.IP(t, "link set wan1 down")
	eventually(t, "the user is blocked", func() error {
		user.want("ok", "new w udp4")
		if answer := user.do("connect w %s", far4); answer != "ENETUNREACH" {
			return errors.New(answer)
		}
		return nil
	})
	c.nothing(func() {
		for _, far := range [][2]string{{"4", far4}, {"6", far6}} {
			user.want("ENETUNREACH", "new s udp%s\nask s %s", far[0], far[1])
			user.want("ENETUNREACH", "new s tcp%s\nconnect s %s", far[0], far[1])
		}
	})
	inet0, inet60 := at(0)
	chosen(0, inet0, inet60)
	c.must("unbind", "--ifname", "wan1", "--uid", "4711")
	eventually(t, "nothing is left of the binding", func() error {
		if rules := append(c.foreignAt(inet0), c.foreignAt(inet60)...); len(rules) > 0 {
			return fmt.Errorf("%q", rules)
		}
		return nil
	})
}

// TestBindPortAddress: what goes to a bound port with an address that the program chose leaves by the uplink of that in
// IPv4, and not at all in IPv6.
func TestBindPortAddress(t *testing.T) {
	c := newCrossing(t)
	p := c.prober()
	c.must("bind", "--ifname", "wan1", "--proto", "udp", "--dport", "7")
	inet, inet6 := at(0)
	c.only(0, func() { p.want(inet, "new s udp4\nbind s %s:0\nask s %s", inet, far4) })
	c.nothing(func() { p.want("ENETUNREACH", "new s udp6\nbind s [%s]:0\nask s %s", inet6, far6) })
	c.must("unbind", "--ifname", "wan1", "--proto", "udp", "--dport", "7")
	c.must("bind", "--ifname", "wan1", "--on-loss", "fallback", "--proto", "udp", "--dport", "7")
	c.only(0, func() {
		p.want(inet, "new s udp4\nbind s %s:0\nask s %s", inet, far4)
		p.want(inet6, "new s udp6\nbind s [%s]:0\nask s %s", inet6, far6)
	})
	if rules := append(c.foreignAt(inet), c.foreignAt(inet6)...); len(rules) > 0 {
		t.Errorf("fallback needs no rules for other addresses: %q", rules)
	}
}
