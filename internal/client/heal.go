package client

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/events"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Rules that another program deletes are restored at once, and at this rate if it goes on.
const (
	healEvery  = 5 * time.Second
	healBurst  = 20
	blameEvery = time.Hour

	blameWithin = 10 * time.Minute

	advice = " (for systemd-networkd set ManageForeignRoutingPolicyRules=no and ManageForeignRoutes=no in networkd.conf)"
)

// heal restores rules that another program deleted. If that program goes on, rules are restored every healEvery, and
// a line in the log says so.
func (h *host) heal() {
	h.healAt = 0
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		if err := h.healFamily(family); err != nil {
			h.log.Error("cannot restore the rules", "err", err)
		}
	}
}

func (h *host) healFamily(family int) error {
	lost, whose, err := h.lostRules(family)
	if err != nil {
		return err
	}
	behind, err := h.disordered(family)
	if err != nil || len(lost) == 0 && len(behind) == 0 {
		return err
	}
	if !h.heals.Allow() {
		h.healAt = wire.Now() + healEvery
		return nil
	}
	if err := h.restoreRules(family, lost, whose); err != nil {
		return err
	}
	if behind, err = h.disordered(family); err != nil {
		return err
	}
	for _, s := range behind {
		if err := h.moveBehind(s); err != nil {
			return fmt.Errorf("restore the order of the unbound rules: %w", err)
		}
	}
	return nil
}

// lostRules are the rules of sessions that the kernel does not have, and whose they are.
func (h *host) lostRules(family int) (lost []route.Rule, whose map[route.Rule]*session, err error) {
	ours := func(r *route.Rule) bool { return r.Protocol == route.Protocol }
	rules, err := h.kernel.RulesWhere(family, ours)
	if err == nil && h.serveNews(family, rules) {
		rules, err = h.kernel.RulesWhere(family, ours)
	}
	if err != nil {
		return nil, nil, err
	}
	have := make(map[route.Rule]bool, len(rules))
	for _, r := range rules {
		have[r] = true
	}
	whose = make(map[route.Rule]*session)
	for _, s := range h.inOrder(family) {
		for _, r := range s.inst.Rules.Want(s.lease.table) {
			if !have[r] {
				lost, whose[r] = append(lost, r), s
			}
		}
	}
	return lost, whose, nil
}

func (h *host) restoreRules(family int, lost []route.Rule, whose map[route.Rule]*session) error {
	if len(lost) == 0 {
		return nil
	}
	h.tellLost(lost, whose)
	h.blame.do(func() {
		h.log.Warn("another program deletes our rules; they are restored, but not faster than every "+healEvery.String()+" if it goes on"+advice,
			"rule", lost[0].String())
	})
	// By priority, so that all addresses have their source rules first: those keep an address to its uplink.
	slices.SortStableFunc(lost, func(a, b route.Rule) int { return cmp.Compare(a.Priority, b.Priority) })
	none := func(route.Rule) bool { return false } // nothing is deleted
	_, err := h.env.SyncRules(family, none, lost, func(r route.Rule) []any { return whose[r].inst.Rules.Attrs(r) })
	return err
}

// tellLost notes for each address how many rules it lost.
func (h *host) tellLost(lost []route.Rule, whose map[route.Rule]*session) {
	first := make(map[*session]route.Rule)
	count := make(map[*session]int)
	for _, r := range lost {
		s := whose[r]
		if count[s]++; count[s] == 1 {
			first[s] = r
		}
	}
	for _, s := range h.sessions {
		if count[s] > 0 {
			h.tell(s, events.RulesLost, lossText(count[s], first[s]))
			h.tellSoon(s)
		}
	}
}

func lossText(n int, first route.Rule) string {
	if n == 1 {
		return fmt.Sprintf("another program deleted the rule %q, which is restored", first)
	}
	return fmt.Sprintf("another program deleted %d rules, which are restored; the first is %q", n, first)
}

// blame is when another program was seen to delete rules. What somebody does once needs no advice.
type blame struct{ seen, told time.Duration }

// do calls f if this is not the first time within blameWithin, and f was not called for blameEvery.
func (b *blame) do(f func()) {
	now := wire.Now()
	again := b.seen != 0 && now < b.seen+blameWithin
	b.seen = now
	if again && (b.told == 0 || now >= b.told+blameEvery) {
		b.told = now
		f()
	}
}

// hearOfRules subscribes to the end of rules that lead to the table of a session, which has its lease.
func (l *loop) hearOfRules(s *session) {
	groups := route.Rules4
	if s.family() == unix.AF_INET6 {
		groups = route.Rules6
	}
	var err error
	if s.inst.Rules.Marking == (wire.Marking{}) { // else all rules are heard of, for bound traffic
		err = l.watcher.OnlyDeletedRules(s.lease.table)
	}
	s.warn("hear of rules", errors.Join(err, l.watcher.Join(groups)))
}

// restoreRules restores the rules of a lone session that another program deleted.
func (l *loop) restoreRules(s *session) error {
	if !s.serves() || s.lease.watched || !s.lease.uplink.IsAddress() {
		return nil
	}
	l.checkPrefixes()
	lost, err := s.inst.Rules.Restore(s.lease.table)
	if len(lost) > 0 {
		l.tell(s, events.RulesLost, lossText(len(lost), lost[0]))
		l.tellSoon(s)
		s.blame.do(func() {
			s.log.Warn("another program deletes our rules; they are restored, but not faster than once a second if it goes on"+advice, "rule", lost[0].String())
		})
	}
	s.warn("restore the rules", err)
	return err
}

// restoreSoon is restoreRules at the rate of repairs.
func (l *loop) restoreSoon(s *session) {
	if !s.repairs.Allow() {
		s.lookLater()
		return
	}
	_ = l.restoreRules(s) // which warns
}
