// Package allocator knows who holds which routing table: leases, the pools they come from,
// and their end. It hides the database, which is the truth, and the index of it in memory.
package allocator

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"strconv"
	"strings"
	"time"
)

// Errors of refusals, for callers that answer each differently. Result.Err is one of the first three.
// Commit returns ErrStorage with its cause.
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

var familyNames = map[Family]string{Unspec: "unspec", Inet: "inet", Inet6: "inet6"}

// String returns the name of the family as logs and the leases view have it.
func (f Family) String() string {
	if name, ok := familyNames[f]; ok {
		return name
	}
	return "family " + strconv.Itoa(int(f))
}

// Key is what a table is leased to. Addr is canonical text: keys are compared as bytes.
type Key struct {
	Family Family
	Ifname string
	Addr   string
}

// Pool is the tables First to First+Count-1. None of them is the kernel's: 0 and 253 to 255.
type Pool struct {
	First uint32
	Count uint64
}

// Epoch says where a lease is in force: in one boot (its id) and one network namespace (its
// SO_NETNS_COOKIE, 0 where the kernel has none). Rules die with either of them.
type Epoch struct {
	Boot  string
	Netns uint64
}

// Config is what Open needs to know. It takes the values as they are: whoever reads them says what is wrong with them.
type Config struct {
	Path  string          // of the database file, absolute
	Pools map[Family]Pool // a family without a pool is not served
	Limits
	Epoch Epoch
	Marks Marks

	// Avoid reports whether table must not go to key now, because rules of the host refer to it, or it
	// has routes. lastHolder held the table last, in this database and epoch, and is the zero Key if it
	// was never held. With lastResort no other table was found, and the host has to be read again. A nil
	// Avoid never does.
	Avoid func(table uint32, key, lastHolder Key, lastResort bool) bool

	// Taken reports whether rules of the host show that another key than this one holds table,
	// so that a row which says that key does is of an older database. A nil Taken never does.
	Taken func(table uint32, key Key) bool

	// Sources returns the tables that rules of the host look up for packets from exactly the address
	// of key, in the order of the rules. A nil Sources returns none.
	Sources func(key Key) []uint32

	// Named reports whether a rule of the host looks up a table. A nil Named never does.
	Named func(family Family, table uint32) bool

	Self uint32 // the uid of the server
}

// Limits may change while the allocator works. RootTables of each pool are for root and Self; other users share the
// rest. UserTables is how many of each pool a user may hold of that; 0: all.
type Limits struct {
	Timeout                int64 // seconds that a lease lasts
	RootTables, UserTables uint64
}

// Sender tells processes that ask apart, as far as the kernel knows them. Name is a hash of the name of its
// socket; 0: it has none.
type Sender struct {
	PID  int32
	Name uint64
}

