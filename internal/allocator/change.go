package allocator

import (
	"container/heap"
	"math"
	"slices"
)

// hold grants a free table of the pool to a key that holds none. had is the table that the key had last.
func (a *Allocator) hold(s, had *slot, l Lease) {
	p, before, first := a.pools[l.Family], s.Lease, s.neverGranted()
	preferred := !first && a.byKey[before.Key] == s
	prev, next := s.prev, s.next
	if first {
		p.mark(s.Table)
	} else {
		p.pull(s)
	}
	if preferred {
		delete(a.byKey, before.Key)
	}
	a.count(p, l.Owner, 1)
	l.own()
	s.Lease, s.held = l, true
	a.byKey[l.Key] = s
	a.pairs.add(s)
	heap.Push(&a.due, s)
	a.change(s, func() {
		a.pairs.remove(s)
		heap.Remove(&a.due, s.index)
		if delete(a.byKey, l.Key); had != nil {
			a.byKey[l.Key] = had
		}
		if preferred {
			a.byKey[before.Key] = s
		}
		a.count(p, s.Owner, -1) // root may have taken it over
		s.Lease, s.held = before, false
		if first {
			p.unmark(s.Table)
		} else {
			p.insert(s, prev, next)
		}
	})
}

// release ends a lease until the next Commit, which undoes that if it fails.
func (a *Allocator) release(s *slot) {
	p, ended, local := a.pools[s.Family], s.ended, s.local
	inside, preferred := p.contains(s.Table), a.byKey[s.Key] == s
	a.end(s)
	a.change(s, func() {
		if inside {
			a.count(p, s.Owner, 1)
			p.pull(s)
		} else if preferred {
			a.byKey[s.Key] = s
		}
		a.pairs.add(s)
		s.held, s.ended, s.local = true, ended, local
		heap.Push(&a.due, s)
	})
}

// end frees the table of a lease.
func (a *Allocator) end(s *slot) {
	p := a.pools[s.Family]
	a.pairs.remove(s)
	heap.Remove(&a.due, s.index)
	a.ended++
	s.held, s.ended, s.local, s.reserved = false, a.ended, true, 0
	if p.contains(s.Table) {
		a.count(p, s.Owner, -1)
		p.push(s)
	} else if a.byKey[s.Key] == s {
		delete(a.byKey, s.Key)
	}
}

// change notes that the next commit has to store s, and how to undo the change of it.
func (a *Allocator) change(s *slot, undo func()) {
	a.markUnsaved(s)
	a.touched[s.Key] = struct{}{}
	a.undo = append(a.undo, undo)
}

// expire ends the leases that are over.
func (a *Allocator) expire(now int64) (some bool) {
	for len(a.due) > 0 && a.due[0].due <= now {
		s := a.due[0]
		if s.Expires > s.due {
			a.due.reorder(s)
			continue
		}
		a.end(s)
		a.markDirty(now, s)
		a.expired = append(a.expired, s.Lease)
		some = true
	}
	return some
}

// Pause adds to all leases the seconds for which the server stood still, since no holder could renew meanwhile. It does
// not store the new ends: a restart extends leases likewise.
func (a *Allocator) Pause(seconds int64) {
	for _, s := range a.due {
		s.Expires += min(seconds, math.MaxInt64-s.Expires)
	}
}

// markDirty notes that Tick has to store s.
func (a *Allocator) markDirty(now int64, s *slot) {
	if s.dirty || s.unsaved {
		return
	}
	if len(a.dirty) == 0 {
		a.flushAt = now + flushAfter
	}
	s.dirty = true
	a.dirty = append(a.dirty, s)
}

// markUnsaved notes that the next commit has to store s.
func (a *Allocator) markUnsaved(s *slot) {
	if !s.unsaved {
		s.unsaved = true
		a.unsaved = append(a.unsaved, s)
	}
}

// rollback undoes what was decided since the last commit.
func (a *Allocator) rollback(now int64) {
	for _, undo := range slices.Backward(a.undo) {
		undo()
	}
	// A lease whose release is undone is stored once more, as the database has it already. A table
	// whose first grant is undone has no slot any more.
	for _, s := range a.unsaved {
		if s.unsaved = false; !s.neverGranted() {
			a.markDirty(now, s)
		}
	}
	a.unsaved = empty(a.unsaved)
}

// empty returns the list without its elements. It keeps the memory of the list.
func empty[T any](list []T) []T {
	clear(list)
	return list[:0]
}
