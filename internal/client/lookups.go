package client

import (
	"errors"
	"slices"

	"github.com/table-allocator/table-allocator/internal/lock"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// learn takes over the marking of the session's interface.
func (l *loop) learn(s *session, m wire.Marking) {
	if m == (wire.Marking{}) || m == s.inst.Rules.Marking || !s.lease.uplink.IsAddress() {
		return
	}
	s.warn("subscribe to events of rules", errors.Join(l.watcher.AllRules(), l.watcher.Join(route.Rules4|route.Rules6)))
	s.log.Debug("mark of the interface", "mark", m.Mark, "priority", m.Block)
	byFamily := make(map[int]*session)
	for _, other := range l.sessions { // all addresses of the interface share it
		if other.lease.uplink.IsAddress() && other.lease.uplink.Key.Ifname == s.lease.uplink.Key.Ifname {
			other.inst.Rules.Marking = m
			byFamily[other.family()] = other
		}
	}
	for _, one := range byFamily { // a server that gives other priorities than before has nothing bound there
		l.serveBound(one)
	}
}

// serveWhatIsBound is what serveBound warns that it cannot do.
const serveWhatIsBound = "serve traffic that is bound to the interface"

// serveBound reads the rules of traffic that is bound to the interface of a session, and makes the lookups of all sessions of the
// interface and family follow.
func (l *loop) serveBound(s *session) {
	if s.inst.Rules.Marking == (wire.Marking{}) {
		return
	}
	err := s.inst.Rules.ReadGuards()
	if err == nil {
		err = l.syncLookups(s)
	}
	s.warn(serveWhatIsBound, err)
	s.warn(keepForeignRules, l.keepForeign(s))
	s.warn(keepLock, l.keepLock(s))
	if err == nil && len(s.inst.Rules.Guards) == 0 {
		l.forget(s)
	}
}

// forget forgets the marking of an interface to which nothing is bound: the server may give the mark to another
// interface, whose traffic this one must not take. Whoever binds something again tells the marking.
func (l *loop) forget(s *session) {
	for _, other := range l.sessions {
		if other.family() == s.family() && other.lease.uplink.Key.Ifname == s.lease.uplink.Key.Ifname {
			other.inst.Rules.Marking = wire.Marking{}
		}
	}
}

func (l *loop) syncLookups(s *session) error {
	var want []route.Rule
	sessions := make(map[uint32]*session)
	for _, other := range l.sessions {
		if other.family() != s.family() || other.inst.Rules.Marking != s.inst.Rules.Marking {
			continue
		}
		other.inst.Rules.Guards = s.inst.Rules.Guards
		if !other.serves() {
			continue // Place adds its lookups with its other rules
		}
		sessions[other.lease.table] = other
		want = append(want, other.lease.uplink.Lookups(s.inst.Rules.Marking, s.inst.Rules.Guards, other.lease.table)...)
	}
	if len(sessions) == 0 {
		return nil
	}
	ours := func(r route.Rule) bool {
		return (uplink.IsLookup(r) || uplink.IsOwnLookup(r)) && sessions[r.Table] != nil
	}
	_, err := l.env.SyncRules(s.family(), ours, want, func(r route.Rule) []any { return sessions[r.Table].inst.Rules.Attrs(r) })
	return err
}

// keepForeignRules is what keepForeign warns that it cannot do.
const keepForeignRules = "keep the rules for bound traffic with addresses of other interfaces"

// keepForeign makes rules for bound traffic follow the leases of other interfaces.
func (l *loop) keepForeign(s *session) error {
	return lock.KeepForeign(l.kernel, s.family(), s.inst.Rules.Marking, s.lease.uplink.Key.Ifname)
}

// keepForeignSoon is keepForeign, which reads all rules, at the rate of repairs.
func (l *loop) keepForeignSoon(s *session) {
	if !l.foreign.Allow() {
		s.lookLater() // which serves bound traffic
		return
	}
	s.warn(keepForeignRules, l.keepForeign(s))
}

// serveNews serves traffic that is bound by rules and was not when guards were read last, and reports whether anything is.
func (l *loop) serveNews(family int, rules []route.Rule) (some bool) {
	var guards []route.Rule
	for _, r := range rules {
		if uplink.IsGuard(r) {
			guards = append(guards, r)
		}
	}
	for _, s := range l.sessions {
		if s.family() == family && !slices.Equal(s.inst.Rules.Guards, uplink.GuardsOf(s.inst.Rules.Marking, guards)) {
			l.serveBound(s)
			some = true
		}
	}
	return some
}

// serveNewlyBound serves interfaces where events say that traffic was bound or set free.
func (l *loop) serveNewlyBound(n news) {
	done := make(map[ruleAt]bool)
	for _, s := range l.sessions {
		at := ruleAt{s.family(), s.inst.Rules.Marking.Block}
		switch {
		case done[at]:
		case n.boundTo(s):
			l.serveBound(s)
			done[at] = true
		case len(n.rules)+len(n.addresses) > 0 && slices.ContainsFunc(s.inst.Rules.Guards, uplink.HasForeign):
			l.keepForeignSoon(s) // leases of other interfaces may have changed
			done[at] = true
		}
	}
}

// restoreLookups restores lookups that another program deleted.
func (l *loop) restoreLookups(s *session) {
	rules, err := l.kernel.RulesWhere(s.family(), func(r *route.Rule) bool { return r.Table == s.lease.table })
	want := s.lease.uplink.Lookups(s.inst.Rules.Marking, s.inst.Rules.Guards, s.lease.table)
	if err != nil || !s.serves() || !slices.ContainsFunc(want, func(r route.Rule) bool { return !slices.Contains(rules, r) }) {
		s.warn("read the rules", err)
		return
	}
	if !s.repairs.Allow() {
		s.warn("keep the rules", errors.New("another program deletes them again and again; they are restored once a second"))
		s.lookLater()
		return
	}
	l.serveBound(s)
}
