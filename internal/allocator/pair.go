package allocator

import (
	"cmp"
	"slices"
)

// pairs are the leases in force of inet and inet6, so that an interface gets the same number in both families where
// that is possible.
type pairs struct {
	byTable  map[place]*slot
	byIfname map[string][]*slot
}

const (
	mostPaired = 32 // leases of an interface that count: uplinks have a few addresses, and a search must not take long
	mostLone   = 64 // tables that lone leaves out in one search
)

func newPairs() pairs { return pairs{make(map[place]*slot), make(map[string][]*slot)} }

func (p *pairs) add(s *slot) {
	of := p.byIfname[s.Ifname]
	if s.Family == Unspec || len(of) >= mostPaired {
		return // the ifname of an identifier is any text
	}
	p.byIfname[s.Ifname] = append(of, s)
	p.byTable[place{s.Family, s.Table}] = s
}

func (p *pairs) remove(s *slot) {
	at := place{s.Family, s.Table}
	if p.byTable[at] != s {
		return
	}
	delete(p.byTable, at)
	of := slices.DeleteFunc(p.byIfname[s.Ifname], func(o *slot) bool { return o == s })
	if p.byIfname[s.Ifname] = of; len(of) == 0 {
		delete(p.byIfname, s.Ifname)
	}
}

// twin returns the other one of the families inet and inet6.
func (f Family) twin() Family { return Inet + Inet6 - f }

// wanted returns the tables that the interface of key, and of the same user, has in the other family and not in this
// one, the lowest first.
func (p *pairs) wanted(key Key, uid uint32) []uint32 {
	if key.Family == Unspec {
		return nil
	}
	var tables []uint32
	for _, s := range p.byIfname[key.Ifname] {
		if s.Family == key.Family.twin() && s.Owner == uid && p.byTable[place{key.Family, s.Table}] == nil {
			tables = append(tables, s.Table)
		}
	}
	slices.SortFunc(tables, cmp.Compare[uint32])
	return tables
}

// lone returns a function that reports whether no other interface, or another user, has a table in the other family.
// It reports true for all tables behind the first mostLone that others have.
func (p *pairs) lone(key Key, uid uint32) func(table uint32) bool {
	left := mostLone
	return func(table uint32) bool {
		if key.Family == Unspec || left == 0 {
			return true
		}
		s := p.byTable[place{key.Family.twin(), table}]
		if s == nil || s.Ifname == key.Ifname && s.Owner == uid {
			return true
		}
		left--
		return false
	}
}
