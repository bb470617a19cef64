package client

import (
	"errors"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestMachineAsks: the first request, and what the caller is told.
func TestMachineAsks(t *testing.T) {
	const s, ms = time.Second, time.Millisecond
	live(t, []life{
		{name: "no answer at all", moments: []moment{
			at(0, event{kind: start}, 2*s, acquire),
			at(2*s, tick, 4*s, acquire),
			at(4*s, tick, 6*s, acquire),
			at(6*s, tick, 8*s, acquire),
			at(8*s, tick, 10*s, acquire),
			at(10*s, tick, 10*s+300*ms, "report 0 no answer", release),
		}},
		{name: "nobody there", moments: []moment{
			at(0, event{kind: start}, 2*s, acquire),
			at(0, nobody, 2*s),
			at(2*s, tick, 4*s, acquire),
			at(4*s, tick, 6*s, acquire),
			at(6*s, tick, 8*s, acquire),
			at(8*s, tick, 10*s, acquire),
			at(8*s, nobody, 10*s),
			at(10*s, tick, 10*s+300*ms, "report 0 nobody serves it", release),
			at(10*s, nobody, never, "finish: the server is not there to take the lease back: nobody serves it"),
		}},
		{name: "the server comes between two tries", moments: []moment{
			at(0, event{kind: start}, 2*s, acquire),
			at(0, nobody, 2*s),
			at(2*s, tick, 4*s, acquire),
			at(2*s, granted(10000, 1102), 60*s, "place 10000"),
			at(2*s, placed(nil), 52*s, "report 10000"),
		}},
		{name: "a refusal that may pass", moments: []moment{
			at(0, event{kind: start}, 2*s, acquire),
			at(0, refusal(wire.Exhausted, "all 40 tables are leased"), 2*s),
			at(2*s, tick, 4*s, acquire),
			at(2*s, granted(10000, 1102), 60*s, "place 10000"),
		}},
		{name: "a refusal that does not pass in time", moments: []moment{
			at(0, event{kind: start}, 2*s, acquire),
			at(2*s, tick, 4*s, acquire),
			at(4*s, tick, 6*s, acquire),
			at(6*s, tick, 8*s, acquire),
			at(8*s, tick, 10*s, acquire),
			at(8*s, refusal(wire.Exhausted, "all 40 tables are leased"), 10*s),
			at(10*s, tick, 10*s+300*ms, "report 0 all 40 tables are leased", release),
		}},
		{name: "a C server's table 0", moments: []moment{
			at(0, event{kind: start}, 2*s, acquire),
			at(0, released, 2*s),
			at(2*s, tick, 4*s, acquire),
		}},
		{name: "the kernel's own tables", moments: []moment{
			at(0, event{kind: start}, 2*s, acquire),
			at(0, granted(253, 1100), 2*s),
			at(0, granted(254, 1100), 2*s),
			at(0, granted(255, 1100), 2*s),
			at(0, stopped, 300*ms, "report 0 stopped", release),
		}},
		{name: "tables beside the kernel's own", moments: []moment{
			at(0, event{kind: start}, 2*s, acquire),
			at(0, granted(252, 1100), 60*s, "place 252"),
			at(0, placed(nil), 50*s, "report 252"),
			at(50*s, granted(256, 1200), 60*s, "place 256"),
		}},
		{name: "not permitted", moments: []moment{
			at(0, event{kind: start}, 2*s, acquire),
			at(0, refusal(wire.Denied, "uid 7 is not permitted"), 300*ms, "report 0 uid 7 is not permitted", release),
			at(0, refusal(wire.Denied, "uid 7 is not permitted"), never, "finish: not released: uid 7 is not permitted"),
		}},
		{name: "family not served", moments: []moment{
			at(0, event{kind: start}, 2*s, acquire),
			at(0, refusal(wire.NotServed, "inet is off"), 300*ms, "report 0 inet is off", release),
		}},
		{name: "ended before there was an answer", moments: []moment{
			at(0, event{kind: start}, 2*s, acquire),
			at(1*s, stopped, 1*s+300*ms, "report 0 stopped", release),
			at(1*s, granted(10000, 1100), 1*s+300*ms),
			at(1*s, released, never, "finish: released"),
		}},
		{name: "another tag before the lease", moments: []moment{
			at(0, event{kind: start}, 2*s, acquire),
			at(1*s, event{kind: replaced, newer: tagged("dsl")}, 2*s),
			at(2*s, tick, 4*s, "acquire wan0-10.77.0.2-2 dsl"),
		}},
	})
}

// TestMachineRenews: a lease that is held.
func TestMachineRenews(t *testing.T) {
	const s, ms = time.Second, time.Millisecond
	live(t, []life{
		{name: "renews at half the lease", moments: heldLife(
			at(50*s+499*ms, tick, 50*s+500*ms),
			at(50*s+500*ms, tick, 52*s, acquire),
			at(51*s, granted(10000, 1151), 101*s),
			at(101*s, tick, 102*s+500*ms, acquire),
		)},
		{name: "the server is away and comes back", moments: heldLife(
			at(51*s, tick, 52*s+500*ms, acquire),
			at(51*s, nobody, 52*s+500*ms),
			at(52*s+500*ms, tick, 54*s, acquire),
			at(54*s, tick, 55*s+500*ms, acquire),
			at(500*s, tick, 501*s+500*ms, acquire), // long after the end of the lease
			at(501*s, granted(10000, 1601), 551*s),
		)},
		{name: "another table", moments: heldLife(
			at(51*s, tick, 52*s+500*ms, acquire),
			at(51*s, granted(10007, 1151), never, "place 10007"),
			at(51*s, placed(nil), 101*s), // and no second report
			at(60*s, gone, 60*s+300*ms, "clear 10007", release),
			at(60*s, released, never, "finish: released"),
		)},
		{name: "another table, and the kernel refuses", moments: heldLife(
			at(51*s, tick, 52*s+500*ms, acquire),
			at(51*s, granted(10007, 1151), never, "place 10007"),
			at(51*s, placed(errors.New("not permitted")), 51*s+300*ms, "clear 10007", release),
			at(51*s, released, never, "finish: released"),
		)},
		{name: "refused while the lease runs", moments: heldLife(
			at(51*s, tick, 52*s+500*ms, acquire),
			at(51*s, refusal(wire.Denied, "not permitted"), 52*s+500*ms),
			at(53*s, tick, 54*s+500*ms, acquire),
			at(99*s, refusal(wire.Denied, "not permitted"), 54*s+500*ms),
			at(100*s, refusal(wire.Denied, "not permitted"), 100*s+300*ms, "clear 10000", release),
		)},
		{name: "the pool is exhausted when the lease has ended", moments: heldLife(
			at(200*s, tick, 201*s+500*ms, acquire),
			at(200*s, refusal(wire.Exhausted, "all leased"), 201*s+500*ms),
			at(202*s, tick, 203*s+500*ms, acquire),
			at(202*s, granted(10003, 1302), never, "place 10003"),
		)},
		{name: "another tag", moments: heldLife(
			at(10*s, event{kind: replaced, newer: tagged("dsl")}, 11*s+500*ms, "acquire wan0-10.77.0.2-2 dsl"),
			at(10*s, granted(10000, 1110), 60*s),
			at(60*s, tick, 61*s+500*ms, "acquire wan0-10.77.0.2-2 dsl"),
		)},
		{name: "a lease of one second", moments: []moment{
			at(0, event{kind: start}, 2*s, acquire),
			at(0, granted(10000, 1001), 60*s, "place 10000"),
			at(0, placed(nil), 500*ms, "report 10000"),
			at(950*ms, tick, 2*s+450*ms, acquire),
			at(950*ms, granted(10000, 1001), 1150*ms),
		}},
		{name: "an expiry that has passed", moments: heldLife(
			at(51*s, tick, 52*s+500*ms, acquire),
			at(51*s, granted(10000, 0), 51*s+200*ms),
			at(51*s+200*ms, tick, 52*s+700*ms, acquire),
			at(51*s+200*ms, granted(10000, 1), 51*s+400*ms),
		)},
		{name: "an expiry beyond all time", moments: heldLife(
			at(51*s, tick, 52*s+500*ms, acquire),
			at(51*s, granted(10000, 1<<33), 51*s+24*time.Hour),
			at(52*s+24*time.Hour, tick, 53*s+500*ms+24*time.Hour, acquire),
			at(52*s+24*time.Hour, refusal(wire.Denied, "not permitted"), 53*s+500*ms+24*time.Hour),
			at(52*s+24*time.Hour, granted(10000, 1<<33), 52*s+48*time.Hour),
		)},
		{name: "a renamed link's second machine asks for ever", machine: newMachine(cable(), false, false), moments: func() []moment {
			m := []moment{at(0, event{kind: start}, 2*s, acquire), at(0, seen, 2*s)}
			for i := time.Duration(1); i < 20; i++ {
				m = append(m, at(2*i*s, tick, 2*(i+1)*s, acquire))
			}
			return m
		}()},
	})
}

// TestMachineReleases: the end of a lease.
func TestMachineReleases(t *testing.T) {
	const s, ms = time.Second, time.Millisecond
	live(t, []life{
		{name: "the address goes", moments: heldLife(
			at(20*s, gone, 20*s+300*ms, "clear 10000", release),
			at(20*s, gone, 20*s+300*ms),
			at(20*s, stopped, 20*s+300*ms),
			at(20*s, granted(10000, 1120), 20*s+300*ms), // of a renewal that was under way
			at(20*s, released, never, "finish: released"),
			at(20*s, released, never),
			at(20*s, stopped, never),
			at(90*s, tick, never),
		)},
		{name: "a signal, and the server is silent", moments: heldLife(
			at(20*s, stopped, 20*s+300*ms, "clear 10000", release),
			at(20*s+300*ms, tick, 20*s+600*ms, release),
			at(20*s+600*ms, tick, 20*s+900*ms, release),
			at(20*s+900*ms, tick, 21*s+200*ms, release),
			at(21*s+200*ms, tick, 21*s+500*ms, release),
			at(21*s+500*ms, tick, 21*s+800*ms, release),
			at(21*s+800*ms, tick, 22*s+100*ms, release),
			at(22*s+100*ms, tick, 22*s+400*ms, release),
			at(22*s+400*ms, tick, 22*s+700*ms, release),
			at(22*s+700*ms, tick, 23*s, release),
			at(23*s, tick, never, "finish: the server did not confirm the release"),
		)},
		{name: "a signal, and the server's queue is full for a moment", moments: heldLife(
			at(20*s, stopped, 20*s+300*ms, "clear 10000", release),
			at(20*s+300*ms, full, 20*s+600*ms),
			at(20*s+600*ms, full, 20*s+900*ms),
			at(20*s+900*ms, tick, 21*s+200*ms, release),
			at(21*s, released, never, "finish: released"),
		)},
		{name: "a signal, and there is no server", moments: heldLife(
			at(20*s, stopped, 20*s+300*ms, "clear 10000", release),
			at(20*s, nobody, never, "finish: the server is not there to take the lease back: nobody serves it"),
		)},
		{name: "a release that the database refuses is asked again", moments: heldLife(
			at(20*s, stopped, 20*s+300*ms, "clear 10000", release),
			at(20*s, refusal(wire.Storage, "disk full"), 20*s+300*ms),
			at(20*s+300*ms, tick, 20*s+600*ms, release),
			at(20*s+300*ms, released, never, "finish: released"),
		)},
		{name: "the kernel refuses the rules", moments: []moment{
			at(0, event{kind: start}, 2*s, acquire),
			at(1*s, granted(10000, 1100), 60*s, "place 10000"),
			at(1*s, placed(errors.New("not permitted")), 1*s+300*ms, "clear 10000", "report 0 not permitted", release),
			at(1*s, released, never, "finish: released"),
		}},
		{name: "the address goes before there was an answer", moments: []moment{
			at(0, event{kind: start}, 2*s, acquire),
			at(1*s, gone, 1*s+300*ms, "report 0 the address is gone", release),
		}},
	})
}

// TestMachineAwaits: an address that is awaited, at first or again.
func TestMachineAwaits(t *testing.T) {
	const s, ms = time.Second, time.Millisecond
	live(t, []life{
		{name: "the address comes later", moments: []moment{
			at(0, event{kind: start}, 2*s, acquire),
			at(1*s, granted(10000, 1200), 60*s, "place 10000"),
			at(1*s, placed(nil), 60*s, "report 10000"),
			at(59*s, seen, 100*s+500*ms),
			at(70*s, tick, 100*s+500*ms),
		}},
		{name: "the address does not come", moments: []moment{
			at(0, event{kind: start}, 2*s, acquire),
			at(1*s, granted(10000, 4600), 60*s, "place 10000"),
			at(1*s, placed(nil), 60*s, "report 10000"),
			at(60*s-1, tick, 60*s),
			at(60*s, tick, 60*s+300*ms, "clear 10000", release),
			at(60*s, released, never, "finish: released"),
		}},
		{name: "renewals go on while the address is awaited", moments: []moment{
			at(0, event{kind: start}, 2*s, acquire),
			at(0, granted(10000, 1010), 60*s, "place 10000"),
			at(0, placed(nil), 5*s, "report 10000"),
			at(5*s, tick, 6*s+500*ms, acquire),
			at(5*s, granted(10000, 1200), 60*s),
			at(60*s, tick, 60*s+300*ms, "clear 10000", release),
		}},
		{name: "with routes it waits for the address to return", machine: newMachine(carried(), true, false), moments: []moment{
			at(0, event{kind: start}, 1*s, acquire),
			at(0, seen, 1*s),
			at(0, granted(10000, 1100), never, "place 10000"),
			at(0, placed(nil), 50*s, "report 10000"),
			at(10*s, gone, 70*s, "block 10000", release),
			at(10*s, released, 70*s),
			at(20*s, seen, 21*s, acquire),
			at(20*s, granted(10001, 1120), never, "place 10001"),
			at(20*s, placed(nil), 70*s),
			at(30*s, gone, 90*s, "block 10001", release),
			at(31*s, seen, 32*s, acquire),
			at(32*s, tick, 34*s, "fall back", acquire), // and nothing is guarded any more
			at(33*s, stopped, 33*s+300*ms, release),
		}},
		{name: "with routes the address does not return", machine: newMachine(carried(), true, false), moments: []moment{
			at(0, event{kind: start}, 1*s, acquire),
			at(0, seen, 1*s),
			at(0, granted(10000, 1100), never, "place 10000"),
			at(0, placed(nil), 50*s, "report 10000"),
			at(10*s, gone, 70*s, "block 10000", release),
			at(70*s, tick, 70*s+300*ms, "clear 10000", release),
		}},
		{name: "somebody calls while it waits for the address", machine: newMachine(carried(), true, false), moments: []moment{
			at(0, event{kind: start}, 1*s, acquire),
			at(0, seen, 1*s),
			at(0, granted(10000, 1100), never, "place 10000"),
			at(0, placed(nil), 50*s, "report 10000"),
			at(10*s, gone, 70*s, "block 10000", release),
			at(50*s, event{kind: called}, 51*s, acquire),
			at(50*s, granted(10001, 1150), 110*s, "place 10001"),
			at(50*s, placed(nil), 100*s),
			at(110*s, tick, 110*s+300*ms, "clear 10001", release),
		}},
		{name: "somebody calls while it waits for the server", machine: newMachine(carried(), true, false), moments: []moment{
			at(0, event{kind: start}, 1*s, acquire),
			at(0, seen, 1*s),
			at(50*ms, event{kind: called}, 1*s),
			at(100*ms, event{kind: called}, 1*s, acquire),
			at(150*ms, event{kind: called}, 1*s),
			at(1*s, tick, 3*s, "fall back", "report 0 no answer", acquire),
			at(2*s, event{kind: called}, 3*s, acquire),
			at(2*s, granted(10000, 1100), never, "place 10000"),
			at(2*s, event{kind: called}, never),
		}},
		{name: "other settings without routes while it waits", machine: newMachine(carried(), true, false), moments: []moment{
			at(0, event{kind: start}, 1*s, acquire),
			at(0, seen, 1*s),
			at(0, granted(10000, 1100), never, "place 10000"),
			at(0, placed(nil), 50*s, "report 10000"),
			at(10*s, gone, 70*s, "block 10000", release),
			at(20*s, event{kind: replaced, newer: cable()}, 70*s, "clear 10000"),
			at(30*s, seen, 32*s, acquire),
		}},
		{name: "an identifier has no address to wait for",
			machine: newMachine(uplink.Uplink{Key: wire.Key{Family: wire.Unspec, Ifname: "x", Address: "y"}}, true, false),
			moments: []moment{
				at(0, event{kind: start}, 2*s, "acquire x-y-0 "),
				at(0, granted(10000, 1200), never, "place 10000"),
				at(0, placed(nil), 100*s, "report 10000"),
				at(100*s, tick, 101*s+500*ms, "acquire x-y-0 "),
			}},
	})
}

// TestMachineAnswersOnce: whatever happens, the caller hears one table, a machine that
// has finished is silent, and every lease that was granted is given back.
func TestMachineAnswersOnce(t *testing.T) {
	events := []event{
		tick, seen, gone, stopped, nobody, released, granted(10000, 1100), granted(10001, 2100), placed(nil),
		placed(errors.New("no")), refusal(wire.Exhausted, "full"), refusal(wire.Denied, "no"), {kind: replaced, newer: tagged("x")},
		{kind: called},
	}
	const depth = 5
	var walk func(m machine, now time.Duration, reports, placedRules int, path []int)
	walk = func(m machine, now time.Duration, reports, placedRules int, path []int) {
		if len(path) == depth {
			return
		}
		for i, ev := range events {
			if ev.kind == rulesPlaced != (m.state == placing) {
				continue // it follows placeRules at once, and nothing else does
			}
			next, reports, placedRules := m, reports, placedRules
			when := now + time.Second
			if ev.kind == timer && m.deadline() != 0 {
				when = max(when, m.deadline())
			}
			path := append(path, i)
			for _, a := range next.step(when, ev) {
				switch a.kind {
				case report:
					reports++
				case placeRules, block:
					placedRules++
				case clearRules, fallBack:
					placedRules = 0
				}
				if m.state == done {
					t.Fatalf("%v: %v after the end", path, a)
				}
			}
			if reports > 1 {
				t.Fatalf("%v: %d reports", path, reports)
			}
			if next.state == releasing || next.state == done {
				if placedRules > 0 {
					t.Fatalf("%v: the end, and rules are left", path)
				}
				if reports != 1 {
					t.Fatalf("%v: the end, and nothing was reported", path)
				}
			}
			if next.state != done && next.deadline() == 0 && next.state != placing {
				t.Fatalf("%v: waits for nothing", path)
			}
			walk(next, when, reports, placedRules, path)
		}
	}
	for _, u := range []uplink.Uplink{cable(), carried()} {
		m := newMachine(u, true, false)
		m.step(epoch, event{kind: start})
		walk(*m, epoch, 0, 0, nil)
	}
}

// TestRefusalsAreNoAbsence: a server that refuses is there.
func TestRefusalsAreNoAbsence(t *testing.T) {
	m := newMachine(cable(), true, false)
	m.step(0, event{kind: start})
	m.step(0, event{kind: replied, reply: wire.Reply{Table: 10000, Expires: 100}})
	m.step(0, event{kind: rulesPlaced})
	m.step(0, event{kind: addressSeen})
	for range 10 {
		now := m.deadline()
		m.step(now, event{kind: timer})
		if m.away {
			t.Fatalf("away at %v, though it answers", now)
		}
		m.step(now, event{kind: replied, reply: wire.Refuse(wire.Exhausted, "full")})
	}
}

// TestTentativeWithoutLimit: an address that is on its link has all the time to become usable,
// which an IPv6 address without a carrier never does.
func TestTentativeWithoutLimit(t *testing.T) {
	m := newMachine(carried(), true, false)
	now := epoch
	m.step(now, event{kind: start})
	m.step(now, event{kind: replied, reply: wire.Reply{Table: 10000, Expires: int64(epoch/time.Second) + 3600}})
	m.step(now, event{kind: rulesPlaced})
	m.step(now, event{kind: addressSeen}) // also of a tentative one
	for range 10 {
		now = max(m.deadline(), now+addressGrace)
		for _, a := range m.step(now, event{kind: timer}) {
			if a.kind != send {
				t.Errorf("%v after it came: action %d, %s", now-epoch, a.kind, a.why)
			}
		}
		m.step(now, event{kind: replied, reply: wire.Reply{Table: 10000, Expires: int64(now/time.Second) + 3600}})
	}
	if m.state != held {
		t.Errorf("state is %d", m.state)
	}
}

// TestReleaseEnds: nobody waits for ever for a server that stands still with its queue full.
func TestReleaseEnds(t *testing.T) {
	t.Parallel()
	m := newMachine(cable(), false, false)
	m.step(0, event{kind: start})
	now := time.Duration(0)
	m.step(now, event{kind: end, why: "stopped"})
	for range releaseWaits + peer.ReleaseTries {
		if m.state == done {
			t.Fatalf("ended after %v", now)
		}
		now = m.due
		m.step(now, event{kind: timer, full: true})
	}
	if m.state != done || now > time.Minute {
		t.Errorf("state %d after %v, want it done within a minute", m.state, now)
	}
}

// TestExhaustedIsAskedLessOften: an address of a watch that gets no table asks again at growing intervals, and not before its
// turn.
func TestExhaustedIsAskedLessOften(t *testing.T) {
	for _, tt := range []struct {
		turn time.Duration // from the refusal on
		want []time.Duration
	}{
		{0, []time.Duration{2, 8, 32, 60, 60}},
		{10, []time.Duration{10, 10, 32, 60, 60}},
		{600, []time.Duration{600, 600, 600}},
	} {
		m := newMachine(carried(), false, true)
		m.step(epoch, event{kind: start})
		m.step(epoch, event{kind: addressSeen})
		now := epoch
		for _, want := range tt.want {
			m.step(now, event{kind: replied, reply: wire.Refuse(wire.Exhausted, "no table is free"), turn: now + tt.turn*time.Second})
			m.step(now, event{kind: replied, reply: wire.Refuse(wire.Exhausted, "no table is free"), turn: now + time.Hour}) // it was sent twice
			if got := m.deadline() - now; got != want*time.Second {
				t.Errorf("turn in %d s, after %v: asks again after %v, want %v", tt.turn, now-epoch, got, want*time.Second)
			}
			now = m.deadline()
			m.step(now, event{kind: timer})
		}
	}
}

// TestTurns: however many addresses wait for a table, all together ask at one rate, and each within ten minutes.
func TestTurns(t *testing.T) {
	for _, waiting := range []int{1, 100, 4000, 20_000} {
		l := &loop{}
		for range waiting {
			m := newMachine(carried(), false, true)
			m.step(epoch, event{kind: start})
			l.sessions = append(l.sessions, &session{lease: m})
		}
		now, last, same := epoch, epoch, 0
		for n := range 3 * min(waiting, 5000) {
			turn := l.nextTurn(now)
			if in := min(time.Duration(waiting)*turnEvery, refusedFor) + together; turn > now+in {
				t.Fatalf("%d addresses: the turn of refusal %d is in %v, want it within %v", waiting, n, turn-now, in)
			}
			if same++; turn != last {
				last, same = turn, 1
			}
			if most := int(together/turnEvery) + 2; same > most && waiting*int(turnEvery) < int(refusedFor) {
				t.Fatalf("%d addresses: more than %d have their turn at %v", waiting, most, turn)
			}
			if n >= waiting {
				now += turnEvery // as they ask
			}
		}
	}
}
