package e2e

import (
	"errors"
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

	p := c.bound("wan1")
	c.leaves(p, 1)
	before = c.allRules()
	c.do("attach", "wan1", "4194303")
	c.do("run", "wan1", "no-such-command")
	asBefore("beside a program that is bound")
	c.leaves(p, 1)
}
