package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/bits"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/allocator"
	"github.com/table-allocator/table-allocator/internal/jsonc"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// marking says how the index of a mark becomes bits and priorities. The bits are twice the index
// within the mask; the lowest bit is for the fallback variant. Each interface has two pairs of
// priorities, each for a lookup and the block rule behind it.
type marking struct{ mask, block, fallback uint32 }

var defaultMarking = marking{mask: 0xff000000, block: 9000, fallback: 15000}

const (
	// The rules of leases begin two before 10000. IPv6 looks a route up again with a source address,
	// and then reaches those rules: a block rule has to stand before them. With specific_first there may be five
	// more before that, but a configuration that was right stays right.
	leaseRules = 9998
	mainRule   = 32766
)

// known are marks that other programs use: AppMesh, Mullvad, wg-quick, Istio.
var known = []uint32{0x1e7700ce, 0x6d6f6c65, 0xca6c, 0x539}

func (m marking) of(index uint32) wire.Marking {
	return wire.Marking{
		Mark:     2 * index << bits.TrailingZeros32(m.mask),
		Mask:     m.mask,
		Block:    m.block + 2*index,
		Fallback: m.fallback + 2*index,
	}
}

// marks returns the indexes that mask and priorities have room for.
func (m marking) marks() allocator.Marks {
	last := uint32(1)<<(bits.OnesCount32(m.mask)-1) - 1
	for _, room := range []struct{ first, end uint32 }{{m.block, leaseRules}, {m.fallback, mainRule}} {
		last = min(last, (room.end-room.first-2)/2)
	}
	if m.block < m.fallback {
		last = min(last, (m.fallback-m.block)/2)
	}
	return allocator.Marks{Last: last, Skip: func(index uint32) bool {
		mark := m.of(index).Mark
		// With fewer bits each index collides with one of them.
		return bits.OnesCount32(m.mask) >= 8 && slices.ContainsFunc(known, func(k uint32) bool {
			return k&m.mask&^(m.mask&-m.mask) == mark
		})
	}}
}

func (m marking) validate() error {
	width := bits.OnesCount32(m.mask)
	if width < 2 || bits.Len32(m.mask)-bits.TrailingZeros32(m.mask) != width {
		return fmt.Errorf("bind_mark_mask: %#x, want at least two bits side by side, as in 0xff000000", m.mask)
	}
	const room = 4 // priorities for one mark, and the unused pair of index 0
	if m.block < 1 || m.block > leaseRules-room {
		return fmt.Errorf("bind_priority: %d, want 1 to %d: the rules of leases begin at %d, and block rules behind them have no effect", m.block, leaseRules-room, leaseRules)
	}
	if m.fallback <= m.block+room || m.fallback > mainRule-room {
		return fmt.Errorf("bind_fallback_priority: %d, want %d to %d: behind bind_priority and before the rule of table main", m.fallback, m.block+room+1, mainRule-room)
	}
	return nil
}

// setMask decodes a number, or a string with a hexadecimal one, which JSON does not have.
func (c *Config) setMask(key string, value []byte) error {
	const want = `a number, or a string like "0xff000000"`
	var text string
	if json.Unmarshal(value, &text) != nil || text == "" { // it takes null for a string
		return jsonc.Decode(key, value, &c.Marking.mask, want)
	}
	n, err := strconv.ParseUint(text, 0, 32)
	if err != nil {
		return fmt.Errorf("%s: want %s, have %s", key, want, value)
	}
	c.Marking.mask = uint32(n)
	return nil
}

// takeMark answers a request for the mark of an interface, and gives it one if it has none.
func (s *server) takeMark(ifname string, cred wire.Cred) wire.Reply {
	before := s.markingOf(ifname)
	index, err := s.leases.TakeMark(wire.Seconds(wire.Now()), ifname, s.rules.use(s.marking, ifname))
	switch {
	case errors.Is(err, allocator.ErrNoMark):
		s.noise.write(slog.LevelWarn, "mark refused", "ifname", ifname, "uid", cred.UID, "pid", cred.PID, "err", err)
		return wire.Refuse(wire.Exhausted, "all marks are in use: unbind what is not needed any more, or configure a wider bind_mark_mask")
	case err != nil:
		s.faults.write(slog.LevelError, "cannot write to the database, refusing a mark", "ifname", ifname, "err", err)
		return wire.Refuse(wire.Storage, err.Error())
	}
	m := s.marking.of(index)
	if m != before {
		s.log.Info("mark given", "ifname", ifname, "mark", fmt.Sprintf("%#x/%#x", m.Mark, m.Mask), "priority", m.Block,
			"uid", cred.UID, "pid", cred.PID)
	}
	return wire.Reply{Marking: m}
}

