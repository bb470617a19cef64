package client

import (
	"errors"
	"slices"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// What is bound to an interface the kernel itself records: a guard for each kind of traffic,
// behind the rules that look up the tables of the interface's leases. Whoever binds places
// guards, and they outlive all leases. The holder of a lease places one lookup for each.

// guardOf is the guard of traffic that is bound.
func guardOf(m wire.Marking, t route.Traffic, onLoss OnLoss) route.Rule {
	if onLoss == Fallback {
		return route.Rule{Priority: m.Fallback + 1, Traffic: t, Action: route.Nop, Protocol: route.Protocol}
	}
	return route.Rule{Priority: m.Block + 1, Traffic: t, Action: route.Unreachable, Protocol: route.Protocol}
}

// isGuard tells whether a rule is a guard of some interface.
func isGuard(r route.Rule) bool {
	if r.Traffic == (route.Traffic{}) || r.Action != route.Unreachable && r.Action != route.Nop {
		return false
	}
	return r == route.Rule{Priority: r.Priority, Traffic: r.Traffic, Action: r.Action, Protocol: route.Protocol}
}

// guardsOf are the guards among rules that an interface with this marking has.
func guardsOf(m wire.Marking, rules []route.Rule) []route.Rule {
	if m == (wire.Marking{}) {
		return nil
	}
	var guards []route.Rule
	for _, r := range rules {
		if isGuard(r) && (r == guardOf(m, r.Traffic, Block) || r == guardOf(m, r.Traffic, Fallback)) {
			guards = append(guards, r)
		}
	}
	return guards
}

// lookupOf is the rule that sends what a guard is for to a table.
func lookupOf(guard route.Rule, table uint32) route.Rule {
	return route.Rule{Priority: guard.Priority - 1, Traffic: guard.Traffic, Table: table, Protocol: route.Protocol}
}

// readGuards finds what is bound to the interface now.
func (r *ruleset) readGuards() error {
	if r.marking == (wire.Marking{}) {
		return nil
	}
	rules, err := r.kernel.RulesWhere(r.uplink.family(), func(rule *route.Rule) bool { return isGuard(*rule) })
	if err == nil {
		r.guards = guardsOf(r.marking, rules)
	}
	return err
}

// want are all rules that a lease of table means: those of the uplink, and the lookups for
// what is bound to its interface.
func (r *ruleset) want(table uint32) []route.Rule { return r.wantWith(r.guards, table) }

func (r *ruleset) wantWith(guards []route.Rule, table uint32) []route.Rule {
	rules := r.uplink.rules(table)
	for _, guard := range guards {
		rules = append(rules, lookupOf(guard, table))
	}
	return rules
}

// learn takes over the marking of the session's interface.
func (l *loop) learn(s *session, m wire.Marking) {
	if m == (wire.Marking{}) || m == s.rules.marking || !s.uplink.isAddress() {
		return
	}
	if l.watch == nil { // a watch hears of rules anyway
		s.warn("hear of rules", l.watcher.Join(route.Rules4|route.Rules6))
	}
	s.rules.marking = m
	s.log.Debug("mark of the interface", "mark", m.Mark, "priority", m.Block)
	l.serveBound(s) // with other priorities than before, what was bound is not bound any more
}

// serveBound makes the lookups those for what is bound now.
func (l *loop) serveBound(s *session) error {
	if s.rules.marking == (wire.Marking{}) || s.state != held || !s.installed {
		return nil // they come with the others
	}
	err := s.rules.readGuards()
	if err == nil {
		err = s.rules.sync(s.table, s.rules.want(s.table))
	}
	s.warn("serve what is bound to the interface", err)
	return err
}

// boundAt is where rules of bindings are.
type boundAt struct {
	family   int
	priority uint32
}

// noteBound sorts an event into the news of guards, and of lookups that are gone.
func (n *news) noteBound(e route.Event) {
	if e.Protocol != route.Protocol {
		return
	}
	if n.ours == nil {
		n.ours = make(map[boundAt]bool)
	}
	n.ours[boundAt{e.Family, e.Priority}] = n.ours[boundAt{e.Family, e.Priority}] || e.Deleted
}

// hearBound follows what is bound and what is not any more. Lookups that others delete come
// back; in a watch all rules do.
func (l *loop) hearBound(s *session, n news) {
	m := s.rules.marking
	if n.ours == nil || m == (wire.Marking{}) {
		return
	}
	family := s.uplink.family()
	for _, lookups := range []uint32{m.Block, m.Fallback} {
		if _, guards := n.ours[boundAt{family, lookups + 1}]; guards {
			_ = l.serveBound(s) // it has told
			return
		}
	}
	if l.watch != nil || !n.ours[boundAt{family, m.Block}] && !n.ours[boundAt{family, m.Fallback}] {
		return
	}
	rules, err := l.kernel.RulesWhere(family, func(r *route.Rule) bool { return r.Table == s.table })
	if err != nil || !slices.ContainsFunc(s.rules.want(s.table), func(r route.Rule) bool { return !slices.Contains(rules, r) }) {
		s.warn("read the rules", err)
		return
	}
	if !s.repairs.Allow() {
		s.warn("keep the rules", errors.New("they are deleted again and again; what is missing is put back once a second"))
		s.lookSoon(repairEvery)
		return
	}
	_ = l.serveBound(s) // it has told
}
