package client

import (
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestMachineRenewsAmid: a loop that is busy for longer than a lease lasts renews it meanwhile, and does not take what it has not
// heard for silence.
func TestMachineRenewsAmid(t *testing.T) {
	const s, ms = time.Second, time.Millisecond
	m := newMachine(cable(), true, false)
	granted := func(left int64) event {
		return event{kind: replied, reply: wire.Reply{Table: 10000, Expires: 1, Left: left}} // on another clock
	}
	amid := event{kind: busy}
	live(t, []life{{name: "the answers wait", machine: m, moments: []moment{
		at(0, event{kind: start}, 2*s, acquire),
		at(0, amid, 2*s),
		at(0, seen, 2*s),
		at(0, granted(20), never, "place 10000"),
		at(0, amid, never),
		at(0, placed(nil), 10*s, "report 10000"),
		at(9*s, amid, 10*s),
		at(10*s, amid, 11*s+500*ms, acquire),
		at(11*s, amid, 11*s+500*ms),
		at(12*s, amid, 13*s+500*ms, acquire),
		at(29*s, amid, 30*s+500*ms, acquire),
		at(31*s, tick, 32*s+500*ms, acquire),
	}}})
	if m.away {
		t.Error("the server counts as silent, though nobody has looked for its answers")
	}
	live(t, []life{{name: "an answer that waited for 21 s", machine: m, moments: []moment{
		at(31*s, granted(20), 31*s+200*ms), // of the first request: that lease has ended
		at(31*s+200*ms, tick, 32*s+700*ms, acquire),
		at(32*s, granted(20), 32*s+9*s+600*ms),
		at(41*s+600*ms, tick, 43*s+100*ms, acquire),
		at(43*s+100*ms, tick, 44*s+600*ms, acquire),
	}}})
	if !m.away {
		t.Error("the server does not count as silent, though it did not answer two renewals")
	}
}
