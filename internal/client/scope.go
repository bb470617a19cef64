package client

import (
	"time"

	"github.com/table-allocator/table-allocator/internal/uplink"
)

// scope is what a loop serves: a lone address, or the host.
type scope interface {
	// awaits reports whether there may be sessions for other addresses.
	awaits() bool
	// leaves reports whether the loop ends at once, and leaves rules and routes in place. It ends for a failure, or
	// for a signal, which is nil.
	leaves(failure error) bool
	// next is when runDue has something to do; 0: never.
	next() time.Duration
	// runDue does what is due for no single session.
	runDue(now time.Duration)
	// note hears of events, after all sessions.
	note(news)
	// settled hears that a session has rules, settings or an address that it did not have before.
	settled(*session)
	// exhausted hears that the server has no table left for a session.
	exhausted(*session)
	// dropped hears that a session is over.
	dropped(*session)
	// wants reports whether addresses of a link get leases as they come.
	wants(uplink.Link) bool
	// renamed is the uplink for the address of a session under another name of its link, if it is to be served.
	renamed(s *session, ifname string) (uplink.Uplink, bool)
}

// lone serves one address for as long as it has a session.
type lone struct{ *loop }

func (lone) awaits() bool           { return false }
func (lone) leaves(error) bool      { return false }
func (lone) next() time.Duration    { return 0 }
func (lone) runDue(time.Duration)   {}
func (lone) settled(*session)       {}
func (lone) exhausted(*session)     {}
func (lone) dropped(*session)       {}
func (lone) wants(uplink.Link) bool { return false }

func (lone) renamed(s *session, ifname string) (uplink.Uplink, bool) {
	u := s.lease.uplink
	u.Key.Ifname = ifname
	return u, true
}

// note restores rules that another program deleted.
func (l lone) note(n news) {
	for _, s := range l.all() {
		if n.tables[s.lease.table] || n.overrun {
			l.restoreSoon(s)
		}
		if !n.boundTo(s) && n.lostLookups(s) {
			l.restoreLookups(s)
		}
	}
}
