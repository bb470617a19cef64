package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// refused are the answers of a socket that has no way out, at once.
func (p *probing) refused(families ...string) {
	p.t.Helper()
	for _, family := range families {
		to := map[string]string{"4": far4, "6": far6}[family]
		p.want("ENETUNREACH", "new s tcp%s\nconnect s %s", family, to)
		p.want("ENETUNREACH", "new s udp%s\nask s %s", family, to)
		p.want("ENETUNREACH", "new s udp%s\nconnect s %s", family, to)
		p.want("ENETUNREACH", "new s ping%s\nask s %s", family, to)
		p.want("ENETUNREACH", "new s raw%s\nask s %s", family, to)
		p.want("ENETUNREACH", "new s mptcp%s\nconnect s %s", family, to)
	}
}

// leaves is that it sends by uplink n.
func (c *crossing) leaves(p *probing, n int) {
	c.t.Helper()
	inet, inet6 := at(n)
	c.only(n, func() {
		p.want(inet, "new s tcp4\nconnect s %s\nask s", far4)
		p.want(inet6, "new s tcp6\nconnect s %s\nask s", far6)
		p.want(inet, "new s udp4\nask s %s", far4)
		p.want(inet6, "new s udp6\nask s %s", far6)
	})
}

// blocked waits until what is bound to wan1 has no way out any more, and then watches that nothing gets
// out. What has lost its uplink in the midst may have been answered before.
func (c *crossing) blocked(p *probing, families ...string) {
	c.t.Helper()
	for _, family := range families {
		eventually(c.t, "IPv"+family+" is blocked", func() error {
			p.want("ok", "new w udp%s", family)
			answer := p.do("connect w %s", map[string]string{"4": far4, "6": far6}[family])
			p.want("ok", "close w")
			if answer != "ENETUNREACH" {
				return errors.New(answer)
			}
			return nil
		})
	}
	c.nothing(func() { p.refused(families...) })
}

// waitLeaves waits until what is bound to wan1 gets out again.
func (c *crossing) waitLeaves(p *probing, n int) {
	c.t.Helper()
	for _, far := range [][2]string{{"4", far4}, {"6", far6}} {
		eventually(c.t, "IPv"+far[0]+" works again", func() error {
			p.want("ok", "new w udp%s", far[0])
			answer := p.do("connect w %s", far[1])
			p.want("ok", "close w")
			if answer != "ok" {
				return errors.New(answer)
			}
			return nil
		})
	}
	c.leaves(p, n)
}

// TestBindLoss: whatever happens to the uplink, nothing leaves by the other one, in either family; and
// what falls back does. An open connection ends, and does not move.
func TestBindLoss(t *testing.T) {
	c := newCrossing(t)
	inet, _ := at(1)
	strict, soft := c.bound("wan1"), c.bound("wan1", "--on-loss", "fallback")
	c.leaves(strict, 1)
	c.leaves(soft, 1)
	for _, tt := range []struct {
		name, lose, find string
	}{
		{"link down", "link set wan1 down", "link set wan1 up"},
		{"no default routes", "route del default dev wan1\n-6 route del default dev wan1", ""},
		{"no addresses", "address flush dev wan1 scope global", ""},
		{"no link", "link del wan1", "connect"},
	} {
		t.Log(tt.name)
		strict.want(inet, "new open tcp4\nconnect open %s\nask open", far4)
		// What soft has closed falls back, too, and with its old source, as long as the far end has not confirmed that.
		eventually(t, "no connection is about to close", func() error {
			if out := c.sh("ss -Htan state fin-wait-1 state closing state last-ack"); out != "" {
				return errors.New(out)
			}
			return nil
		})
		for line := range strings.Lines(tt.lose) {
			c.ns.IP(t, line)
		}
		c.blocked(strict, "4", "6")
		c.nothing(func() { strict.do("try open") })
		strict.want("ok", "close open")
		c.leaves(soft, 0)
		if tt.find == "connect" {
			c.connect(1)
		} else if tt.find != "" {
			c.ns.IP(t, tt.find)
		}
		c.address(1)
		c.waitLeaves(strict, 1)
		c.waitLeaves(soft, 1)
	}
}

