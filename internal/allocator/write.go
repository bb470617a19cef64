package allocator

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"
)

const (
	flushAfter = 1   // seconds until Tick stores a renewal, or longer if many wait
	flushMost  = 512 // renewals in one transaction, which takes some milliseconds
	retryAfter = 2   // seconds from a write that failed to the next
	clockEvery = 60  // seconds from one write of the clock row to the next
)

// Commit stores, in one transaction, all leases that were created or ended since the last Commit. If that
// fails, the error is ErrStorage, and the allocator undoes them; renewals stay. Without pending results
// Commit does nothing.
func (a *Allocator) Commit(now int64) (err error) {
	if len(a.undo) == 0 {
		return nil
	}
	if err = a.write(now, 0); err != nil {
		a.rollback(now)
		err = fmt.Errorf("%w: %w", ErrStorage, err)
	}
	a.undo = empty(a.undo)
	clear(a.touched)
	return err
}

// Tick ends the leases that are over, and stores these and renewals. It returns the leases that ended
// since the last Tick, also if it cannot store them now.
func (a *Allocator) Tick(now int64) ([]Lease, error) {
	due := a.expire(now) || len(a.dirty) > 0 && now >= a.flushAt || now >= a.clockAt
	var err error
	if due && now >= a.retryAt {
		err = a.write(now, flushMost)
	}
	expired := a.expired
	a.expired = nil
	return expired, err
}

// Next returns the second at which Tick may have something to do; it may have passed.
func (a *Allocator) Next() int64 {
	next := a.clockAt
	if len(a.dirty) > 0 {
		next = min(next, a.flushAt)
	}
	next = max(next, a.retryAt)
	if len(a.due) > 0 {
		next = min(next, a.due[0].due)
	}
	if len(a.expired) > 0 {
		next = 0
	}
	return next
}

// Close stores all renewals and closes the database. The allocator is not usable afterwards.
func (a *Allocator) Close(now int64) error {
	err := a.write(now, len(a.dirty))
	if err != nil { // it need not come back
		err = a.write(now, len(a.dirty))
	}
	return errors.Join(err, a.store.close())
}

// Writing returns how long transactions have taken in all, with the one that is under way. It may be
// called at any time, from any goroutine.
func (a *Allocator) Writing() time.Duration { return a.writes.total() }

// write stores the unsaved slots, and up to most dirty ones, the oldest first.
func (a *Allocator) write(now int64, most int) error {
	most = min(most, len(a.dirty))
	if err := a.transact(now, func() error { return a.store.put(now, a.utc(), a.unsaved, a.dirty[:most]) }); err != nil {
		a.retryAt = now + retryAfter
		a.fault = fmt.Errorf("write leases to %s: %w", a.cfg.Path, err)
		return a.fault
	}
	a.written(now, most)
	return nil
}

// transact runs a transaction. If the database is damaged or was deleted, it begins a new one first.
func (a *Allocator) transact(now int64, fn func() error) error {
	return a.writes.time(func() error {
		err := errAstray
		if !a.store.astray() {
			err = a.store.transact(fn)
		}
		if errors.Is(err, errAstray) || errors.Is(err, errDamaged) {
			if err = a.beginAnew(now, err); err == nil {
				err = a.store.transact(fn)
			}
		}
		return err
	})
}

// beginAnew replaces a database that is damaged or was deleted while the server runs. The index has all
// rows, except preferences for tables that are in no pool now.
func (a *Allocator) beginAnew(now int64, cause error) error {
	aside, err := a.store.leave(a.utc())
	if err != nil {
		return fmt.Errorf("%w: %w", cause, err)
	}
	if a.store, err = openStore(a.cfg.Path, a.cfg.Epoch, a.log); err == nil {
		err = a.fill(now)
	}
	if err != nil {
		return errors.Join(err, a.store.close())
	}
	a.log.Warn("the database was begun anew, with all leases", "path", a.cfg.Path, "leases", len(a.due), "err", cause, "aside", aside)
	return nil
}

// fill writes the whole index into a new database.
func (a *Allocator) fill(now int64) error {
	return a.store.start(0, a.log, func() error {
		for ifname, m := range a.marks.byIfname {
			if err := a.store.putMark(ifname, m); err != nil {
				return err
			}
		}
		return a.store.put(now, a.utc(), a.all())
	})
}

// all returns every slot of the index.
func (a *Allocator) all() []*slot {
	all := slices.Concat(a.unsaved, a.dirty, a.due)
	for _, p := range a.pools {
		for s := p.ring.next; s != &p.ring; s = s.next {
			all = append(all, s)
		}
	}
	return all
}

// written notes that the unsaved slots and the first n dirty ones are stored.
func (a *Allocator) written(now int64, n int) {
	for _, s := range a.unsaved {
		s.unsaved, s.history = false, !s.held
	}
	a.unsaved = empty(a.unsaved)
	for _, s := range a.dirty[:n] {
		s.dirty, s.history = false, !s.held
	}
	a.dirty = slices.Delete(a.dirty, 0, n)
	a.clockAt, a.retryAt, a.fault = now+clockEvery, 0, nil
}

// stopwatch adds up how long calls of functions take.
type stopwatch struct{ before, began atomic.Int64 } // began is 0 between calls

var processStart = time.Now()

func (w *stopwatch) time(f func() error) error {
	began := time.Since(processStart)
	w.began.Store(int64(began))
	defer func() {
		w.before.Add(int64(time.Since(processStart) - began))
		w.began.Store(0)
	}()
	return f()
}

// total may be called at any time.
func (w *stopwatch) total() time.Duration {
	total := time.Duration(w.before.Load())
	if began := w.began.Load(); began != 0 {
		total += time.Since(processStart) - time.Duration(began)
	}
	return total
}
