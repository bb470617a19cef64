package e2e

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
)

// routing is the rules and routes of a machine, as ip shows them.
type routing struct{ *machine }

// clientRules are the rules of an address whose client places no routes.
func clientRules(addr, network string, table uint32) []string {
	return []string{
		fmt.Sprintf("10000: from %s lookup %d proto 116", addr, table),
		fmt.Sprintf("20000: from all to %s lookup %d proto 116", network, table),
		fmt.Sprintf("91000: from all iif lo lookup %d proto 116", table),
	}
}

// copyRules are those of one that copies routes: main answers for the network first.
func copyRules(addr, network string, table uint32) []string {
	return append(clientRules(addr, network, table), mainFirst(network))
}

// moveRules are those of one that moves routes: the table serves what is forwarded, too.
func moveRules(addr, network string, table uint32) []string {
	return append(copyRules(addr, network, table), fmt.Sprintf("91001: from all lookup %d proto 116", table))
}

// mainFirst is the rule that lets main answer for a network, at its length and longer. Addresses of
// one network share it.
func mainFirst(network string) string {
	length := 32
	if p, err := netip.ParsePrefix(network); err == nil {
		length = p.Bits()
	}
	return fmt.Sprintf("19999: from all to %s lookup main suppress_prefixlength %d proto 116", network, length-1)
}

// ofAll are the rules of several addresses.
func ofAll(rules ...[]string) []string {
	return slices.Compact(slices.Sorted(slices.Values(slices.Concat(rules...))))
}

// rules and routes return lines of ip with single spaces. They leave out the kernel's own rules, and of
// routes what differs between runs, such as lifetimes, and what every IPv6 route has.

func (h routing) rules() []string  { h.t.Helper(); return h.ruleLines("-4") }
func (h routing) rules6() []string { h.t.Helper(); return h.ruleLines("-6") }
func (h routing) allRules() []string {
	h.t.Helper()
	return append(h.ruleLines("-4"), h.ruleLines("-6")...)
}

func (h routing) routes(table string) []string  { h.t.Helper(); return h.routeLines("-4", table) }
func (h routing) routes6(table string) []string { h.t.Helper(); return h.routeLines("-6", table) }

func (h routing) ruleLines(family string) []string {
	h.t.Helper()
	return slices.DeleteFunc(lines(h.ns.IP(h.t, "-d "+family+" rule show")), func(line string) bool {
		return strings.HasSuffix(line, "proto kernel")
	})
}

var changing = regexp.MustCompile(` linkdown| pref medium| expires -?\d+sec`)

func (h routing) routeLines(family, table string) []string {
	h.t.Helper()
	out, err := h.ns.Output("ip", family, "route", "show", "table", table)
	if err != nil && strings.Contains(out, "FIB table does not exist") {
		return nil
	}
	if err != nil {
		h.t.Fatalf("routes of table %s: %v\n%s", table, err, out)
	}
	return slices.DeleteFunc(lines(changing.ReplaceAllString(out, "")), func(line string) bool {
		return strings.HasPrefix(line, "fe80::/64")
	})
}

// lines are the lines of a text without empty ones, with single spaces.
func lines(text string) (all []string) {
	for line := range strings.Lines(text) {
		if line = strings.Join(strings.Fields(line), " "); line != "" {
			all = append(all, line)
		}
	}
	return all
}

// wantRules fails the test unless the IPv4 rules are want, in any order.
func (h routing) wantRules(want ...string) {
	h.t.Helper()
	if diff := unordered(h.rules(), want); diff != "" {
		h.t.Errorf("rules: %s", diff)
	}
}

// waitRules, waitRules6, waitRoutes and waitRoutes6 wait until the rules, or the routes of a table, are
// want, in any order.
func (h routing) waitRules(want ...string) {
	h.t.Helper()
	eventually(h.t, "the rules are there", func() error { return unorderedError(h.rules(), want) })
}

func (h routing) waitRules6(want ...string) {
	h.t.Helper()
	eventually(h.t, "the IPv6 rules are there", func() error { return unorderedError(h.rules6(), want) })
}

func (h routing) waitRoutes(table string, want ...string) {
	h.t.Helper()
	eventually(h.t, "the routes of table "+table+" are there", func() error { return unorderedError(unforced(h.routes(table), want), want) })
}

func (h routing) waitRoutes6(table string, want ...string) {
	h.t.Helper()
	eventually(h.t, "the IPv6 routes of table "+table+" are there", func() error { return unorderedError(unforced(h.routes6(table), want), want) })
}

// unforced returns routes without the onlink of those that are wanted without: a route is added by force where its gateway is
// in no network yet, as while a link comes up, and then stays so.
func unforced(routes, want []string) []string {
	for i, route := range routes {
		if plain := strings.TrimSuffix(route, " onlink"); slices.Contains(want, plain) {
			routes[i] = plain
		}
	}
	return routes
}

