package client

import (
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/table-allocator/table-allocator/internal/install"
	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// lookAgain is the pause after a look that failed.
const lookAgain = time.Second

// Routes that another program deletes are restored at once, and at this rate if it goes on.
const (
	repairEvery = time.Second
	repairBurst = 10
)

// session is one address that is served: its machine, what is installed for it, and its socket.
type session struct {
	lease      *machine
	inst       *install.Installation
	conn       *wire.Conn
	addr       netip.Addr // of the uplink
	warned     map[string]string
	log        *slog.Logger
	created    uint32       // 0: a route of type local makes the address, or no look has found it
	onLink     netip.Prefix // the network that the address has on its link; zero: not seen there yet
	deprecated bool         // as it was seen last
	left       int          // the link that the address was deleted from since the last look; 0: none
	gone       bool         // events say that the address may be gone, or it was missed by a look before they did
	unlinked   bool         // its link was deleted since the last look; one that is made again may have the same ifindex
	retry      wire.Message
	retryAt    time.Duration // when retry is sent again, for want of room in the server's queue; 0: nothing waits
	retries    int
	enders     []wire.Addr   // who is told when everything is taken back
	repairs    *rate.Limiter // of rules and routes that another program deletes
	blame      blame
	ordered    uint32 // the table whose unbound rule has a place in the host's order; 0: none has
	orderedIn  lane
	spoke      bool          // that place is known to be before those of the other addresses of the link, if it has to be
	hooked     bool          // a call brought settings of its own
	saved      remembered    // of these settings, for the next watch
	served     bool          // that it has a table was told
	told       exit          // where packets leave, as of the last event
	doubtful   bool          // that may have changed
	refusal    string        // of the server, as it was told
	again      bool          // the server refused the address before, which was logged
	leftOut    string        // the prefix that was left out last, and why
	compared   comparison    // for who asks
	heir       *session      // the address that this one ended for, since the server has no table left
	givenUntil time.Duration // until then no other address ends for this one
}

// leased is the table of the lease, if there is one; else 0.
func (s *session) leased() uint32 {
	if s.lease.state == held {
		return s.lease.table
	}
	return 0
}

// inMain reports whether main has the routes, since there is no lease.
func (s *session) inMain() bool { return s.lease.state == fallenBack }

func (s *session) family() int { return s.lease.uplink.Family() }

// serves reports whether a lease, its rules and its routes are in place.
func (s *session) serves() bool { return s.lease.state == held && s.inst.Installed }

// follow makes the table follow main.
func (s *session) follow() { s.inst.Follow(s.leased(), s.inMain()) }

// settingsUnder are the settings of a profile, with what a hook said of the network.
func (s *session) settingsUnder(profile uplink.Settings) uplink.Settings {
	if !s.hooked {
		return profile
	}
	return s.lease.uplink.Settings.Under(profile)
}

// warn logs a failure that ends nothing, once until it changes; a nil error ends the failure.
func (s *session) warn(what string, err error) {
	if err == nil {
		delete(s.warned, what)
		return
	}
	if s.warned == nil {
		s.warned = make(map[string]string)
	}
	if text := err.Error(); s.warned[what] != text {
		s.warned[what] = text
		s.log.Warn("cannot "+what, "table", s.lease.table, "err", text)
	}
}

// clear removes what is installed for table, but for rules to keep.
func (s *session) clear(table uint32, keep []route.Rule) {
	err := s.inst.Clear(keep...)
	if err != nil { // another try, since nobody comes back to these rules
		err = s.inst.Clear(keep...)
	}
	if err != nil {
		s.log.Error("cannot remove the rules", "table", table, "err", err)
	}
}

// place installs what a lease of table means. It reports whether the machine waited for that, and has heard of it.
func (l *loop) place(s *session, table uint32) bool {
	if s.lease.uplink.Settings.PlacesRoutes() {
		s.warn("subscribe to events of routes", l.watcher.Join(route.Routes4|route.Routes6|route.Nexthops))
	}
	if s.inst.Index == 0 {
		l.look(s)
	}
	if !s.lease.watched && s.lease.uplink.IsAddress() {
		l.hearOfRules(s) // before there are any
	}
	l.checkPrefix(s, l.delegating())
	err := s.inst.Place(table)
	if s.lease.state != placing { // it has the lease already, and got other settings
		s.warn("place the rules", err)
		l.tellSoon(s)
		return false
	}
	if err == nil {
		s.log.Debug("lease granted", "table", table, "tag", s.lease.uplink.Tag, "expires", when(s.lease.expires))
	}
	l.feed(s, event{kind: rulesPlaced, err: err})
	if err == nil {
		l.tellServed(s)
	}
	if err == nil && s.lease.uplink.Settings.Prefix.IsValid() {
		l.checkPrefixes() // of other links that are in the prefix; and another process may have placed the same one now
	}
	return true
}

// lookAtTwins looks at the other sessions of the same address and link, which was renamed: each has one of the names.
func (l *loop) lookAtTwins(s *session) {
	for i := 0; i < len(l.sessions); i++ {
		other := l.sessions[i]
		if other != s && s.inst.Index != 0 && other.inst.Index == s.inst.Index && other.addr == s.addr {
			l.look(other)
		}
	}
}

// hear makes the table follow main, and restores routes that another program deleted from the table, at the rate of
// repairs.
func (s *session) hear(n news) {
	if !s.lease.uplink.Settings.PlacesRoutes() {
		return
	}
	switch {
	case s.concernedByMain(n) && s.inst.Stale():
		s.follow()
	case !n.lost[tableOf{s.family(), s.leased()}]: // most of these this process deleted itself
	case s.repairs.Tokens() < 1:
		s.warn("keep the routes", errors.New("another program deletes them again and again; they are restored once a second"))
		s.lookLater()
	default:
		s.follow()
		if s.inst.Restored() {
			s.repairs.Allow()
		}
	}
}

// concernedByMain reports whether what changed in main may belong into the table.
func (s *session) concernedByMain(n news) bool {
	main := n.main[s.family()]
	if n.addressed[s.inst.Index] {
		return true
	}
	if len(n.left) > 0 { // with an address go the routes that had it as their source, without an event
		return true
	}
	return len(n.gone) > 0 && s.inst.SharesRoutes() || n.mainOn[linkOf{s.family(), s.inst.Index}] || n.mainOn[linkOf{s.family(), 0}] || main.silent ||
		main.others && (s.lease.watched || s.lease.uplink.Settings.SpecificFirst)
}

// lookLater has the session looked at after a pause, or before.
func (s *session) lookLater() {
	if at := wire.Now() + repairEvery; s.inst.RefreshAt == 0 || at < s.inst.RefreshAt {
		s.inst.RefreshAt = at
	}
}

// noteLeaving notes that the address was on its link and was deleted, even if no look has found it there, or that it may
// have gone with the link.
func (s *session) noteLeaving(n news) {
	for _, index := range n.went[s.addr] {
		if index == s.inst.Index || s.inst.Index == 0 {
			s.left, s.gone = index, true
		}
	}
	s.gone = s.gone || n.overrun || n.silent[s.inst.Index]
	s.unlinked = s.unlinked || s.inst.Index != 0 && n.gone[s.inst.Index]
}

// look reads the link and its addresses, and tells the machine what changed.
func (l *loop) look(s *session) {
	if !s.lease.uplink.IsAddress() || s.lease.state == releasing || s.lease.state == done {
		return
	}
	link, found, err := l.link(s)
	switch {
	case err != nil:
		s.lookAgain("read the link", err)
	case found && !s.unlinked:
		l.lookOn(s, link)
	case s.inst.Index != 0: // else the link may come yet
		s.inst.Present = false
		l.feed(s, event{kind: linkGone, why: "the link is gone"})
	}
}

// lookOn reads the addresses of the link of a session.
func (l *loop) lookOn(s *session, link route.Link) {
	s.inst.Index = link.Index
	s.inst.Present = s.inst.Present || s.left == link.Index
	s.left = 0
	addresses, err := l.addressesOn(linkOf{s.family(), link.Index})
	if err != nil {
		s.lookAgain("read the addresses", err)
		return
	}
	goesOn := false
	if at := s.find(addresses); at >= 0 {
		goesOn = l.see(s, addresses[at])
	} else {
		goesOn = l.miss(s)
	}
	if goesOn && link.Name != s.lease.uplink.Key.Ifname {
		l.rename(s, link.Name)
	}
}

// addressesOn reads the addresses of a link. While one session after the other is looked at, it reads them once.
func (l *loop) addressesOn(of linkOf) ([]route.Address, error) {
	if known, ok := l.read[of]; ok {
		return known, nil
	}
	addresses, err := l.kernel.AddressesOn(of.family, of.index)
	if err == nil && l.read != nil {
		l.read[of] = addresses
	}
	return addresses, err
}

func (s *session) lookAgain(what string, err error) {
	s.warn(what, err)
	s.inst.RefreshAt = wire.Now() + lookAgain
}

// find returns where addresses of the link have the one of the uplink, or -1. With two lengths at once, as while it
// is changed, the one that the uplink has counts.
func (s *session) find(addresses []route.Address) int {
	same := func(a route.Address) bool { return a.Addr == s.addr && a.Network() == s.lease.uplink.Network }
	if at := slices.IndexFunc(addresses, same); at >= 0 {
		return at
	}
	return slices.IndexFunc(addresses, func(a route.Address) bool { return a.Addr == s.addr })
}

// see notes that the address is on its link. It reports whether the session goes on.
func (l *loop) see(s *session, a route.Address) bool {
	s.inst.Usable = !a.Tentative()
	if a.DADFailed() {
		s.inst.Present = false // if the address is added again, that is a new one
		l.feed(s, event{kind: end, why: "another host has the address (duplicate address detection failed)"})
		return false
	}
	s.inst.Present, s.gone = true, false
	changed := a.Created != s.created
	s.created, s.deprecated = a.Created, a.Flags&unix.IFA_F_DEPRECATED != 0
	l.feed(s, event{kind: addressSeen})
	l.noteNetwork(s, a)
	if s.lease.state == held && !s.inst.Installed {
		s.warn("place rules and routes", s.inst.Place(s.lease.table))
		l.tellSoon(s)
		changed = true
	} else {
		s.follow()
	}
	if changed {
		l.scope.settled(s)
	}
	return true
}

// noteNetwork takes over the network that an address has on its link, if it changes there. What a caller said of it
// at the beginning stands until then.
func (l *loop) noteNetwork(s *session, a route.Address) {
	before := s.onLink
	s.onLink = a.Network()
	u := s.lease.uplink
	if s.onLink == u.Network || before == s.onLink || !before.IsValid() && !s.lease.watched {
		return
	}
	u.Network = s.onLink
	l.update(s, u)
}

// miss notes that the address is not on its link. It reports whether the session goes on.
func (l *loop) miss(s *session) bool {
	s.inst.Usable = false
	switch {
	case s.inst.Present && !s.gone:
		// Its event is still to come, and those before that say what main has lost with it, as when the link was down.
		s.gone = true
		s.lookLater()
		return false
	case s.inst.Present:
		s.inst.Present = false
		if s.inMain() {
			s.inst.LeaveMain()
		}
		l.feed(s, event{kind: addressGone, why: "the address is gone"})
		return false
	case !s.onLink.IsValid():
		// It may come as a local route, too.
		s.warn("hear of routes", l.watcher.Join(route.Routes4|route.Routes6))
		s.inst.OnLink = s.lease.uplink.Network.IsValid() // the caller knew it before the kernel
	}
	if s.lease.blocking {
		s.inst.YieldAddress()
	}
	return true
}

func (l *loop) link(s *session) (route.Link, bool, error) {
	if s.inst.Index != 0 {
		return l.kernel.LinkByIndex(s.inst.Index)
	}
	return l.kernel.LinkByName(s.lease.uplink.Key.Ifname)
}

// oneNameInFlight reports whether another session of the same address and link is about to get, or to give back, a
// lease for a name that the link no longer has: names that come and go faster than leases must not take all tables. A
// session that has no lease yet ends if another one has. When it is gone, lookAtTwins has the other one look again.
func (l *loop) oneNameInFlight(s *session, name string) (waits bool) {
	for _, other := range l.all() {
		if other == s || other.inst.Index != s.inst.Index || other.addr != s.addr {
			continue
		}
		switch other.lease.state {
		case asking, placing, fallenBack, releasing:
			waits = true
		case held:
			if s.lease.state == held {
				continue
			}
			if !s.lease.reported {
				l.report(other.lease.table, "")
				l.feed(s, event{kind: succeeded})
			}
			l.feed(s, event{kind: end, why: "the link was renamed to " + name})
			return true
		}
	}
	return waits
}

// rename starts a second session, for the new name of the link: the name is part of the key. The first one ends once
// the second one has its lease.
func (l *loop) rename(s *session, name string) {
	u, ok := l.scope.renamed(s, name)
	if !ok {
		l.feed(s, event{kind: end, why: "the link was renamed to " + name + ", which the configuration does not select"})
		return
	}
	for _, other := range l.sessions {
		if other.lease.uplink.Key != u.Key {
			continue
		}
		if other.lease.state == held {
			l.feed(s, event{kind: end, why: "the link was renamed to " + name})
		}
		return // else the second session waits for its lease
	}
	if l.oneNameInFlight(s, name) {
		return
	}
	conn, err := peer.Open(u.Key, peer.AsHolder)
	if err != nil {
		s.log.Error("the link was renamed, and its new name cannot be held; keeping the old lease", "name", name, "err", err)
		return
	}
	s.log.Info("the link was renamed", "name", name)
	m := newMachine(u, !s.lease.reported, s.lease.watched)
	l.feed(s, event{kind: succeeded})
	next := l.add(m, conn)
	next.inst.Index, next.created, next.hooked = s.inst.Index, s.created, s.hooked
	next.onLink, next.inst.OnLink = s.onLink, s.inst.OnLink
	next.inst.InheritServers(s.inst)
	l.scope.settled(next)
	l.feed(next, event{kind: start})
	l.look(next)
}
