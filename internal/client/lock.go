package client

import (
	"errors"
	"slices"

	"github.com/table-allocator/table-allocator/internal/lock"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// keepLock is what keepLock warns that it cannot do.
const keepLock = "keep the lock of bound programs, whose link stays closed after a replug until the next run"

// keepLock makes the lock follow the interface of a session, if programs are bound to that with block.
func (l *loop) keepLock(s *session) error {
	if !slices.ContainsFunc(s.inst.Rules.Guards, uplink.IsStrict) {
		return nil
	}
	// A link with a new default route is an uplink. Only clients with a lock hear of routes: each change of one would wake all.
	hears := l.watcher.Join(route.Routes4 | route.Routes6)
	return errors.Join(hears, lock.Keep(l.kernel, s.inst.Rules.Marking, s.lease.uplink.Key.Ifname, l.scope.wants))
}

// keepLocks makes the lock follow events of links and addresses, also those of networks of the host: a link is an uplink,
// and its network none of the host's, once it has a lease or a default route. What rules and routes say is read at the
// rate of repairs: other programs may change them all the time.
func (l *loop) keepLocks(n news) {
	done := make(map[string]bool)
	atOnce := n.overrun || len(n.names)+len(n.links)+len(n.addressed) > 0
	changed := atOnce || n.newDefault || len(n.others)+len(n.filled) > 0
	for _, s := range l.sessions {
		ifname := s.lease.uplink.Key.Ifname
		if !changed || done[ifname] || !slices.ContainsFunc(s.inst.Rules.Guards, uplink.IsStrict) {
			continue
		}
		done[ifname] = true
		if atOnce || l.locks.Allow() {
			s.warn(keepLock, l.keepLock(s))
		} else {
			s.lookLater() // which serves bound traffic
		}
	}
	if len(n.gone) > 0 {
		if err := lock.Remove(n.gone); err != nil {
			l.log.Warn("cannot remove links that went from the lock of bound programs", "err", err)
		}
	}
}
