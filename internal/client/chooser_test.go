package client

import (
	"bytes"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/choice"
	"github.com/table-allocator/table-allocator/internal/install"
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
		{"with a wish", func(c *chooser) { c.of[unix.AF_INET6].pinned = "wan0" }, true},
		{"with probes", func(c *chooser) { p := DefaultProbes(); c.config.Probes = &p }, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := &chooser{host: &host{}, uplinks: make(map[wire.Key]*probed), of: map[int]*chosen{unix.AF_INET: {}, unix.AF_INET6: {}}}
			tt.change(c)
			c.note(all)
			c.soon()
			if at := c.next(time.Hour); (at != 0) != tt.wakes {
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
			used, other := standby(1, metered), standby(2, metered)
			c := &chooser{uplinks: map[wire.Key]*probed{{Ifname: "wan0"}: used, {Ifname: "wan1"}: other}, of: map[int]*chosen{unix.AF_INET: {table: 1}}}
			before := other.due
			if used.due <= now+n.Interval {
				t.Fatalf("a standby is asked after %v", used.due-now)
			}
			c.askSooner(now, unix.AF_INET)
			if used.due > now+n.Interval || used.due < now {
				t.Errorf("the chosen one is asked after %v, want %v at the most", used.due-now, n.Interval)
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
	c := &chooser{of: map[int]*chosen{family: {table: 1, adopted: true}}, grace: now + startGrace}
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
			c := &chooser{host: &host{config: WatchConfig{Probes: &probes}}, uplinks: map[wire.Key]*probed{key: p}, of: map[int]*chosen{unix.AF_INET: {}}, running: 1}
			c.finishRound(key, s, now-tt.ago, time.Minute, probe.Result{Round: choice.Round{Asked: "icmp"}})
			if h.State != choice.Alive || h.Suspect() != tt.suspect || p.busy || c.running != 0 {
				t.Errorf("the uplink is %v, suspect %v, want %v; busy %v, %d rounds run", h.State, h.Suspect(), tt.suspect, p.busy, c.running)
			}
		})
	}
}

// TestStill: a hold is longer by the time in which this process stood still, since nobody asked meanwhile.
func TestStill(t *testing.T) {
	const armed = time.Hour
	n := choice.Default()
	for _, tt := range []struct{ late, held, want time.Duration }{
		{time.Second, armed + time.Minute, armed + time.Minute},
		{time.Hour, armed + time.Minute, armed + time.Minute + time.Hour},
		{time.Hour, armed - time.Minute, armed - time.Minute},
		{time.Hour, 0, 0},
	} {
		h := choice.NewHealth(&n, armed)
		h.Held = tt.held
		c := &chooser{host: &host{}, uplinks: map[wire.Key]*probed{{Ifname: "wan0"}: {health: h}}, decideAt: armed}
		c.next(armed - time.Second)
		if c.noteStill(armed + tt.late); h.Held != tt.want {
			t.Errorf("late by %v, held until %v: now until %v, want %v", tt.late, tt.held, h.Held, tt.want)
		}
	}
}

// TestOverdue: a round that waited for others to end is no time in which this process stood still.
func TestOverdue(t *testing.T) {
	const due, held = time.Hour, 2 * time.Hour
	n := choice.Default()
	h := choice.NewHealth(&n, due)
	h.Held = held
	p := &probed{session: &session{lease: &machine{}}, health: h, due: due}
	probes := DefaultProbes()
	c := &chooser{host: &host{config: WatchConfig{Probes: &probes}}, uplinks: map[wire.Key]*probed{{Ifname: "wan0"}: p}}
	c.next(due + time.Minute)
	if c.noteStill(due + time.Minute + time.Second); h.Held != held {
		t.Errorf("held until %v, want %v", h.Held, held)
	}
}

// TestUnable: while this process may not ask, an uplink that works is off, and one that does not stays as it is.
func TestUnable(t *testing.T) {
	n, probes := choice.Default(), DefaultProbes()
	c := &chooser{host: &host{config: WatchConfig{Probes: &probes}}}
	for _, tt := range []struct {
		round choice.Round
		want  choice.State
	}{
		{choice.Round{Answered: true, First: true}, choice.Off},
		{choice.Round{}, choice.Dead},
		{choice.Round{Answered: true, First: true, Portal: choice.Intercepted}, choice.Portal},
	} {
		h := choice.NewHealth(&n, 1)
		for range n.Down {
			h.Round(1, tt.round)
		}
		before := h.State
		p := &probed{health: h, unable: "permission denied", plan: probe.Plan{Targets: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, Kinds: probes.Kinds}}
		h.SetOff(2, c.off(p))
		if h.State != tt.want {
			t.Errorf("%v, and then nobody may ask: %v, want %v", before, h.State, tt.want)
		}
	}
}

