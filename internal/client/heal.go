package client

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Rules that another program deletes are restored at once, and at this rate if it goes on.
const (
	healEvery  = 5 * time.Second
	healBurst  = 20
	blameEvery = time.Hour
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
	h.blames.Do(func() {
		h.log.Warn("another program deletes our rules; they are restored, but not faster than every "+healEvery.String()+" if it goes on (for systemd-networkd set ManageForeignRoutingPolicyRules=no and ManageForeignRoutes=no in networkd.conf)",
			"rule", lost[0].String())
	})
	// By priority, so that all addresses have their source rules first: those keep an address to its uplink.
	slices.SortStableFunc(lost, func(a, b route.Rule) int { return cmp.Compare(a.Priority, b.Priority) })
	none := func(route.Rule) bool { return false } // nothing is deleted
	_, err := h.env.SyncRules(family, none, lost, func(r route.Rule) []any { return whose[r].inst.Rules.Attrs(r) })
	return err
}
