package probe

import (
	"cmp"
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/table-allocator/table-allocator/internal/choice"
)

// Habit is what rounds of one uplink have learned: what to ask first. Its zero value is that of a new uplink.
type Habit struct {
	Kind   Kind // that a target answered last; zero: none yet
	Second bool // the second target is asked first, since the first one does not answer
	misses int  // rounds in a row that the first one did not answer, and the second did
}

// missesMost is after how many misses the second target becomes the first.
const missesMost = 3

// Task is one round.
type Task struct {
	Uplink
	Plan         // of the uplink
	Habit        // of the rounds before
	Suspect bool // ask by all kinds at once
	Portal  bool // ask for the page, too
	Timeout time.Duration
}

// Result is what a round brought.
type Result struct {
	choice.Round
	Habit Habit
	Bytes int
	// Silent is why nothing was asked, so that the round says nothing of the uplink: ErrUnable, the process stood still
	// for the whole time, or files ran out.
	Silent error
}

// errNotAsked says that no probe left: the round was over before, or there was no socket for it.
var errNotAsked = errors.New("no probe left")

// Round asks the first target, and after half the timeout the second one. It returns at the first answer, and at the
// timeout at the latest. A round by one kind costs two packets where the target answers.
func Round(ctx context.Context, t Task) Result {
	ctx, cancel := context.WithTimeout(ctx, t.Timeout)
	defer cancel()
	targets, kinds := slices.Clone(t.Targets), t.Kinds
	if t.Habit.Second {
		slices.Reverse(targets)
	}
	if !t.Suspect && slices.Contains(kinds, t.Habit.Kind) {
		kinds = []Kind{t.Habit.Kind}
	}
	r := Result{Habit: t.Habit}
	r.Asked = Plan{Kinds: kinds}.text()
	begin := time.Now()
	answers, pages := make(chan Answer), make(chan Answer, 1)
	var running sync.WaitGroup
	if t.Portal && t.Page != nil {
		running.Go(func() { pages <- t.fetchPage(ctx) })
	}
	probing, enough := context.WithCancel(ctx)
	defer enough()
	for i, target := range targets {
		for _, kind := range kinds {
			running.Go(func() { answers <- t.askLater(probing, time.Duration(i)*t.Timeout/most, kind, target) })
		}
	}
	asked := false
	for range len(targets) * len(kinds) {
		a := <-answers
		r.Bytes += a.Bytes
		switch {
		case errors.Is(a.Err, ErrUnable):
			r.Silent = a.Err
		case errors.Is(a.Err, errNotAsked):
			r.Silent = cmp.Or(r.Silent, a.Err)
		default:
			asked = true
		}
		if a.Err != nil || r.Answered {
			continue
		}
		r.Answered, r.First, r.RTT = true, a.Target == targets[0], min(a.RTT, t.Timeout)
		r.Habit = r.Habit.after(a.Kind, r.First)
		enough()
	}
	if t.Portal && t.Page != nil {
		page := <-pages
		r.Bytes += page.Bytes
		switch {
		case page.Err == nil:
			r.Round.Portal = choice.Expected
		case errors.Is(page.Err, errStatus):
			r.Round.Portal = choice.Intercepted
		default:
			r.Round.Portal = choice.Unanswered
		}
		if r.Round.Portal != choice.Unanswered && !r.Answered { // it answers, whoever it is
			r.Answered, r.RTT = true, time.Since(begin)
		}
	}
	switch {
	case asked || r.Answered:
		r.Silent = nil
	case len(kinds) < len(t.Kinds): // the next round asks by the others, too
		r.Silent, r.Habit.Kind = errNotAsked, Kind{}
	}
	running.Wait()
	return r
}

// after is the habit after an answer.
func (h Habit) after(kind Kind, first bool) Habit {
	h.Kind = kind
	if first {
		h.misses = 0
		return h
	}
	if h.misses++; h.misses == missesMost {
		h.misses, h.Second = 0, !h.Second
	}
	return h
}

// askLater asks after a pause, unless ctx ends before.
func (t Task) askLater(ctx context.Context, pause time.Duration, kind Kind, target netip.Addr) Answer {
	select {
	case <-ctx.Done():
	case <-time.After(pause):
	}
	if ctx.Err() != nil {
		return Answer{Err: errNotAsked}
	}
	return Ask(ctx, t.Uplink, kind, target)
}

func (t Task) fetchPage(ctx context.Context) Answer {
	servers := slices.Concat(t.Nameservers, t.Targets)
	n, err := fetch(ctx, t.Uplink, *t.Page, servers)
	return Answer{Bytes: n, Err: err}
}