// TestBindLossOwnAddress: a socket that a bound program binds to the address of its uplink leaves by no other uplink.
func TestBindLossOwnAddress(t *testing.T) {
	c := newCrossingAlone(t)
	server := c.serve()
	watch := c.watch("--routes", "copy")
	c.waitTables(0)
	c.waitTables(1)
	rules := c.allRules()
	inet, inet6 := at(1)
	p := c.bound("wan1")
	type end struct{ family, source, far string }
	ends := []end{{"4", inet, far4}, {"6", "[" + inet6 + "]", far6}}
	open := func() {
		for _, e := range ends {
			seen := strings.Trim(e.source, "[]")
			c.only(1, func() {
				for _, kind := range []string{"tcp", "mptcp"} {
					p.want(seen, "new %[4]s%[1]s %[4]s%[1]s\nbind %[4]s%[1]s %[2]s:0\nconnect %[4]s%[1]s %[3]s\nask %[4]s%[1]s", e.family, e.source, e.far, kind)
				}
				p.want(seen, "new udp%[1]s udp%[1]s\nbind udp%[1]s %[2]s:0\nask udp%[1]s %[3]s", e.family, e.source, e.far)
			})
		}
	}
	nothing := func(gone string) { // families whose addresses went
		for _, e := range ends {
			c.nothing(func() {
				for _, kind := range []string{"tcp", "mptcp"} {
					p.do("try %s%s", kind, e.family)
				}
				p.do("try udp%s %s", e.family, e.far)
				if strings.Contains(gone, e.family) {
					p.want("EADDRNOTAVAIL", "new s udp%s\nbind s %s:0", e.family, e.source)
					p.do("try s %s", e.far)
					p.want("ENETUNREACH", "ask s %s", e.far)
					return
				}
				for _, kind := range []string{"tcp", "mptcp"} {
					p.want("ENETUNREACH", "new s %s%s\nbind s %s:0\nconnect s %s", kind, e.family, e.source, e.far)
				}
				p.want("ENETUNREACH", "try udp%s %s", e.family, e.far)
				p.want("ENETUNREACH", "new s udp%s\nbind s %s:0\nask s %s", e.family, e.source, e.far)
				p.want("ENETUNREACH", "new s udp%s\nbind s %s:0\nconnect s %s", e.family, e.source, e.far)
			})
			p.want("ok", "close tcp%[1]s\nclose mptcp%[1]s\nclose udp%[1]s", e.family)
		}
	}
	for _, tt := range []struct{ name, lose, find, gone string }{
		{"no default routes", "route del default dev wan1\n-6 route del default dev wan1", "", ""},
		{"link down, where IPv6 addresses stay", "link set wan1 down", "link set wan1 up", ""},
		{"link down", "link set wan1 down", "link set wan1 up", "6"},
		{"no addresses", "address flush dev wan1 scope global", "", "4 6"},
	} {
		t.Log(tt.name)
		stay := "1"
		if tt.gone != "" {
			stay = "0"
		}
		sysctl(t, c.ns, "net/ipv6/conf/wan1/keep_addr_on_down", stay)
		open()
		for line := range strings.Lines(tt.lose) {
			c.ns.IP(t, line)
		}
		c.blocked(p, "4", "6")
		nothing(tt.gone)
		if tt.find != "" {
			c.ns.IP(t, tt.find)
		}
		c.address(1)
		c.waitLeaves(p, 1)
	}

	// Nobody is there who could do anything.
	open()
	server.kill()
	watch.kill()
	c.emptyTables()
	c.blocked(p, "4", "6")
	nothing("")

	// All is as before once nothing is bound any more.
	c.serve()
	c.watch("--routes", "copy")
	c.waitLeaves(p, 1)
	c.must("unbind", "--all")
	eventually(t, "the rules are as before", func() error {
		if diff := unordered(c.allRules(), rules); diff != "" {
			return errors.New(diff)
		}
		return nil
	})
}

// TestBindRenamed: a link with another name is another link. What is bound to the old name does not leave until a link
// has that again.
func TestBindRenamed(t *testing.T) {
	c := newCrossing(t)
	rename := func(from, to string) { // where the kernel does that while it is up, routes stay
		if _, err := c.ns.Output("ip", "link", "set", from, "name", to); err != nil {
			c.rename(from, to)
		}
	}
	p := c.bound("wan1")
	c.leaves(p, 1)
	rename("wan1", "wan9")
	c.blocked(p, "4", "6")
	rename("wan9", "wan1")
	c.address(1)
	c.waitLeaves(p, 1)
}

