package choice

import "time"

// Minute is what the rounds of one minute brought.
type Minute struct {
	RTT  time.Duration // mean; 0: no answer
	Loss int           // percent
	Any  bool          // there was a round
}

// minutes is how many are kept.
const minutes = 60

// hour is the rounds of the last hour, by minutes.
type hour struct {
	cells [minutes]cell
	last  int64 // the minute of the last round, since the begin of the clock
}

type cell struct {
	micros         uint32 // of the first targets' answers together
	rounds, losses uint16
}

func minuteOf(now time.Duration) int64 { return int64(now / time.Minute) }

func (h *hour) note(now, rtt time.Duration, first bool) {
	minute := minuteOf(now)
	for m := max(h.last+1, minute-minutes+1); m <= minute; m++ {
		h.cells[m%minutes] = cell{}
	}
	h.last = max(h.last, minute)
	c := &h.cells[minute%minutes]
	c.rounds++
	if first {
		c.micros += uint32(min(rtt, time.Minute).Microseconds())
	} else {
		c.losses++
	}
}

// Hour returns the last minutes, the oldest first.
func (h *Health) Hour(now time.Duration) []Minute {
	all := make([]Minute, 0, minutes)
	for m := minuteOf(now) - minutes + 1; m <= minuteOf(now); m++ {
		c := cell{}
		if m >= 0 && m <= h.hour.last && m > h.hour.last-minutes {
			c = h.hour.cells[m%minutes]
		}
		one := Minute{Any: c.rounds > 0}
		if c.rounds > 0 {
			one.Loss = 100 * int(c.losses) / int(c.rounds)
		}
		if answers := c.rounds - c.losses; answers > 0 {
			one.RTT = time.Duration(c.micros) * time.Microsecond / time.Duration(answers)
		}
		all = append(all, one)
	}
	return all
}
