package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// TestClientRestoresRules: rules of a lone client that another program deletes come back, at once and for each family,
// and a call does not report a table that nothing leads to.
func TestClientRestoresRules(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.ns.IP(t, "address add 2001:db8::2/64 dev wan0 nodad")
	h.serve()
	call := func() {
		t.Helper()
		if got := h.lease("10.77.0.2", "wan0", "--routes", "move", "--gateway", "10.77.0.1", "--on-loss", "block"); got != 10000 {
			t.Fatalf("table %d", got)
		}
	}
	call()
	h.lease6("2001:db8::2", "wan0", "--routes", "copy", "--gateway", "fe80::1")
	rules, rules6 := h.rules(), h.rules6()
	if len(rules) < 5 || len(rules6) < 4 {
		t.Fatalf("rules: %q, %q", rules, rules6)
	}
	for range 3 {
		h.ns.IP(t, "rule flush protocol 116")
		h.ns.IP(t, "-6 rule flush protocol 116")
		h.waitRules(rules...)
		h.waitRules6(rules6...)
	}
	for _, priority := range []string{"10000", "20000", "91000", "91001"} {
		h.ns.IP(t, "rule del priority "+priority)
		h.waitRules(rules...)
	}
	// The rule that blocks the address leads to no table: the next call finds out.
	h.ns.IP(t, "rule del priority 10001")
	call()
	h.wantRules(rules...)
	if n := strings.Count(h.clientLog(), "another program deletes our rules"); n < 1 || n > 2 {
		t.Errorf("%d warnings", n)
	}
	h.ns.IP(t, "address flush dev wan0")
	eventually(t, "all rules are gone", func() error {
		if left := append(h.rules(), h.rules6()...); len(left) > 1 { // the block waits for the address
			return fmt.Errorf("%q", left)
		}
		return nil
	})
}

// TestClientRestoresRulesAtRenewals: also what no event tells of.
func TestClientRestoresRulesAtRenewals(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve(`"table_timeout":4`)
	h.lease("10.77.0.2", "wan0", "--routes", "copy", "--gateway", "10.77.0.1", "--on-loss", "block")
	rules := h.rules()
	h.ns.IP(t, "rule del priority 10001")
	h.ns.IP(t, "rule del priority 19999")
	h.waitRules(rules...)
}