// TestBindOneFamily: an uplink with one family only. The other one does not leave by another uplink.
func TestBindOneFamily(t *testing.T) {
	c := newCrossing(t)
	inet, inet6 := at(1)
	p := c.bound("wan1")
	c.ns.IP(t, "address del "+inet6+"/64 dev wan1")
	c.ns.IP(t, "-6 route flush default dev wan1")
	c.waitNotServed(inet6)
	c.blocked(p, "6")
	c.only(1, func() { p.want(inet, "new s tcp4\nconnect s %s\nask s", far4) })
	// And who starts then.
	late := c.bound("wan1")
	c.nothing(func() { late.refused("6") })
	c.only(1, func() { late.want(inet, "new s udp4\nask s %s", far4) })

	c.ns.IP(t, "address del "+inet+"/24 dev wan1")
	c.waitNotServed(inet)
	c.address(1)
	c.ns.IP(t, "address del "+inet+"/24 dev wan1")
	c.served(inet6)
	c.waitNotServed(inet)
	c.blocked(p, "4")
	eventually(t, "IPv6 is back", func() error {
		p.want("ok", "new w udp6")
		if answer := p.do("ask w %s", far6); answer != inet6 {
			return errors.New(answer)
		}
		return nil
	})
}

// TestBindKilled: everything of ours is killed. Who is bound stays bound, or blocked, and what starts
// again takes over.
func TestBindKilled(t *testing.T) {
	c := newCrossingAlone(t)
	server := c.serve()
	watch := c.watch("--routes", "copy")
	c.waitTables(0)
	c.waitTables(1)
	p := c.bound("wan1")
	c.leaves(p, 1)
	rules := c.allRules()

	server.kill()
	watch.kill()
	c.leaves(p, 1)
	// Nobody is there who would mend this.
	c.emptyTables()
	c.ns.IP(t, "route del default dev wan1")
	c.ns.IP(t, "-6 route del default dev wan1")
	c.blocked(p, "4", "6")
	c.leaves(c.prober(), 0)
	if r := c.do("run", "--ifname", "wan1", "true"); r.code != 125 || !strings.Contains(r.stderr, "server") {
		t.Errorf("run without a server: %+v", r)
	}

	c.address(1)
	c.serve()
	c.watch("--routes", "copy")
	c.waitLeaves(p, 1)
	c.leaves(c.bound("wan1"), 1)
	eventually(t, "the rules are as before", func() error {
		if diff := unordered(c.allRules(), rules); diff != "" {
			return errors.New(diff)
		}
		return nil
	})
}

// emptyTables takes all routes out of the leased tables.
func (c *crossing) emptyTables() {
	c.t.Helper()
	for _, family := range []string{"-4", "-6"} {
		for _, rule := range c.allRules() {
			f := strings.Fields(rule)
			if f[0] == "10000:" {
				_, _ = c.ns.Output("ip", family, "route", "flush", "table", f[4]) // of one family each
			}
		}
	}
}

// TestBindMany: hundreds of runs leave nothing behind.
func TestBindMany(t *testing.T) {
	c := newCrossing(t)
	client := staticDir(t) + "/" + clientBin
	if r := c.run(c.here(client, "run", "--ifname", "wan1", "true").Args[0], c.here(client, "run", "--ifname", "wan1", "true").Args[1:]...); r.code != 0 {
		t.Fatalf("%+v", r)
	}
	rules := c.allRules()
	const runs = 300
	script := fmt.Sprintf(`i=0; while [ $i -lt %d ]; do "$0" run --ifname wan$((i %% 2)) true || exit; i=$((i+1)); echo $i; done`, runs/2)
	var both []*process
	for range 2 { // at the same time
		both = append(both, c.start(c.here("sh", "-c", script, client)))
	}
	for _, p := range both {
		if code := p.waitWriting(); code != 0 {
			t.Fatalf("exit code %d: %s", code, p.log)
		}
	}
	if r := c.do("run", "--ifname", "wan1", "true"); r.code != 0 || r.stderr != "" {
		t.Errorf("%+v", r)
	}
	for _, rule := range c.allRules() {
		if strings.Count(strings.Join(rules, "\n"), rule) == 0 && !strings.Contains(rule, "fwmark") && !strings.Contains(rule, "unreachable") {
			t.Errorf("one rule more: %s", rule)
		}
	}
	if got, want := len(c.allRules()), len(rules)+6; got != want { // those of wan0
		t.Errorf("%d rules, want %d", got, want)
	}
	c.must("unbind", "--all")
	if left := c.ours(); len(left) != 0 {
		t.Errorf("left: %q", left)
	}
}

// ours are rules of bindings and cgroups.
func (c *crossing) ours() (left []string) {
	c.t.Helper()
	for _, rule := range c.allRules() {
		if priority, _, _ := strings.Cut(rule, ":"); priority < "9998" && len(priority) == 4 || strings.HasPrefix(priority, "15") {
			left = append(left, rule)
		}
	}
	r := c.run("find", c.cgroup, "-name", "ta-*", "-o", "-path", "*/table-allocator*", "-type", "d")
	return append(left, strings.Fields(r.stdout)...)
}
