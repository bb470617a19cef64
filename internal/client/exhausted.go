package client

import (
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/table-allocator/table-allocator/internal/events"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Addresses that the server has no table for ask again in turn, so that thousands of them cost no more than a few. Once one of
// them is granted a table, there may be more: the next ones ask at once, and as many for each of these that is granted one.
const (
	turnEvery = 150 * time.Millisecond
	together  = time.Second // those of a second ask together: a wake-up reads all sessions
	hastened  = 4
)

// need is what addresses have in common for which the same addresses may give their tables.
type need struct {
	family, index int
	deprecated    bool
}

// giversEvery is how often it is looked for an address that gives its table for others of a link that have asked before, while
// there is none.
const giversEvery = time.Second

// nextTurn is when an address may ask again that the server has no table for.
func (l *loop) nextTurn(now time.Duration) time.Duration {
	most := time.Duration(len(l.sessions)) * turnEvery // if addresses went that waited
	l.lastTurn = min(max(now, l.lastTurn)+turnEvery, now+min(most, refusedFor))
	return (l.lastTurn + together - 1).Truncate(together)
}

// hasten has those addresses of a family ask whose turn comes first.
func (l *loop) hasten(family int) {
	for range hastened {
		var first *session
		for _, s := range l.sessions {
			if s.lease.queued && s.lease.asks() && s.family() == family && (first == nil || s.lease.due < first.lease.due) {
				first = s
			}
		}
		if first == nil {
			return
		}
		l.feed(first, event{kind: freed})
	}
}

// The log and history have a line for each of the first addresses of a link that the server has no table for, and then one with
// their number, which is said again when it has doubled.
const (
	eachScarce   = 3
	tellScarceIn = time.Second // of the last lease, say: thousands may ask together
)

// scarcity is what was said of addresses that the server has no table for.
type scarcity struct {
	at    time.Duration  // when their numbers are looked at; 0: no address was counted
	each  map[linkOf]int // addresses with a line of their own
	total map[linkOf]int // the last number that was said
}

// counts reports whether an address has no line of its own.
func (c *scarcity) counts(s *session) bool {
	of := linkOf{s.family(), s.inst.Index}
	if c.each == nil {
		c.each, c.total = make(map[linkOf]int), make(map[linkOf]int)
	}
	if c.at == 0 {
		c.at = wire.Now() + tellScarceIn
	}
	if c.each[of] == eachScarce {
		return true
	}
	c.each[of]++
	return false
}

// tellScarce says how many addresses of each link have no table. When all have one it begins anew.
func (l *loop) tellScarce() {
	l.scarce.at = 0
	lacking := make(map[linkOf]int)
	last := make(map[linkOf]*session)
	for _, s := range l.sessions {
		if of := (linkOf{s.family(), s.inst.Index}); s.lease.asks() && s.refusal != "" {
			lacking[of]++
			last[of] = s
		}
	}
	for of := range l.scarce.each {
		if n := lacking[of]; n == 0 {
			delete(l.scarce.each, of)
			delete(l.scarce.total, of)
		} else if n > eachScarce && n >= 2*l.scarce.total[of] {
			l.scarce.total[of] = n
			key, why := last[of].lease.uplink.Key, last[of].refusal
			text := fmt.Sprintf("%d addresses get no table: %s", n, why)
			l.log.Warn(key.Ifname+": "+text, "ifname", key.Ifname, "family", key.Family.String())
			l.events.Append(events.Event{What: events.Refused, Ifname: key.Ifname, Family: key.Family.String(), Text: text})
		}
	}
}

// exhausted ends the session of another address, so that an address on a link that main has routes over gets its table:
// the server has none left. Another client may take that table first, so no second one gives its table for it soon.
func (h *host) exhausted(needy *session) {
	now := wire.Now()
	from := need{needy.family(), needy.inst.Index, needy.deprecated}
	lookedFor := needy.lease.sends > 1 && now < h.nobodyGives[from]
	if now < needy.givenUntil || lookedFor || !h.routed(needy) {
		return
	}
	giver, why, deprecated := h.pickGiver(needy, now)
	if giver == nil {
		h.nobodyGives[from] = now + giversEvery
		return
	}
	h.refused[giver.lease.uplink.Key] = now + refusedFor
	if deprecated {
		h.deprecated[giver.lease.uplink.Key] = true
	}
	giver.heir, needy.givenUntil = needy, now+refusedFor
	h.feed(giver, event{kind: end, why: why})
	h.feed(needy, event{kind: freed}) // at once behind the release, so that no address whose turn it is gets the table
}

// pickGiver returns the address that gives its table, nil if none does, and whether it does so because it is deprecated.
func (h *host) pickGiver(needy *session, now time.Duration) (giver *session, why string, deprecated bool) {
	var givers []*session // few, where thousands wait for a table
	leases, coming := make(map[int]int), 0
	for _, s := range h.sessions {
		if s.lease.table == 0 && s.givenUntil == 0 || s.family() != needy.family() {
			continue
		}
		switch {
		case s.lease.state == placing || s.lease.state == held: // else it has given its table
			leases[s.inst.Index]++
		case s.inst.Index == needy.inst.Index && now < s.givenUntil: // a table for this link is on its way, or another client took it
			coming++
		}
		if s.mayGive(needy) {
			givers = append(givers, s)
		}
	}
	if giver, why = h.unroutedGiver(givers); giver != nil {
		return giver, why, false
	}
	if giver, why = deprecatedGiver(needy, givers, leases); giver != nil {
		return giver, why, true
	}
	giver, why = crowdedGiver(needy, givers, leases, leases[needy.inst.Index]+coming)
	return giver, why, false
}

// unroutedGiver returns an address on a link without any route of main.
func (h *host) unroutedGiver(givers []*session) (giver *session, why string) {
	for _, s := range givers {
		if !h.routed(s) {
			return s, "the server has no table left for a link that main has routes over, and main has none over this link"
		}
	}
	return nil, ""
}

// deprecatedGiver returns a deprecated address, for one that is not: no new traffic uses it, and a host that makes temporary
// addresses keeps each for days. The last table of a link stays with that link.
func deprecatedGiver(needy *session, givers []*session, leases map[int]int) (giver *session, why string) {
	if needy.deprecated {
		return nil, ""
	}
	for _, s := range givers {
		if s.deprecated && leases[s.inst.Index] > 1 {
			return s, fmt.Sprintf("the server has no table left for %s, and this address is deprecated: see num_tables", needy.lease.uplink.Key.Address)
		}
	}
	return nil, ""
}

// crowdedGiver returns an address on the link with most leases, for a link that has fewer, so that in the end both have as many: no
// number of addresses on one link keeps tables from another one. has is how many the other one has, or is about to have. A
// deprecated address gets the first table of its link, and no further one.
func crowdedGiver(needy *session, givers []*session, leases map[int]int, has int) (giver *session, why string) {
	if needy.deprecated && has > 0 {
		return nil, ""
	}
	most := has + 1
	for _, s := range givers { // the last one of a link: the first ones are what main prefers
		if n := leases[s.inst.Index]; n >= most && n > has+1 {
			giver, most = s, n
		}
	}
	few := "none"
	if has > 0 {
		few = strconv.Itoa(has)
	}
	if giver != nil {
		why = fmt.Sprintf("the server has no table left for link %q, which has %s, and this link has %d: see num_tables", needy.lease.uplink.Key.Ifname, few, most)
	}
	return giver, why
}

// mayGive reports whether a session has a table that another address may get.
func (s *session) mayGive(needy *session) bool {
	return s.lease.state == held && s.family() == needy.family() && s.lease.uplink.Want == 0 && !s.hooked
}

// bequeath has the address that a session ended for ask for the table at once, before any other address does.
func (h *host) bequeath(s *session) {
	if heir := s.heir; heir != nil && slices.Contains(h.sessions, heir) {
		h.feed(heir, event{kind: freed})
	}
}
