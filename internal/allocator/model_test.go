package allocator

import (
	"cmp"
	"database/sql"
	"database/sql/driver"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"
)

var (
	seed = flag.Uint64("seed", 0, "of the model test; 0 takes a new one")
	soak = flag.Duration("soak", 0, "how long the model test runs; 0 is a few seconds, or 10m with SOAK=full")
)

// model is the allocator again, as slow and plain as can be: no heap, no list, no bitset.
type model struct {
	boot    string
	timeout int64
	pools   map[Family]Pool
	leases  map[Key]Lease
	past    map[place]past // of free tables
	prefer  map[Key]uint32
	sources map[Key][]uint32 // that rules look up for the address of a key
	ended   int64

	rootTables, userTables uint64
}

// mayHold is the share of users.
func (m *model) mayHold(family Family, uid uint32) bool {
	all, own := uint64(0), uint64(0)
	for _, l := range m.leases {
		if l.Family == family && l.Owner != 0 && m.inside(family, l.Table) {
			all++
			if l.Owner == uid {
				own++
			}
		}
	}
	return uid == 0 || all+m.rootTables < m.pools[family].Count && own < m.userTables
}

type past struct {
	key   Key
	boot  string
	ended int64
}

func (m *model) clone() *model {
	c := *m
	c.leases, c.past, c.prefer = maps.Clone(m.leases), maps.Clone(m.past), maps.Clone(m.prefer)
	return &c
}

func (m *model) inside(f Family, table uint32) bool {
	p := m.pools[f]
	return table >= p.First && uint64(table) < uint64(p.First)+p.Count
}

func (m *model) holder(at place) (Lease, bool) {
	for _, l := range m.leases {
		if l.Family == at.family && l.Table == at.table {
			return l, true
		}
	}
	return Lease{}, false
}

func (m *model) end(l Lease, boot string) {
	m.ended++
	delete(m.leases, l.Key)
	m.past[place{l.Family, l.Table}] = past{l.Key, boot, m.ended}
	if m.inside(l.Family, l.Table) {
		m.prefer[l.Key] = l.Table
	} else {
		delete(m.prefer, l.Key)
	}
}

// over returns the leases that are over, in the order of their ends.
func (m *model) over(now int64) []Lease {
	var all []Lease
	for _, l := range m.leases {
		if l.Expires <= now {
			all = append(all, l)
		}
	}
	sortByEnd(all)
	return all
}

func sortByEnd(all []Lease) {
	slices.SortFunc(all, func(a, b Lease) int {
		return cmp.Or(cmp.Compare(a.Expires, b.Expires), cmp.Compare(a.Table, b.Table), cmp.Compare(a.Family, b.Family))
	})
}

func (m *model) choose(k Key, uid uint32, wanted []uint32, avoid func(uint32, Key, Key) bool) (uint32, bool) {
	pool := m.pools[k.Family]
	free := func(table uint32) bool {
		at := place{k.Family, table}
		last := Key{}
		if p := m.past[at]; p.boot == m.boot {
			last = p.key
		}
		_, held := m.holder(at)
		return !held && !avoid(table, k, last)
	}
	for _, want := range wanted {
		if m.inside(k.Family, want) && free(want) {
			return want, true
		}
	}
	if t, ok := m.prefer[k]; ok && m.inside(k.Family, t) && free(t) {
		return t, true
	}
	// twin is who has a table in the other family, and whether it is the same interface of the same user.
	twin := func(table uint32) (held, same bool) {
		l, held := m.holder(place{Inet + Inet6 - k.Family, table})
		return held && k.Family != Unspec, l.Ifname == k.Ifname && l.Owner == uid
	}
	for t := pool.First; uint64(t) < uint64(pool.First)+pool.Count; t++ {
		if held, same := twin(t); held && same && free(t) {
			return t, true
		}
	}
	best, found := uint32(0), false
	for _, lone := range []bool{true, false} {
		if found {
			break
		}
		for t := pool.First; uint64(t) < uint64(pool.First)+pool.Count; t++ {
			if held, same := twin(t); lone && held && !same {
				continue
			}
			if free(t) && (!found || m.past[place{k.Family, t}].ended < m.past[place{k.Family, best}].ended) {
				best, found = t, true
			}
		}
	}
	return best, found
}

