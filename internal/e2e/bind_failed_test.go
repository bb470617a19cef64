package e2e

import (
	"errors"
	"fmt"
	"testing"
)

// TestBindFailedLeavesNothing: a run or attach that fails leaves no rule, so that its mark is free again; with one mark for
// the whole host the next command would be refused. What was bound before stays bound.
func TestBindFailedLeavesNothing(t *testing.T) {
	c := newCrossingAlone(t)
	c.serve(`"bind_mark_mask":"0x06000000"`)
	c.watch("--routes", "copy")
	for n := range c.isps {
		c.waitTables(n)
	}
	before := c.allRules()
	asBefore := func(what string) {
		t.Helper()
		eventually(t, "the rules are as before "+what, func() error {
			if diff := unordered(c.allRules(), before); diff != "" {
				return errors.New(diff)
			}
			return nil
		})
	}
	without := []string{"setpriv", "--bounding-set", "-bpf,-sys_admin", "--inh-caps", "-bpf,-sys_admin", bin(t, clientBin)}
	for _, args := range [][]string{
		{"run", "--force", "wna0", "true"},
		{"run", "--force", "--on-loss", "fallback", "wna1", "true"},
		{"run", "--force", "--wait", "1", "wna2", "true"},
		{"run", "lo", "true"},
		{"attach", "lo", "1"},
		{"attach", "wan1", "4194303"},
	} {
		if r := c.do(args...); r.code == 0 {
			t.Errorf("%q: %+v", args, r)
		}
		asBefore(args[0] + " " + args[1])
	}
	cmd := c.here(without[0], append(without[1:], "run", "--on-loss", "fallback", "wan1", "true")...)
	if r := c.run(cmd.Args[0], cmd.Args[1:]...); r.code != 125 {
		t.Errorf("without the right to load programs: %+v", r)
	}
	asBefore("without the right to load programs")

	// What is pinned for units while it waits stays bound. Its mark was wan1's, whose holder leaves it alone.
	r := c.here(bin(t, clientBin), "run", "--force", "--wait", "15", "wna3", "true")
	waiting := c.start(r)
	eventually(t, "it has bound", func() error {
		if now := c.allRules(); len(now) < len(before)+2 { // a guard in each family
			return fmt.Errorf("%q", now)
		}
		return nil
	})
	guards := c.allRules()
	if r := c.do("bind", "--force", "wna3", "--pin"); r.code != 0 {
		t.Fatalf("bind --pin: %+v", r)
	}
	if code := waiting.wait(); code != 125 {
		t.Errorf("run that got no lease: exit code %d", code)
	}
	if diff := unordered(c.allRules(), guards); diff != "" {
		t.Error(diff)
	}
	c.must("unbind", "wna3", "--pin")
	c.must("unbind", "--all")
	asBefore("unbind --all")

	p := c.bound("wan1")
	c.leaves(p, 1)
	before = c.allRules()
	c.do("attach", "wan1", "4194303")
	c.do("run", "wan1", "no-such-command")
	asBefore("beside a program that is bound")
	c.leaves(p, 1)
}

// TestMarkOfAnother: what is bound to a link never leaves by the link that had its mark before.
func TestMarkOfAnother(t *testing.T) {
	c := newCrossingAlone(t)
	c.serve(`"bind_mark_mask":"0x06000000"`) // room for one
	c.watch("--routes", "copy")
	for n := range c.isps {
		c.waitTables(n)
	}
	user := c.asUserProbe()
	closed := func() {
		for family, far := range map[string]string{"4": far4, "6": far6} {
			user.want("ENETUNREACH", "new s udp%s\nask s %s", family, far)
			user.want("ENETUNREACH", "new s tcp%s\nconnect s %s", family, far)
		}
	}
	for n := range 3 {
		c.must("bind", "wan1", "--uid", "4711")
		c.leaves(user, 1)
		c.must("unbind", "wan1", "--uid", "4711")
		c.leaves(user, 0)
		c.must("bind", "--force", "wan7", "--uid", "4711") // which no link has
		c.nothing(closed)
		more := fmt.Sprintf("10.2.0.%d", 20+n) // wakes the holders of wan1
		c.ns.IP(t, "address add "+more+"/24 dev wan1")
		c.served(more)
		c.nothing(closed)
		c.must("unbind", "wan7", "--uid", "4711")
		c.leaves(user, 0)
	}
}
