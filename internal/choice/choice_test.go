package choice

import (
	"strings"
	"testing"
	"time"
)

// script drives a health: a + is a round with an answer, - one without, 2 one of the second target only, p one that a
// portal answers, e one with the expected page, u one in which the page does not come, c loss of the carrier, C its return; each a second after the last one.
func script(h *Health, now *time.Duration, text string) {
	for _, what := range text {
		*now += time.Second
		r := Round{Answered: true, First: true, RTT: 10 * time.Millisecond, Asked: "icmp"}
		switch what {
		case '-':
			r = Round{Asked: "icmp"}
		case '2':
			r.First = false
		case 'p':
			r.Portal = Intercepted
		case 'e':
			r.Portal = Expected
		case 'u':
			r.Portal = Unanswered
		case 'l':
			h.Leave(*now)
			continue
		case 'c', 'C':
			h.Carrier(*now, what == 'C')
			continue
		}
		h.Round(*now, r)
	}
}

func TestHealth(t *testing.T) {
	for _, test := range []struct {
		name, rounds string
		want         State
	}{
		{"nothing is known", "", Unknown},
		{"one round says nothing", "-", Unknown},
		{"a new uplink that does not answer", "--", Dead},
		{"a new uplink that answers", "-+", Alive},
		{"a new uplink behind a portal", "p", Portal},
		{"four lost rounds", "+----", Alive},
		{"five lost rounds", "+-----", Dead},
		{"an answer between", "+----+----", Alive},
		{"the second target answers", "+2222222222", Alive},
		{"four answers", "--++++", Dead},
		{"five answers", "--+++++", Alive},
		{"a lost one between", "--++++-++++", Dead},
		{"back behind a portal", "--++++p", Portal},
		{"a portal", "++p", Portal},
		{"a portal that was not asked", "p+++", Portal},
		{"a portal that has let us in", "p++e", Alive},
		{"a portal that goes silent", "p-----", Dead},
		{"the carrier goes", "+c", NoCarrier},
		{"a round that was late", "+c+", NoCarrier},
		{"the carrier is back", "+cC", Unknown},
		{"and it answers", "+cC+", Alive},
		{"the carrier of a dead one", "--c", NoCarrier},
		{"the address goes", "+l", Unknown},
		{"and comes back", "+l+", Alive},
		{"the address of a dead one", "--l", Unknown},
		{"a quarter of the rounds lost", strings.Repeat("+++2", 15), Degraded},
		{"a quarter, of too few rounds", strings.Repeat("+++2", 14), Alive},
		{"a fifth", strings.Repeat("++++2", 20), Alive},
		{"a degraded one at a fifth", strings.Repeat("+++2", 15) + strings.Repeat("++++2", 20), Degraded},
		{"a degraded one that got better", strings.Repeat("+++2", 15) + strings.Repeat("+", 55), Alive},
		{"a degraded one that fails", strings.Repeat("+++2", 15) + "-----", Dead},
	} {
		t.Run(test.name, func(t *testing.T) {
			numbers, now := Default(), time.Duration(0)
			h := NewHealth(&numbers, now)
			if script(h, &now, test.rounds); h.State != test.want {
				t.Errorf("%v (%s), want %v", h.State, h.Reason, test.want)
			}
		})
	}
}

func TestPause(t *testing.T) {
	const used, standby, metered = 0, 1, 2
	roles := []Role{{InUse: true}, {}, {Metered: true}}
	for _, test := range []struct {
		name, rounds string
		role         int
		later, want  time.Duration
	}{
		{"in use", "++", used, 0, 5 * time.Second},
		{"standby", "++", standby, 0, 10 * time.Second},
		{"metered", "++", metered, 0, time.Minute},
		{"the first", "+", standby, 0, 10 * time.Second},
		{"unknown", "-", metered, 0, time.Second},
		{"suspect", "+-", metered, 0, time.Second},
		{"dead", "--", standby, 0, 10 * time.Second},
		{"dead for long", "--", standby, 10 * time.Minute, time.Minute},
		{"about to return", "--+", standby, 0, time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			numbers, now := Default(), time.Duration(0)
			h := NewHealth(&numbers, now)
			script(h, &now, test.rounds)
			if got := h.Pause(now+test.later, roles[test.role], 0); got != test.want {
				t.Errorf("a pause of %v, want %v", got, test.want)
			}
			shortest := test.want * 9 / 10
			if test.name == "the first" {
				shortest = test.want / 10
			}
			if got := h.Pause(now+test.later, roles[test.role], 1); got < shortest || got > test.want {
				t.Errorf("a pause of %v, want from %v to %v", got, shortest, test.want)
			}
		})
	}
}