// markingOf returns the marking of an interface, the zero Marking if it has none.
func (s *server) markingOf(ifname string) wire.Marking {
	index, ok := s.leases.Mark(ifname)
	if !ok {
		return wire.Marking{}
	}
	return s.marking.of(index)
}

// interfaceAt returns the interface whose lookups have a priority, "" if none has.
func (s *server) interfaceAt(priority uint32) string {
	for _, first := range []uint32{s.marking.block, s.marking.fallback} {
		if index := (priority - first) / 2; priority > first && (priority-first)%2 == 0 {
			if ifname := s.leases.MarkedInterface(index); ifname != "" {
				return ifname
			}
		}
	}
	return ""
}

// restoreMark takes the mark of an interface from the holder of a lease, after the database was lost.
func (s *server) restoreMark(now time.Duration, ifname string, had wire.Marking) {
	index := had.Mark >> bits.TrailingZeros32(s.marking.mask) / 2
	if had == s.marking.of(index) && had.Mark != 0 {
		s.leases.RestoreMark(wire.Seconds(now), ifname, index)
	}
}

// use returns functions that find in the rules of the host which marks are used. The rules are read
// when Of is called.
func (r *rulesInUse) use(m marking, ifname string) allocator.Use {
	var by func(index uint32) bool
	return allocator.Use{
		Of: func() uint32 {
			r.refresh(true)
			by = r.usedBy(m)
			return r.markOf(m, ifname)
		},
		By: func(index uint32) bool { return by(index) },
	}
}

// markOf returns the index of the mark whose lookups lead to the table of an address of the interface,
// 0 if there are none. Nothing else in a rule shows which interface a mark belongs to.
func (r *rulesInUse) markOf(m marking, ifname string) (index uint32) {
	if r.conn == nil {
		return 0
	}
	link, found, err := r.conn.LinkByName(ifname)
	if err != nil || !found {
		return 0
	}
	addresses, err := r.conn.AddressesOn(unix.AF_UNSPEC, link.Index)
	if err != nil {
		return 0
	}
	for _, a := range addresses {
		family := allocator.Inet
		if a.Addr.Is6() {
			family = allocator.Inet6
		}
		for _, table := range r.sources[a.Addr] {
			for _, rule := range r.tables[family][table] {
				if index := m.indexOf(rule); index != 0 {
					return index
				}
			}
		}
	}
	return 0
}

// indexOf returns the index of the mark whose lookup a rule is, 0 for any other rule.
func (m marking) indexOf(r route.Rule) uint32 {
	if r.Mask == math.MaxUint32 && r.Mark == wire.ReplyMark(r.Table) { // of replies, at any priority
		return 0
	}
	first := m.block
	if r.Priority > m.fallback {
		first = m.fallback
	}
	if r.Protocol != route.Protocol || r.Traffic == (route.Traffic{}) || r.Priority <= first || (r.Priority-first)%2 != 0 {
		return 0
	}
	return (r.Priority - first) / 2
}

// usedBy returns a function that reports whether rules use a mark: its bits, or its priorities.
func (r *rulesInUse) usedBy(m marking) func(index uint32) bool {
	var byMark []route.Rule
	byPriority := make(map[uint32]bool)
	for _, tables := range r.tables {
		for _, rules := range tables {
			for _, rule := range rules {
				if rule.Mask&m.mask != 0 {
					byMark = append(byMark, rule)
				}
				if rule.Protocol == route.Protocol {
					byPriority[rule.Priority] = true
				}
			}
		}
	}
	return func(index uint32) bool {
		of := m.of(index)
		for _, first := range []uint32{of.Block, of.Fallback} {
			if byPriority[first] || byPriority[first+1] {
				return true
			}
		}
		lowest := m.mask & -m.mask
		return slices.ContainsFunc(byMark, func(rule route.Rule) bool {
			return (of.Mark^rule.Mark)&rule.Mask&m.mask&^lowest == 0
		})
	}
}
