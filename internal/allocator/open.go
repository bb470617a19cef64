package allocator

import (
	"cmp"
	"container/heap"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"
	"unicode"
	"unicode/utf8"
)

// Open opens the database, made new if there is none, and takes over what it finds: leases
// of this boot and network namespace stay in force for a full timeout at least, since their
// holders could not renew while nobody served; leases of other ones leave only a preference.
// The first Open of a database of the original keeps a copy of it beside it. An error says
// what to do; then the database is as it was.
func Open(cfg Config, now int64, log *slog.Logger) (*Allocator, error) {
	a, err := open(cfg, now, log)
	if err != nil {
		return nil, fmt.Errorf("open database %s: %w", cfg.Path, err)
	}
	return a, nil
}

func open(cfg Config, now int64, log *slog.Logger) (_ *Allocator, err error) {
	a := &Allocator{
		timeout: cfg.Timeout,
		avoid:   cfg.Avoid,
		taken:   cfg.Taken,
		beside:  cfg.Beside,
		utc:     time.Now,
		log:     log,
		pools:   make(map[Family]*pool),
		renewed: make(map[*slot]Lease),
	}
	if a.beside == nil {
		a.beside = func(work func()) { work() }
	}
	switch {
	case len(cfg.Pools) == 0:
		return nil, errors.New("no family has a pool")
	case cfg.Timeout <= 0:
		return nil, fmt.Errorf("leases of %d seconds: must be positive", cfg.Timeout)
	case cfg.Boot.ID == "":
		return nil, errors.New("the boot has no id")
	}
	for f, p := range cfg.Pools {
		if a.pools[f], err = newPool(f, p); err != nil {
			return nil, err
		}
	}
	path, err := filepath.Abs(cfg.Path)
	if err != nil {
		return nil, err
	}

	copied := ""
	defer func() {
		if err == nil {
			return
		}
		err = errors.Join(err, a.store.close())
		if copied != "" {
			err = errors.Join(err, os.Remove(copied)) // the original is untouched
		}
	}()
	if a.store, err = openStore(path, cfg.Boot, log); err != nil {
		return nil, err
	}
	version, original, err := a.store.version()
	if err != nil {
		return nil, err
	}
	if err := a.store.check(); err != nil {
		return nil, err
	}
	if original {
		if copied, err = a.store.copyOriginal(path); err != nil {
			return nil, err
		}
	}
	if err := a.store.prepareJournal(log); err != nil {
		return nil, err
	}
	behind := 0
	if err := a.store.transact(func() error {
		if err := a.store.migrate(version); err != nil {
			return err
		}
		if err := a.load(now, version, log); err != nil {
			return err
		}
		if err := a.loadMarks(cfg.Marks); err != nil {
			return err
		}
		behind = min(len(a.dirty), flushMost)
		return a.store.put(now, a.utc(), a.fresh, a.dirty[:behind])
	}); err != nil {
		return nil, err
	}
	a.store.settle()
	a.written(now, behind)
	if original {
		log.Info("database of the original taken over", "path", path, "copy", copied)
	}
	return a, nil
}

// load builds the index from the database, which had a schema version, and marks what the
// database is to have differently: only a later end of leases may wait.
func (a *Allocator) load(now int64, version int64, log *slog.Logger) error {
	type number struct {
		family Family
		table  uint32
	}
	history, err := a.store.history()
	if err != nil {
		return err
	}
	var rows int64
	if err := a.store.db.queryRow("SELECT count(*) FROM RtTables", &rows); err != nil {
		return err
	}
	// Maps that grow on the way are a good part of a start with many leases.
	most := len(history) + int(rows)
	known := make(map[number]*slot, most)
	a.byKey = make(map[Key]*slot, most)
	a.due = make(expiryHeap, 0, rows)
	for _, s := range history {
		s.past = true
		known[number{s.Family, s.Table}] = s
		a.ended = s.ended
	}

	live := make(map[Key]*slot, rows)
	var over []*slot // rows that are no lease any more
	elsewhere := 0
	type reject struct {
		id  int64
		why string
	}
	var rejects []reject
	if err := a.store.leaseRows(func(r leaseRow) error {
		if version < sumsSince {
			r.sum = nil
		}
		s, boot, err := r.parse()
		if err != nil {
			log.Warn("row of RtTables makes no sense, moved to table rejected", "table", r.table, "family", r.family,
				"ifname", r.ifname, "addr", r.addr, "expires", r.expires, "err", err)
			rejects = append(rejects, reject{r.id, err.Error()})
			return nil
		}
		s.local = boot == a.store.boot
		s.held = s.local
		if boot.ID == "" { // written by the original
			s.held = s.Expires > now && s.Expires <= a.expiry(now)
			s.Owner = 0
		}
		if !s.held {
			over = append(over, s)
			elsewhere++
			return nil
		}
		if a.taken != nil && a.taken(s.Table, s.Key) {
			log.Warn("another address uses the table, so the lease is of an older database", "family", s.Family.String(),
				"ifname", s.Ifname, "addr", s.Addr, "table", s.Table)
			s.held, s.local = false, false
			over = append(over, s)
			return nil
		}
		other := live[s.Key]
		if other == nil {
			live[s.Key] = s
			return nil
		}
		stay, leave := s, other
		if compareEnds(s, other) < 0 {
			stay, leave = other, s
		}
		log.Warn("two leases of one key, the one that ends later stays", "family", s.Family.String(),
			"ifname", s.Ifname, "addr", s.Addr, "table", stay.Table, "other", leave.Table)
		live[s.Key], leave.held = stay, false
		over = append(over, leave)
		return nil
	}); err != nil {
		return err
	}
	for _, r := range rejects {
		if err := a.store.reject(r.id, r.why); err != nil {
			return err
		}
	}
	if elsewhere > 0 {
		log.Info("leases of another boot or network namespace are preferences now", "leases", elsewhere)
	}

	slices.SortFunc(over, compareEnds)
	for _, s := range over {
		a.ended++
		s.ended = a.ended
		a.refresh(s)
		known[number{s.Family, s.Table}] = s
	}
	for _, s := range live {
		at := number{s.Family, s.Table}
		s.past = known[at] != nil
		if s.Expires = max(s.Expires, a.expiry(now)); s.local && !s.past && version >= sumsSince {
			a.soil(now, s)
		} else {
			a.refresh(s)
		}
		s.ended, s.local = 0, false
		known[at] = s
	}
	var free []*slot
	for _, s := range known {
		if !s.held {
			free = append(free, s)
		}
	}
	slices.SortFunc(free, func(x, y *slot) int { return cmp.Compare(x.ended, y.ended) })
	for _, s := range free {
		a.index(s)
	}
	// Last, since what a key holds goes before what it held.
	for _, s := range live {
		a.index(s)
	}
	return nil
}

