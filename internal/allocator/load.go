package allocator

import (
	"cmp"
	"container/heap"
	"database/sql/driver"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"unicode"
	"unicode/utf8"
)

// loader makes the index from the rows of a database.
type loader struct {
	a       *Allocator
	now     int64
	damaged bool // leases become preferences

	slots []*slot       // in the order of the rows
	known map[place]int // which of them is of a table: those of history, and all of a damaged database
	odd   []int64       // rowids of rows of RtTables that make no sense
}

// place is a table of a family.
type place struct {
	family Family
	table  uint32
}

// read reads a database that is whole.
func (l *loader) read(version int64) error {
	var rows, free int64
	if err := l.a.store.db.queryRow("SELECT (SELECT count(*) FROM RtTables), (SELECT count(*) FROM history)", &rows, &free); err != nil {
		return err
	}
	// Maps that grow on the way are a good part of a start with many leases.
	l.slots = make([]*slot, 0, rows+free)
	l.known = make(map[place]int, free)
	l.a.byKey = make(map[Key]*slot, rows+free)
	l.a.due = make(expiryHeap, 0, rows)
	return errors.Join(
		l.a.store.history(version, l.past),
		l.a.store.leases(version, "ASC", l.lease),
		l.a.store.marks(version, l.a.marks.set),
	)
}

// salvage reads the rows of a damaged database that can be read, from either end of the table.
func (l *loader) salvage() {
	l.known = make(map[place]int)
	s, version := l.a.store, int64(0)
	if s.db == nil { // the header is damaged
		var err error
		if s.db, err = openDatabase(s.path); err != nil {
			return
		}
	}
	// Each of these fails where the damage is. With writable_schema SQLite reads a damaged schema too.
	_ = s.db.exec("PRAGMA writable_schema = ON")
	_ = s.db.queryRow("PRAGMA user_version", &version)
	_ = s.history(version, l.past)
	_ = s.leases(version, "ASC", l.lease)
	_ = s.leases(version, "DESC", l.lease)
	_ = s.marks(version, l.a.marks.set)
}

func (l *loader) past(s *slot) {
	l.known[place{s.Family, s.Table}] = len(l.slots)
	l.slots = append(l.slots, s)
}

// lease takes a row of RtTables.
func (l *loader) lease(row []driver.Value) error {
	var id int64
	if err := scan(row, &id); err != nil {
		return err
	}
	s, epoch, err := parseLease(row[1:])
	if err != nil {
		if !l.damaged {
			l.a.log.Warn("row of RtTables makes no sense, deleted", "row", fmt.Sprint(row[1:]), "err", err)
		}
		l.odd = append(l.odd, id)
		return nil
	}
	s.local = epoch == l.a.cfg.Epoch
	s.held = s.local
	if epoch.Boot == "" { // written by the original
		s.held = s.Expires > l.now && s.Expires <= l.a.expiry(l.now)
		s.Owner = 0
	}
	if l.damaged && s.held {
		s.held, s.reserved = false, l.a.expiry(l.now)
	}
	at := place{s.Family, s.Table}
	i, found := l.known[at]
	if found {
		other := l.slots[i]
		if other.ended == 0 && compareEnds(other, s) >= 0 { // only a damaged database has two leases of a table
			return nil
		}
		s.history = other.history
		l.slots[i] = s
		return nil
	}
	if l.damaged {
		l.known[at] = len(l.slots)
	}
	l.slots = append(l.slots, s)
	return nil
}

// finish makes the index of the rows that were read, and notes which rows the database must have
// differently. Rows that only get a later end are dirty; the others are unsaved.
func (l *loader) finish() error {
	for _, id := range l.odd {
		if l.damaged {
			break
		}
		if err := l.a.store.deleteLease(id); err != nil {
			return err
		}
	}
	over := l.sort()
	a := l.a
	slices.SortFunc(over, compareEnds)
	for _, s := range over {
		a.ended++
		s.ended = a.ended
		a.markUnsaved(s)
	}
	var free []*slot
	for _, s := range l.slots {
		if !s.held {
			free = append(free, s)
			continue
		}
		if s.Expires = max(s.Expires, a.expiry(l.now)); s.local && !s.history {
			a.markDirty(l.now, s)
		} else {
			a.markUnsaved(s)
		}
		s.local = false
		a.index(s)
	}
	slices.SortFunc(free, func(x, y *slot) int { return cmp.Compare(x.ended, y.ended) })
	for _, s := range free {
		a.index(s)
	}
	return nil
}

