package client

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/choice"
	"github.com/table-allocator/table-allocator/internal/probe"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestChooserOff: where nobody wants a choice, no event and no comparison of everything wakes the watch for it.
func TestChooserOff(t *testing.T) {
	all := news{overrun: true, nexthops: true, links: map[int]bool{2: true}, choice: map[int]bool{unix.AF_INET: true}}
	for _, tt := range []struct {
		name   string
		change func(*chooser)
		wakes  bool
	}{
		{"without probes and wishes", func(*chooser) {}, false},
		{"with a wish", func(c *chooser) { c.pinned[unix.AF_INET6] = "wan0" }, true},
		{"with probes", func(c *chooser) { p := DefaultProbes(); c.config.Probes = &p }, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := &chooser{host: &host{}, uplinks: make(map[wire.Key]*probed), pinned: make(map[int]string), placed: make(map[int]bool)}
			tt.change(c)
			c.note(all)
			c.soon()
			if at := c.next(); (at != 0) != tt.wakes {
				t.Errorf("the watch wakes at %v, want that it does: %v", at, tt.wakes)
			}
		})
	}
}

// TestChosenIsAsked: an uplink that was a standby, and is chosen, is asked as often as one in use from then on.
func TestChosenIsAsked(t *testing.T) {
	const now = time.Hour
	n := choice.Default()
	standby := func(table uint32, metered bool) *probed {
		s := &session{lease: &machine{}}
		s.lease.table, s.lease.uplink.Key.Family = table, wire.Inet
		h := choice.NewHealth(&n, now)
		h.Round(now, choice.Round{Answered: true, First: true})
		p := &probed{session: s, health: h, traits: uplink.Traits{Metered: metered}}
		p.due = now + h.Pause(now, choice.Role{Metered: metered}, 0)
		return p
	}
	for name, metered := range map[string]bool{"metered": true, "free": false} {
		t.Run(name, func(t *testing.T) {
			chosen, other := standby(1, metered), standby(2, metered)
			c := &chooser{uplinks: map[wire.Key]*probed{{Ifname: "wan0"}: chosen, {Ifname: "wan1"}: other}, current: map[int]uint32{unix.AF_INET: 1}}
			before := other.due
			if chosen.due <= now+n.Interval {
				t.Fatalf("a standby is asked after %v", chosen.due-now)
			}
			c.askSooner(now, unix.AF_INET)
			if chosen.due > now+n.Interval || chosen.due < now {
				t.Errorf("the chosen one is asked after %v, want %v at the most", chosen.due-now, n.Interval)
			}
			if other.due != before {
				t.Errorf("the other one is asked after %v, before after %v", other.due-now, before-now)
			}
		})
	}
}

// TestAwaits: after a start a choice stands for a while whose address is not in service yet, and no longer once it was.
func TestAwaits(t *testing.T) {
	const now, family = time.Hour, unix.AF_INET
	there := []choice.Candidate{{Table: 1}, {Table: 2}}
	c := &chooser{current: map[int]uint32{family: 1}, adopted: map[int]bool{family: true}, grace: now + startGrace}
	if !c.awaits(now, family, there[1:]) {
		t.Error("the choice of the watch before does not stand until its address is in service")
	}
	if c.awaits(c.grace, family, there[1:]) {
		t.Error("the choice of the watch before stands for ever")
	}
	if c.awaits(now, family, there) || c.awaits(now, family, there[1:]) {
		t.Error("an address that was in service and went is waited for")
	}
}

// TestLateRound: a round that ended long after its limit says nothing of the uplink, since this process stood still. The clock does
// not count what a machine sleeps, nor what somebody sets.
func TestLateRound(t *testing.T) {
	for _, tt := range []struct {
		name    string
		ago     time.Duration
		suspect bool
	}{
		{"in time", 0, true},
		{"after the process stood still", time.Hour, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := choice.Default()
			key, now := wire.Key{Ifname: "wan0", Family: wire.Inet}, wire.Now()
			h := choice.NewHealth(&n, now)
			h.Round(now, choice.Round{Answered: true, First: true})
			s := &session{lease: &machine{}}
			s.lease.uplink.Key = key
			p := &probed{session: s, health: h, busy: true}
			probes := DefaultProbes()
			c := &chooser{host: &host{config: WatchConfig{Probes: &probes}}, uplinks: map[wire.Key]*probed{key: p}, current: make(map[int]uint32), running: 1}
			c.finishRound(key, s, now-tt.ago, time.Minute, probe.Result{Round: choice.Round{Asked: "icmp"}})
			if h.State != choice.Alive || h.Suspect() != tt.suspect || p.busy || c.running != 0 {
				t.Errorf("the uplink is %v, suspect %v, want %v; busy %v, %d rounds run", h.State, h.Suspect(), tt.suspect, p.busy, c.running)
			}
		})
	}
}
