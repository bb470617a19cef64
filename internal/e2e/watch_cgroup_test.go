package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestWatchCgroup: a link that only what is put into its cgroup uses. The cgroup stands while the watch serves the link,
// and stays, closed, while processes are in it.
func TestWatchCgroup(t *testing.T) {
	c := newCrossingAlone(t)
	c.serve()
	file := c.watchFile(`{"links":[{"ifname":"wan1","routes":"move","unbound":false,"cgroup":true},{}],"reconcile_seconds":1}`)
	watch := c.watch("-c", file)
	for n := range c.isps {
		c.waitTables(n)
	}
	cgroup := filepath.Join(c.cgroup, "ta-wan1")
	stands := func(want bool) {
		t.Helper()
		eventually(t, fmt.Sprintf("the cgroup stands: %v", want), func() error {
			info, err := os.Stat(cgroup)
			// The sticky bit comes last: what enters before is not bound.
			if have := err == nil && (!want || info.Mode()&os.ModeSticky != 0); have != want {
				return fmt.Errorf("%v, %w", have, err)
			}
			return nil
		})
	}
	stands(true)

	inet, inet6 := at(1)
	for _, rule := range c.allRules() {
		for _, addr := range []string{inet, inet6} {
			if strings.HasPrefix(rule, "9100") && strings.HasSuffix(strings.TrimSuffix(rule, " proto 116"), "lookup "+c.served(addr)) {
				t.Errorf("unbound traffic may use %s: %s", addr, rule)
			}
		}
	}
	for _, family := range []string{"-4", "-6"} {
		if out, _ := c.ns.Output("ip", family, "route", "show", "default", "table", "main"); strings.Contains(out, "wan1") {
			t.Errorf("main has %q", out)
		}
	}
	plain := c.prober()
	c.leaves(plain, 0)
	enter := func() *probing {
		t.Helper()
		return c.prober("sh", "-ec", `echo 0 >/sys/fs/cgroup/ta-wan1/cgroup.procs; exec "$@"`, "sh")
	}
	member := enter()
	c.leaves(member, 1)

	// Rules of its binding that others delete come back.
	c.sh("ip rule del priority 9003; ip -6 rule del priority 9003")
	eventually(t, "the guards are back", func() error {
		if rules := fmt.Sprint(c.allRules()); strings.Count(rules, "9003:") != 2 {
			return errors.New(rules)
		}
		return nil
	})
	c.waitLeaves(member, 1)

	// An empty one is nobody's leftover, for none of the commands that remove those.
	member.in.Close()
	member.p.wait()
	c.must("run", "wan1", "true")
	if r := c.do("bound"); !strings.Contains(r.stdout, "ta-wan1") {
		t.Errorf("bound: %+v", r)
	}
	if _, err := os.Stat(cgroup); err != nil {
		t.Error(err)
	}
	// Who removes it gets it back, and the next watch goes on with it.
	if err := os.Remove(cgroup); err != nil {
		t.Fatal(err)
	}
	stands(true)
	member = enter()
	c.leaves(member, 1)
	watch.stop()
	c.leaves(member, 1)
	watch = c.watch("-c", file)

	// The link goes, with a process in the cgroup.
	c.ns.IP(t, "address flush dev wan1")
	c.blocked(member, "4", "6")
	stands(true)
	member.in.Close()
	member.p.wait()
	stands(false)
	eventually(t, "nothing is left of it", func() error {
		if left := c.ours(); len(left) > 0 {
			return fmt.Errorf("%q", left)
		}
		return nil
	})
	c.leaves(plain, 0)

	// It comes again, and goes by the configuration.
	c.address(1)
	stands(true)
	member = enter()
	c.waitLeaves(member, 1)
	member.in.Close()
	member.p.wait()
	c.watchFile(`{"links":[{}],"reconcile_seconds":1}`)
	watch.again()
	stands(false)
	eventually(t, "unbound traffic may use the link", func() error {
		for _, rule := range c.allRules() {
			if strings.HasPrefix(rule, "91000:") && strings.Contains(rule, "lookup "+c.served(inet)) {
				return nil
			}
		}
		return errors.New("no rule")
	})
}
