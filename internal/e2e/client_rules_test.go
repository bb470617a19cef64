package e2e

import (
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/table-allocator/table-allocator/internal/route"
)

// originals are the three rules of the C program, which marks nothing.
func originals(addr, hosted string, table uint32) []route.Rule {
	return []route.Rule{
		{Priority: 10000, Src: netip.MustParsePrefix(addr + "/32"), Table: table},
		{Priority: 20000, Dst: netip.MustParsePrefix(hosted), Table: table},
		{Priority: 91000, Traffic: route.Traffic{Iif: "lo"}, Table: table},
	}
}

// TestClientOriginalsRules: the original's three rules for this very address are
// replaced; those of others, and an administrator's, stay.
func TestClientOriginalsRules(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	h.addRules(originals("10.77.0.3", "10.77.0.3/24", 10006)...)
	h.ns.IP(t, "rule add pref 10000 from 10.77.0.2 lookup 10005 proto boot")
	h.ns.IP(t, "rule add pref 9999 from 10.77.0.2 lookup 10005") // unmarked by this `ip`, too
	h.ns.IP(t, "rule add pref 20000 to 10.77.0.0/24 lookup 10005 proto static")
	h.ns.IP(t, "rule add pref 91000 iif lo lookup 10005 proto static")
	h.ns.IP(t, "rule add pref 10000 from 10.77.0.2 lookup 10007 proto 117")
	stay := h.rules()
	h.addRules(originals("10.77.0.2", "10.77.0.2/24", 10005)...)
	if got := len(h.rules()); got != len(stay)+3 {
		t.Fatalf("%d rules at the start: %q", got, h.rules())
	}
	table := h.lease("10.77.0.2", "wan0")
	h.wantRules(append(slices.Clone(stay), clientRules("10.77.0.2", "10.77.0.0/24", table)...)...)
	h.signalClients(syscall.SIGTERM)
	h.waitNoClient()
	h.wantRules(stay...)
}

// TestClientOriginalsTable: they are replaced also where the lease is of their own table.
func TestClientOriginalsTable(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve("num_tables:1")
	h.addRules(originals("10.77.0.2", "10.77.0.2/24", 10000)...)
	m := h.monitor()
	before := h.rules()
	if got := h.lease("10.77.0.2", "wan0"); got != 10000 {
		t.Errorf("table %d", got)
	}
	h.wantRules(clientRules("10.77.0.2", "10.77.0.0/24", 10000)...)
	m.wantNeverWithout("from the address", before, func(rule string) bool {
		return strings.HasPrefix(rule, "10000: from 10.77.0.2 lookup 10000")
	})
}

// TestClientNeverTwice: rules are the same three, however often and after whatever end.
func TestClientNeverTwice(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	want := clientRules("10.77.0.2", "10.77.0.0/24", 10000)
	for range 2 {
		for range 2 {
			if got := h.lease("10.77.0.2", "wan0"); got != 10000 {
				t.Errorf("table %d", got)
			}
			h.wantRules(want...)
		}
		h.signalClients(syscall.SIGKILL)
		h.waitNoClient()
		h.wantRules(want...)
	}
	// Other priorities and another mask: those of the dead one go.
	table := h.lease("10.77.0.2", "wan0", "-n", "16", "--priority", "1,2,3")
	h.wantRules("1: from 10.77.0.2 lookup 10000 proto 116", "2: from all to 10.77.0.0/16 lookup 10000 proto 116",
		"3: from all iif lo lookup 10000 proto 116")
	h.signalClients(syscall.SIGTERM)
	h.waitClean()
	if table != 10000 {
		t.Errorf("table %d", table)
	}
}

