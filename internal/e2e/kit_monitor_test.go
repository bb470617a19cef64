package e2e

import (
	"errors"
	"os/exec"
	"slices"
	"strings"
)

// monitor follows the rules of one family as `ip monitor rule` shows them.
type monitor struct {
	h      routing
	p      *process
	family string // "-4" or "-6"
}

// monitor follows the IPv4 rules.
func (h routing) monitor() *monitor { h.t.Helper(); return h.follow("-4") }

// hear follows the rules of family "4" or "6" until stop, which returns the changes.
func (h routing) hear(family string) (stop func() []string) {
	h.t.Helper()
	return h.follow("-" + family).changes
}

func (h routing) follow(family string) *monitor {
	h.t.Helper()
	m := &monitor{h, h.start(exec.Command("ip", "-d", family, "monitor", "rule")), family}
	m.sync()
	return m
}

// sync waits until the monitor has shown all that happened so far.
func (m *monitor) sync() {
	m.h.t.Helper()
	before := strings.Count(m.p.log.String(), "Deleted 32765:")
	eventually(m.h.t, "ip monitor shows rules", func() error {
		m.h.ns.IP(m.h.t, m.family+" rule add pref 32765 lookup 99")
		m.h.ns.IP(m.h.t, m.family+" rule del pref 32765 lookup 99")
		if strings.Count(m.p.log.String(), "Deleted 32765:") == before {
			return errors.New("not yet")
		}
		return nil
	})
}

// changes are the lines that the monitor showed, those of deleted rules with "Deleted".
func (m *monitor) changes() []string {
	m.h.t.Helper()
	m.sync()
	return slices.DeleteFunc(lines(m.p.log.String()), func(line string) bool { return strings.Contains(line, "32765:") })
}

// wantNeverWithout fails the test unless a rule that matches was there all the time: among the rules
// before, and after each change.
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
