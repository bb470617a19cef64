package e2e

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// waitNothingLeft waits until all that was served is gone, but for the process that serves.
func (h *host) waitNothingLeft(p *process, fds int) {
	h.t.Helper()
	eventually(h.t, "nothing is left", func() error {
		if got := fdCount(h.t, p.cmd.Process.Pid); got > fds {
			return fmt.Errorf("descriptors: %d, at the beginning %d", got, fds)
		}
		if n := len(h.rules()) + len(h.rules6()); n > 0 {
			return fmt.Errorf("%d rules", n)
		}
		for _, family := range []string{"-4", "-6"} {
			if routes := h.ns.IP(h.t, family+" route show table all proto 116"); routes != "" {
				return errors.New(routes)
			}
		}
		if leases := h.leases(); len(leases) > 0 {
			return fmt.Errorf("%d leases", len(leases))
		}
		return nil
	})
}

// TestWatchSoakScale: many addresses on many links up and down.
func TestWatchSoakScale(t *testing.T) {
	links, each, rounds := 6, 10, 3
	if fullSize() {
		links, each, rounds = 100, 10, 10
	}
	h := newHost(t)
	h.serve(`"num_tables":4000`)
	file := h.watchFile(`{"links":[{"ifname":"wan*"}],"exclude":["lo","far*"],"reconcile_seconds":5}`)
	p := h.watchPlain("-c", file)
	fds := fdCount(t, p.cmd.Process.Pid)
	var up, down []string
	for i := range links {
		for n := range each {
			nodad := ""
			if n%2 == 1 {
				nodad = " nodad"
			}
			up = append(up, fmt.Sprintf("address add %s dev wan%d%s", numbered(i, n), i, nodad))
			down = append(down, fmt.Sprintf("address del %s dev wan%d", numbered(i, n), i))
		}
	}
	var first int
	for round := range rounds {
		h.many(links)
		begin := time.Now()
		h.ns.Batch(h.t, up...)
		eventually(t, "all are served", func() error {
			if n := h.unboundRules(); n != len(up) {
				return fmt.Errorf("%d of %d", n, len(up))
			}
			return nil
		})
		took := time.Since(begin)
		if round == 0 {
			first = pssOf(t, p.cmd.Process.Pid)
		}
		last := pssOf(t, p.cmd.Process.Pid)
		t.Logf("round %d: %d addresses on %d links served after %v; PSS %d KiB", round, len(up), links, took.Round(time.Millisecond), last)
		if last > first*3/2+8<<10 {
			t.Errorf("PSS grew from %d to %d KiB", first, last)
		}
		if round == rounds-1 {
			for _, r := range h.statusRows("-c", file) {
				if r.State != "no-route" || r.Missing != "no route" {
					t.Errorf("%s on %s misses %s", r.Address, r.Ifname, r.Missing)
				}
			}
			h.healMany(p, len(up))
		}
		// In turns: addresses go, links go down, links vanish.
		begin = time.Now()
		switch round % 3 {
		case 0:
			h.ns.Batch(h.t, down...)
		case 1:
			var lines []string
			for i := range links {
				lines = append(lines, fmt.Sprintf("link set wan%d down", i))
			}
			h.ns.Batch(h.t, lines...)
			fallthrough
		default:
			h.ns.Run(t, "sh", "-c", "ip -o link show type veth | sed -n 's/^[0-9]*: \\(wan[0-9]*\\)@.*/link del \\1/p' | ip -batch -")
		}
		h.waitNothingLeft(p, fds)
		t.Logf("round %d: nothing left after %v", round, time.Since(begin).Round(time.Millisecond))
		if round%3 == 0 {
			h.ns.Run(t, "sh", "-c", "ip -o link show type veth | sed -n 's/^[0-9]*: \\(wan[0-9]*\\)@.*/link del \\1/p' | ip -batch -")
		}
	}
	for word, want := range map[string]int{"level=ERROR": 0, "level=WARN": 1, "panic": 0} { // one of rules that others delete
		if n := strings.Count(p.log.String(), word); n != want {
			t.Errorf("the log has %d of %s, want %d", n, word, want)
		}
	}
}