// TestFamiliesOf: a wish for a link counts for both families though the address of one is not in service yet, and for none while
// neither is.
func TestFamiliesOf(t *testing.T) {
	address := func(family wire.Family, ifname string, serves bool) *session {
		s := &session{lease: &machine{}, inst: &install.Installation{Installed: serves}}
		s.lease.uplink.Key = wire.Key{Family: family, Ifname: ifname}
		if serves {
			s.lease.state = held
		}
		return s
	}
	inet, inet6, late := address(wire.Inet, "wan0", true), address(wire.Inet6, "wan0", true), address(wire.Inet6, "wan0", false)
	for _, tt := range []struct {
		name     string
		sessions []*session
		ifname   string
		only     wire.Family
		want     []int
		serves   bool
	}{
		{"both", []*session{inet, inet6}, "wan0", wire.Unspec, []int{unix.AF_INET, unix.AF_INET6}, true},
		{"one is late", []*session{inet, late}, "wan0", wire.Unspec, []int{unix.AF_INET, unix.AF_INET6}, true},
		{"the late one alone", []*session{inet, late}, "wan0", wire.Inet6, []int{unix.AF_INET6}, false},
		{"one has none", []*session{inet}, "wan0", wire.Unspec, []int{unix.AF_INET}, true},
		{"one is asked for", []*session{inet, inet6}, "wan0", wire.Inet, []int{unix.AF_INET}, true},
		{"another link", []*session{inet, inet6}, "wan1", wire.Unspec, nil, false},
		{"no link", nil, "auto", wire.Unspec, []int{unix.AF_INET, unix.AF_INET6}, true},
		{"no link, of one family", nil, "auto", wire.Inet6, []int{unix.AF_INET6}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := &chooser{host: &host{loop: &loop{sessions: tt.sessions}}}
			if of, serves := c.familiesOf(tt.ifname, tt.only); !slices.Equal(of, tt.want) || serves != tt.serves {
				t.Errorf("%v, %v, want %v, %v", of, serves, tt.want, tt.serves)
			}
		})
	}
}

// TestOldest: the unbound rules stand in the order in which leases came, which a watch that was started again knows from the kernel;
// its sessions are in the order in which links have addresses.
func TestOldest(t *testing.T) {
	c := &chooser{uplinks: make(map[wire.Key]*probed), host: &host{loop: &loop{}}}
	n := choice.Default()
	for table, ifname := range map[uint32]string{10000: "wan0", 10001: "wan1", 10002: "wan2"} {
		key := wire.Key{Family: wire.Inet, Ifname: ifname, Address: "192.0.2.2"}
		s := &session{lease: seenMachine(uplink.Uplink{Key: key}, table), inst: &install.Installation{Installed: true}}
		c.sessions = append(c.sessions, s)
		c.uplinks[key] = &probed{session: s, health: choice.NewHealth(&n, 0)}
	}
	c.order = map[lane][]uint32{c.sessions[0].lane(): {10002, 10000, 10001}}
	age := make(map[uint32]int)
	for _, o := range c.candidates(unix.AF_INET) {
		age[o.Table] = o.Age
	}
	if !(age[10002] < age[10000] && age[10000] < age[10001]) {
		t.Errorf("the ages are %v", age)
	}
}

// TestRoomForUsed: the uplink in use is asked also while as many rounds run as may.
func TestRoomForUsed(t *testing.T) {
	const now = time.Hour
	n := choice.Default()
	for table, wakes := range map[uint32]bool{1: true, 2: false} {
		s := &session{lease: &machine{table: table, uplink: uplink.Uplink{Key: wire.Key{Family: wire.Inet}}}}
		p := DefaultProbes()
		c := &chooser{host: &host{config: WatchConfig{Probes: &p}}, of: map[int]*chosen{unix.AF_INET: {table: 1}}, running: maxRounds,
			uplinks: map[wire.Key]*probed{{}: {session: s, health: choice.NewHealth(&n, now), due: now}}}
		if at := c.next(now); (at != 0) != wakes {
			t.Errorf("table %d: the next round is at %v, want that there is one: %v", table, at, wakes)
		}
	}
}

// TestChoiceFailure: what the kernel refuses is tried again at once, and said once, if it does not pass.
func TestChoiceFailure(t *testing.T) {
	const at = time.Hour
	refused := errors.New("Invalid prefsrc address")
	for _, tt := range []struct {
		name  string
		tries map[time.Duration]error
		says  int
	}{
		{"passes", map[time.Duration]error{at: refused, at + lookAgain/2: nil, at + 2*lookAgain: refused}, 0},
		{"passes, and comes again", map[time.Duration]error{at: refused, at + lookAgain/2: refused, at + lookAgain*3/4: nil, at + lookAgain: refused}, 0},
		{"stays", map[time.Duration]error{at: refused, at + lookAgain: refused, at + 2*lookAgain: refused}, 1},
		{"stays, and is another one", map[time.Duration]error{at: refused, at + lookAgain: refused, at + 2*lookAgain: errors.New("no such device")}, 2},
		{"stays twice", map[time.Duration]error{at: refused, at + lookAgain: refused, at + 2*lookAgain: nil, at + 3*lookAgain: refused, at + 4*lookAgain: refused}, 2},
	} {
		var log bytes.Buffer
		c := &chooser{host: &host{loop: &loop{log: slog.New(slog.NewTextHandler(&log, nil))}}}
		for _, now := range slices.Sorted(maps.Keys(tt.tries)) {
			c.decideAt = 0
			if c.noteFailure(now, tt.tries[now]); (c.decideAt != 0) != (tt.tries[now] != nil) {
				t.Errorf("%s: after %v the choice is made again: %v", tt.name, tt.tries[now], c.decideAt != 0)
			}
		}
		if says := strings.Count(log.String(), "level=ERROR"); says != tt.says {
			t.Errorf("%s: said %d times, want %d:\n%s", tt.name, says, tt.says, &log)
		}
	}
}
