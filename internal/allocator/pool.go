package allocator

import (
	"cmp"
	"container/heap"

	"github.com/bits-and-blooms/bitset"
)

// slot is a table that was granted at least once: its holder, or who held a free one last.
type slot struct {
	Lease           // the lease in force, or the last one; Family and Table never change
	held     bool   // the lease is in force
	local    bool   // the last holder of a free table held it in this epoch
	reserved int64  // until then a free table goes to its last holder only
	ended    int64  // grows with every end of a lease, over restarts too; 0 before the first end
	unsaved  bool   // the next commit has to store this state
	dirty    bool   // Tick has to store this state
	history  bool   // table history may have a row of this table
	index    int    // in the expiry heap
	due      int64  // place in the expiry heap: not after the end of the lease
	sender   Sender // of the last request in this run of the server; zero: none yet

	prev, next *slot // in the pool's list of free tables
}

// neverGranted reports whether a table counts as never granted: its first grant was undone.
func (s *slot) neverGranted() bool { return !s.held && s.ended == 0 }

// hasHistory reports whether table history has a row of this table now, or must have one.
func (s *slot) hasHistory() bool { return !s.held || s.history }

// lastHolder returns the zero Key if no rules of this host can be of an earlier holder.
func (s *slot) lastHolder() Key {
	if s != nil && s.local {
		return s.Key
	}
	return Key{}
}

const (
	// remembered bounds how many free tables have a slot: with that many, one of them is
	// granted before a table that never was.
	remembered = 1 << 16

	// maxAvoided bounds how many unused tables are looked at in a row. No host has rules for
	// so many; a broken Avoid must not cause four billion tries.
	maxAvoided = 1 << 16
)

// pageSize is the number of tables that one bitset covers. Pages keep the index small when
// the pool is nearly the whole range of numbers and a database knows tables at its far end.
const pageSize = 1 << 14

// pool knows which of its tables were never granted, and the order in which the other
// free ones came back.
type pool struct {
	family Family
	first  uint32
	count  uint64
	used   map[uint32]*bitset.BitSet // by page: tables that have a slot
	low    uint64                    // every table below this offset is used
	ring   slot                      // head of the free slots; ring.next is unused for longest
	free   uint64                    // length of the list
	held   uint64
	enough uint64 // free tables to remember

	byUsers uint64            // tables that users hold for whom no share is kept
	byUser  map[uint32]uint64 // the same by uid
}

func newPool(f Family, p Pool) *pool {
	n := &pool{family: f, first: p.First, count: p.Count, used: make(map[uint32]*bitset.BitSet), enough: remembered,
		byUser: make(map[uint32]uint64)}
	n.ring.prev, n.ring.next = &n.ring, &n.ring
	return n
}

// contains is also right for a nil pool, the pool of a family that is not served.
func (p *pool) contains(table uint32) bool {
	return p != nil && table >= p.first && uint64(table-p.first) < p.count
}

func (p *pool) mark(table uint32) {
	if !p.contains(table) {
		return
	}
	off := table - p.first
	page := p.used[off/pageSize]
	if page == nil {
		page = bitset.MustNew(pageSize)
		p.used[off/pageSize] = page
	}
	page.Set(uint(off % pageSize))
}

func (p *pool) unmark(table uint32) {
	if !p.contains(table) {
		return
	}
	off := table - p.first
	if page := p.used[off/pageSize]; page != nil {
		page.Clear(uint(off % pageSize))
	}
	p.low = min(p.low, uint64(off))
}

// unused returns the lowest table at or above an offset that was never granted.
func (p *pool) unused(from uint64) (off uint64, ok bool) {
	atLow := from <= p.low
	off = max(from, p.low)
	for off < p.count {
		page := p.used[uint32(off/pageSize)]
		if page == nil {
			break
		}
		i, ok := page.NextClear(uint(off % pageSize))
		if ok {
			off = off/pageSize*pageSize + uint64(i)
			break
		}
		off = (off/pageSize + 1) * pageSize
	}
	if atLow {
		p.low = min(off, p.count)
	}
	return off, off < p.count
}

// pick returns a table by its number, if it is free and of this pool.
func (p *pool) pick(table uint32, fits func(uint32, *slot) bool) *slot {
	if !p.contains(table) {
		return nil
	}
	off := table - p.first
	if page := p.used[off/pageSize]; page == nil || !page.Test(uint(off%pageSize)) {
		if !fits(table, nil) {
			return nil
		}
		return &slot{Lease: Lease{Key: Key{Family: p.family}, Table: table}}
	}
	for s := p.ring.next; s != &p.ring; s = s.next {
		if s.Table == table {
			if fits(table, s) {
				return s
			}
			return nil
		}
	}
	return nil
}

// pickFree returns the lowest table that was never granted, or else the one that is unused for longest.
func (p *pool) pickFree(fits func(uint32, *slot) bool) *slot {
	first, second := p.pickUnused, p.pickOldest
	if p.free >= p.enough {
		first, second = second, first
	}
	if s := first(fits); s != nil {
		return s
	}
	return second(fits)
}

func (p *pool) pickUnused(fits func(uint32, *slot) bool) *slot {
	off, ok := p.unused(0)
	for range maxAvoided {
		if !ok {
			return nil
		}
		if table := p.first + uint32(off); fits(table, nil) {
			return &slot{Lease: Lease{Key: Key{Family: p.family}, Table: table}}
		}
		off, ok = p.unused(off + 1)
	}
	return nil
}

func (p *pool) pickOldest(fits func(uint32, *slot) bool) *slot {
	for s := p.ring.next; s != &p.ring; s = s.next {
		if fits(s.Table, s) {
			return s
		}
	}
	return nil
}

// push adds a table that has just become free.
func (p *pool) push(s *slot) { p.insert(s, p.ring.prev, &p.ring) }

func (p *pool) insert(s, prev, next *slot) {
	s.prev, s.next = prev, next
	prev.next, next.prev = s, s
	p.free++
}

// pull takes s out of the list. To undo it, first undo all later changes of the list, then insert s
// between its neighbours.
func (p *pool) pull(s *slot) {
	s.prev.next, s.next.prev = s.next, s.prev
	p.free--
}

// expiryHeap orders the leases in force by their end, for container/heap. A renewal, of which
// there are many for each end, leaves its lease where it is: expire reorders what comes first.
type expiryHeap []*slot

func (h expiryHeap) Len() int { return len(h) }

func (h expiryHeap) Less(i, j int) bool {
	a, b := h[i], h[j]
	return cmp.Or(cmp.Compare(a.due, b.due), compareTables(a, b)) < 0
}

func (h expiryHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

func (h *expiryHeap) Push(x any) {
	s := x.(*slot)
	s.index, s.due = len(*h), s.Expires
	*h = append(*h, s)
}

func (h *expiryHeap) Pop() any {
	last := len(*h) - 1
	s := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	return s
}

// reorder moves a lease to where its end belongs.
func (h *expiryHeap) reorder(s *slot) {
	s.due = s.Expires
	heap.Fix(h, s.index)
}

func compareEnds(a, b *slot) int {
	return cmp.Or(cmp.Compare(a.Expires, b.Expires), compareTables(a, b))
}

func compareTables(a, b *slot) int {
	return cmp.Or(cmp.Compare(a.Table, b.Table), cmp.Compare(a.Family, b.Family))
}
