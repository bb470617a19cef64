package choice

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// path is a simulated uplink with two targets.
type path struct {
	*rand.Rand
	loss float64 // of each probe
	down func(at time.Duration) bool
}

const (
	simulatedRTT = 20 * time.Millisecond
	day          = 24 * time.Hour
)

// round is a round that begins at a time, and when it ends.
func (p path) round(h *Health, at time.Duration) (Round, time.Duration) {
	limit := h.Timeout()
	for target := range 2 {
		asked := at + time.Duration(target)*limit/2
		if !p.down(asked) && p.Float64() >= p.loss {
			return Round{Answered: true, First: target == 0, RTT: simulatedRTT, Asked: "icmp"}, asked + simulatedRTT
		}
	}
	return Round{Asked: "icmp"}, at + limit
}

// live drives a health for a time, and calls changed at each change of its state.
func (p path) live(h *Health, role Role, from, until time.Duration, changed func(at time.Duration)) {
	for at := from; at < until; {
		r, end := p.round(h, at)
		if h.Round(end, r) && changed != nil {
			changed(end)
		}
		at = max(at+h.Pause(end, role, p.Float64()), end)
	}
}

func never(time.Duration) bool { return false }

func TestFalseAlarms(t *testing.T) {
	numbers := Default()
	for _, test := range []struct {
		loss float64
		most float64 // a day
	}{{0.05, 0}, {0.1, 0.1}, {0.3, 1}} {
		t.Run(fmt.Sprintf("%.0f %%", 100*test.loss), func(t *testing.T) {
			const days = 30
			alarms := 0
			h := NewHealth(&numbers, 0)
			p := path{rand.New(rand.NewPCG(1, 2)), test.loss, never}
			p.live(h, Role{InUse: true}, 0, days*day, func(time.Duration) {
				if h.State == Dead {
					alarms++
				}
			})
			if got := float64(alarms) / days; got > test.most {
				t.Errorf("%.2f false alarms a day, want at most %v", got, test.most)
			}
			t.Logf("%.2f false alarms a day", float64(alarms)/days)
		})
	}
}

// delays are how long a change takes to be found, sorted.
func delays(seed uint64, role Role, down bool) []time.Duration {
	numbers := Default()
	random := rand.New(rand.NewPCG(seed, 4))
	var all []time.Duration
	for range 500 {
		begin := time.Minute + time.Duration(random.Float64()*float64(time.Minute))
		p := path{random, 0.01, func(at time.Duration) bool { return (at >= begin) == down }}
		h := NewHealth(&numbers, 0)
		found := time.Duration(0)
		p.live(h, role, 0, begin+3*time.Minute, func(at time.Duration) {
			if found == 0 && at > begin && (h.State == Dead) == down {
				found = at
			}
		})
		all = append(all, found-begin)
	}
	slices.Sort(all)
	return all
}

func TestDetection(t *testing.T) {
	for _, test := range []struct {
		name       string
		role       Role
		down       bool
		p50, limit time.Duration
	}{
		{"uplink in use fails", Role{InUse: true}, true, 8 * time.Second, 10 * time.Second},
		{"standby fails", Role{}, true, 11 * time.Second, 15 * time.Second},
		{"uplink works again", Role{InUse: true}, false, 8 * time.Second, 11 * time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			all := delays(3, test.role, test.down)
			p50, p95 := all[len(all)/2], all[len(all)*95/100]
			t.Logf("p50 %v, p95 %v", p50, p95)
			if all[0] < 0 || p50 > test.p50 || p95 > test.limit {
				t.Errorf("found after %v (p50), %v (p95), want %v and %v", p50, p95, test.p50, test.limit)
			}
		})
	}
}

// TestFailback counts switches of a host whose first uplink fails again and again.
func TestFailback(t *testing.T) {
	for _, test := range []struct {
		on, off time.Duration
		most    float64 // switches an hour
	}{
		{time.Minute, 20 * time.Second, 1},
		{5 * time.Minute, 30 * time.Second, 4},
		{10 * time.Second, 10 * time.Second, 1},
	} {
		t.Run(fmt.Sprintf("%v on, %v off", test.on, test.off), func(t *testing.T) {
			const hours = 48
			if got := float64(switches(test.on, test.off, hours*time.Hour)) / hours; got > test.most {
				t.Errorf("%.1f switches an hour, want at most %v", got, test.most)
			} else {
				t.Logf("%.1f switches an hour", got)
			}
		})
	}
}

func switches(on, off, until time.Duration) (count int) {
	numbers := Default()
	random := rand.New(rand.NewPCG(5, 6))
	first := path{random, 0.01, func(at time.Duration) bool { return at%(on+off) >= on }}
	h := NewHealth(&numbers, 0)
	used := uint32(1)
	for at := time.Duration(0); at < until; {
		r, end := first.round(h, at)
		h.Round(end, r)
		d := Choose(end, []Candidate{
			{Ifname: "wan0", Table: 1, State: h.State, Default: true, Held: h.Held},
			{Ifname: "wan1", Table: 2, State: Alive, Rank: 1, Default: true},
		}, used, "")
		if d.Table != used {
			count++
		}
		used = d.Table
		at = max(at+h.Pause(end, Role{InUse: used == 1}, random.Float64()), end)
	}
	return count
}

// TestNoBursts counts the rounds of 1,000 uplinks, all of which began within a second.
func TestNoBursts(t *testing.T) {
	const count, until = 1000, 10 * time.Minute
	numbers := Default()
	random := rand.New(rand.NewPCG(7, 8))
	rounds := make(map[time.Duration]int) // of a second
	for range count {
		h := NewHealth(&numbers, 0)
		p := path{random, 0.01, never}
		for at := time.Duration(random.Float64() * float64(numbers.Suspect)); at < until; {
			rounds[at/time.Second]++
			r, end := p.round(h, at)
			h.Round(end, r)
			at = max(at+h.Pause(end, Role{}, random.Float64()), end)
		}
	}
	mean := float64(count) * float64(time.Second) / float64(numbers.Standby)
	for second, n := range rounds {
		if second > 0 && float64(n) > 2*mean {
			t.Errorf("%d rounds in second %d, want at most twice %.0f", n, second, mean)
		}
	}
}