// healMany deletes all rules of ours, and then the first unbound ones: all are back, in the
// order in which they were.
func (h *host) healMany(p *process, addresses int) {
	h.t.Helper()
	want := [][]string{unbound(h.rules()), unbound(h.rules6())}
	for _, c := range []struct{ name, command string }{
		{"all rules", "rule flush protocol 116"},
		{"the first unbound rule", "rule del pref 91000 protocol 116"},
	} {
		begin := time.Now()
		h.freeze(p.cmd.Process.Pid) // or a rule that it moves meanwhile makes the flush fail
		h.ns.IP(h.t, "-4 "+c.command)
		h.ns.IP(h.t, "-6 "+c.command)
		_ = syscall.Kill(p.cmd.Process.Pid, syscall.SIGCONT) // what follows says if it has ended
		eventually(h.t, c.name+" are back", func() error {
			if n := h.unboundRules(); n != addresses {
				return fmt.Errorf("%d of %d", n, addresses)
			}
			for i, got := range [][]string{unbound(h.rules()), unbound(h.rules6())} {
				if !slices.Equal(got, want[i]) {
					return errors.New("the order is another")
				}
			}
			return nil
		})
		h.t.Logf("%s deleted: back as they were after %v", c.name, time.Since(begin).Round(time.Millisecond))
	}
}

// TestWatchSoakOverrun: more changes than the kernel queues while the watch does not read,
// and a kill in the middle of them.
func TestWatchSoakOverrun(t *testing.T) {
	changes := 2000
	if fullSize() {
		changes = 5000
	}
	h := newHost(t)
	h.serve(`"num_tables":8000`)
	h.many(4)
	file := h.watchFile(`{"links":[{"ifname":"wan*"}],"exclude":["lo","far*"],"reconcile_seconds":3600}`)
	p := h.watchPlain("-c", file)
	// Each round leaves other addresses than the one before.
	var lines []string
	var want []string
	round := 0
	storm := func() {
		lines, want = nil, nil
		for i := range changes / 2 {
			addr := fmt.Sprintf("10.%d.%d.%d", 1+round, i/250, 1+i%250)
			lines = append(lines, fmt.Sprintf("address add %s/32 dev wan%d", addr, i%4))
			if i%50 == 0 {
				want = append(want, addr)
			}
		}
		for i := range changes / 2 {
			if i%50 != 0 {
				lines = append(lines, strings.Replace(lines[i], "address add", "address del", 1))
			}
		}
		round++
	}
	flush := func() {
		for i := range 4 {
			lines = append(lines, fmt.Sprintf("address flush dev wan%d scope global", i))
		}
	}
	exactly := func(p *process) {
		t.Helper()
		eventually(t, "exactly the addresses that are left are served", func() error {
			var got []string
			for _, rule := range h.rules() {
				if rest, ok := strings.CutPrefix(rule, "10000: from "); ok {
					got = append(got, strings.Fields(rest)[0])
				}
			}
			if err := unorderedError(got, want); err != nil {
				return fmt.Errorf("%d of %d: %.300w", len(got), len(want), err)
			}
			if leases := h.leases(); len(leases) != len(want) {
				return fmt.Errorf("%d leases for %d addresses", len(leases), len(want))
			}
			return nil
		})
	}
	storm()
	h.freeze(p.cmd.Process.Pid)
	h.ns.Batch(h.t, lines...)
	begin := time.Now()
	_ = syscall.Kill(p.cmd.Process.Pid, syscall.SIGCONT)
	exactly(p)
	t.Logf("%d changes while it did not read: right after %v", len(lines), time.Since(begin).Round(time.Millisecond))

	// All of them go, others come, and it is killed on the way.
	old := lines[:0:0]
	storm()
	flush()
	lines = append(lines[len(lines)-4:], lines[:len(lines)-4]...)
	old = append(old, lines...)
	h.freeze(p.cmd.Process.Pid)
	h.ns.Batch(t, old[:len(old)/2]...)
	_ = syscall.Kill(p.cmd.Process.Pid, syscall.SIGCONT)
	p.kill()
	p = h.watchPlain("-c", file)
	h.ns.Batch(t, old[len(old)/2:]...)
	begin = time.Now()
	if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	var left []string // leases of addresses that nobody can know of any more end by themselves
	eventually(t, "exactly the addresses that are left have rules", func() error {
		var got []string
		for _, rule := range h.rules() {
			if rest, ok := strings.CutPrefix(rule, "10000: from "); ok {
				got = append(got, strings.Fields(rest)[0])
			}
		}
		left = h.leases()
		return unorderedError(got, want)
	})
	t.Logf("%d changes around a kill: right after %v, %d leases for %d addresses", len(old), time.Since(begin).Round(time.Millisecond), len(left), len(want))
	for _, addr := range want {
		if !strings.Contains(strings.Join(left, " "), "|"+addr+"|") {
			t.Errorf("no lease of %s", addr)
		}
	}
}