func (m *model) do(now int64, op Op, avoid func(uint32, Key, Key) bool) Result {
	l, held := m.leases[op.Key]
	refuse := func(err error) Result { return Result{Outcome: Refused, Lease: Lease{Key: op.Key}, Err: err} }
	_, served := m.pools[op.Key.Family]
	switch {
	case held && op.UID != 0 && op.UID != l.Owner:
		return refuse(ErrNotOwner)
	case op.Release && held:
		m.end(l, m.boot)
		return Result{Outcome: Released, Lease: l}
	case op.Release:
		return Result{Outcome: NotHeld, Lease: Lease{Key: op.Key}}
	case !served:
		return refuse(ErrFamily)
	}
	table, found := uint32(0), false
	if !held || !m.inside(op.Key.Family, l.Table) {
		wanted := []uint32{op.Want}
		if op.Want == 0 {
			wanted = m.sources[op.Key]
		}
		table, found = m.choose(op.Key, op.UID, wanted, avoid)
	}
	if !held && (!found || !m.mayHold(op.Key.Family, op.UID)) {
		return refuse(ErrExhausted)
	}
	outcome, owner := Granted, op.UID
	if held {
		owner = l.Owner
		if found {
			m.end(l, m.boot)
		} else {
			table, outcome = l.Table, Renewed
		}
		if op.UID == 0 && owner != 0 {
			outcome, owner = Granted, 0
		}
	}
	delete(m.past, place{op.Key.Family, table})
	for k, t := range m.prefer {
		if k.Family == op.Key.Family && t == table {
			delete(m.prefer, k)
		}
	}
	l = Lease{op.Key, table, op.Tag, owner, now + m.timeout}
	m.leases[op.Key] = l
	m.prefer[op.Key] = table
	return Result{Outcome: outcome, Lease: l}
}

func (m *model) restart(now int64, cfg Config) {
	boot := cfg.Epoch.Boot
	if boot != m.boot {
		all := slices.Collect(maps.Values(m.leases))
		sortByEnd(all)
		for _, l := range all {
			m.end(l, m.boot)
		}
	}
	m.boot, m.timeout, m.pools, m.prefer = boot, cfg.Timeout, cfg.Pools, make(map[Key]uint32)
	for at, p := range m.past {
		if t, ok := m.prefer[p.key]; m.inside(at.family, at.table) && (!ok || m.past[place{at.family, t}].ended < p.ended) {
			m.prefer[p.key] = at.table
		}
	}
	for k, l := range m.leases {
		l.Expires = max(l.Expires, now+m.timeout)
		m.leases[k] = l
		m.prefer[k] = l.Table
	}
}

