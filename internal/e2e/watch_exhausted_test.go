package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// TestWatchCrowdedLink: however many addresses one link has, another link that main has routes over gets a table.
func TestWatchCrowdedLink(t *testing.T) {
	h := newHost(t)
	crowd := []string{"10.77.0.2", "10.77.0.3", "10.77.0.4", "10.77.0.5", "10.77.0.6", "10.77.0.7"}
	h.link("wan0", crowd[0]+"/24")
	for _, addr := range crowd[1:] {
		h.ns.IP(t, "address add "+addr+"/24 dev wan0")
	}
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0 metric 1")
	h.serve(`"num_tables":3`)
	p := h.watch()
	servedOf := func(addrs []string) (n int) {
		rules := strings.Join(h.rules(), "\n")
		for _, addr := range addrs {
			if strings.Contains(rules, "from "+addr+" lookup") {
				n++
			}
		}
		return n
	}
	eventually(t, "the first link has all tables", func() error {
		if servedOf(crowd) != 3 {
			return errors.New(strings.Join(h.rules(), "\n"))
		}
		return nil
	})
	h.link("wan1", "10.78.0.2/24")
	h.ns.IP(t, "route add default via 10.78.0.1 dev wan1 metric 2")
	h.served("10.78.0.2")
	h.served(crowd[0]) // what main prefers keeps its table
	p.waitLog(`the server has no table left for link \"wan1\", which has none, and this link has 3: see num_tables`)
	h.link("wan2", "10.79.0.2/24", "10.79.0.3/24")
	h.ns.IP(t, "route add default via 10.79.0.1 dev wan2 metric 3")
	eventually(t, "a third link has a table", func() error {
		if servedOf([]string{"10.79.0.2", "10.79.0.3"}) != 1 {
			return errors.New(strings.Join(h.rules(), "\n"))
		}
		return nil
	})
	h.served("10.78.0.2")
	h.served(crowd[0])
	if n := servedOf(crowd); n != 1 {
		t.Errorf("the first link has %d tables, want 1", n)
	}
	if n := strings.Count(p.log.String(), "msg=finished"); n != 2 {
		t.Errorf("%d addresses gave their table back, want 2:\n%s", n, p.log.String())
	}
}

// TestWatchUnroutedGives: an address on a link that main has no route over gives its table to one on a link that main has
// routes over, and gets none of the last tables.
func TestWatchUnroutedGives(t *testing.T) {
	h := newHost(t)
	h.ns.Run(t, "ip", "link", "add", "lan0", "type", "veth", "peer", "name", "far0")
	h.ns.Batch(t, "link set far0 up", "link set lan0 up", "address add 10.99.0.1/32 dev lan0", "address add 10.99.0.2/32 dev lan0")
	h.serve(`"num_tables":2`)
	p := h.watch("--ifname", "*")
	h.served("10.99.0.1")
	h.served("10.99.0.2")
	h.link("wan0", "10.77.0.2/24")
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0")
	h.served("10.77.0.2")
	p.waitLog("the server has no table left for a link that main has routes over, and main has none over this link")
	h.link("wan1", "10.78.0.2/24")
	h.ns.IP(t, "route add default via 10.78.0.1 dev wan1 metric 2")
	h.served("10.78.0.2")
	h.served("10.77.0.2")
	h.notServed("10.99.0.1")
	h.notServed("10.99.0.2")
}