// sort enters the leases in force into byKey, one for each key, and returns those that are over.
func (l *loader) sort() (over []*slot) {
	live := l.a.byKey
	elsewhere := 0
	for _, s := range l.slots {
		if s.ended > 0 {
			l.a.ended = max(l.a.ended, s.ended)
			continue
		}
		switch other := live[s.Key]; {
		case !s.held:
			elsewhere++
		case l.a.cfg.Taken != nil && l.a.cfg.Taken(s.Table, s.Key):
			l.warn(s, "another address uses the table, so the lease is of an older database")
			s.held, s.local = false, false
		case other == nil:
			live[s.Key] = s
		default:
			if compareEnds(s, other) < 0 {
				s, other = other, s
			}
			l.warn(other, "another lease of the same key ends later, so this one is over")
			live[s.Key], s, other.held = s, other, false
		}
		if !s.held {
			over = append(over, s)
		}
	}
	if elsewhere > 0 && !l.damaged {
		l.a.log.Info("leases of another boot or network namespace are preferences now", "leases", elsewhere)
	}
	return over
}

func (l *loader) warn(s *slot, msg string) {
	l.a.log.Warn(msg, "family", s.Family.String(), "ifname", s.Ifname, "addr", s.Addr, "table", s.Table)
}

// index enters a slot into the index, where byKey has all leases in force already. A free table outside the pool stays in the database only, for the
// case that the pool contains it again later.
func (a *Allocator) index(s *slot) {
	p := a.pools[s.Family]
	inside := p.contains(s.Table)
	if !inside && !s.held {
		return
	}
	if s.held {
		a.pairs.add(s)
		heap.Push(&a.due, s)
	} else if other := a.byKey[s.Key]; other == nil || !other.held {
		a.byKey[s.Key] = s
	}
	if !inside {
		return
	}
	if p.mark(s.Table); s.held {
		a.count(p, s.Owner, 1)
	} else {
		p.push(s)
	}
}

// parseLease turns a row into a slot, with its address in canonical text. It also returns the epoch of the
// lease.
func parseLease(row []driver.Value) (*slot, Epoch, error) {
	var at Epoch
	var netns int64
	s := &slot{}
	tag := row[5]
	if err := errors.Join(
		scan(row, &s.Table, &s.Family, &s.Ifname, &s.Addr, &s.Expires),
		scan(row[6:], &s.Owner, &at.Boot, &netns),
	); err != nil {
		return nil, at, err
	}
	at.Netns = uint64(netns)
	switch {
	case s.Family != Unspec && s.Family != Inet && s.Family != Inet6:
		return nil, at, errors.New("family is none of 0, 2 and 10")
	case !isText(s.Ifname, 15) || s.Ifname == "":
		return nil, at, errors.New("ifname is not the name of an interface")
	case !isText(s.Addr, 45) || s.Addr == "":
		return nil, at, errors.New("addr is not an address")
	}
	if s.Family != Unspec {
		ip, err := netip.ParseAddr(s.Addr)
		if err != nil || ip.Zone() != "" || ip.Is4In6() || ip.Is4() != (s.Family == Inet) {
			return nil, at, fmt.Errorf("addr is not an address of family %s", s.Family)
		}
		s.Addr = ip.String()
	}
	// The tag has no effect, so a lease with a bad one stays.
	if text, ok := tag.(string); ok && isText(text, 127) {
		s.Tag = text
	}
	return s, at, nil
}

// isText reports whether a request may carry s: control characters would break a line of the log.
func isText(s string, most int) bool {
	return len(s) <= most && utf8.ValidString(s) && !slices.ContainsFunc([]rune(s), unicode.IsControl)
}
