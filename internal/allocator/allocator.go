// Package allocator knows who holds which routing table: leases, the pools they come from,
// and their end. It hides the database: SQLite is the truth, what is in memory its index.
package allocator

import (
	"container/heap"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Errors of refusals, for callers that answer each differently. They are wrapped in what
// Result.Err and Commit return.
var (
	ErrExhausted = errors.New("no table is free")
	ErrFamily    = errors.New("family is not served")
	ErrNotOwner  = errors.New("the lease belongs to another user")
	ErrStorage   = errors.New("the lease database cannot be written")
)

// Family is an address family by its AF_ number.
type Family uint8

// The families that can have a pool. Unspec is for keys that are no address.
const (
	Unspec Family = 0
	Inet   Family = 2
	Inet6  Family = 10
)

// String returns the name of the family as logs and the leases view have it.
func (f Family) String() string {
	switch f {
	case Unspec:
		return "unspec"
	case Inet:
		return "inet"
	case Inet6:
		return "inet6"
	}
	return "family " + strconv.Itoa(int(f))
}

// Key is what a table is leased to. Addr is canonical text: keys are compared as bytes.
type Key struct {
	Family Family
	Ifname string
	Addr   string
}

// Pool is the tables First to First+Count-1, without the ones the kernel reserves.
type Pool struct {
	First uint32
	Count uint64
}

// Boot says where leases are worth something: in one boot (its id) and one network
// namespace (its SO_NETNS_COOKIE, 0 where the kernel has none).
type Boot struct {
	ID    string
	Netns uint64
}

// Config is what Open needs to know.
type Config struct {
	Path    string          // of the database file
	Pools   map[Family]Pool // a family without a pool is not served
	Timeout int64           // seconds that a lease lasts
	Boot    Boot
	Marks   Marks

	// Avoid reports whether table must not go to key now, because rules of the host refer to
	// it. lastHolder held the table last, in this database, boot and namespace; it is the
	// zero Key if nobody did. fresh asks for a look that is not cached. A nil Avoid never does.
	Avoid func(table uint32, key, lastHolder Key, fresh bool) bool

	// Taken reports whether rules of the host show that another than key holds table, so that a
	// row which says that key does is of an older database. A nil Taken never does.
	Taken func(table uint32, key Key) bool

	// Beside runs work that may wait for the disk, and returns when it is done. It may give up
	// the mutex of the callers meanwhile, for Renew, Mark, Next and Busy. A nil Beside does not.
	Beside func(work func())
}

// Op is one request: for a table, which also renews, or with Release to give it back. Of its
// texts the allocator keeps copies, so that they may be parts of something larger.
type Op struct {
	Release bool
	Key     Key
	Tag     string // replaces the tag of the lease, also when empty
	UID     uint32 // who asks: only the owner and root renew and release
	Want    uint32 // the table for a key that holds none, if it is free; 0: any
}

// Lease is the grant of a table to a key. Expires is a second of CLOCK_MONOTONIC_RAW; the
// lease has ended when the clock reads it.
type Lease struct {
	Key
	Table   uint32
	Tag     string
	Owner   uint32 // uid
	Expires int64
}

// Outcome is what became of an Op.
type Outcome int

// The outcomes. NotHeld, for the release of what is not held, is a success.
const (
	Refused Outcome = iota
	Granted
	Renewed
	Released
	NotHeld
)

// Result answers one Op. Lease has the lease granted, renewed or released; otherwise only
// its Key is set. Err is set when the outcome is Refused. Pending tells a result that holds
// only once Commit has returned nil.
type Result struct {
	Outcome Outcome
	Lease   Lease
	Err     error
	Pending bool
}

// Stats counts tables and leases of one family.
type Stats struct {
	Held    uint64 // leases of tables in the pool
	Free    uint64 // tables of the pool that nobody holds
	Outside uint64 // leases of tables that are in no pool now; kept until they end
}

const (
	flushAfter = 1   // seconds that a renewal may wait for the disk, and longer behind others
	flushMost  = 512 // renewals that one write takes: some milliseconds
	flushAlong = 16  // renewals that a commit takes along, if there are no more
	retryAfter = 2   // seconds between writes that fail
	clockEvery = 60  // seconds between writes of the clock row
)

// Allocator leases tables. It is not safe for concurrent use: callers share it under one
// mutex, and see Beside. Every now is a second of CLOCK_MONOTONIC_RAW.
type Allocator struct {
	timeout int64
	avoid   func(table uint32, key, lastHolder Key, fresh bool) bool
	taken   func(table uint32, key Key) bool
	beside  func(work func())
	utc     func() time.Time
	log     *slog.Logger

	store *store
	pools map[Family]*pool
	byKey map[Key]*slot // what the key holds, or held last and nobody has needed since
	due   expiryHeap    // all leases in force
	ended int64         // the newest end of a lease
	open  *Batch        // waits for Commit
	marks marks         // of interfaces
	spare *Batch        // of the last Decide, for the next one if nothing depends on it

	fresh   []*slot // what open created or ended
	dirty   []*slot // what else the database does not know yet, in order of change
	expired []Lease // not yet returned by Tick

	busy    bool            // the database is written to: nothing else here changes but
	renewed map[*slot]Lease // renewals in the meantime

	flushAt int64 // when dirty is to be written
	clockAt int64 // when the clock row is to be written
	retryAt int64 // no attempt to write before, after one failed
}

// Batch is the result of one Decide.
type Batch struct {
	now     int64
	results []Result
	touched map[Key]struct{} // keys with a change that is not committed
	undo    []func()         // one for each such change
	err     error
}

// Results returns one result for each Op, in order. A failing Commit changes the pending
// ones.
func (b *Batch) Results() []Result { return b.results }

// Decide applies ops, in order, and returns a result for each. Pending results may be
// answered after Commit; all others, renewals among them, at once. A batch that is not
// committed before the next Decide, Tick, TakeMark or Close is undone; any other is not valid
// any longer either.
func (a *Allocator) Decide(now int64, ops []Op) *Batch {
	a.abandon()
	a.expire(now)
	b := a.spare
	if b == nil || len(b.undo) > 0 {
		b = &Batch{}
		a.spare = b
	}
	b.now, b.results = now, b.results[:0]
	a.Extend(b, ops)
	return b
}

// Extend applies more ops in a batch that is neither committed nor undone yet.
func (a *Allocator) Extend(b *Batch, ops []Op) {
	for i := range ops {
		b.results = append(b.results, a.decide(b, &ops[i]))
	}
	if len(b.undo) > 0 {
		a.open = b
	}
}

func (a *Allocator) decide(b *Batch, op *Op) Result {
	s, p := a.byKey[op.Key], a.pools[op.Key.Family]
	held := s != nil && s.held
	_, touched := b.touched[op.Key]
	nothing := Result{Lease: Lease{Key: op.Key}, Pending: touched}
	switch {
	case held && op.UID != 0 && op.UID != s.Owner:
		nothing.Err = ErrNotOwner
		return nothing
	case op.Release && !held:
		nothing.Outcome = NotHeld
		return nothing
	case op.Release:
		a.end(b, b.now, s)
		return Result{Outcome: Released, Lease: s.Lease, Pending: true}
	case p == nil:
		nothing.Err = ErrFamily
		return nothing
	case held && p.contains(s.Table):
		return a.renew(b, s, op.Tag, touched)
	}
	next := a.choose(p, op.Key, s, op.Want)
	if next == nil && held {
		return a.renew(b, s, op.Tag, touched)
	}
	if next == nil {
		nothing.Err, nothing.Pending = ErrExhausted, len(b.undo) > 0
		return nothing
	}
	owner := op.UID
	if held {
		owner = s.Owner
		a.end(b, b.now, s)
		s = nil // of no pool, and so forgotten
	}
	a.hold(b, next, s, Lease{Key: op.Key, Table: next.Table, Tag: op.Tag, Owner: owner, Expires: a.expiry(b.now)})
	return Result{Outcome: Granted, Lease: next.Lease, Pending: true}
}

func (a *Allocator) renew(b *Batch, s *slot, tag string, pending bool) Result {
	if s.Tag != tag {
		tag = strings.Clone(tag)
	}
	a.prolong(b.now, s, tag, a.expiry(b.now))
	return Result{Outcome: Renewed, Lease: s.Lease, Pending: pending}
}

func (a *Allocator) prolong(now int64, s *slot, tag string, expires int64) {
	s.Tag, s.Expires = tag, expires
	if s.Expires < s.due { // the timeout is shorter than in the run before
		a.due.settle(s)
	}
	a.soil(now, s)
}

// expiry is the end of a lease that begins now. The longest timeouts must not wrap.
func (a *Allocator) expiry(now int64) int64 {
	if a.timeout > math.MaxInt64-now {
		return math.MaxInt64
	}
	return now + a.timeout
}

// choose returns the free table for a key: the one it wants, else the one it had last, else the lowest that was
// never used, else the one unused for longest. It returns nil if there is none, which it
// only believes after a fresh look at what is avoided.
func (a *Allocator) choose(p *pool, key Key, last *slot, want uint32) *slot {
	for _, fresh := range []bool{false, true} {
		avoided := false
		fits := func(table uint32, holder Key) bool {
			if a.avoid == nil || !a.avoid(table, key, holder, fresh) {
				return true
			}
			avoided = true
			return false
		}
		if s := p.pick(want, fits); s != nil {
			return s
		}
		if last != nil && !last.held && fits(last.Table, last.lastHolder()) {
			return last
		}
		first, second := p.pickUnused, p.pickOldest
		if p.free >= p.enough {
			first, second = second, first
		}
		s := first(fits)
		if s == nil {
			s = second(fits)
		}
		if s != nil || !avoided {
			return s
		}
	}
	return nil
}

// hold gives a free table of the pool to a key that holds none; had is what it had last.
func (a *Allocator) hold(b *Batch, s, had *slot, l Lease) {
	p, before, unborn := a.pools[l.Family], s.Lease, s.unborn()
	preferred := !unborn && a.byKey[before.Key] == s
	prev, next := s.prev, s.next
	if unborn {
		p.mark(s.Table)
	} else {
		p.pull(s)
	}
	if preferred {
		delete(a.byKey, before.Key)
	}
	p.held++
	l.own()
	s.Lease, s.held = l, true
	a.byKey[l.Key] = s
	heap.Push(&a.due, s)
	a.refresh(s)
	b.change(l.Key, func() {
		heap.Remove(&a.due, s.index)
		if delete(a.byKey, l.Key); had != nil {
			a.byKey[l.Key] = had
		}
		if preferred {
			a.byKey[before.Key] = s
		}
		p.held--
		s.Lease, s.held = before, false
		if unborn {
			p.unmark(s.Table)
		} else {
			p.insert(s, prev, next)
		}
	})
}

// own gives the lease its own copy of its texts.
func (l *Lease) own() {
	texts := l.Ifname + l.Addr + l.Tag
	at := len(l.Ifname) + len(l.Addr)
	l.Ifname, l.Addr, l.Tag = texts[:len(l.Ifname)], texts[len(l.Ifname):at], texts[at:]
}

// end frees the table of a lease. Without a batch it is for good.
func (a *Allocator) end(b *Batch, now int64, s *slot) {
	p, ended, local := a.pools[s.Family], s.ended, s.local
	inside, preferred := p.contains(s.Table), a.byKey[s.Key] == s
	heap.Remove(&a.due, s.index)
	a.ended++
	s.held, s.ended, s.local = false, a.ended, true
	if inside {
		p.held--
		p.push(s)
	} else if preferred {
		delete(a.byKey, s.Key)
	}
	if b == nil {
		a.soil(now, s)
		return
	}
	a.refresh(s)
	b.change(s.Key, func() {
		if inside {
			p.held++
			p.pull(s)
		} else if preferred {
			a.byKey[s.Key] = s
		}
		s.held, s.ended, s.local = true, ended, local
		heap.Push(&a.due, s)
	})
}

func (b *Batch) change(key Key, undo func()) {
	if b.touched == nil {
		b.touched = make(map[Key]struct{})
	}
	b.touched[key] = struct{}{}
	b.undo = append(b.undo, undo)
}

// expire ends the leases that are over.
func (a *Allocator) expire(now int64) (some bool) {
	for len(a.due) > 0 && a.due[0].due <= now {
		s := a.due[0]
		if s.Expires > s.due {
			a.due.settle(s)
			continue
		}
		a.end(nil, now, s)
		a.expired = append(a.expired, s.Lease)
		some = true
	}
	return some
}

// soil notes that the database has to learn the state of s some time.
func (a *Allocator) soil(now int64, s *slot) {
	if s.dirty || s.fresh {
		return
	}
	if len(a.dirty) == 0 {
		a.flushAt = now + flushAfter
	}
	s.dirty = true
	a.dirty = append(a.dirty, s)
}

// refresh notes that the database has to learn it at the next commit.
func (a *Allocator) refresh(s *slot) {
	if !s.fresh {
		s.fresh = true
		a.fresh = append(a.fresh, s)
	}
}

// Renew decides op while the database is written to, if that takes no other write: if it is
// about a lease that is not part of the one under way, renews it, and need not move it to
// another table, or is refused to somebody else.
func (a *Allocator) Renew(now int64, op Op) (r Result, ok bool) {
	s := a.byKey[op.Key]
	if s == nil || !s.held || s.fresh {
		return Result{}, false
	}
	l, again := a.renewed[s]
	if !again {
		l = s.Lease
	}
	switch {
	case l.Expires <= now:
		return Result{}, false
	case op.UID != 0 && op.UID != l.Owner:
		return Result{Lease: Lease{Key: op.Key}, Err: ErrNotOwner}, true
	case op.Release, !a.pools[s.Family].contains(s.Table):
		return Result{}, false
	}
	if l.Expires = a.expiry(now); l.Tag != op.Tag {
		l.Tag = strings.Clone(op.Tag)
	}
	a.renewed[s] = l
	return Result{Outcome: Renewed, Lease: l}, true
}

// Busy tells whether the database is written to, so that only Renew decides.
func (a *Allocator) Busy() bool { return a.busy }

// atDisk runs what may wait for the disk. Its caller then catches up.
func (a *Allocator) atDisk(work func() error) (err error) {
	a.busy = true
	a.beside(func() { err = work() })
	a.busy = false
	return err
}

// catchUp enters the renewals of the meantime.
func (a *Allocator) catchUp(now int64) {
	for s, l := range a.renewed {
		a.prolong(now, s, l.Tag, l.Expires)
	}
	if len(a.renewed) > 0 { // a map that is cleared keeps its memory
		a.renewed = make(map[*slot]Lease)
	}
}

// Commit writes what b created or ended in one transaction, with renewals if few of them wait.
// If that fails, every pending result of b becomes a refusal with the error returned, which
// is ErrStorage, and the allocator is as if those ops had not been asked; the renewals
// stay. Without pending results Commit does nothing.
func (a *Allocator) Commit(b *Batch) error {
	if a.open != b {
		return b.err
	}
	a.open = nil
	along := len(a.dirty)
	if along > flushAlong {
		along = 0 // they are not what a new lease waits for
	}
	if err := a.flush(b.now, along); err != nil {
		a.rollback(b, fmt.Errorf("%w: %w", ErrStorage, err))
		return b.err
	}
	b.undo = empty(b.undo)
	clear(b.touched)
	return nil
}

func (a *Allocator) abandon() {
	if a.open != nil {
		a.rollback(a.open, fmt.Errorf("%w: the batch was not committed", ErrStorage))
		a.open = nil
	}
}

func (a *Allocator) rollback(b *Batch, err error) {
	b.err = err
	for i := len(b.undo) - 1; i >= 0; i-- {
		b.undo[i]()
	}
	// What it ended stays dirty, which costs a write of what the database has already. What it
	// created is known to nobody any more.
	for _, s := range a.fresh {
		if s.fresh = false; !s.unborn() {
			a.soil(b.now, s)
		}
	}
	a.fresh = empty(a.fresh)
	for i, r := range b.results {
		if r.Pending {
			b.results[i] = Result{Outcome: Refused, Lease: Lease{Key: r.Lease.Key}, Err: err, Pending: true}
		}
	}
}

// Tick ends the leases that are over and writes what waits to be written. It returns the
// leases that ended since the last Tick, also when the write fails and is tried again.
func (a *Allocator) Tick(now int64) ([]Lease, error) {
	a.abandon()
	due := a.expire(now) || len(a.dirty) > 0 && now >= a.flushAt || now >= a.clockAt
	var err error
	if due && now >= a.retryAt {
		err = a.flush(now, flushMost)
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

// flush writes what a commit waits for, and up to most others, the oldest first.
func (a *Allocator) flush(now int64, most int) error {
	behind := min(len(a.dirty), most)
	err := a.atDisk(func() (err error) {
		behind, err = a.write(now, behind)
		return err
	})
	if err != nil {
		a.retryAt = now + retryAfter
		err = fmt.Errorf("write leases to %s: %w", a.store.path, err)
	} else {
		a.written(now, behind)
	}
	a.catchUp(now)
	return err
}

// write writes what is fresh, and at least the first of what is dirty. It returns how many.
func (a *Allocator) write(now int64, behind int) (int, error) {
	switch {
	case a.store.astray():
		return len(a.dirty), a.restore(now)
	case a.store.overwritten():
		if err := a.store.amend(now, a.utc(), a.all()); err != nil {
			return 0, err
		}
		a.log.Warn("another program wrote to the database; its leases are written again", "path", a.store.path, "leases", len(a.due))
		return len(a.dirty), nil
	}
	return behind, a.store.save(now, a.utc(), a.fresh, a.dirty[:behind])
}

// restore makes a database anew where there is none any more, and writes all that is known
// into it. What cannot be helped is lost: preferences for tables that are in no pool now.
func (a *Allocator) restore(now int64) error {
	if err := a.store.vacate(); err != nil {
		return err
	}
	next, err := openStore(a.store.path, a.store.boot, a.log)
	a.store = next // also if that failed: the file that it made is ours to try again
	if err == nil {
		err = a.store.fill(a.all(), a.marks.byIfname, now, a.utc(), a.log)
	}
	if err != nil {
		return errors.Join(err, next.close())
	}
	a.log.Warn("the database was deleted, or moved away; its leases are written anew", "path", next.path, "leases", len(a.due))
	return nil
}

// all is every slot that the database is to know.
func (a *Allocator) all() []*slot {
	all := slices.Concat(a.fresh, a.dirty, a.due)
	for _, p := range a.pools {
		for s := p.ring.next; s != &p.ring; s = s.next {
			all = append(all, s)
		}
	}
	return all
}

// written notes that the database knows all that is fresh, and the first n of what is dirty.
func (a *Allocator) written(now int64, n int) {
	for _, s := range a.fresh {
		s.fresh, s.past = false, !s.held
	}
	a.fresh = empty(a.fresh)
	for _, s := range a.dirty[:n] {
		s.dirty, s.past = false, !s.held
	}
	a.dirty = slices.Delete(a.dirty, 0, n)
	a.clockAt, a.retryAt = now+clockEvery, 0
}

// empty keeps the memory of a list, but nothing that it points to.
func empty[T any](list []T) []T {
	clear(list)
	return list[:0]
}

// Close writes what waits and gives the database back. The allocator is not usable after.
func (a *Allocator) Close(now int64) error {
	a.abandon()
	return errors.Join(a.flush(now, len(a.dirty)), a.store.close())
}

// Stats counts leases and free tables of each family that is served or has leases left.
func (a *Allocator) Stats() map[Family]Stats {
	all := make(map[Family]Stats)
	for f, p := range a.pools {
		all[f] = Stats{Held: p.held, Free: p.count - p.held}
	}
	for _, s := range a.due {
		if !a.pools[s.Family].contains(s.Table) {
			st := all[s.Family]
			st.Outside++
			all[s.Family] = st
		}
	}
	return all
}
