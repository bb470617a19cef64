package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// TestServerTableNames: with table_names `ip` prints names of tables and takes them, and never one that it has already.
func TestServerTableNames(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24", "2001:db8:77::2/64")
	h.link("wan1", "10.78.0.2/24")
	h.link("wan~", "10.79.0.2/24")
	h.ns.Batch(t, "route add default via 10.77.0.1 dev wan0 metric 100", "route add default via 10.78.0.1 dev wan1 metric 200", "route add default via 2001:db8:77::1 dev wan0")
	// Of another program, for the server and for ip. Other tests have no table of this number.
	h.ns.Run(t, "sh", "-ec", "mkdir -p /etc/iproute2/rt_tables.d; echo '77001 ta-wan1' >/etc/iproute2/rt_tables.d/other.conf")
	t.Cleanup(func() { h.ns.Run(t, "rm", "/etc/iproute2/rt_tables.d/other.conf") })
	// As installed, for this test alone: the link is in a file system of its own.
	ip := func(args string) string {
		t.Helper()
		r := h.run("unshare", "-m", "sh", "-ec", `mount -t tmpfs none /etc/iproute2; mkdir /etc/iproute2/rt_tables.d
			ln -s /run/table-allocator/rt_tables.conf /etc/iproute2/rt_tables.d/table-allocator.conf; exec ip `+args)
		if r.code != 0 {
			t.Fatalf("ip %s: %+v", args, r)
		}
		return r.stdout
	}
	lookups := func() (words []string) {
		for _, line := range lines(ip("rule")) {
			if f := strings.Fields(line); len(f) > 4 && f[0] == "10000:" {
				words = append(words, f[2]+" "+f[4])
			}
		}
		slices.Sort(words)
		return words
	}
	wait := func(want ...string) {
		t.Helper()
		eventually(t, fmt.Sprintf("ip rule prints %q", want), func() error {
			if got := lookups(); !slices.Equal(got, want) {
				return fmt.Errorf("%q\n%s", got, h.ns.Run(t, "sh", "-c", "cat /run/table-allocator/rt_tables.conf || :"))
			}
			return nil
		})
	}
	server := h.serve() // off
	h.watch()
	h.waitStatus("10.78.0.2", "ok", "")
	h.waitStatus("2001:db8:77::2", "ok", "")
	wan0, wan1, odd := h.tableOf("10.77.0.2"), h.tableOf("10.78.0.2"), h.tableOf("10.79.0.2")
	wait("10.77.0.2 "+wan0, "10.78.0.2 "+wan1, "10.79.0.2 "+odd)
	h.config(`"table_names":true`)
	server.again()
	wait("10.77.0.2 ta-wan0", "10.78.0.2 "+wan1, "10.79.0.2 "+odd)
	if got := ip("-6 rule"); !strings.Contains(got, "from 2001:db8:77::2 lookup ta-wan0") {
		t.Errorf("IPv6: %s", got)
	}
	if got := ip("route show table ta-wan0"); !strings.Contains(got, "default via 10.77.0.1") {
		t.Errorf("table ta-wan0: %q", got)
	}
	ip("rule add pref 30000 fwmark 1 lookup ta-wan0")
	if got := h.ns.IP(t, "rule"); !strings.Contains(got, "30000:	from all fwmark 0x1 lookup "+wan0) {
		t.Errorf("a rule by name: %s", got)
	}
	// Another table of the link, and the end of the first one.
	h.ns.IP(t, "address add 10.77.1.2/24 dev wan0")
	h.waitStatus("10.77.1.2", "ok", "")
	second := h.tableOf("10.77.1.2")
	wait("10.77.0.2 ta-wan0", "10.77.1.2 ta-wan0-"+second, "10.78.0.2 "+wan1, "10.79.0.2 "+odd)
	h.ns.IP(t, "address del 10.77.1.2/24 dev wan0")
	wait("10.77.0.2 ta-wan0", "10.78.0.2 "+wan1, "10.79.0.2 "+odd)
	if names, text := h.diagnosis(""); slices.Contains(names, "table-name") {
		t.Errorf("doctor takes names of ours for those of others: %s", text)
	}
	// They last over a restart, as the leases do, and end with the key.
	server.stop()
	wait("10.77.0.2 ta-wan0", "10.78.0.2 "+wan1, "10.79.0.2 "+odd)
	h.config()
	h.restart()
	wait("10.77.0.2 "+wan0, "10.78.0.2 "+wan1, "10.79.0.2 "+odd)
}
