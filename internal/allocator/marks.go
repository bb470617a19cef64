package allocator

import (
	"database/sql/driver"
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

// marks are those of interfaces: one each, for ever, but that of an interface for which
// nobody asked for longest and that nothing uses goes to another one when they run out.
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

// TakeMark returns the index of the interface's mark, and chooses one if it has none: one
// that nobody has, else the one unused for longest. inUse says whether the host still uses
// a mark, which is then not taken from anybody. What is returned is in the database; an
// error is ErrNoMark or ErrStorage.
func (a *Allocator) TakeMark(now int64, ifname string, inUse func(index uint32) bool) (uint32, error) {
	a.abandon()
	m := &a.marks
	next := mark{used: m.used + 1}
	have, ok := a.Mark(ifname)
	if ok {
		if m.byIfname[ifname].used == m.used {
			return have, nil // was the last one, too
		}
		next.index = have
	} else if next.index = m.choose(inUse); next.index == 0 {
		return 0, ErrNoMark
	}
	if err := a.saveMark(now, ifname, next); err != nil {
		if ok {
			return have, nil // only its turn is not noted
		}
		return 0, fmt.Errorf("%w: %w", ErrStorage, err)
	}
	m.set(ifname, next)
	return next.index, nil
}

// choose returns the index of a mark to give away, 0 if there is none.
func (m *marks) choose(inUse func(index uint32) bool) uint32 {
	var oldest uint32
	for index := uint32(1); index <= m.Last; index++ {
		ifname, taken := m.ifnames[index]
		switch {
		case !m.has(index), taken && oldest != 0 && m.byIfname[ifname].used > m.byIfname[m.ifnames[oldest]].used:
		case inUse(index):
		case !taken:
			return index
		default:
			oldest = index
		}
	}
	return oldest
}

func (a *Allocator) saveMark(now int64, ifname string, m mark) error {
	if a.store.astray() {
		if err := a.flush(now, flushMost); err != nil {
			return err
		}
	}
	err := a.atDisk(func() error {
		overwritten := a.store.overwritten() // for the next flush
		err := a.store.transact(func() error { return a.store.putMark(ifname, m) })
		if !overwritten {
			a.store.left = a.store.stamp()
		}
		return err
	})
	a.catchUp(now)
	return err
}

func (s *store) putMark(ifname string, m mark) error {
	return s.db.exec("INSERT OR REPLACE INTO marks (ifname, idx, used) VALUES (?, ?, ?)", ifname, int64(m.index), m.used)
}

// loadMarks reads the marks that interfaces have.
func (a *Allocator) loadMarks(which Marks) error {
	a.marks = marks{Marks: which, byIfname: make(map[string]mark), ifnames: make(map[uint32]string)}
	return a.store.db.query("SELECT ifname, idx, used FROM marks", func(row []driver.Value) error {
		var ifname string
		var m mark
		if err := scan(row, &ifname, &m.index, &m.used); err != nil {
			return err
		}
		a.marks.set(ifname, m)
		return nil
	})
}
