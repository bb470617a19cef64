package e2e

import (
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// An address that goes and comes back is not served for a moment. Nothing leaves from it by
// another uplink meanwhile, if nothing ever may, and once it is not awaited any more nothing
// is left.
func TestReturningAddress(t *testing.T) {
	h := newHome(t, 2)
	for n, isp := range h.isps {
		h.ns.IP(t, "address add "+given[n]+"/24 dev "+isp.ifname)
		h.ns.IP(t, fmt.Sprintf("address add %s/64 dev %s nodad", given6(n, 0), isp.ifname))
		h.ns.IP(t, fmt.Sprintf("route add default via %s dev %s metric %d", isp.gateway, isp.ifname, 200-n))
		h.ns.IP(t, fmt.Sprintf("route add default via %s dev %s metric %d", router6, isp.ifname, 200-n))
	}
	h.lease(given[0], "wan0", "--on-loss", "block", "--routes", "copy", "--gateway", h.isps[0].gateway)
	h.lease6(given6(0, 0), "wan0", "--on-loss", "block", "--routes", "copy", "--gateway", router6)
	clients := h.pids(clientBin)
	served := func() {
		t.Helper()
		h.waitServed(0, given[0], "192.168.1.0/24 dev wan0", "default via 192.168.1.1 dev wan0")
		h.waitServed(0, given6(0, 0), prefix6(0, 0)+" dev wan0", "default via "+router6+" dev wan0")
	}
	waitFor := func(rules ...string) {
		t.Helper()
		eventually(t, "the addresses are awaited", func() error {
			if err := unorderedError(h.allRules(), rules); err != nil {
				return err
			}
			if leases := h.leases(); len(leases) > 0 {
				return fmt.Errorf("leases: %q", leases)
			}
			return nil
		})
	}
	guards := []string{awaited(given[0]), awaited(given6(0, 0))}
	for range 3 {
		served()
		h.ns.IP(t, "address flush dev wan0 scope global")
		waitFor(guards...)
		for _, pid := range clients {
			h.freeze(pid)
		}
		h.ns.IP(t, "address add "+given[0]+"/24 dev wan0")
		h.ns.IP(t, "address add "+given6(0, 0)+"/64 dev wan0 nodad")
		for _, addr := range []string{given[0], given6(0, 0)} {
			if err := h.pass(0, addr, answers); !errors.Is(err, syscall.ENETUNREACH) {
				t.Errorf("a packet from %s: %v", addr, err)
			}
		}
		for _, pid := range clients {
			if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
				t.Fatal(err)
			}
		}
	}
	served()
	// On another link it is another's.
	h.ns.IP(t, "address flush dev wan0 scope global")
	waitFor(guards...)
	h.ns.IP(t, "address add "+given[0]+"/25 dev wan1")
	waitFor(guards[1])
	h.ns.IP(t, "address del "+given[0]+"/25 dev wan1")
	h.signalClients(syscall.SIGTERM)
	h.waitClean()
	h.waitRules6()
	h.wantOwnOnly()
}

// Clients that wait for the server ask it at once when somebody calls for the table.
func TestCallWhileWaiting(t *testing.T) {
	h := newHost(t)
	var args [][]string
	for i := range 5 {
		h.link(fmt.Sprintf("wan%d", i), fmt.Sprintf("10.77.%d.2/24", i))
		args = append(args, []string{fmt.Sprintf("10.77.%d.2", i), fmt.Sprintf("wan%d", i), "--routes", "copy"})
	}
	for _, a := range args {
		if got := h.lease(a[0], a[1], a[2:]...); got != 0 {
			t.Fatalf("table without a server: %d", got)
		}
	}
	h.serve()
	var calls []*exec.Cmd
	for _, a := range args {
		calls = append(calls, h.command(append([]string{"-4", "-a", a[0], "-i"}, a[1:]...)...))
	}
	for i, r := range h.together(calls) {
		if r.stdout == "0\n" || r.code != 0 {
			t.Errorf("%s: no table, though the server is there: %s", args[i][0], r.stderr)
		}
	}
}

// TestReturningAddressRenamed: a client that awaits its address follows the link to its new name, and takes over the
// network that the address then has.
func TestReturningAddressRenamed(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	h.ns.IP(t, "address add 2001:db8:1::2/56 dev wan0 nodad")
	var clients []*process
	for _, family := range []string{"-4 -a 10.77.0.2", "-6 -a 2001:db8:1::2"} {
		words := strings.Fields(family)
		clients = append(clients, h.start(h.command(append([]string{"-f", "-i", "wan0", "--on-loss", "block", "--routes", "copy"}, words...)...)))
	}
	all := func() string {
		return h.ns.IP(t, "rule") + h.ns.IP(t, "-6 rule") + h.ns.IP(t, "route show table all proto 116") + h.ns.IP(t, "-6 route show table all proto 116")
	}
	wait := func(what string, has, not []string) {
		t.Helper()
		eventually(t, what, func() error {
			got := all()
			for _, text := range has {
				if !strings.Contains(got, text) {
					return fmt.Errorf("nothing has %q:\n%s", text, got)
				}
			}
			for _, text := range not {
				if strings.Contains(got, text) {
					return fmt.Errorf("there is %q:\n%s", text, got)
				}
			}
			return nil
		})
	}
	lookups := []string{"to 10.77.0.0/24 lookup 1", "to 2001:db8:1::/56 lookup 1", "from 10.77.0.2 lookup 1", "from 2001:db8:1::2 lookup 1"}
	wait("served", append([]string{"10.77.0.0/24 dev wan0 table 1", "2001:db8:1::/56 dev wan0 table 1"}, lookups...), nil)
	h.ns.IP(t, "address del 10.77.0.2/24 dev wan0")
	h.ns.IP(t, "address del 2001:db8:1::2/56 dev wan0")
	wait("blocked", []string{"from 10.77.0.2 unreachable", "from 2001:db8:1::2 unreachable"}, lookups)
	h.rename("wan0", "wan9")
	eventually(t, "both wait under the new name", func() error {
		for _, p := range clients {
			if log := p.log.String(); !strings.Contains(log, "the link was renamed") {
				return errors.New(log)
			}
		}
		return nil
	})
	h.ns.IP(t, "address add 10.77.0.2/25 dev wan9")
	h.ns.IP(t, "address add 2001:db8:1::2/57 dev wan9 nodad")
	wait("served anew", []string{"to 10.77.0.0/25 lookup 1", "to 2001:db8:1::/57 lookup 1", "10.77.0.0/25 dev wan9 table 1", "2001:db8:1::/57 dev wan9 table 1"},
		[]string{"10.77.0.0/24", "2001:db8:1::/56"})
}