// TestWatchDeprecatedGives: while the server has no table left, deprecated addresses give theirs to one that is not.
func TestWatchDeprecatedGives(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "2001:db8:77::2/64", "2001:db8:77::3/64", "2001:db8:77::4/64")
	h.ns.IP(t, "route add default via fe80::1 dev wan0")
	h.serve(`"num_tables":3`)
	p := h.watch()
	for _, addr := range []string{"2001:db8:77::2", "2001:db8:77::3", "2001:db8:77::4"} {
		h.served(addr)
	}
	h.ns.IP(t, "address change 2001:db8:77::3/64 dev wan0 nodad preferred_lft 0")
	h.ns.IP(t, "address add 2001:db8:77::5/64 dev wan0 nodad")
	h.served("2001:db8:77::5")
	h.waitNotServed("2001:db8:77::3")
	p.waitLog("the server has no table left for 2001:db8:77::5, and this address is deprecated: see num_tables")
	h.ns.IP(t, "address add 2001:db8:77::6/64 dev wan0 nodad preferred_lft 0")
	p.waitLog("addr=2001:db8:77::6") // which gets none, as it is deprecated
	h.ns.IP(t, "address change 2001:db8:77::4/64 dev wan0 nodad preferred_lft 0")
	h.waitNotServed("2001:db8:77::6")
	h.ns.IP(t, "address del 2001:db8:77::6/64 dev wan0") // else it may ask before the next one
	h.ns.IP(t, "address change 2001:db8:77::4/64 dev wan0 nodad preferred_lft 0")
	h.ns.IP(t, "address add 2001:db8:77::7/64 dev wan0 nodad")
	h.served("2001:db8:77::7")
	h.waitNotServed("2001:db8:77::4")
	h.served("2001:db8:77::2")
	h.served("2001:db8:77::5")
	if n := strings.Count(p.log.String(), "msg=finished"); n != 3 { // one that was deleted among them
		t.Errorf("%d addresses ended, want 3:\n%s", n, p.log.String())
	}
}

// TestWatchPreferredAgain: an address that gave its table while it was deprecated gets one at once when it is preferred again.
func TestWatchPreferredAgain(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "2001:db8:77::2/64", "2001:db8:77::3/64")
	h.ns.IP(t, "route add default via fe80::1 dev wan0")
	h.serve(`"num_tables":2`)
	h.watch()
	h.served("2001:db8:77::2")
	h.served("2001:db8:77::3")
	h.ns.IP(t, "address change 2001:db8:77::3/64 dev wan0 nodad preferred_lft 0")
	h.ns.IP(t, "address add 2001:db8:77::5/64 dev wan0 nodad")
	h.served("2001:db8:77::5")
	h.waitNotServed("2001:db8:77::3")
	h.ns.IP(t, "address change 2001:db8:77::2/64 dev wan0 nodad preferred_lft 0")
	h.ns.IP(t, "address change 2001:db8:77::3/64 dev wan0 nodad preferred_lft forever")
	h.served("2001:db8:77::3")
	h.waitNotServed("2001:db8:77::2")
}

// TestWatchFairShare: links share the tables, whatever number of addresses each has, and the log does not name each address.
func TestWatchFairShare(t *testing.T) {
	h := newHost(t)
	u := h.behind(routed(0), routed(1))
	h.serve(`"num_tables":6`)
	p := h.watch()
	const crowd = 40
	addresses := func(n, from, to int) (all []string) {
		for i := from; i < to; i++ {
			all = append(all, fmt.Sprintf("10.%d.0.%d", n+1, i))
			h.ns.IP(t, fmt.Sprintf("address add %s/24 dev wan%d", all[len(all)-1], n))
		}
		return all
	}
	u.address(0)
	first := addresses(0, 10, 10+crowd)
	served := func(addrs []string) (which []string) {
		rules := strings.Join(h.rules(), "\n")
		for _, addr := range addrs {
			if strings.Contains(rules, "from "+addr+" lookup") {
				which = append(which, addr)
			}
		}
		return which
	}
	wait := func(addrs []string, want int) {
		t.Helper()
		eventually(t, "the share of a link", func() error {
			if got := served(addrs); len(got) != want {
				return fmt.Errorf("%d have a table, want %d: %v", len(got), want, got)
			}
			return nil
		})
	}
	inet, _ := at(0)
	first = append(first, inet)
	wait(first, 6)
	p.waitLog("addresses get no table: ")
	u.address(1)
	inet, _ = at(1)
	second := append(addresses(1, 10, 14), inet)
	wait(second, 3)
	wait(first, 3)
	for _, addr := range served(second) {
		eventually(t, "packets from "+addr+" leave by wan1", func() error { return u.arrives(packet{source: addr}, u.publicly(1, addr)) })
	}
	h.served("10.1.0.2") // what main prefers
	lines := strings.Count(p.log.String(), " level=WARN ")
	if lines > 20 { // three for each link and family, and each doubling of the rest
		t.Errorf("%d warnings of %d addresses:\n%s", lines, crowd, p.log.String())
	}
}