func TestModel(t *testing.T) {
	length := *soak
	switch {
	case length != 0:
	case os.Getenv("SOAK") == "full":
		length = 10 * time.Minute
	default:
		length = 5 * time.Second
	}
	first := *seed
	if first == 0 {
		first = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d", first)
	rounds := 0
	for end := time.Now().Add(length); time.Now().Before(end) && !t.Failed(); rounds++ {
		n := first + uint64(rounds)
		t.Run(fmt.Sprint("seed=", n), func(t *testing.T) { compare(t, rand.New(rand.NewPCG(n, 0))) })
	}
	t.Logf("%d rounds", rounds)
}

// comparison is an allocator beside the model of it.
type comparison struct {
	*host
	rnd         *rand.Rand
	step        int
	model, disk *model  // the model, and what of it the database has
	expired     []Lease // by the model, not yet returned by Tick
	lock        *sql.DB // while the database cannot be written
	avoided     map[uint32]bool
	sources     map[Key][]uint32
	keys        []Key
	boots       int
}

// modelPools are drawn from at each start.
var modelPools = []map[Family]Pool{
	{Inet: {10000, 1}},
	{Inet: {10000, 3}, Inet6: {10000, 3}},
	{Inet: {10002, 6}, Unspec: {10000, 4}},
	{Inet: {10000, 12}, Inet6: {10004, 2}, Unspec: {9998, 4}},
}

func compare(t *testing.T, rnd *rand.Rand) {
	c := &comparison{rnd: rnd, avoided: make(map[uint32]bool), sources: make(map[Key][]uint32)}
	cfg := config(t, modelPools[rnd.IntN(len(modelPools))])
	cfg.Avoid = func(table uint32, key, last Key, _ bool) bool { return c.avoids(table, key, last) }
	cfg.Sources = func(key Key) []uint32 { return c.sources[key] }
	cfg.RootTables, cfg.UserTables = uint64(rnd.IntN(3)), uint64(1+rnd.IntN(3))
	c.host = start(t, cfg)
	c.model = &model{boot: here.Boot, timeout: cfg.Timeout, pools: cfg.Pools, leases: map[Key]Lease{}, past: map[place]past{}, prefer: map[Key]uint32{}, sources: c.sources,
		rootTables: cfg.RootTables, userTables: cfg.UserTables}
	c.disk = c.model.clone()
	defer c.unlock()
	for n := range 8 {
		c.keys = append(c.keys, key(n), key(n), Key{Inet6, fmt.Sprint("eth", n%2), fmt.Sprint("2001:db8::", n+1)}, Key{Unspec, "eth0", fmt.Sprint(n)})
	}
	for c.step = range 150 {
		switch what := rnd.IntN(100); {
		case what < 60:
			c.ask()
		case what < 80:
			c.now += rnd.Int64N(timeout / 2)
			c.tick()
		case what < 85:
			c.tick()
		case what < 88:
			c.avoided[uint32(9998+rnd.IntN(14))] = rnd.IntN(3) == 0
		case what < 90:
			c.sources[c.keys[rnd.IntN(len(c.keys))]] = [][]uint32{nil, {254, 10004}, {uint32(9998 + rnd.IntN(14))}}[rnd.IntN(3)]
		case what < 93 && c.lock != nil:
			c.unlock()
		case what < 93:
			c.lock = peer(t, c.cfg.Path)
			mustExec(t, c.lock, "BEGIN IMMEDIATE")
		default:
			c.restart()
		}
		if len(c.unsaved)+len(c.dirty) == 0 {
			c.disk = c.model.clone()
		}
		check(t, c.step, c.host, c.model)
	}
}

func (c *comparison) avoids(table uint32, key, last Key) bool {
	return c.avoided[table] && last.Addr != key.Addr
}

// unlock lets the database be written again.
func (c *comparison) unlock() {
	if c.lock != nil {
		mustExec(c.t, c.lock, "ROLLBACK")
		_ = c.lock.Close() // peer looks at the second time
		c.lock = nil
	}
}

// lapse ends the leases of the model that are over.
func (c *comparison) lapse() {
	for _, l := range c.model.over(c.now) {
		c.model.end(l, c.model.boot)
		c.expired = append(c.expired, l)
	}
}

// ask gives the same requests to both.
func (c *comparison) ask() {
	var batch []Op
	for range 1 + c.rnd.IntN(4) {
		batch = append(batch, Op{
			Release: c.rnd.IntN(4) == 0,
			Key:     c.keys[c.rnd.IntN(len(c.keys))],
			Tag:     []string{"", "x", "y"}[c.rnd.IntN(3)],
			UID:     []uint32{0, 0, 0, 1000, 1001}[c.rnd.IntN(5)],
			Want:    []uint32{0, 0, 0, 9, 11, 13, 15, 21, 300}[c.rnd.IntN(9)],
		})
	}
	results := c.decide(batch...)
	fails := c.lock != nil && slices.ContainsFunc(results, func(r Result) bool { return r.Pending })
	if err := c.Commit(c.now); (err != nil) != fails {
		c.t.Fatalf("step %d: commit: %v", c.step, err)
	}
	c.lapse()
	asIf := c.model.clone()
	for i, op := range batch {
		want := asIf.do(c.now, op, c.avoids)
		got := results[i]
		got.Pending = false
		if errors.Is(got.Err, ErrExhausted) {
			got.Err = ErrExhausted
		}
		if got != want {
			c.t.Fatalf("step %d: %+v\ngot  %+v\nwant %+v", c.step, op, got, want)
		}
		if fails && !results[i].Pending {
			c.answeredAtOnce(op, got)
		}
	}
	if fails {
		return
	}
	c.model = asIf
	if c.lock == nil { // what the database has is as the model has it only when nothing waits
		c.flush()
	}
}

// answeredAtOnce takes over into the model what was answered before a commit that failed.
func (c *comparison) answeredAtOnce(op Op, got Result) {
	l, held := c.model.leases[op.Key]
	takenOver := got.Outcome == Granted && got.Lease.Owner != l.Owner
	if held && (got.Outcome == Renewed || takenOver) {
		l.Tag, l.Expires, l.Owner = op.Tag, c.now+c.model.timeout, got.Lease.Owner
		c.model.leases[op.Key] = l
	} else if got.Outcome == Renewed || got.Outcome == Granted || got.Outcome == Released {
		c.t.Fatalf("step %d: %+v answered at once", c.step, got)
	}
}

func (c *comparison) tick() {
	got, err := c.Tick(c.now)
	if err != nil && c.lock == nil {
		c.t.Fatalf("step %d: tick: %v", c.step, err)
	}
	c.lapse()
	if !slices.Equal(got, c.expired) {
		c.t.Fatalf("step %d: expired %v, want %v", c.step, got, c.expired)
	}
	c.expired = nil
	if c.lock == nil && c.Next() <= c.now && len(c.dirty) == 0 {
		c.t.Fatalf("step %d: at %d Tick left something to do at %d", c.step, c.now, c.Next())
	}
}

// restart stops or kills the allocator, and starts it again, at times after a boot or with another configuration.
func (c *comparison) restart() {
	crash := c.rnd.IntN(2) == 0
	c.unlock()
	if !crash {
		c.stop()
	}
	if c.rnd.IntN(3) == 0 {
		c.boots++
		c.cfg.Epoch.Boot = fmt.Sprint("boot ", c.boots)
		c.now = c.rnd.Int64N(5000)
	}
	if c.rnd.IntN(3) == 0 {
		c.cfg.Pools = modelPools[c.rnd.IntN(len(modelPools))]
	}
	if c.rnd.IntN(3) == 0 {
		c.cfg.Timeout = []int64{timeout / 9, timeout, 3 * timeout}[c.rnd.IntN(3)]
	}
	if crash {
		c.crash()
		c.model = c.disk.clone()
	} else {
		c.open()
	}
	c.model.restart(c.now, c.cfg)
	c.expired = nil
}

func check(t *testing.T, step int, h *host, m *model) {
	t.Helper()
	got := make(map[Key]Lease)
	holders := make(map[place]Key)
	for i, s := range h.due {
		if s.index != i || s.due > s.Expires || i > 0 && h.due.Less(i, (i-1)/2) {
			t.Fatalf("step %d: %v is at %d in the heap for %d", step, s.Lease, s.index, s.due)
		}
		at := place{s.Family, s.Table}
		if other, taken := holders[at]; taken {
			t.Fatalf("step %d: table %v is held by %v and %v", step, at, other, s.Key)
		}
		holders[at], got[s.Key] = s.Key, s.Lease
	}
	if !maps.Equal(got, m.leases) {
		t.Fatalf("step %d: got\n%v\nwant\n%v", step, got, m.leases)
	}
	for f, p := range m.pools {
		held := uint64(0)
		for _, l := range m.leases {
			if l.Family == f && m.inside(f, l.Table) {
				held++
			}
		}
		if got := h.pools[f].held; got != held || h.pools[f].count != p.Count {
			t.Fatalf("step %d: %s: %d of %d tables are held, want %d of %d", step, f, got, h.pools[f].count, held, p.Count)
		}
	}
	if len(h.unsaved)+len(h.dirty) > 0 {
		return
	}
	stored := make(map[Key]Lease)
	rows := 0
	if err := h.store.leases(schemaVersion, "ASC", func(row []driver.Value) error {
		rows++
		s, _, err := parseLease(row[1:])
		stored[s.Key] = s.Lease
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if !maps.Equal(stored, m.leases) || rows != len(stored) {
		t.Fatalf("step %d: stored\n%v\nwant\n%v", step, stored, m.leases)
	}

	var want []place
	for at := range m.past {
		want = append(want, at)
	}
	slices.SortFunc(want, func(a, b place) int { return cmp.Compare(m.past[a].ended, m.past[b].ended) })
	var history []*slot
	if err := h.store.history(schemaVersion, func(s *slot) { history = append(history, s) }); err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(history, func(a, b *slot) int { return cmp.Compare(a.ended, b.ended) })
	for i, s := range history {
		if len(history) != len(want) || want[i] != (place{s.Family, s.Table}) || m.past[want[i]].key != s.Key {
			t.Fatalf("step %d: row %d of %d in history is %v, want %v in %v", step, i, len(history), s.Lease, m.past, want)
		}
	}
}