// TestClientStaleRules: the next holder of a table meets nothing that a killed one left:
// no rule that catches its traffic, no route of ours, but what is not ours.
func TestClientStaleRules(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24", "10.77.0.3/24")
	server := h.serve("num_tables:1", "table_timeout:1")
	if got := h.lease("10.77.0.2", "wan0"); got != 10000 {
		t.Fatalf("table %d", got)
	}
	h.signalClients(syscall.SIGKILL)
	h.waitNoClient()
	h.ns.IP(t, "route add 198.51.100.0/24 dev wan0 table 10000 proto 116")
	h.ns.IP(t, "route add unreachable default metric 4294967295 table 10000 proto 116")
	h.ns.IP(t, "route add 203.0.113.0/24 dev wan0 table 10000 proto static")
	h.ns.IP(t, "route add 198.51.100.0/24 dev wan0 table 10001 proto 116")
	server.waitLog("lease expired")
	if got := h.lease("10.77.0.3", "wan0"); got != 10000 {
		t.Fatalf("table %d", got)
	}
	h.wantRules(clientRules("10.77.0.3", "10.77.0.0/24", 10000)...)
	if got := strings.TrimSpace(h.ns.IP(t, "-4 route show table 10000")); got != "203.0.113.0/24 dev wan0 proto static scope link" {
		t.Errorf("routes of the table:\n%s", got)
	}
	if got := h.ns.IP(t, "-4 route show table 10001"); !strings.Contains(got, "198.51.100.0/24") {
		t.Errorf("routes of another table:\n%s", got)
	}
	h.signalClients(syscall.SIGTERM)
	h.waitClean()
	if got := h.ns.IP(t, "-4 route show table 10000"); !strings.Contains(got, "203.0.113.0/24") {
		t.Errorf("at the end:\n%s", got)
	}
}

// TestClientLostTable: a holder that was stopped until its table went to another leaves
// that one's rules alone, also the one that is just like its own was.
func TestClientLostTable(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24", "10.77.0.3/24", "10.77.0.4/24")
	server := h.serve("num_tables:2", "table_timeout:3")
	if got := h.lease("10.77.0.4", "wan0"); got != 10000 {
		t.Fatalf("table %d", got)
	}
	other := h.onlyClient()
	if got := h.lease("10.77.0.2", "wan0"); got != 10001 {
		t.Fatalf("table %d", got)
	}
	var sleeper int
	for _, pid := range h.pids(clientBin) {
		if pid != other {
			sleeper = pid
		}
	}
	signal := func(pid int, sig syscall.Signal) {
		t.Helper()
		if err := syscall.Kill(pid, sig); err != nil {
			t.Fatal(err)
		}
	}
	h.freeze(sleeper)
	server.waitLog(`msg="lease expired" ifname=wan0 addr=10.77.0.2`)
	if got := h.lease("10.77.0.3", "wan0"); got != 10001 {
		t.Fatalf("table %d", got)
	}
	h.waitRules(append(clientRules("10.77.0.4", "10.77.0.0/24", 10000), clientRules("10.77.0.3", "10.77.0.0/24", 10001)...)...)
	signal(other, syscall.SIGTERM)
	server.waitLog(`msg="lease released" ifname=wan0 addr=10.77.0.4`)
	signal(sleeper, syscall.SIGCONT) // and it gets the other table
	h.waitRules(append(clientRules("10.77.0.2", "10.77.0.0/24", 10000), clientRules("10.77.0.3", "10.77.0.0/24", 10001)...)...)
	signal(sleeper, syscall.SIGTERM)
	h.waitRules(clientRules("10.77.0.3", "10.77.0.0/24", 10001)...)
}

// TestClientKernelRefuses: without the right to change rules there is no table.
func TestClientKernelRefuses(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	server := h.serve(`"allowed_users":[0]`) // as whom it counts without that right
	for _, more := range []string{"", "-f"} {
		args := append([]string{"-4", "-a", "10.77.0.2", "-i", "wan0"}, strings.Fields(more)...)
		r := h.clientWith(withoutNetwork, args...)
		if r.stdout != "0\n" || r.code != 0 || !strings.Contains(r.stderr, "operation not permitted") {
			t.Errorf("%s: got %+v", more, r)
		}
		h.waitClean()
	}
	if got := server.log.String(); strings.Count(got, "lease granted") != 2 || strings.Count(got, "lease released") != 2 {
		t.Errorf("the server logged:\n%s", got)
	}
}
