package client

import (
	"fmt"
	"reflect"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Times of the protocol as callers know them from the original, and floors and bounds of
// our own.
const (
	renewFloor   = 200 * time.Millisecond
	renewCeiling = 24 * time.Hour // a forged or broken expiry must not stop renewals
	awayEvery    = 1500 * time.Millisecond
	listenLate   = 100 * time.Millisecond // a timer that is later says that nobody listened: the answer may wait to be read
	addressGrace = 60 * time.Second
	fallBackIn   = time.Second // for a lease to come before main has to do

	exhaustedFor = time.Minute // between requests of an address, when the server has no table left

	releaseWaits = 100                    // more, for room in the server's queue: hundreds may end at once
	calledEvery  = 100 * time.Millisecond // at most, for somebody who calls again and again
)

type state int

const (
	asking     state = iota // has no lease
	fallenBack              // has none, and main has the routes until one comes
	waiting                 // gave its lease back, and waits for the address to return
	placing                 // has a lease, and waits to hear that its rules stand
	held                    // lease and rules stand
	releasing               // rules are gone, the server has not confirmed the end yet
	done
)

// machine is one address on its way from a request to a release. It does no I/O and reads no clock. newMachine makes
// it, and then step alone changes it.
//
//	       start
//	         v     no lease at once, and it places routes
//	.---> asking -------------------------------> fallenBack
//	|        |                                        |
//	|        | granted <------------------------------'
//	|        v
//	|     placing -- the rules cannot stand ----.
//	|        |                                  v
//	|        | rules stand                  releasing --> done
//	|        v                                  ^
//	|      held -- the address or link is gone, |
//	|        |     or somebody ends it ---------+
//	|        |                                  |
//	|        | the address is gone, it places   | after 60 s
//	|        v routes, and nothing watches      |
//	'---- waiting ------------------------------'
//	the address is back
//
// The end of an address comes from asking and fallenBack, too, and so does the wait for its return. A machine for
// which a caller waits gives up after five requests, unless it places routes.
type machine struct {
	uplink  uplink.Uplink
	awaited bool // a caller waits for the first answer, and is told after five requests at the latest
	watched bool // whoever made it makes another one when the address returns

	state    state
	table    uint32
	expires  time.Duration // on the lease clock
	sends    int           // in this state
	waits    int           // of a release, for room in the server's queue
	asked    time.Duration // when the server was asked for a lease last, or for the renewal of one first
	due      time.Duration // of the timer; 0: none
	grace    time.Duration // until the address has to be there; 0: it was, or never has to
	reported bool          // the caller has its answer
	blocking bool          // nothing leaves from the address, should it return, before its rules stand
	away     bool          // the server did not answer the last renewals
	unheard  bool          // a renewal was sent amid other work, and nobody has looked for its answer
	denied   bool          // it ends since the server, or the kernel, refused it for good
	queued   bool          // the server has no table left, and the next request waits for its turn
	why      string        // the last reason not to have a lease
}

// event is something that happened. Exactly one field group is meaningful, by kind.
type event struct {
	kind  eventKind
	reply wire.Reply
	turn  time.Duration // of replied: when it is this machine's turn to ask again, if the server has no table left
	table uint32        // of inherited
	err   error         // of rulesPlaced and unreachable
	why   string        // of end, addressGone and linkGone
	newer uplink.Uplink // of replaced
	full  bool          // of timer: the last request still waits for room in the server's queue
}

type eventKind int

const (
	start       eventKind = iota
	timer                 // due or grace has come
	busy                  // due may have come, and the loop goes on with what it does before it hears answers
	replied               // the server answered: reply
	unreachable           // the request could not be delivered: err
	rulesPlaced           // the rules of the last placeRules stand, or not: err
	addressSeen           // the address is on its link
	addressGone           // it is not, though it was: why
	linkGone              // nor is the link: why
	replaced              // a newer call brought another tag or other settings: newer
	called                // somebody waits for the table
	freed                 // a table was given back for this machine
	inherited             // nobody answers, and rules of the process before lead to table
	succeeded             // a machine for the link's new name answers the caller
	end                   // a signal, or another client, wants the end: why
)

// newMachine makes the machine of an uplink. awaited reports whether a caller waits for the table, watched whether
// another machine is made when the address returns.
func newMachine(u uplink.Uplink, awaited, watched bool) *machine {
	return &machine{uplink: u, awaited: awaited, watched: watched, reported: !awaited}
}

// seenMachine is the machine of an address that another client serves. It makes no step.
func seenMachine(u uplink.Uplink, table uint32) *machine {
	return &machine{uplink: u, table: table, state: held, watched: true, reported: true}
}

// deadline is when the machine wants a timer event; 0: never.
func (m *machine) deadline() time.Duration {
	if m.grace != 0 && (m.due == 0 || m.grace < m.due) {
		return m.grace
	}
	return m.due
}

func (m *machine) step(now time.Duration, ev event) []action {
	switch ev.kind {
	case start:
		if m.uplink.IsAddress() {
			m.grace = now + addressGrace
		}
		return m.ask(now)
	case timer:
		return m.tick(now, ev.full)
	case busy:
		return m.renew(now)
	case replied:
		return m.answer(now, ev.reply, ev.turn)
	case unreachable:
		return m.undelivered(now, ev.err)
	case rulesPlaced:
		return m.placed(now, ev.err)
	case addressSeen:
		m.grace = 0
		if m.state == waiting {
			m.enter(asking)
			return m.ask(now)
		}
	case addressGone:
		if m.uplink.Settings.PlacesRoutes() && !m.watched {
			return m.wait(now, ev.why)
		}
		return m.quit(now, ev.why)
	case replaced:
		return m.replace(now, ev.newer)
	case called:
		return m.call(now)
	case freed:
		if m.asks() {
			return m.ask(now)
		}
	case inherited:
		if m.state == asking {
			m.expires = now
			return m.leased(ev.table)
		}
	case succeeded:
		m.reported = true
	case linkGone, end:
		return m.quit(now, ev.why)
	}
	return nil
}

func (m *machine) request(cmd wire.Command) action {
	req := wire.Request{Key: m.uplink.Key, Tag: m.uplink.Tag, Cmd: cmd}
	if cmd == wire.Acquire {
		req.Want, req.Marks, req.Left = m.uplink.Want, m.uplink.IsAddress(), true
		if m.state == held {
			req.Want = m.table // of a server that has lost its database, too
		}
	}
	return action{kind: send, request: req}
}

func (m *machine) ask(now time.Duration) []action {
	m.sends++
	m.asked, m.queued = now, false
	m.due = now + peer.TryEvery
	if m.uplink.Settings.PlacesRoutes() && m.state != fallenBack {
		m.due = now + fallBackIn
	}
	return []action{m.request(wire.Acquire)}
}

// asks reports whether the machine wants a lease, and has none.
func (m *machine) asks() bool { return m.state == asking || m.state == fallenBack }

// patient reports whether the machine asks for ever: nobody waits, or main has the routes until there is a lease.
func (m *machine) patient() bool { return !m.awaited || m.uplink.Settings.PlacesRoutes() }

// makeDo is what a patient machine does when there is no lease at once: no boot waits.
func (m *machine) makeDo() []action {
	if m.state == fallenBack || m.watched || !m.uplink.Settings.PlacesRoutes() {
		return nil // a watch took nothing from main yet
	}
	m.state, m.blocking = fallenBack, false // requests go on as before
	if m.why == "" {
		m.why = "no answer"
	}
	return append([]action{{kind: fallBack}}, m.tell(0, m.why)...)
}

func (m *machine) tick(now time.Duration, full bool) []action {
	if m.grace != 0 && now >= m.grace {
		m.grace = 0
		if m.state == waiting {
			return m.quit(now, m.why)
		}
		return m.quit(now, fmt.Sprintf("the address did not come within %v", addressGrace))
	}
	if m.due == 0 || now < m.due {
		return nil
	}
	return m.expire(now, full)
}

// expire does what the timer was set for.
func (m *machine) expire(now time.Duration, full bool) []action {
	switch m.state {
	case asking, fallenBack:
		if m.sends >= peer.Tries && !m.patient() {
			if m.why == "" {
				m.why = "no answer"
			}
			return m.giveUp(now)
		}
		return append(m.makeDo(), m.ask(now)...)
	case held:
		if m.sends++; m.sends == 1 {
			m.asked = now
		} else if !m.unheard && now < m.due+listenLate {
			m.away = true
		}
		m.due, m.unheard = now+awayEvery, false
		return []action{m.request(wire.Acquire)}
	case releasing:
		if full && m.waits < releaseWaits {
			m.waits++
			m.due = now + peer.ReleaseEvery
			return nil
		}
		return m.release(now)
	}
	return nil
}

// giveUp ends a machine that never had a lease. The server is told even so: a grant may
// have been lost on its way.
func (m *machine) giveUp(now time.Duration) []action {
	actions := m.tell(0, m.why)
	if m.blocking {
		m.blocking = false
		actions = append(actions, action{kind: clearRules, table: m.table})
	}
	m.enter(releasing)
	return append(actions, m.release(now)...)
}

func (m *machine) tell(table uint32, why string) []action {
	if m.reported {
		return nil
	}
	m.reported = true
	return []action{{kind: report, table: table, why: why}}
}

func (m *machine) enter(s state) {
	m.state, m.sends, m.due, m.unheard = s, 0, 0, false
}

func (m *machine) answer(now time.Duration, r wire.Reply, turn time.Duration) []action {
	switch m.state {
	case asking, fallenBack, held:
		if r.Table >= unix.RT_TABLE_DEFAULT && r.Table <= unix.RT_TABLE_LOCAL {
			r = wire.Reply{Error: fmt.Sprintf("the server leased table %d, which is reserved", r.Table)}
		}
		if r.Table == 0 {
			return m.refused(now, r, turn)
		}
		return m.granted(now, r)
	case releasing:
		switch {
		case r.Table != 0: // late, of a renewal
		case r.Error == "" && r.Code == "":
			return m.finish("released")
		case r.Code.Final():
			return m.finish("not released: " + r.Error)
		}
		// Else it is tried again.
	}
	return nil // late, of a request that no longer matters
}

func (m *machine) granted(now time.Duration, r wire.Reply) []action {
	m.expires = time.Duration(r.Expires) * time.Second
	if r.Left > 0 { // the server may be in another time namespace. An answer may have waited to be read
		m.expires = m.asked + time.Duration(r.Left)*time.Second
	}
	m.away = false
	switch {
	case m.state == held && r.Table == m.table:
		m.enter(held)
		m.due = m.renewal(now)
	case m.state != held && r.Left > 0 && now >= m.expires: // the answer waited for longer than the lease lasts
		m.due = now
	default:
		return m.leased(r.Table)
	}
	return nil
}

func (m *machine) leased(table uint32) []action {
	m.enter(placing)
	m.table = table
	return []action{{kind: placeRules, table: table}}
}

func (m *machine) refused(now time.Duration, r wire.Reply, turn time.Duration) []action {
	m.why = r.Error
	if m.why == "" {
		m.why = "refused without a reason"
	}
	m.away = false
	if m.state == held {
		m.sends = 0 // it is there
	}
	switch {
	case m.asks() && r.Code.Final():
		m.denied = true
		return append(m.makeDo(), m.giveUp(now)...)
	case m.asks():
		actions := m.makeDo()
		if actions != nil {
			m.due = now + peer.TryEvery
		}
		if m.watched && r.Code == wire.Exhausted && !m.queued { // after 2, 8, 32 seconds, and then each minute; one after the other if thousands ask
			m.queued = true
			m.due = max(turn, now+min(peer.TryEvery<<min(2*(m.sends-1), 16), exhaustedFor))
		}
		return actions // the next try is due already
	case m.state == held && r.Code.Final() && now >= m.expires:
		m.denied = true
		return m.quit(now, "the lease ended and is not renewed: "+m.why)
	}
	return nil // likewise
}

func (m *machine) undelivered(now time.Duration, err error) []action {
	switch m.state {
	case asking, fallenBack:
		m.why = err.Error()
		actions := m.makeDo()
		if actions != nil {
			m.due = now + peer.TryEvery
		}
		return actions
	case held:
		m.away = true
	case releasing:
		// The lease runs out by itself, and its rules are gone.
		return m.finish("the server is not there to take the lease back: " + err.Error())
	}
	return nil
}

func (m *machine) placed(now time.Duration, err error) []action {
	if m.state != placing {
		return nil
	}
	if err != nil {
		m.why, m.denied = err.Error(), true
		actions := append([]action{{kind: clearRules, table: m.table}}, m.giveUp(now)...)
		m.table = 0
		return actions
	}
	m.enter(held)
	m.blocking = false
	m.due = m.renewal(now)
	return m.tell(m.table, "")
}

// replace takes over what a newer call brought.
func (m *machine) replace(now time.Duration, newer uplink.Uplink) []action {
	old := m.uplink
	m.uplink = newer
	if m.blocking && !newer.Settings.PlacesRoutes() {
		m.blocking = false
		return []action{{kind: clearRules, table: m.table}}
	}
	if m.state != held {
		return nil // the next request carries it
	}
	var actions []action
	tag := old.Tag
	if old.Tag = newer.Tag; !reflect.DeepEqual(old, newer) {
		actions = append(actions, action{kind: placeRules, table: m.table})
	}
	if tag == newer.Tag {
		return actions
	}
	m.due = now + awayEvery
	if m.sends++; m.sends == 1 {
		m.asked = now
	}
	return append(actions, m.request(wire.Acquire))
}

// call asks the server at once for somebody who wants the table, and may be about to put
// the address back.
func (m *machine) call(now time.Duration) []action {
	switch {
	case m.state == waiting:
		m.enter(asking)
		m.grace = now + addressGrace
		return m.ask(now)
	case m.asks() && m.patient() && now >= m.asked+calledEvery:
		due := m.due
		actions := m.ask(now)
		m.due = min(m.due, due) // main does not wait any longer for that
		return actions
	}
	return nil
}

// wait takes everything back like quit, but stays: what a hook said is still good if the
// address was only flushed and put back. From one that comes back packets would leave by
// another uplink until it is served, so where that must not be, it is blocked.
func (m *machine) wait(now time.Duration, why string) []action {
	var actions []action
	switch m.state {
	case releasing, waiting, done:
		return nil
	case placing, held:
		m.blocking = true
		actions = []action{{kind: block, table: m.table}}
	}
	actions = append(actions, m.request(wire.Release))
	m.enter(waiting)
	m.why = why
	m.grace = now + addressGrace
	return actions
}

// quit takes everything back, rules before the lease, so that the next holder of the
// table meets none of them.
func (m *machine) quit(now time.Duration, why string) []action {
	m.grace = 0
	var actions []action
	switch m.state {
	case releasing, done:
		return nil
	case placing, held:
		m.blocking = false
		actions = []action{{kind: clearRules, table: m.table}}
	}
	m.why = why
	return append(actions, m.giveUp(now)...)
}

func (m *machine) release(now time.Duration) []action {
	if m.sends >= peer.ReleaseTries {
		return m.finish("the server did not confirm the release")
	}
	m.sends++
	m.due = now + peer.ReleaseEvery
	return []action{m.request(wire.Release)}
}

func (m *machine) finish(why string) []action {
	m.enter(done)
	m.grace = 0
	return []action{{kind: finish, why: why}}
}
