package e2e

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
)

// TestWatchFrozen: a watch that was stopped for a while, as by a debugger, finds what happened meanwhile, of which the kernel has
// dropped most events.
func TestWatchFrozen(t *testing.T) {
	for _, mode := range []string{"copy", "move"} {
		t.Run(mode, func(t *testing.T) {
			h := newHost(t)
			u := h.behind(routed(0), routed(1))
			u.address(0)
			u.address(1)
			h.serve()
			p := h.watch("--routes", mode)
			for n := range u.isps {
				inet, inet6 := at(n)
				h.served(inet)
				h.served(inet6)
			}
			h.freeze(p.cmd.Process.Pid)
			h.ns.IP(t, "rule flush protocol 116")
			h.ns.IP(t, "link set wan0 down")
			h.ns.IP(t, "link set wan0 up")
			u.address(0)
			h.ns.IP(t, "address del 10.2.0.2/24 dev wan1")
			h.ns.IP(t, "address add 10.2.0.3/24 dev wan1")
			h.ns.IP(t, "route replace default via 10.2.0.1 dev wan1 metric 200")
			var batch strings.Builder
			for i := range 20000 {
				fmt.Fprintf(&batch, "route %s 172.16.0.0/24 dev wan1\n", []string{"add", "del"}[i%2])
			}
			h.batch(strings.TrimSpace(batch.String()))
			if err := p.cmd.Process.Signal(syscall.SIGCONT); err != nil {
				t.Fatal(err)
			}
			for addr, n := range map[string]int{"10.1.0.2": 0, "fd01::2": 0, "10.2.0.3": 1, "fd02::2": 1} {
				h.served(addr)
				eventually(t, "packets from "+addr+" leave by their link", func() error { return u.arrives(packet{source: addr}, u.publicly(n, addr)) })
			}
			h.waitNotServed("10.2.0.2")
			p.stop()
		})
	}
}

// TestWatchTwo: a second watch leaves addresses to the first one, and serves what comes once that was killed.
func TestWatchTwo(t *testing.T) {
	h := newHost(t)
	u := h.behind(routed(0), routed(1))
	u.address(0)
	h.serve()
	config := h.watchFile(`{"reconcile_seconds":1,"links":[{"ifname":"*"}]}`)
	first := h.watch("-c", config)
	h.served("10.1.0.2")
	second := h.watch("-c", config)
	second.waitLog("another client serves this address")
	u.address(1)
	h.served("10.2.0.2")
	if n := len(h.leases()); n != 4 {
		t.Errorf("%d leases of 4 addresses: %q", n, h.leases())
	}
	tables := h.rules()
	first.kill()
	h.ns.IP(t, "address add 10.2.0.9/24 dev wan1")
	h.served("10.2.0.9")
	eventually(t, "the second watch serves all", func() error {
		if n := strings.Count(second.log.String(), ": has table "); n < 5 {
			return fmt.Errorf("it serves %d of 5", n)
		}
		return nil
	})
	for _, rule := range tables {
		if !strings.Contains(strings.Join(h.rules(), "\n"), rule) {
			t.Errorf("the rule %q is gone", rule)
		}
	}
}
