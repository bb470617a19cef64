package e2e

import (
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strings"

	"github.com/table-allocator/table-allocator/internal/route"
	"golang.org/x/sys/unix"
)

// routing is the rules and routes of a machine, as ip shows them.
type routing struct{ *machine }

// clientRules are the rules that a client with default options installs.
func clientRules(addr, network string, table uint32) []string {
	return []string{
		fmt.Sprintf("10000: from %s lookup %d proto 116", addr, table),
		fmt.Sprintf("20000: from all to %s lookup %d proto 116", network, table),
		fmt.Sprintf("91000: from all iif lo lookup %d proto 116", table),
	}
}

// rules are the rules of the host but the kernel's three, as `ip -d rule` shows them,
// one line each with single spaces.
func (h routing) rules() []string {
	h.t.Helper()
	var rules []string
	for line := range strings.Lines(h.ns.IP(h.t, "-d -4 rule show")) {
		line = strings.Join(strings.Fields(line), " ")
		if line != "" && !strings.HasSuffix(line, "proto kernel") {
			rules = append(rules, line)
		}
	}
	return rules
}

// rules6 are the IPv6 rules of the host but the kernel's two.
func (h routing) rules6() []string {
	h.t.Helper()
	var rules []string
	for line := range strings.Lines(h.ns.IP(h.t, "-d -6 rule show")) {
		line = strings.Join(strings.Fields(line), " ")
		if line != "" && !strings.HasSuffix(line, "proto kernel") {
			rules = append(rules, line)
		}
	}
	return rules
}

// wantRules fails the test unless the host's rules are want, in any order.
func (h routing) wantRules(want ...string) {
	h.t.Helper()
	if diff := unordered(h.rules(), want); diff != "" {
		h.t.Errorf("rules: %s", diff)
	}
}

// waitRules waits until they are.
func (h routing) waitRules(want ...string) {
	h.t.Helper()
	eventually(h.t, "the rules are there", func() error {
		if diff := unordered(h.rules(), want); diff != "" {
			return errors.New(diff)
		}
		return nil
	})
}

func (h routing) waitRules6(want ...string) {
	h.t.Helper()
	eventually(h.t, "the IPv6 rules are there", func() error {
		if diff := unordered(h.rules6(), want); diff != "" {
			return errors.New(diff)
		}
		return nil
	})
}

// routes are those of a table, as `ip route` shows them, one line each with single spaces.
func (h routing) routes(table string) []string {
	h.t.Helper()
	out, err := h.ns.Output("ip", "-4", "route", "show", "table", table)
	if err != nil && !strings.Contains(out, "FIB table does not exist") {
		h.t.Fatalf("routes of table %s: %v\n%s", table, err, out)
	}
	var routes []string
	for line := range strings.Lines(out) {
		line = strings.Join(strings.Fields(strings.ReplaceAll(line, " linkdown", "")), " ")
		if line != "" && !strings.HasPrefix(line, "Error:") && !strings.HasPrefix(line, "Dump terminated") {
			routes = append(routes, line)
		}
	}
	return routes
}

var lifetime = regexp.MustCompile(` expires -?\d+sec`)

// routes6 are the IPv6 routes of a table without what every one of them has.
func (h routing) routes6(table string) []string {
	h.t.Helper()
	out, err := h.ns.Output("ip", "-6", "route", "show", "table", table)
	if err != nil && !strings.Contains(out, "FIB table does not exist") {
		h.t.Fatalf("routes of table %s: %v\n%s", table, err, out)
	}
	var routes []string
	for line := range strings.Lines(out) {
		line = lifetime.ReplaceAllString(strings.ReplaceAll(line, " pref medium", ""), "")
		line = strings.Join(strings.Fields(line), " ")
		if line != "" && !strings.HasPrefix(line, "Error:") && !strings.HasPrefix(line, "Dump terminated") && !strings.HasPrefix(line, "fe80::/64") {
			routes = append(routes, line)
		}
	}
	return routes
}

func (h routing) waitRoutes(table string, want ...string) {
	h.t.Helper()
	eventually(h.t, "the routes of table "+table+" are right", func() error {
		if diff := unordered(h.routes(table), want); diff != "" {
			return errors.New(diff)
		}
		return nil
	})
}

func (h routing) waitRoutes6(table string, want ...string) {
	h.t.Helper()
	eventually(h.t, "the IPv6 routes of table "+table+" are right", func() error {
		if diff := unordered(h.routes6(table), want); diff != "" {
			return errors.New(diff)
		}
		return nil
	})
}

// served waits until an address has its source rule, and returns the table.
func (h routing) served(addr string) (table string) {
	h.t.Helper()
	eventually(h.t, addr+" is served", func() error {
		for _, rule := range append(h.rules(), h.rules6()...) {
			if rest, ok := strings.CutPrefix(rule, "10000: from "+addr+" lookup "); ok {
				table = strings.Fields(rest)[0]
				return nil
			}
		}
		return errors.New("no source rule")
	})
	return table
}

// waitNotServed waits until an address has no rule.
func (h routing) waitNotServed(addr string) {
	h.t.Helper()
	eventually(h.t, addr+" is not served", func() error {
		for _, rule := range append(h.rules(), h.rules6()...) {
			if strings.Contains(rule, " from "+addr+" ") {
				return errors.New(rule)
			}
		}
		return nil
	})
}

