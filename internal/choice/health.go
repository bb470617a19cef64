package choice

import (
	"fmt"
	"math/bits"
	"time"
)

// State is what is known of an uplink.
type State int

// The states.
const (
	Unknown   State = iota // no round has told anything yet
	Alive                  // a target answers
	Degraded               // a target answers, and too many rounds lose the first answer
	Portal                 // a captive portal answers in place of the target
	Dead                   // no target answers
	NoCarrier              // the link is down, or has no carrier
	Off                    // not probed: it counts as alive
)

func (s State) String() string {
	return [...]string{"unknown", "alive", "degraded", "portal", "dead", "no-carrier", "off"}[s]
}

// Works reports whether an uplink in this state carries traffic.
func (s State) Works() bool { return s == Alive || s == Degraded || s == Off }

// Answer is what the question for a captive portal brought.
type Answer int

// The answers.
const (
	Unasked     Answer = iota
	Expected           // the page that the configuration names
	Intercepted        // another page
	Unanswered         // the page was asked for, and nothing came, which says nothing of a portal
)

// Round is what one round of probes brought.
type Round struct {
	Answered bool          // a target answered
	First    bool          // the first target did
	RTT      time.Duration // of the first answer
	Portal   Answer
	Asked    string // what was asked, for the reason: "icmp, dns"
}

// Role is what decides how often an uplink is asked.
type Role struct{ InUse, Metered bool }

// Health is the state of one uplink, by its rounds. NewHealth makes it, and its methods alone change it.
type Health struct {
	State  State
	Since  time.Duration
	Reason string
	RTT    time.Duration // smoothed; 0: no answer yet
	Held   time.Duration // until then another uplink that works is not left for this one

	numbers          *Numbers
	failed, answered int    // rounds in a row
	lost             uint64 // a bit for each of the last rounds
	rounds           int    // how many of these bits count
	hold             time.Duration
	failure          time.Duration // when it failed last; 0: never
	portalAt         time.Duration // when a portal was asked for last; 0: never
	unanswered       int           // of these questions in a row
	hour             hour
}

// NewHealth returns the health of an uplink of which nothing is known. numbers may change later.
func NewHealth(numbers *Numbers, now time.Duration) *Health {
	return &Health{Since: now, Reason: "not asked yet", numbers: numbers}
}

// Carrier notes whether the link is up and has a carrier. It reports whether the state changed.
func (h *Health) Carrier(now time.Duration, has bool) bool {
	switch {
	case !has && h.State != NoCarrier:
		return h.enter(now, NoCarrier, "the link is down or has no carrier")
	case has && h.State == NoCarrier:
		return h.enter(now, Unknown, "the link has a carrier again")
	}
	return false
}

// Leave notes that the address is in service no more although its link has a carrier, as if it went: that is a failure, and nothing is
// known of it if it comes back. It reports whether the state changed.
func (h *Health) Leave(now time.Duration) bool {
	changed := h.enter(now, Unknown, "its address was out of service")
	h.lost, h.rounds, h.RTT = 0, 0, 0
	return changed
}

// SetOff notes why the uplink is not asked, or with "" that it is. It reports whether the state changed.
func (h *Health) SetOff(now time.Duration, why string) bool {
	switch {
	case why != "" && h.State != Off && h.State != NoCarrier:
		return h.enter(now, Off, why)
	case why == "" && h.State == Off:
		return h.enter(now, Unknown, "asked from now on")
	}
	return false
}

// ForgetPortal ends a state that only a page could end which nobody asks for any more. It reports whether the state changed.
func (h *Health) ForgetPortal(now time.Duration) bool {
	return h.State == Portal && h.enter(now, Unknown, "no page is asked for any more")
}

// Still notes that nobody could ask from a time on, for so long: a hold that ran then is longer by that.
func (h *Health) Still(from, long time.Duration) {
	if h.Held > from {
		h.Held += long
	}
}

// Hold notes that another uplink was preferred when this process began.
func (h *Health) Hold(now time.Duration) { h.Held = now + h.numbers.Hold }

// Round takes over a round, and reports whether the state changed.
func (h *Health) Round(now time.Duration, r Round) bool {
	if h.State == NoCarrier || h.State == Off {
		return false // a late one
	}
	h.count(now, r)
	h.notePortal(now, r.Portal)
	if !r.Answered {
		return h.silent(now, r)
	}
	switch {
	case h.State == Dead && h.answered < h.numbers.Up:
		return false
	case r.Portal == Intercepted:
		return h.enter(now, Portal, "a captive portal answers")
	case h.State == Portal && r.Portal != Expected:
		return false
	case h.State == Unknown:
		return h.enter(now, Alive, "answers")
	case h.State == Dead, h.State == Portal:
		return h.enter(now, Alive, "answers again")
	case h.State == Alive && h.rounds == window && h.Loss() >= h.numbers.DegradedAt:
		return h.enter(now, Degraded, fmt.Sprintf("%d %% of the last %d rounds lost", h.Loss(), window))
	case h.State == Degraded && h.Loss() <= h.numbers.ClearedAt:
		return h.enter(now, Alive, fmt.Sprintf("%d %% of the last %d rounds lost", h.Loss(), window))
	}
	return false
}

