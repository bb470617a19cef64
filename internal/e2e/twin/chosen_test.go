package twin

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// The second mode: a user wants one link for what is bound to none. The plain host gets the best default route of that link
// once more, before all others, and then all that is unbound or forwarded must go as there. What is bound goes as ever.

// chosenMetric is that of the route that says so.
const chosenMetric = 1

// TestTwinChosen makes up hosts with a chosen uplink. Every other one is rich, and all are with "-looks rich".
func TestTwinChosen(t *testing.T) {
	n, base := cmp.Or(*hosts, 30), uint64(7100)
	if *seed != 0 || os.Getenv("SOAK") == "full" {
		base = firstSeed()
	}
	rich := *looks == "rich"
	k := probe(t)
	var all []*host
	for i := 0; len(all) < n; i++ {
		h := generate(base+uint64(i), rich || i%2 == 1, phasesToGo(), k)
		if h.watch.clients {
			continue // no watch chooses there
		}
		h.chosen = true
		all = append(all, h)
	}
	sum, err := live(all, *workers, func(h *host, stock *twins) (finding, error) { return life(h, stock, patience) })
	if err != nil {
		t.Error(err)
	}
	t.Logf("%d hosts, %d answers, %d wrong in %d hosts, seeds %d; phases: %v", sum.hosts, sum.answers, sum.wrong, sum.bad, sum.badSeeds, sum.phases)
	report(t, sum)
}

// isChosen reports whether a route of the plain host is the one that says what is chosen.
func isChosen(r route) bool {
	return r.table == unix.RT_TABLE_MAIN && r.protocol == protocol && r.isDefault() && r.metric == chosenMetric
}

// takeChosen removes that route from what the plain host is taken for.
func (p *picture) takeChosen() {
	p.routes = slices.DeleteFunc(p.routes, isChosen)
}

// unchoose deletes it.
func (w *world) unchoose() error {
	routes, err := w.plain.routes()
	if err != nil {
		return err
	}
	for _, r := range routes {
		if !isChosen(r) {
			continue
		}
		if err := w.plain.change(unix.RTM_DELROUTE, 0, r.message()); err != nil && err != unix.ESRCH {
			return fmt.Errorf("delete route %s: %w", r, err)
		}
	}
	return nil
}

// choose has a link chosen, if there is one, and the plain host say so.
func (c *comparison) choose() error {
	if err := c.w.unchoose(); err != nil {
		return err
	}
	c.chosen = make(map[int][]route)
	names := c.eligible()
	if len(names) == 0 {
		return nil
	}
	if !slices.Contains(names, c.w.wanted) {
		c.w.wanted = names[int(c.w.host.seed)%len(names)]
		if err := c.client(nil, "uplinks", "use", c.w.wanted); err != nil {
			c.result.add("an uplink cannot be chosen", "uplinks use %s: %v", c.w.wanted, err)
			c.w.wanted = ""
			return nil
		}
	}
	var report struct {
		Unbound []struct {
			Family string
			Table  uint32
		}
	}
	if err := c.client(&report, "uplinks", "--json"); err != nil {
		c.result.add("uplinks does not answer", "uplinks --json: %v", err)
		return nil
	}
	for _, one := range report.Unbound {
		at := slices.IndexFunc(c.served, func(s served) bool { return s.table == one.Table && (one.Family == "inet") == s.addr.Is4() })
		if one.Table == 0 || at < 0 {
			continue
		}
		if err := c.first(c.served[at]); err != nil {
			return err
		}
	}
	for _, s := range c.served {
		if c.chosen[s.family()] == nil && c.plain.names[s.index] == c.w.wanted && len(c.bestOf(s)) > 0 {
			c.result.add("the chosen link is not used", "%s has a default route, and nothing is chosen", c.w.wanted)
		}
	}
	return nil
}

// eligible are the links of addresses whose twins have a default route, sorted.
func (c *comparison) eligible() (names []string) {
	for _, s := range c.served {
		if len(c.bestOf(s)) > 0 && !slices.Contains(names, c.plain.names[s.index]) {
			names = append(names, c.plain.names[s.index])
		}
	}
	slices.Sort(names)
	return names
}

// bestOf are the default routes of the twin of an address that come first.
func (c *comparison) bestOf(s served) (best []route) {
	for _, r := range c.routes[s.addr] {
		switch {
		case !r.isDefault() || r.tos != 0 || r.from.IsValid() || r.typ != unix.RTN_UNICAST:
		case len(best) == 0 || r.metric < best[0].metric:
			best = []route{r}
		case r.metric == best[0].metric:
			best = append(best, r)
		}
	}
	return best
}

// first gives the plain host the best default route of an address before all others.
func (c *comparison) first(s served) error {
	best := c.bestOf(s)
	others := slices.ContainsFunc(c.served, func(o served) bool {
		return c.plain.names[o.index] == c.w.wanted && o.family() == s.family() && len(c.bestOf(o)) > 0
	})
	switch {
	case len(best) == 0:
		c.result.add("the chosen uplink has no default route", "%s is chosen, and its twin has none", s.addr)
		return nil
	case others && c.plain.names[s.index] != c.w.wanted:
		c.result.add("another link is chosen", "%s is wanted, and %s is chosen", c.w.wanted, s.addr)
		return nil
	}
	c.chosen[s.family()] = best
	r := best[0]
	r.table, r.metric, r.protocol, r.nexthop, r.pref = unix.RT_TABLE_MAIN, chosenMetric, protocol, 0, 0
	message := r.message()
	if s.addr.Is4() {
		message = attribute(message, unix.RTA_PREFSRC, s.addr.AsSlice())
	}
	if err := c.w.plain.change(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_APPEND, message); err != nil {
		return fmt.Errorf("add route %s to the plain host: %w", r, err)
	}
	return nil
}

// firstOf are the answers that are right where the plain host's is a default route of main: the chosen link's.
func (c *comparison) firstOf(q question, plain answer) (wants []answer) {
	chosen := c.chosen[familyOf(q.dst)]
	if chosen == nil || plain.match.table != unix.RT_TABLE_MAIN || !plain.match.isDefault() {
		return nil
	}
	moved := c.w.host.watch.Routes == "move" && plain.match.metric < chosenMetric // which left main for a table
	if !isChosen(plain.match) && !moved {
		return nil
	}
	for _, r := range chosen {
		wants = append(wants, answer{unix.RTN_UNICAST, r.legs, r})
	}
	if moved && slices.ContainsFunc(c.tables, func(r route) bool { // unless it did not
		return r.table == unix.RT_TABLE_MAIN && r.place() == plain.match.place() && r.family == plain.match.family && r.protocol != protocol
	}) {
		wants = append(wants, plain)
	}
	return wants
}

// client runs the client on the real host, and decodes what it prints.
func (c *comparison) client(into any, args ...string) error {
	dir, err := commands()
	if err != nil {
		return err
	}
	out, err := c.w.real.Output(filepath.Join(dir, "table-allocator-client"), args...)
	if err == nil && into != nil {
		err = json.Unmarshal([]byte(out), into)
	}
	return err
}