// TestForgetPortal: without a page to ask for, nothing would end the state.
func TestForgetPortal(t *testing.T) {
	numbers, now := Default(), time.Duration(0)
	h := NewHealth(&numbers, now)
	script(h, &now, "p+")
	if !h.ForgetPortal(now) || h.State != Unknown || h.ForgetPortal(now) {
		t.Errorf("%v (%s)", h.State, h.Reason)
	}
	if script(h, &now, "+"); h.State != Alive {
		t.Errorf("with an answer: %v (%s)", h.State, h.Reason)
	}
}

func TestHold(t *testing.T) {
	numbers, now := Default(), time.Duration(0)
	h := NewHealth(&numbers, now)
	script(h, &now, "+")
	want := func(held time.Duration) {
		t.Helper()
		script(h, &now, "-----+++++")
		if got := h.Held - now; h.State != Alive || got != held {
			t.Errorf("%v, held for %v, want %v", h.State, got, held)
		}
	}
	if h.Held != 0 {
		t.Errorf("an uplink that never failed is held until %v", h.Held)
	}
	for _, minutes := range []time.Duration{1, 2, 4, 8, 16, 30, 30} {
		want(minutes * time.Minute)
	}
	now += numbers.Forget
	want(time.Minute)
}

func TestTimeout(t *testing.T) {
	numbers := Default()
	for _, test := range []struct{ rtt, want time.Duration }{
		{0, 3 * time.Second},
		{20 * time.Millisecond, time.Second},
		{600 * time.Millisecond, 2400 * time.Millisecond},
		{2 * time.Second, 3 * time.Second},
	} {
		h := NewHealth(&numbers, 0)
		h.RTT = test.rtt
		if got := h.Timeout(); got != test.want {
			t.Errorf("round trip %v: %v, want %v", test.rtt, got, test.want)
		}
	}
}

func TestAsksPortal(t *testing.T) {
	for _, test := range []struct {
		name, rounds string
		later        time.Duration
		want         bool
	}{
		{"at first", "", 0, true},
		{"asked", "e", 0, false},
		{"five minutes later", "e", 5 * time.Minute, true},
		{"behind a portal", "p", 30 * time.Second, true},
		{"without an answer", "u", 5 * time.Second, false},
		{"without an answer, again", "u", 10 * time.Second, true},
		{"without the second answer", "uu", 10 * time.Second, false},
		{"without the second answer, again", "uu", 20 * time.Second, true},
		{"without answers for long", strings.Repeat("u", 100), 5 * time.Minute, true},
		{"without answers for long, soon", strings.Repeat("u", 100), 5*time.Minute - time.Second, false},
		{"an answer after none", "uue", 20 * time.Second, false},
		{"behind a portal that went silent", "puuu", 30 * time.Second, true},
		{"with a new carrier", "uuucC", 0, true},
		{"dead", "e-----", 0, false},
		{"before it is believed", "e-----++++", 0, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			numbers, now := Default(), time.Duration(0)
			h := NewHealth(&numbers, now)
			script(h, &now, test.rounds)
			if got := h.AsksPortal(now + test.later); got != test.want {
				t.Errorf("%v, want %v", got, test.want)
			}
		})
	}
}

