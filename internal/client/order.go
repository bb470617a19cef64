package client

import (
	"cmp"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// lane is where unbound rules stand in an order that counts: the kernel sorts by priority,
// and those of equal priority by the time at which they came.
type lane struct {
	family   int
	priority uint32
}

func (s *session) lane() lane {
	return lane{s.family(), s.lease.uplink.Priorities.Unbound}
}

// inOrder are the sessions whose rules have to be there, in the order of their unbound rules.
func (h *host) inOrder(family int) []*session {
	at := make(map[uint32]int)
	for of, order := range h.order {
		if of.family != family {
			continue
		}
		for i, table := range order {
			at[table] = i
		}
	}
	sessions := slices.DeleteFunc(h.all(), func(s *session) bool {
		return s.family() != family || !s.serves()
	})
	slices.SortStableFunc(sessions, func(a, b *session) int { return cmp.Compare(at[a.lease.table], at[b.lease.table]) })
	return sessions
}

// unboundOrder is the order of the unbound rules, which chooses the uplink for traffic that is bound to nothing:
// of those for what this host sends, or of those for all packets, which stand one priority behind them.
func (h *host) unboundOrder(iif string) (map[lane][]uint32, error) {
	order := make(map[lane][]uint32)
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := h.kernel.RulesWhere(family, func(r *route.Rule) bool { return r.Iif == iif && uplink.IsUnbound(*r) })
		if err != nil {
			return nil, err
		}
		for _, r := range rules {
			of := lane{family, r.Priority}
			if iif == "" {
				of.priority--
			}
			order[of] = append(order[of], r.Table)
		}
	}
	return order, nil
}

// disordered are the sessions whose unbound rules have to go behind all others, one after
// the other, so that all stand in the order that they had.
func (h *host) disordered(family int) ([]*session, error) {
	sessions := make(map[uint32]*session) // that can be moved, by table
	for _, s := range h.sessions {
		if s.family() == family && s.serves() {
			sessions[s.lease.table] = s
		}
	}
	now, err := h.unboundOrder(uplink.Loopback)
	if err != nil {
		return nil, err
	}
	forwarded, err := h.unboundOrder("")
	if err != nil {
		return nil, err
	}
	var behind []*session
	for of, order := range h.order {
		if of.family != family {
			continue
		}
		movable := func(table uint32) bool { return sessions[table] != nil }
		tables := misplaced(order, now[of], movable)
		if more := misplaced(order, forwarded[of], movable); len(more) > len(tables) {
			tables = more // both are the end of the order
		}
		for _, table := range tables {
			behind = append(behind, sessions[table])
		}
	}
	return behind, nil
}

// misplaced are the tables that have to go to the end of now, one after the other, so that
// those which can be moved stand as in order: a rule that was added again stands behind its
// equals, and those that followed it have to follow it again.
func misplaced(order, now []uint32, movable func(uint32) bool) []uint32 {
	there := make(map[uint32]bool, len(now))
	for _, table := range now {
		there[table] = true
	}
	order = slices.DeleteFunc(slices.Clone(order), func(table uint32) bool { return !movable(table) || !there[table] })
	at := 0 // all of order before it stands where it should
	for _, table := range now {
		if at < len(order) && table == order[at] {
			at++
		}
	}
	return order[at:]
}

// moveBehind adds the unbound rules of a session again.
func (h *host) moveBehind(s *session) error {
	unbound := s.inst.Rules.Uplink.Unbound(s.lease.table)
	same := func(r route.Rule) bool { return slices.Contains(unbound, r) }
	if _, _, err := h.kernel.SyncRules(s.family(), same, nil); err != nil {
		return err
	}
	_, _, err := h.kernel.SyncRules(s.family(), same, unbound)
	return err
}

// appendOrder notes where the unbound rule of a session came to stand: behind all others.
func (h *host) appendOrder(s *session) {
	if !s.serves() || s.ordered == s.lease.table && s.orderedIn == s.lane() {
		return
	}
	h.removeOrder(s)
	s.ordered, s.orderedIn, s.spoke = s.lease.table, s.lane(), false
	if !slices.Contains(h.order[s.orderedIn], s.lease.table) { // else it stood before this process began
		h.order[s.orderedIn] = append(h.order[s.orderedIn], s.lease.table)
	}
}

func (h *host) removeOrder(s *session) {
	order := h.order[s.orderedIn]
	if at := slices.Index(order, s.ordered); s.ordered != 0 && at >= 0 {
		h.order[s.orderedIn] = slices.Delete(order, at, at+1)
	}
	s.ordered = 0
}

// speaks reports whether traffic that is bound to nothing has the address of a session where it leaves by its link.
func (s *session) speaks() bool {
	return s.serves() && s.addr.IsValid() && s.inst.Default().Source == s.addr
}

// speakersFirst has the unbound rules of such addresses before those of the other addresses of their links, if that is
// not known to be so: else traffic that main's route gave its own address has another one once the route is moved.
func (h *host) speakersFirst() {
	var speakers []*session
	for _, s := range h.sessions {
		speaks := s.speaks()
		if speaks && !s.spoke && s.ordered != 0 {
			speakers = append(speakers, s)
		}
		s.spoke = speaks && s.ordered != 0
	}
	for _, s := range speakers {
		others := make(map[uint32]bool) // tables of the link
		for _, o := range h.sessions {
			if o.orderedIn == s.orderedIn && o.lease.uplink.Key.Ifname == s.lease.uplink.Key.Ifname {
				others[o.ordered] = true
			}
		}
		if order, moved := beforeOthers(h.order[s.orderedIn], s.ordered, others); moved {
			h.order[s.orderedIn], h.healAt = order, wire.Now()
		}
	}
}

// beforeOthers moves a table in an order to the place of the first of others.
func beforeOthers(order []uint32, table uint32, others map[uint32]bool) (now []uint32, moved bool) {
	to := slices.IndexFunc(order, func(o uint32) bool { return others[o] })
	at := slices.Index(order, table)
	if to < 0 || at <= to {
		return order, false
	}
	return slices.Insert(slices.Delete(slices.Clone(order), at, at+1), to, table), true
}