// tableOf is the table of the source rule of an address; "" if there is none.
func (h routing) tableOf(addr string) string {
	h.t.Helper()
	for _, rule := range h.allRules() {
		if rest, ok := strings.CutPrefix(rule, "10000: from "+addr+" lookup "); ok {
			return strings.Fields(rest)[0]
		}
	}
	return ""
}

// tableNumber is tableOf as a number; 0 if there is no source rule.
func (h routing) tableNumber(addr string) (table uint32) {
	h.t.Helper()
	_, _ = fmt.Sscan(h.tableOf(addr), &table) // without a table it stays 0
	return table
}

// served waits until an address has its source rule, and returns the table.
func (h routing) served(addr string) (table string) {
	h.t.Helper()
	eventually(h.t, addr+" is served", func() error {
		if table = h.tableOf(addr); table == "" {
			return fmt.Errorf("no source rule in %q", h.allRules())
		}
		return nil
	})
	return table
}

// rulesFrom are the rules of both families with this source.
func (h routing) rulesFrom(addr string) []string {
	h.t.Helper()
	return slices.DeleteFunc(h.allRules(), func(rule string) bool { return !strings.Contains(rule, " from "+addr+" ") })
}

// waitNotServed waits until an address has no rule.
func (h routing) waitNotServed(addr string) {
	h.t.Helper()
	eventually(h.t, addr+" is not served", func() error { return unorderedError(h.rulesFrom(addr), nil) })
}

// waitFilled waits until the table of an address has one route for each of want, and no others. want
// has the words with which a line of ip begins: "DST" or "DST via GW". If the table is filled by the
// client, it also has to have the networks that main has on the link.
func (h routing) waitFilled(addr string, want ...string) {
	h.t.Helper()
	eventually(h.t, "the table of "+addr+" is filled", func() error { return h.filled(addr, want) })
}

func (h routing) filled(addr string, want []string) error {
	h.t.Helper()
	table := h.tableOf(addr)
	if table == "" {
		return fmt.Errorf("it has no table; rules: %q", h.allRules())
	}
	routes := h.routes
	if strings.Contains(addr, ":") {
		routes = h.routes6
	}
	have := routes(table)
	return matchRoutes(have, withOnLink(want, addr, have, routes("main")))
}

// withOnLink adds to the wanted routes of a table what main has on the link of its address.
func withOnLink(want []string, addr string, table, main []string) []string {
	own := slices.IndexFunc(table, func(r string) bool {
		return strings.Contains(r+" ", " proto 116 ") && strings.Contains(r+" ", " src "+addr+" ")
	})
	if own < 0 {
		return want
	}
	words := strings.Fields(table[own])
	dev := "dev " + words[slices.Index(words, "dev")+1]
	want = slices.Clone(want)
	for _, r := range main {
		dst, rest, _ := strings.Cut(r, " ")
		named := func(w string) bool { return strings.HasPrefix(w+" ", dst+" ") }
		if strings.HasPrefix(rest+" ", dev+" ") && dst != "default" && dst != addr && !slices.ContainsFunc(want, named) {
			want = append(want, dst+" "+dev)
		}
	}
	return want
}

// waitMain waits until the IPv4 routes of a link in main are those of want, as in waitFilled.
// Without want it waits until the link has no default there: move takes no more than that.
func (h routing) waitMain(ifname string, want ...string) {
	h.t.Helper()
	eventually(h.t, "main holds the routes of "+ifname, func() error {
		return matchRoutes(slices.DeleteFunc(h.routes("main"), func(r string) bool {
			return !strings.Contains(r+" ", " dev "+ifname+" ") || len(want) == 0 && !strings.HasPrefix(r, "default ")
		}), want)
	})
}

// mainHolds waits until main has routes of want, as in waitFilled, and perhaps others.
func (h routing) mainHolds(want ...string) {
	h.t.Helper()
	eventually(h.t, "main has its routes", func() error {
		routes := append(h.routes("main"), h.routes6("main")...)
		for _, w := range want {
			if !slices.ContainsFunc(routes, func(r string) bool { return strings.HasPrefix(r+" ", w+" ") }) {
				return fmt.Errorf("there is no %q in %q", w, routes)
			}
		}
		return nil
	})
}

// matchRoutes compares lines with the words with which each of them begins.
func matchRoutes(got, want []string) error {
	left := slices.Clone(got)
	for _, w := range want {
		i := slices.IndexFunc(left, func(r string) bool { return strings.HasPrefix(r+" ", w+" ") })
		if i < 0 {
			return fmt.Errorf("there is no %q in %q", w, got)
		}
		left = slices.Delete(left, i, i+1)
	}
	if len(left) > 0 {
		return fmt.Errorf("too many: %q, want %q", left, want)
	}
	return nil
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

// unboundRules counts the unbound rules of both families. Each address that is served has one.
func (h routing) unboundRules() int {
	h.t.Helper()
	n := 0
	for _, family := range []string{"-4", "-6"} {
		n += strings.Count(h.ns.IP(h.t, family+" rule show pref 91000"), "\n")
	}
	return n
}

// addRules adds rules by netlink, for rules that ip cannot add: without a protocol, say.
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