func TestHour(t *testing.T) {
	numbers, now := Default(), 10*time.Minute-time.Second
	h := NewHealth(&numbers, now)
	script(h, &now, "++2-") // all in the minute 10
	now += 2 * time.Minute
	hour := h.Hour(now)
	if len(hour) != 60 {
		t.Fatalf("%d minutes, want 60", len(hour))
	}
	if got, want := hour[57], (Minute{10 * time.Millisecond, 50, true}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if hour[58].Any || hour[59].Any {
		t.Errorf("minutes without rounds: %+v", hour[58:])
	}
	now += time.Hour
	script(h, &now, "+")
	for i, m := range h.Hour(now) {
		if m.Any != (i == 59) {
			t.Errorf("minute %d: %+v", i, m)
		}
	}
}

func TestChoose(t *testing.T) {
	const now = time.Hour
	wan0 := Candidate{Ifname: "wan0", Table: 1, State: Alive, Default: true, Metric: 100, Age: 1}
	wan1 := Candidate{Ifname: "wan1", Table: 2, State: Alive, Default: true, Metric: 600, Age: 0}
	with := func(c Candidate, change func(*Candidate)) Candidate { change(&c); return c }
	in := func(c Candidate, s State) Candidate { c.State = s; return c }
	for _, test := range []struct {
		name    string
		all     []Candidate
		current uint32
		pinned  string
		want    uint32
		at      time.Duration
	}{
		{"nobody", nil, 0, "", 0, 0},
		{"the better metric", []Candidate{wan0, wan1}, 0, "", 1, 0},
		{"the better metric, later", []Candidate{wan0, wan1}, 2, "", 1, 0},
		{"the better rank", []Candidate{with(wan0, func(c *Candidate) { c.Rank = 1 }), wan1}, 1, "", 2, 0},
		{"the one in use among equals", []Candidate{with(wan0, func(c *Candidate) { c.Metric = 600 }), wan1}, 1, "", 1, 0},
		{"the older among equals", []Candidate{with(wan0, func(c *Candidate) { c.Metric = 600 }), wan1}, 0, "", 2, 0},
		{"one that fails", []Candidate{in(wan0, Dead), wan1}, 1, "", 2, 0},
		{"one without a carrier", []Candidate{in(wan0, NoCarrier), wan1}, 1, "", 2, 0},
		{"one behind a portal", []Candidate{in(wan0, Portal), wan1}, 1, "", 2, 0},
		{"a degraded one", []Candidate{in(wan0, Degraded), wan1}, 1, "", 2, 0},
		{"a portal before nothing", []Candidate{in(wan0, Portal), in(wan1, Dead)}, 2, "", 1, 0},
		{"all dead: no change", []Candidate{in(wan0, Dead), in(wan1, Dead)}, 2, "", 2, 0},
		{"all dead, and the one in use has no carrier", []Candidate{in(wan0, NoCarrier), in(wan1, Dead)}, 1, "", 2, 0},
		{"all dead, and the other has no carrier", []Candidate{in(wan0, NoCarrier), in(wan1, Dead)}, 2, "", 2, 0},
		{"none has a carrier", []Candidate{in(wan0, NoCarrier), in(wan1, NoCarrier)}, 2, "", 2, 0},
		{"all dead, none before", []Candidate{in(wan0, Dead), in(wan1, Dead)}, 0, "", 0, 0},
		{"all dead, and the choice has gone", []Candidate{in(wan0, Dead)}, 2, "", 0, 0},
		{"unknown at the start", []Candidate{in(wan0, Unknown), in(wan1, Unknown)}, 0, "", 0, 0},
		{"unknown, chosen by the last watch", []Candidate{wan0, in(wan1, Unknown)}, 2, "", 2, 0},
		{"one is known at the start", []Candidate{in(wan0, Unknown), wan1}, 0, "", 0, 0},
		{"the choice has gone, and one is unknown", []Candidate{in(wan0, Unknown), wan1}, 3, "", 2, 0},
		{"one without a default route", []Candidate{with(wan0, func(c *Candidate) { c.Default = false }), wan1}, 1, "", 2, 0},
		{"metered", []Candidate{with(wan0, func(c *Candidate) { c.Metered = true }), wan1}, 1, "", 2, 0},
		{"metered, and the other one degraded", []Candidate{with(wan0, func(c *Candidate) { c.Metered = true }), in(wan1, Degraded)}, 2, "", 1, 0},
		{"not probed, of a better rank", []Candidate{in(wan0, Off), with(wan1, func(c *Candidate) { c.Rank = 1 })}, 0, "", 1, 0},
		{"not probed, behind its equals", []Candidate{in(wan0, Off), wan1}, 0, "", 2, 0},
		{"held", []Candidate{with(wan0, func(c *Candidate) { c.Held = now + time.Minute }), wan1}, 2, "", 2, now + time.Minute},
		{"held, and the hold is over", []Candidate{with(wan0, func(c *Candidate) { c.Held = now }), wan1}, 2, "", 1, 0},
		{"held, and the one in use fails", []Candidate{with(wan0, func(c *Candidate) { c.Held = now + time.Minute }), in(wan1, Dead)}, 2, "", 1, 0},
		{"held, and the one in use is degraded", []Candidate{with(wan0, func(c *Candidate) { c.Held = now + time.Minute }), in(wan1, Degraded)}, 2, "", 2, now + time.Minute},
		{"held, in use", []Candidate{with(wan0, func(c *Candidate) { c.Held = now + time.Minute }), wan1}, 1, "", 1, 0},
		{"another address of the link, which unbound traffic has", []Candidate{wan0, with(wan0, func(c *Candidate) { c.Table, c.Age, c.Speaks = 3, 5, true })}, 1, "", 3, 0},
		{"another address of the link", []Candidate{wan0, with(wan0, func(c *Candidate) { c.Table, c.Age = 3, 0 })}, 1, "", 1, 0},
		{"one that unbound traffic has on another link", []Candidate{wan0, with(wan1, func(c *Candidate) { c.Metric, c.Age, c.Speaks = 100, 5, true })}, 1, "", 1, 0},
		{"held, for another address of the link", []Candidate{wan0, with(wan0, func(c *Candidate) { c.Table, c.Age, c.Speaks, c.Held = 3, 5, true, now+time.Minute })}, 1, "", 3, 0},
		{"pinned", []Candidate{wan0, wan1}, 1, "wan1", 2, 0},
		{"pinned and dead", []Candidate{wan0, in(wan1, Dead)}, 1, "wan1", 2, 0},
		{"pinned and gone", []Candidate{wan0}, 2, "wan1", 1, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := Choose(now, test.all, test.current, test.pinned)
			if got.Table != test.want || got.At != test.at || got.Why == "" || got.Pinned != (strings.HasPrefix(test.name, "pinned") && test.want == 2) {
				t.Errorf("%+v, want table %d, again at %v", got, test.want, test.at)
			}
		})
	}
}

