package client

import (
	"slices"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// inherit has a session that the server does not answer go on with the table that the process before this one had for its
// address, if that was killed and the rules stand: the routes of the table have to follow main, and what a hook says now, also
// while there is no server. No server leases a number that rules lead to. Who places no routes has none to keep up.
func (l *loop) inherit(s *session, away bool) {
	m := s.lease
	silent := away || m.sends > 0 && m.why == "" && m.due != 0 && wire.Now() >= m.due
	if m.state != asking || !silent || !m.uplink.Settings.PlacesRoutes() {
		return
	}
	table, err := s.inst.Rules.Former()
	if s.warn("read the rules of the process before", err); err != nil || !isLeased(table) {
		return
	}
	if slices.ContainsFunc(l.sessions, func(other *session) bool { return other.lease.table == table && other.family() == s.family() }) {
		return
	}
	s.log.Warn("the server does not answer; the table stays in use that the rules of this address lead to", "table", table)
	l.feed(s, event{kind: inherited, table: table})
}
