package twin

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// quiet is how long the real host's kernel state must have stood still before it is compared, and
// patience how much longer, time after time, until an answer is held to be wrong.
const quiet = 30 * time.Millisecond

// finding is what a host's life brought to light.
type finding struct {
	host    *host
	phase   string // the one that was wrong
	answers int
	wrong   []wrong
	state   string // rules, routes and status of the real host then
	log     string // of the watch
}

// life lets a host live through its phases until an answer is wrong.
func life(h *host, t *twins, patience []time.Duration) (f finding, err error) {
	f.host = h
	w, err := newWorld(h)
	if err != nil {
		return f, err
	}
	defer w.close()
	w.patience = patience
	if err := w.startWatch(); err != nil {
		return f, err
	}
	l := &living{w, t, &f}
	if *breakIt != "" {
		return f, l.spoilByFlag()
	}
	for _, phase := range h.phases {
		if ok, err := l.phase(phase); !ok || err != nil {
			return f, err
		}
	}
	return f, nil
}

// living is a host on its way through its phases.
type living struct {
	w *world
	t *twins
	f *finding
}

// spoilByFlag breaks what the flag names, for who wants to see the test fail.
func (l *living) spoilByFlag() error {
	i := slices.IndexFunc(breakages, func(b breakage) bool { return b.name == *breakIt })
	if i < 0 {
		return fmt.Errorf("no way to break a host is named %q", *breakIt)
	}
	r, err := l.spoil(breakages[i])
	l.fail(atStart, r)
	return err
}

// phase lets the host live through a phase and reports whether all is right at its end.
func (l *living) phase(phase string) (bool, error) {
	changes := l.w.host.changesIn(phase)
	if phase == atEnd {
		return l.end()
	}
	if phase == inStorm {
		changes = burst(changes)
	}
	for i, s := range changes {
		if phase == afterKill && i == len(changes)/2 {
			l.w.killWatch()
		}
		if err := l.w.apply(s); err != nil {
			return false, err
		}
		if phase != eachChange {
			continue
		}
		if ok, err := l.look(phase); !ok || err != nil {
			return false, err
		}
	}
	if phase == afterKill {
		l.w.killWatch()
		if err := l.w.startWatch(); err != nil {
			return false, err
		}
	}
	return l.look(phase)
}

// burst makes one step of the second half of steps, so that no time passes between its commands.
func burst(steps []step) []step {
	half := len(steps) / 2
	last := step{name: "all at once"}
	for _, s := range steps[half:] {
		last.commands = append(last.commands, s.commands...)
	}
	return append(slices.Clone(steps[:half]), last)
}

// look compares, and reports whether all is right.
func (l *living) look(phase string) (bool, error) {
	if err := l.w.settle(quiet); err != nil {
		return false, err
	}
	if err := l.w.tryAgain(); err != nil {
		return false, err
	}
	return l.until(phase, func() (result, error) { return l.w.compare(l.t) })
}

// until compares until all is right, for as long as the patience lasts.
func (l *living) until(phase string, compare func() (result, error)) (bool, error) {
	for i := 0; ; i++ {
		if err := l.w.settle(quiet); err != nil {
			return false, err
		}
		r, err := compare()
		if err != nil {
			return false, fmt.Errorf("%s: %w", phase, err)
		}
		l.f.answers += r.answers
		if len(r.wrong) == 0 {
			return true, nil
		}
		if i == len(l.w.patience) {
			l.fail(phase, r)
			return false, nil
		}
		time.Sleep(l.w.patience[i])
	}
}

func (l *living) fail(phase string, r result) {
	l.f.phase, l.f.wrong, l.f.log = phase, r.wrong, l.w.log.String()
	l.f.state = l.w.state()
}

// end ends the watch, which takes everything back, once all is right.
func (l *living) end() (bool, error) {
	if ok, err := l.look(atEnd); !ok || err != nil {
		return false, err
	}
	if err := l.w.stopWatch(); err != nil {
		return false, err
	}
	if err := l.w.unchoose(); err != nil {
		return false, err
	}
	return l.until(atEnd, l.w.compareEnd) // the kernel makes routes of links whose carrier comes late
}

// tally is what many lives brought to light.
type tally struct {
	hosts, bad, answers, wrong int
	badSeeds                   []uint64
	phases                     map[string]int
	without                    map[string]int // kinds of links that hosts did without
	kinds                      map[string]*kind
}

// kind is a kind of wrong answer.
type kind struct {
	signature string
	answers   int
	hosts     int
	first     finding // the one of the smallest host
}

// live does something with hosts, several at once, and returns what was found.
func live(hosts []*host, workers int, do func(*host, *twins) (finding, error)) (*tally, error) {
	todo := make(chan *host)
	type outcome struct {
		f   finding
		err error
	}
	done := make(chan outcome)
	for range workers {
		go func() {
			t := &twins{}
			defer t.close()
			for h := range todo {
				f, err := do(h, t)
				if err != nil {
					err = fmt.Errorf("host %d: %w\n%s", h.seed, err, h.text())
				}
				done <- outcome{f, err}
			}
		}()
	}
	go func() {
		defer close(todo)
		for _, h := range hosts {
			todo <- h
		}
	}()
	sum := newTally()
	var first error
	for range hosts {
		o := <-done
		if o.err != nil && first == nil {
			first = o.err
		}
		sum.add(o.f)
	}
	return sum, first
}

func newTally() *tally {
	return &tally{phases: make(map[string]int), without: make(map[string]int), kinds: make(map[string]*kind)}
}

// sorted are the kinds of wrong answers, those of most hosts first.
func (t *tally) sorted() []*kind {
	return slices.SortedFunc(maps.Values(t.kinds), func(a, b *kind) int {
		return cmp.Or(b.hosts-a.hosts, b.answers-a.answers, strings.Compare(a.signature, b.signature))
	})
}

func (t *tally) add(f finding) {
	t.hosts++
	t.answers += f.answers
	t.wrong += len(f.wrong)
	for _, phase := range f.host.phases {
		t.phases[phase]++
	}
	for _, kind := range f.host.without {
		t.without[kind]++
	}
	if len(f.wrong) > 0 {
		t.bad++
		t.badSeeds = append(t.badSeeds, f.host.seed)
	}
	seen := make(map[string]bool)
	for _, w := range f.wrong {
		k := t.kinds[w.signature]
		if k == nil {
			k = &kind{signature: w.signature, first: f}
			t.kinds[w.signature] = k
		}
		k.answers++
		if !seen[w.signature] {
			seen[w.signature] = true
			k.hosts++
			if f.size() < k.first.size() {
				k.first = f
			}
		}
	}
}

// sample are the first wrong answers of a kind.
func (f finding) sample(signature string, most int) string {
	var texts []string
	for _, w := range f.wrong {
		if w.signature == signature && len(texts) < most {
			texts = append(texts, "    "+w.text)
		}
	}
	return strings.Join(texts, "\n")
}

// size is how much there is to read of a host.
func (f finding) size() int { return len(f.host.build) + len(f.host.changes) }
