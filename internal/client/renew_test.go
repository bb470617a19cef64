package client

import (
	"fmt"
	"slices"
	"syscall"
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
		at(0, amid, 10*s),
		at(9*s, amid, 10*s),
		at(10*s, amid, 11*s+500*ms, acquire), // the table is filled for longer than the lease lasts
		at(10*s, seen, 11*s+500*ms),
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

// TestMachineLateTimer: a loop that was stopped has not read what the server answered, and does not say that it is silent.
func TestMachineLateTimer(t *testing.T) {
	const s, ms = time.Second, time.Millisecond
	m := newMachine(cable(), true, false)
	live(t, []life{{name: "stopped", machine: m, moments: []moment{
		at(0, event{kind: start}, 2*s, acquire),
		at(0, seen, 2*s),
		at(0, event{kind: replied, reply: wire.Reply{Table: 10000, Expires: 1, Left: 20}}, never, "place 10000"),
		at(0, placed(nil), 10*s, "report 10000"),
		at(10*s, tick, 11*s+500*ms, acquire),
		at(13*s, tick, 14*s+500*ms, acquire), // SIGSTOP in between
	}}})
	if m.away {
		t.Error("the server counts as silent, though nobody listened")
	}
	live(t, []life{{name: "silent", machine: m, moments: []moment{at(14*s+550*ms, tick, 16*s+50*ms, acquire)}}})
	if !m.away {
		t.Error("the server does not count as silent, though it did not answer two renewals")
	}
}

// TestMachineLateAnswer: what the server answered so long ago that the lease has ended is no lease: another key may have the table.
func TestMachineLateAnswer(t *testing.T) {
	const s = time.Second
	leased := event{kind: replied, reply: wire.Reply{Table: 10000, Expires: 1, Left: 20}}
	live(t, []life{{name: "late", moments: []moment{
		at(0, event{kind: start}, 2*s, acquire),
		at(0, seen, 2*s),
		at(22*s, leased, 22*s),
		at(22*s, tick, 24*s, acquire),
		at(41*s, leased, never, "place 10000"),
	}}})
}

// TestFormer: a full queue of the server lets all former leases have their turn, and what was released is not asked for again.
func TestFormer(t *testing.T) {
	const count, room = 10, 3
	var f former
	f.send(1000*time.Second, nil) // before any was found
	keys := make([]wire.Key, count)
	for i := range keys {
		keys[i] = wire.Key{Family: wire.Inet, Ifname: "wan0", Address: fmt.Sprintf("192.0.2.%d", i)}
		f.requests = append(f.requests, wire.Request{Key: keys[i], Cmd: wire.Acquire})
	}
	var sent []wire.Key
	round := func(now time.Duration) {
		left := room
		f.send(now, func(r wire.Request) error {
			if left--; left < 0 {
				return syscall.EAGAIN
			}
			sent = append(sent, r.Key)
			return nil
		})
	}
	const begun = 1000 * time.Second
	for range 4 {
		round(begun)
	}
	if !slices.Equal(sent, keys) {
		t.Errorf("sent: %v", sent)
	}
	sent = nil
	round(begun + awayEvery - 1) // too early
	f.drop(keys[0])
	round(begun + awayEvery)
	if !slices.Equal(sent, keys[1:1+room]) {
		t.Errorf("the next time: %v", sent)
	}
}
