package client

import (
	"time"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// scope is what a loop serves: a lone address, or the host.
type scope interface {
	// awaits reports whether addresses may come that have no session yet.
	awaits() bool
	// leaves reports whether the loop ends at once and leaves what is installed, for a failure or a signal.
	leaves(failure error) bool
	// next is when something is due that is no session's; 0: nothing is.
	next() time.Duration
	// runDue does what is due.
	runDue(now time.Duration)
	// note hears of events when all sessions have.
	note(news)
	// settled hears that rules of a session stand, or that it has other settings or another address.
	settled(*session)
	// dropped hears that a session is over.
	dropped(*session)
	// keptBlock are the rules that go on blocking the address of a session that ends.
	keptBlock(*session) []route.Rule
	// renamed is the uplink for the address of a session whose link has another name, if that is to be served.
	renamed(s *session, ifname string) (uplink.Uplink, bool)
}

// lone serves one address for as long as it has a session.
type lone struct{ *loop }

func (lone) awaits() bool                    { return false }
func (lone) leaves(error) bool               { return false }
func (lone) next() time.Duration             { return 0 }
func (lone) runDue(time.Duration)            {}
func (lone) settled(*session)                {}
func (lone) dropped(*session)                {}
func (lone) keptBlock(*session) []route.Rule { return nil }

func (lone) renamed(s *session, ifname string) (uplink.Uplink, bool) {
	u := s.lease.uplink
	u.Key.Ifname = ifname
	return u, true
}

// note restores lookups that others delete.
func (l lone) note(n news) {
	for _, s := range l.all() {
		if !n.boundTo(s) && n.lostLookups(s) {
			l.restoreLookups(s)
		}
	}
}