func (h *Health) notePortal(now time.Duration, a Answer) {
	switch a {
	case Unasked:
		return
	case Unanswered:
		h.unanswered++
	default:
		h.unanswered = 0
	}
	h.portalAt = max(now, 1)
}

// silent is a round without any answer.
func (h *Health) silent(now time.Duration, r Round) bool {
	limit := h.numbers.Down
	if h.State == Unknown {
		limit = min(limit, firstRounds)
	}
	if h.State == Dead || h.failed < limit {
		return false
	}
	return h.enter(now, Dead, fmt.Sprintf("%d rounds without an answer: %s", h.failed, r.Asked))
}

func (h *Health) count(now time.Duration, r Round) {
	h.lost <<= 1
	if !r.First {
		h.lost |= 1
	}
	h.rounds = min(h.rounds+1, window)
	if !r.Answered {
		h.failed++
		h.answered = 0
		h.hour.note(now, 0, false)
		return
	}
	h.failed = 0
	h.answered++
	h.hour.note(now, r.RTT, r.First)
	if h.RTT == 0 {
		h.RTT = r.RTT
	}
	h.RTT += (r.RTT - h.RTT) / 8
}

// enter changes the state. An uplink that worked and does not any more has failed, and is held when it works again.
func (h *Health) enter(now time.Duration, s State, why string) bool {
	if s == h.State {
		return false
	}
	if h.State == Alive && s != Off || h.State == Off && s == NoCarrier { // what is degraded has failed already
		h.fail(now)
	}
	if (s == Alive || s == Off) && h.failure != 0 {
		h.Held = now + h.hold
	}
	h.State, h.Since, h.Reason = s, now, why
	if s == Dead || s == NoCarrier {
		h.lost, h.rounds, h.RTT = 0, 0, 0
	}
	if s == Dead || s == NoCarrier || s == Unknown || s == Off {
		h.failed, h.answered, h.portalAt, h.unanswered = 0, 0, 0, 0
	}
	return true
}

func (h *Health) fail(now time.Duration) {
	switch {
	case h.failure == 0 || now-h.failure > h.numbers.Forget:
		h.hold = h.numbers.Hold
	default:
		h.hold = min(2*h.hold, max(h.numbers.HoldMax, h.numbers.Hold))
	}
	h.failure = max(now, 1)
}

// Loss is the percentage of the last rounds in which the first target did not answer.
func (h *Health) Loss() int {
	if h.rounds == 0 {
		return 0
	}
	return 100 * bits.OnesCount64(h.lost&(1<<h.rounds-1)) / h.rounds
}

// Suspect reports whether the next rounds have to find out quickly, by all means, whether the uplink works.
func (h *Health) Suspect() bool {
	switch h.State {
	case Dead:
		return h.answered > 0
	case Unknown:
		return true
	}
	return h.failed > 0
}

// Timeout is how long a round may take: the longest time where the round trip is not known, as of a satellite.
func (h *Health) Timeout() time.Duration {
	if h.RTT == 0 {
		return longestTimeout * h.numbers.Timeout
	}
	return min(max(h.numbers.Timeout, patience*h.RTT), longestTimeout*h.numbers.Timeout)
}

// Pause is the time from the begin of a round to that of the next. chance, from 0 to 1, spreads the rounds of many
// uplinks: the first pause over most of its length.
func (h *Health) Pause(now time.Duration, role Role, chance float64) time.Duration {
	n := h.numbers
	pause := n.Standby
	switch {
	case h.Suspect():
		return n.Suspect
	case h.State == Dead && now-h.Since >= tireAfter:
		pause = max(tired*n.Interval, n.Standby)
	case role.InUse:
		pause = n.Interval
	case role.Metered:
		pause = n.Metered
	}
	share := jitter
	if h.rounds == 1 { // all uplinks of a host may have begun within a second
		share = firstJitter
	}
	return pause - time.Duration(share*chance*float64(pause))
}

// AsksPortal reports whether the next round has to ask whether a captive portal answers: at times, and before an uplink
// is believed again.
func (h *Health) AsksPortal(now time.Duration) bool {
	every := h.numbers.PortalEvery
	switch {
	case h.State == Dead:
		return h.answered+1 >= h.numbers.Up
	case h.State == Portal:
		every = min(every, portalRounds*h.numbers.Interval)
	case h.unanswered > 0: // the page may be lost, or its server gone
		every = min(every, h.numbers.Interval<<min(h.unanswered, mostDoubled))
	}
	return h.portalAt == 0 || now-h.portalAt >= every
}
