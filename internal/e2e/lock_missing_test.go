package e2e

import (
	"errors"
	"strconv"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/cgroup"
)

// TestLockMissing: where the lock was removed, or made anew beside programs that read the former one, doctor and status say
// so once, and what doctor advises cures it.
func TestLockMissing(t *testing.T) {
	c := newCrossing(t)
	p := c.bound("wan1")
	other := c.bound("wan1")
	c.leaves(p, 1)
	other.want("ok", "new s udp4")
	pid := strconv.Itoa(c.pidOf(p))
	doctor := func(code int, words ...string) {
		t.Helper()
		r := c.do("doctor", "--only", "lock-missing")
		for _, want := range words {
			if !strings.Contains(strings.Join(strings.Fields(r.stdout), " "), want) {
				t.Errorf("doctor: %+v, want %q", r, want)
			}
		}
		if r.code != code || code == 1 && strings.Count(r.stdout, "their lock is missing") != 1 {
			t.Errorf("doctor: %+v, want exit code %d", r, code)
		}
	}
	doctor(0)
	if out, err := c.here("sh", "-c", "rm "+cgroup.PinRoot+"/lock-*").CombinedOutput(); err != nil { // its file system is this host's
		t.Fatalf("%v\n%s", err, out)
	}
	doctor(1, "closed once its link is added again", "attach --ifname")
	if r := c.do("status", "--json"); strings.Count(r.stdout, `"name":"lock-missing"`) != 1 {
		t.Errorf("status: %+v", r)
	}
	if r := c.do("bound"); r.code != 1 || !strings.Contains(r.stdout, "the lock, as doctor says") {
		t.Errorf("bound: %+v", r)
	}
	c.leaves(p, 1) // by the former lock
	c.must("attach", "wan1", pid)
	doctor(0)
	if r := c.do("bound"); r.code != 0 {
		t.Errorf("bound: %+v", r)
	}
	c.leaves(p, 1)
}

// TestLockRefused: a holder that cannot write the lock says so once, however often it tries, and writes it once it can.
func TestLockRefused(t *testing.T) {
	c := newCrossingAlone(t)
	c.serve()
	watch := c.watch("--routes", "copy")
	c.waitTables(0)
	c.waitTables(1)
	p := c.bound("wan1")
	c.leaves(p, 1)
	owner := func(uid string) {
		t.Helper()
		if out, err := c.here("sh", "-c", "chown "+uid+" "+cgroup.PinRoot+"/lock-*").CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	owner("4711")
	for _, addr := range []string{"10.2.0.11", "10.2.0.12", "10.2.0.13"} { // each is an event of the link
		c.ns.IP(t, "address add "+addr+"/24 dev wan1")
		c.served(addr)
	}
	eventually(t, "the watch says that it cannot", func() error {
		if len(saidOf(watch)) == 0 {
			return errors.New(watch.log.String())
		}
		return nil
	})
	for addr, said := range saidOf(watch) {
		if said != 1 {
			t.Errorf("%s: said %d times:\n%s", addr, said, watch.log)
		}
	}
	owner("0")
	c.ns.IP(t, "link del wan1")
	c.connect(1)
	c.address(1)
	c.waitLeaves(p, 1)
}

// saidOf counts by address how often a watch said that it cannot write the lock.
func saidOf(watch *process) map[string]int {
	said := make(map[string]int)
	for line := range strings.Lines(watch.log.String()) {
		if _, rest, ok := strings.Cut(line, "cannot keep the lock of bound programs"); ok {
			_, addr, _ := strings.Cut(rest, "addr=")
			addr, _, _ = strings.Cut(addr, " ")
			said[addr]++
		}
	}
	return said
}