// tableNumber is the table of an address that has one, 0 else.
func (h routing) tableNumber(addr string) (table uint32) {
	h.t.Helper()
	for _, rule := range append(h.rules(), h.rules6()...) {
		if rest, ok := strings.CutPrefix(rule, "10000: from "+addr+" lookup "); ok {
			fmt.Sscan(rest, &table)
		}
	}
	return table
}

// unbound are the tables of the unbound rules, in the kernel's order.
func unbound(rules []string) (tables []string) {
	for _, rule := range rules {
		if rest, ok := strings.CutPrefix(rule, "91000: from all iif lo lookup "); ok {
			tables = append(tables, strings.Fields(rest)[0])
		}
	}
	return tables
}

// unboundRules counts the unbound rules of both families: one for each address that is served.
func (h routing) unboundRules() int {
	h.t.Helper()
	n := 0
	for _, family := range []string{"-4", "-6"} {
		n += strings.Count(h.ns.IP(h.t, family+" rule show pref 91000"), "\n")
	}
	return n
}

// addRules adds rules as no `ip` can: without a protocol, say.
func (h routing) addRules(rules ...route.Rule) {
	h.t.Helper()
	h.ns.Do(func() {
		conn, err := route.Dial()
		if err != nil {
			h.t.Fatal(err)
		}
		defer conn.Close()
		if _, _, err := conn.SyncRules(unix.AF_INET, func(route.Rule) bool { return false }, rules); err != nil {
			h.t.Fatal(err)
		}
	})
}

// monitor follows the IPv4 rules of the host as `ip monitor rule` shows them.
type monitor struct {
	h routing
	p *process
}

// sync waits until it has shown all that happened so far.
func (m *monitor) sync() {
	m.h.t.Helper()
	before := strings.Count(m.p.log.String(), "Deleted 32765:")
	eventually(m.h.t, "ip monitor shows rules", func() error {
		m.h.ns.IP(m.h.t, "rule add pref 32765 lookup 99")
		m.h.ns.IP(m.h.t, "rule del pref 32765 lookup 99")
		if strings.Count(m.p.log.String(), "Deleted 32765:") == before {
			return errors.New("not yet")
		}
		return nil
	})
}

// changes are what it showed, "Deleted" and all, with single spaces.
func (m *monitor) changes() []string {
	m.h.t.Helper()
	m.sync()
	var changes []string
	for line := range strings.Lines(m.p.log.String()) {
		line = strings.Join(strings.Fields(line), " ")
		if line != "" && !strings.Contains(line, "32765:") {
			changes = append(changes, line)
		}
	}
	return changes
}

// wantNeverWithout fails unless, while the changes were applied to the rules that stood
// before, one that matches was always there.
func (m *monitor) wantNeverWithout(what string, before []string, match func(rule string) bool) {
	m.h.t.Helper()
	n := 0
	for _, rule := range before {
		if match(rule) {
			n++
		}
	}
	changes := m.changes()
	for i, change := range changes {
		rule, deleted := strings.CutPrefix(change, "Deleted ")
		switch {
		case !match(rule):
		case deleted:
			n--
		default:
			n++
		}
		if n < 1 {
			m.h.t.Errorf("no rule %s after change %d of\n%s", what, i, strings.Join(changes, "\n"))
			return
		}
	}
}

func (h routing) monitor() *monitor {
	h.t.Helper()
	m := &monitor{h, h.start(exec.Command("ip", "-d", "-4", "monitor", "rule"))}
	m.sync()
	return m
}

// hear notes what `ip monitor` shows of the rules of a family until stop, which returns it.
func (h routing) hear(family string) (stop func() []string) {
	h.t.Helper()
	p := h.start(h.sh("exec ip -" + family + " monitor rule"))
	marks := 0
	mark := func() {
		h.t.Helper()
		marks++
		pref := fmt.Sprint(32000 + marks)
		eventually(h.t, "ip monitor shows rules", func() error {
			h.ns.IP(h.t, "-"+family+" rule add pref "+pref+" lookup 99")
			h.ns.IP(h.t, "-"+family+" rule del pref "+pref+" lookup 99")
			if !strings.Contains(p.log.String(), "Deleted "+pref+":") {
				return errors.New("not yet")
			}
			return nil
		})
	}
	mark()
	return func() (heard []string) {
		h.t.Helper()
		mark()
		for line := range strings.Lines(p.log.String()) {
			if line = strings.Join(strings.Fields(line), " "); line != "" && !strings.Contains(line, "lookup 99") {
				heard = append(heard, line)
			}
		}
		return heard
	}
}

func matchRoutes(got, want []string) error {
	left := append([]string(nil), got...)
	for _, w := range want {
		found := false
		for i, r := range left {
			if r == w || strings.HasPrefix(r, w+" ") {
				left = append(left[:i], left[i+1:]...)
				found = true
				break
			}
		}
		if !found {
			return fmt.Errorf("there is no %q in %q", w, got)
		}
	}
	if len(left) > 0 {
		return fmt.Errorf("too many: %q, want %q", left, want)
	}
	return nil
}