// index enters a slot that the database has. A free table outside the pool stays in the
// database only, for when the pool moves back.
func (a *Allocator) index(s *slot) {
	p := a.pools[s.Family]
	inside := p.contains(s.Table)
	if !inside && !s.held {
		return
	}
	a.byKey[s.Key] = s
	if s.held {
		heap.Push(&a.due, s)
	}
	switch {
	case !inside:
	case s.held:
		p.mark(s.Table)
		p.held++
	default:
		p.mark(s.Table)
		p.push(s)
	}
}

// parse turns a row into a slot, with its address in canonical text, and tells where its
// lease was granted.
func (r leaseRow) parse() (*slot, Boot, error) {
	table, ok := r.table.(int64)
	if !ok || table < 0 || table > math.MaxUint32 {
		return nil, Boot{}, errors.New("table is not a table number")
	}
	family, ok := r.family.(int64)
	if !ok || family != int64(Unspec) && family != int64(Inet) && family != int64(Inet6) {
		return nil, Boot{}, errors.New("family is none of 0, 2 and 10")
	}
	ifname, ok := text(r.ifname, 15)
	if !ok || ifname == "" {
		return nil, Boot{}, errors.New("ifname is not the name of an interface")
	}
	addr, ok := text(r.addr, 45)
	if !ok || addr == "" {
		return nil, Boot{}, errors.New("addr is not an address")
	}
	if f := Family(family); f != Unspec {
		ip, err := netip.ParseAddr(addr)
		if err != nil || ip.Zone() != "" || ip.Is4In6() || ip.Is4() != (f == Inet) {
			return nil, Boot{}, fmt.Errorf("addr is not an address of family %s", f)
		}
		addr = ip.String()
	}
	expires, ok := r.expires.(int64)
	if !ok {
		return nil, Boot{}, errors.New("expires is not a second")
	}
	owner, ok := r.owner.(int64)
	if !ok || owner < 0 || owner > math.MaxUint32 {
		return nil, Boot{}, errors.New("owner is not a uid")
	}
	boot, isText := r.boot.(string)
	netns, isInt := r.netns.(int64)
	if !isText || !isInt {
		return nil, Boot{}, errors.New("boot or netns has the wrong type")
	}
	// The tag decides nothing, so a bad one does not cost the lease.
	tag, _ := text(r.tag, 127)
	s := &slot{Lease: Lease{
		Key:   Key{Family: Family(family), Ifname: ifname, Addr: addr},
		Table: uint32(table), Tag: tag, Owner: uint32(owner), Expires: expires,
	}}
	at := Boot{ID: boot, Netns: uint64(netns)}
	var sum int64 // of what other programs write
	if at.ID != "" {
		sum = s.sum(at)
	}
	if r.sum != nil && r.sum != sum {
		return nil, Boot{}, errors.New("it was damaged, or changed by another program (one that does sets Sum to 0 and Boot to '')")
	}
	return s, at, nil
}

// text accepts what a request may carry, too: no control characters, which would break a
// line of the log.
func text(v any, most int) (string, bool) {
	s, ok := v.(string)
	if !ok || len(s) > most || !utf8.ValidString(s) {
		return "", false
	}
	for _, c := range s {
		if unicode.IsControl(c) {
			return "", false
		}
	}
	return s, true
}