func TestUnused(t *testing.T) {
	const now = time.Hour
	used := Candidate{Ifname: "wan0", Table: 1, State: Alive, Default: true, Metric: 100}
	for _, test := range []struct {
		change func(c *Candidate)
		pinned bool
		want   string
	}{
		{func(c *Candidate) {}, false, "metric 600, wan0 has 100"},
		{func(c *Candidate) { c.Metric = 100 }, false, "wan0 is in use"},
		{func(c *Candidate) { c.Rank = 5 }, false, "rank 5, wan0 has 0"},
		{func(c *Candidate) { c.Metered = true }, false, "it is metered"},
		{func(c *Candidate) { c.State = Off }, false, "it is not probed"},
		{func(c *Candidate) { c.State = Dead }, false, "it does not work"},
		{func(c *Candidate) { c.State = Degraded }, false, "wan0 is alive"},
		{func(c *Candidate) { c.Default = false }, false, "its table has no default route of its own"},
		{func(c *Candidate) { c.Metric = 50 }, true, "the user wants wan0"},
		{func(c *Candidate) { c.Metric, c.Held = 50, now+time.Minute }, false, "it failed, and is used again in 1m0s if it goes on to work"},
		{func(c *Candidate) { c.Metric = 50 }, false, "it is used as soon as the kernel has its routes"},
	} {
		c := Candidate{Ifname: "wan1", Table: 2, State: Alive, Default: true, Metric: 600}
		test.change(&c)
		if got := Unused(now, c, used, test.pinned); got != test.want {
			t.Errorf("%+v: %q, want %q", c, got, test.want)
		}
	}
}
