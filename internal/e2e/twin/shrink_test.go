package twin

import (
	"slices"
	"strings"
	"time"
)

// whileShrinking is the patience for the many hosts that are tried while one is made smaller.
var whileShrinking = []time.Duration{150 * time.Millisecond, 250 * time.Millisecond}

// shrink leaves out of a host what a kind of wrong answer does not need, and returns the smallest
// that still has it.
func shrink(f finding, signature string, t *twins) finding {
	s := &shrinking{signature, t, f}
	s.phases()
	s.changes()
	s.settings()
	s.build()
	s.changes() // of parts that are gone now
	s.commands(func(h *host) []step { return h.changes })
	s.commands(func(h *host) []step { return h.build })
	return s.best
}

type shrinking struct {
	signature string
	t         *twins
	best      finding
}

// try keeps a smaller host if the wrong answer is still there.
func (s *shrinking) try(h *host) bool {
	f, err := life(h, s.t, whileShrinking)
	if err != nil || !slices.ContainsFunc(f.wrong, func(w wrong) bool { return w.signature == s.signature }) {
		return false
	}
	s.best = f
	return true
}

// phases leaves out those before and behind the one that is wrong.
func (s *shrinking) phases() {
	for i := 0; i < len(s.best.host.phases); {
		h := s.best.host.clone()
		phase := h.phases[i]
		h.phases = slices.Delete(slices.Clone(h.phases), i, i+1)
		h.changes = slices.DeleteFunc(h.changes, func(c step) bool { return c.phase == phase })
		if len(h.phases) == 0 || !s.try(h) {
			i++
		}
	}
}

func (s *shrinking) changes() {
	s.leaveOut(func(h *host) *[]step { return &h.changes })
}

func (s *shrinking) build() {
	s.leaveOut(func(h *host) *[]step { return &h.build })
}

// leaveOut tries to do without ever smaller parts of a list.
func (s *shrinking) leaveOut(of func(*host) *[]step) {
	for n := len(*of(s.best.host)) / 2; n > 0; n /= 2 {
		for i := len(*of(s.best.host)) - n; i >= 0; i -= n {
			h := s.best.host.clone()
			list := of(h)
			if i+n <= len(*list) {
				*list = slices.Delete(*list, i, i+n)
				s.try(h)
			}
		}
	}
	// What is left may be needed by what went after it only.
	for i := len(*of(s.best.host)) - 1; i >= 0; i-- {
		h := s.best.host.clone()
		list := of(h)
		*list = slices.Delete(*list, i, i+1)
		s.try(h)
	}
}

// commands leaves single commands out of steps, but for those where a link goes and comes: what the
// link loses by that has to be put back before anything is compared.
func (s *shrinking) commands(of func(*host) []step) {
	for i, step := range of(s.best.host) {
		if slices.ContainsFunc(step.commands, func(c string) bool { return strings.HasSuffix(c, " down") || strings.HasPrefix(c, "ip link del") }) {
			continue
		}
		for k := len(of(s.best.host)[i].commands) - 1; k >= 0; k-- {
			h := s.best.host.clone()
			changed := &of(h)[i]
			if len(changed.commands) > 1 {
				changed.commands = slices.Delete(slices.Clone(changed.commands), k, k+1)
				s.try(h)
			}
		}
	}
}

// settings tries the defaults of each.
func (s *shrinking) settings() {
	for _, change := range []func(*watchSettings){
		func(w *watchSettings) { w.Routes = "copy" },
		func(w *watchSettings) { w.OnLoss = "fallback" },
		func(w *watchSettings) { w.SpecificFirst = false },
		func(w *watchSettings) { w.Ifname = "*" },
		func(w *watchSettings) { w.clients = false },
	} {
		h := s.best.host.clone()
		change(&h.watch)
		if h.watch.config() != s.best.host.watch.config() || h.watch.clients != s.best.host.watch.clients {
			s.try(h)
		}
	}
}
