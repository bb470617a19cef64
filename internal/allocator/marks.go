package allocator

import (
	"errors"
	"fmt"
	"strings"
)

// ErrNoMark is the refusal of a mark because all are taken.
var ErrNoMark = errors.New("no mark is free")

// Marks says which marks there are: the indexes from 1 to Last but for those that Skip is
// true for. A nil Skip is true for none.
type Marks struct {
	Last uint32
	Skip func(index uint32) bool
}

func (m Marks) has(index uint32) bool {
	return index >= 1 && index <= m.Last && (m.Skip == nil || !m.Skip(index))
}

// marks are the marks of interfaces. An interface keeps its mark until all marks are given. Then the
// unused one that was not asked for for the longest time goes to another interface.
type marks struct {
	Marks
	byIfname map[string]mark
	ifnames  map[uint32]string // by index
	used     int64             // the newest use
}

type mark struct {
	index uint32
	used  int64
}

func (m *marks) set(ifname string, to mark) {
	delete(m.byIfname, m.ifnames[to.index])
	delete(m.ifnames, m.byIfname[ifname].index)
	ifname = strings.Clone(ifname) // it may be a part of something larger
	m.byIfname[ifname], m.ifnames[to.index] = to, ifname
	m.used = max(m.used, to.used)
}

// Mark returns the index of the mark that an interface has.
func (a *Allocator) Mark(ifname string) (index uint32, ok bool) {
	index = a.marks.byIfname[ifname].index
	return index, a.marks.has(index)
}

// MarkedInterface returns the interface that has the mark of an index, "" if none has.
func (a *Allocator) MarkedInterface(index uint32) string { return a.marks.ifnames[index] }

// Use finds out which marks the host uses. TakeMark calls the functions only if the interface has no mark.
type Use struct {
	Of func() (index uint32)          // the mark that the host uses for the interface, 0 if that cannot be seen
	By func(index uint32) (used bool) // whether the host uses a mark. No other interface gets it then
}

// TakeMark returns the index of the interface's mark, and stores it. If the interface has none, it chooses
// the mark that the host uses for the interface, as after the database was lost; else one that no
// interface has; else the one that is unused for longest. An error is ErrNoMark or ErrStorage.
func (a *Allocator) TakeMark(now int64, ifname string, use Use) (uint32, error) {
	m := &a.marks
	next := mark{used: m.used + 1}
	have, ok := a.Mark(ifname)
	if ok {
		if m.byIfname[ifname].used == m.used {
			return have, nil // the newest use is stored already
		}
		next.index = have
	} else if next.index = m.choose(use); next.index == 0 {
		return 0, ErrNoMark
	}
	err := a.transact(now, func() error { return a.store.putMark(ifname, next) })
	if err == nil {
		m.set(ifname, next)
		return next.index, nil
	}
	if ok {
		return have, nil // only the use is not stored
	}
	return 0, fmt.Errorf("%w: %w", ErrStorage, err)
}

// RestoreMark gives an interface that has no mark the one that it had before the database was lost, unless
// another interface has that. It is no error if it cannot: the holders of leases ask again.
func (a *Allocator) RestoreMark(now int64, ifname string, index uint32) {
	m := &a.marks
	if _, has := a.Mark(ifname); has || !m.has(index) || m.ifnames[index] != "" {
		return
	}
	next := mark{index, m.used + 1}
	if a.transact(now, func() error { return a.store.putMark(ifname, next) }) == nil {
		m.set(ifname, next)
	}
}

// choose returns the index of a mark to give away, 0 if there is none.
func (m *marks) choose(use Use) uint32 {
	if own := use.Of(); m.has(own) && m.ifnames[own] == "" {
		return own
	}
	var oldest uint32
	for index := uint32(1); index <= m.Last; index++ {
		ifname, taken := m.ifnames[index]
		switch {
		case !m.has(index), taken && oldest != 0 && m.byIfname[ifname].used > m.byIfname[m.ifnames[oldest]].used:
		case use.By(index):
		case !taken:
			return index
		default:
			oldest = index
		}
	}
	return oldest
}