// Op is one request: to acquire or renew a lease, or with Release to give it back. The allocator keeps
// copies of its texts, so they may be parts of something larger.
type Op struct {
	Release bool
	Key     Key
	Tag     string // replaces the tag of the lease, also when empty
	UID     uint32 // who asks: only the owner and root renew and release, and root takes over leases of others
	Sender  Sender
	Gone    bool   // the sender has ended, and nobody knows whether it was root: it may release what it leased
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

// own gives the lease its own copy of its texts.
func (l *Lease) own() {
	texts := l.Ifname + l.Addr + l.Tag
	at := len(l.Ifname) + len(l.Addr)
	l.Ifname, l.Addr, l.Tag = texts[:len(l.Ifname)], texts[len(l.Ifname):at], texts[at:]
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
// its Key is set. Err is set when the outcome is Refused. A Pending result is true once Commit has
// returned nil. If Commit fails the op is refused.
type Result struct {
	Outcome Outcome
	Lease   Lease
	Err     error
	Pending bool
}

// Allocator leases tables. Callers share it under one mutex, but may call Writing at any time. Every
// now is a second of CLOCK_MONOTONIC_RAW.
type Allocator struct {
	cfg Config
	utc func() time.Time
	log *slog.Logger

	store  *store
	writes stopwatch
	pools  map[Family]*pool
	byKey  map[Key]*slot // the table that the key holds, or the one it held last if no other key has it now
	due    expiryHeap    // all leases in force
	ended  int64         // the newest end of a lease
	marks  marks         // of interfaces
	pairs  pairs

	touched map[Key]struct{} // keys with a change that is not committed
	undo    []func()         // one for each such change
	unsaved []*slot          // leases that these changes created or ended
	dirty   []*slot          // other slots that differ from the database, in order of change
	expired []Lease          // not yet returned by Tick

	flushAt int64 // when dirty is to be written
	clockAt int64 // when the clock row is to be written
	retryAt int64 // no attempt to write before, after one failed
	fault   error // of the last write; nil: it did not fail
}

// Decide applies an op and returns its result. The caller may answer a pending result after the next
// Commit, and any other at once, as that of a renewal.
func (a *Allocator) Decide(now int64, op *Op) Result {
	a.expire(now)
	s, p := a.byKey[op.Key], a.pools[op.Key.Family]
	held := s != nil && s.held
	_, touched := a.touched[op.Key]
	nothing := Result{Lease: Lease{Key: op.Key}, Pending: touched}
	switch {
	case held && !op.mayUse(s), op.Gone && !op.Release:
		nothing.Err = ErrNotOwner
		return nothing
	case op.Release && !held:
		nothing.Outcome = NotHeld
		return nothing
	case op.Release:
		a.release(s)
		return Result{Outcome: Released, Lease: s.Lease, Pending: true}
	case p == nil:
		nothing.Err = ErrFamily
		return nothing
	}
	takeOver := held && op.UID == 0 && !a.first(s.Owner)
	// A lease of an earlier run of the server may have been root's to renew.
	moves := takeOver && s.sender != (Sender{}) && a.cfg.Named != nil && a.cfg.Named(op.Key.Family, s.Table)
	if held && p.contains(s.Table) && !moves {
		return a.renew(now, s, op, touched)
	}
	if !held {
		if err := a.mayHold(p, op.UID); err != nil {
			nothing.Err, nothing.Pending = err, len(a.undo) > 0
			return nothing
		}
	}
	next := a.choose(now, p, op, s)
	if next == nil && held && !moves {
		return a.renew(now, s, op, touched)
	}
	if next == nil {
		nothing.Err, nothing.Pending = ErrExhausted, len(a.undo) > 0
		return nothing
	}
	owner := op.UID
	if held {
		if !takeOver {
			owner = s.Owner
		}
		a.release(s)
		if !p.contains(s.Table) {
			s = nil // the key keeps no preference for it
		}
	}
	a.hold(next, s, Lease{Key: op.Key, Table: next.Table, Tag: op.Tag, Owner: owner, Expires: a.expiry(now)})
	next.sender = op.Sender
	return Result{Outcome: Granted, Lease: next.Lease, Pending: true}
}

// mayUse reports whether the sender may renew or release a lease.
func (op *Op) mayUse(s *slot) bool {
	if op.Gone {
		same := op.Sender.PID == s.sender.PID || op.Sender.Name == s.sender.Name && op.Sender.Name != 0
		return op.Release && same && s.Owner == 0
	}
	return op.UID == 0 || op.UID == s.Owner
}

// first reports whether a user is root or the server's own, for whom a share of each pool is kept.
func (a *Allocator) first(uid uint32) bool { return uid == 0 || uid == a.cfg.Self }

// mayHold returns why a user may not hold one more table of a pool; nil if he may.
func (a *Allocator) mayHold(p *pool, uid uint32) error {
	switch {
	case a.first(uid):
	case p.byUsers+a.cfg.RootTables >= p.count:
		return fmt.Errorf("%w for users: %d of %d are kept for root (root_tables)", ErrExhausted, a.cfg.RootTables, p.count)
	case a.cfg.UserTables > 0 && p.byUser[uid] >= a.cfg.UserTables:
		return fmt.Errorf("%w for uid %d, which holds %d (user_tables)", ErrExhausted, uid, p.byUser[uid])
	}
	return nil
}

// count notes that a lease of a pool begins, with 1, or ends, with -1.
func (a *Allocator) count(p *pool, owner uint32, by int) {
	p.held += uint64(by)
	if a.first(owner) {
		return
	}
	p.byUsers += uint64(by)
	if p.byUser[owner] += uint64(by); p.byUser[owner] == 0 {
		delete(p.byUser, owner)
	}
}

func (a *Allocator) renew(now int64, s *slot, op *Op, pending bool) Result {
	if s.Tag != op.Tag {
		s.Tag = strings.Clone(op.Tag)
	}
	outcome := Renewed
	if op.UID == 0 && !a.first(s.Owner) {
		outcome = Granted // to root, who takes it over
		if p := a.pools[s.Family]; p.contains(s.Table) {
			a.count(p, s.Owner, -1)
			a.count(p, 0, 1)
		}
		s.Owner = 0
	}
	s.sender = op.Sender
	s.Expires = a.expiry(now)
	if s.Expires < s.due { // the timeout is shorter than in the run before
		a.due.reorder(s)
	}
	a.markDirty(now, s)
	return Result{Outcome: outcome, Lease: s.Lease, Pending: pending}
}

// expiry is the end of a lease that begins now. The longest timeouts must not wrap.
func (a *Allocator) expiry(now int64) int64 {
	if a.cfg.Timeout > math.MaxInt64-now {
		return math.MaxInt64
	}
	return now + a.cfg.Timeout
}

// choose returns a free table for a key, nil if there is none. It tries, in this order, the table that the
// key wants, or, if it names none, those that rules from its address look up; the one that the key had
// last; those that its interface has in the other family; the lowest that was never granted; the one that is unused for
// longest. A table that another interface has in the other family comes behind all others. If Avoid forbids a table,
// choose asks again, as the last resort, before it returns nil.
func (a *Allocator) choose(now int64, p *pool, op *Op, last *slot) *slot {
	key := op.Key
	wanted := []uint32{op.Want}
	if op.Want == 0 && a.cfg.Sources != nil {
		wanted = a.cfg.Sources(key)
	}
	for _, lastResort := range []bool{false, true} {
		avoided := false
		fits := func(table uint32, s *slot) bool {
			if s != nil && s.reserved > now && s.Key != key {
				return false
			}
			last := s.lastHolder()
			if table == op.Want && key.Family == Unspec && last == (Key{}) {
				last = key // a holder that asks for its table again, after the database was lost: no rule shows it
			}
			if a.cfg.Avoid == nil || !a.cfg.Avoid(table, key, last, lastResort) {
				return true
			}
			avoided = true
			return false
		}
		if s := a.prefer(p, op, wanted, last, fits); s != nil {
			return s
		}
		lone, left := a.pairs.lone(key, op.UID), false
		s := p.pickFree(func(table uint32, s *slot) bool {
			if !lone(table) {
				left = true
				return false
			}
			return fits(table, s)
		})
		if s == nil && left {
			s = p.pickFree(fits)
		}
		if s != nil || !avoided {
			return s
		}
	}
	return nil
}

func (a *Allocator) prefer(p *pool, op *Op, wanted []uint32, last *slot, fits func(uint32, *slot) bool) *slot {
	for _, table := range wanted {
		if s := p.pick(table, fits); s != nil {
			return s
		}
	}
	if last != nil && !last.held && fits(last.Table, last) {
		return last
	}
	for _, table := range a.pairs.wanted(op.Key, op.UID) {
		if s := p.pick(table, fits); s != nil {
			return s
		}
	}
	return nil
}

// SetLimits changes the limits. Leases in force stay: the next renewal of each follows the new timeout.
func (a *Allocator) SetLimits(l Limits) { a.cfg.Limits = l }

// Pool returns how many tables of a family are leased, and how many there are; 0 for a family that is not served.
func (a *Allocator) Pool(f Family) (leased, tables uint64) {
	if p := a.pools[f]; p != nil {
		return p.held, p.count
	}
	return 0, 0
}

// Fault returns why the last write of leases failed, nil if it did not.
func (a *Allocator) Fault() error { return a.fault }

// Each calls f with each lease in force.
func (a *Allocator) Each(f func(Lease)) {
	for _, s := range a.due {
		f(s.Lease)
	}
}

// Held returns how many leases are in force.
func (a *Allocator) Held() int { return len(a.due) }
