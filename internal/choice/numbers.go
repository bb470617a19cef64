// Package choice decides which uplinks work, and which of them serves traffic that is bound to none: from the rounds of
// probes and the state of links to states, from states, ranks and metrics to a choice and its reason. It is pure: it
// sends nothing, changes nothing and reads no clock.
package choice

import "time"

// Numbers are the times and limits of the judgement.
type Numbers struct {
	Interval time.Duration // between rounds of the uplink in use
	Standby  time.Duration // of the others
	Metered  time.Duration // of others that are metered
	Suspect  time.Duration // after a round without an answer, and before a dead uplink is believed again
	Timeout  time.Duration // of a round, at least
	Down, Up int           // rounds in a row without, and with an answer

	Hold, HoldMax time.Duration // before an uplink that failed is preferred again; doubled at each failure
	Forget        time.Duration // without a failure, after which Hold is the first again

	DegradedAt, ClearedAt int // percent of the last rounds without an answer of the first target

	PortalEvery time.Duration // between questions whether a captive portal answers
}

// Default returns the numbers that a simulation found: a dead uplink is found within 10 s, and 30 % of loss raise less
// than one false alarm a day.
func Default() Numbers {
	return Numbers{
		Interval: 5 * time.Second, Standby: 10 * time.Second, Metered: time.Minute,
		Suspect: time.Second, Timeout: time.Second, Down: 5, Up: 5,
		Hold: time.Minute, HoldMax: 30 * time.Minute, Forget: time.Hour,
		DegradedAt: 25, ClearedAt: 10,
		PortalEvery: 5 * time.Minute,
	}
}

const (
	window = 60 // rounds that the loss is counted in

	tireAfter = 10 * time.Minute // a dead uplink is asked every tiredEvery then
	tired     = 12               // Intervals

	longestTimeout = 3   // times Timeout
	patience       = 4   // times the smoothed round trip
	firstRounds    = 2   // without an answer before a new uplink is dead
	portalRounds   = 6   // Intervals between questions, while a portal answers
	mostDoubled    = 10  // times that the pause after a page without an answer doubles
	jitter         = 0.1 // of a pause, which is that much shorter at most
	firstJitter    = 0.9 // of the first one
)
