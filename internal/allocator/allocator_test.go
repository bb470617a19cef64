package allocator

import (
	"bytes"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

const timeout = 3600

var here = Epoch{Boot: "5d6f2c9e-0000-4000-8000-000000000001", Netns: 7}

// host is an allocator under test with the clock it lives by.
type host struct {
	*Allocator
	t   testing.TB
	cfg Config
	now int64
	log *bytes.Buffer
}

func config(t testing.TB, pools map[Family]Pool) Config {
	return Config{Path: filepath.Join(t.TempDir(), "state", "leases.db"), Pools: pools, Limits: Limits{Timeout: timeout}, Epoch: here}
}

func inet(first uint32, count uint64) map[Family]Pool {
	return map[Family]Pool{Inet: {First: first, Count: count}}
}

func start(t testing.TB, cfg Config) *host {
	t.Helper()
	h := &host{t: t, cfg: cfg, now: 1000}
	h.open()
	t.Cleanup(func() {
		if h.Allocator != nil {
			_ = h.store.close() // only to give descriptors back
		}
	})
	return h
}

func (h *host) open() {
	h.t.Helper()
	h.log = &bytes.Buffer{}
	a, err := Open(h.cfg, h.now, slog.New(slog.NewTextHandler(h.log, nil)))
	if err != nil {
		h.t.Fatal(err)
	}
	h.Allocator = a
}

func (h *host) stop() {
	h.t.Helper()
	if err := h.Close(h.now); err != nil {
		h.t.Fatal(err)
	}
	h.Allocator = nil
}

// crash goes on with what is on the disk now.
func (h *host) crash() {
	h.t.Helper()
	dir := filepath.Join(h.t.TempDir(), "crashed")
	if out, err := exec.Command("cp", "-a", filepath.Dir(h.cfg.Path), dir).CombinedOutput(); err != nil {
		h.t.Fatalf("cp: %v: %s", err, out)
	}
	if err := os.Remove(filepath.Join(dir, "leases.db-shm")); err != nil {
		h.t.Fatal(err)
	}
	if err := h.store.close(); err != nil {
		h.t.Fatal(err)
	}
	h.cfg.Path = filepath.Join(dir, "leases.db")
	h.open()
}

// do decides and commits, and returns the results in short: "granted 10000".
func (h *host) do(ops ...Op) []string {
	h.t.Helper()
	results, _ := h.results(ops...) // which tell
	return short(results)
}

// results decides and commits as the server does: what was pending is refused if that fails.
func (h *host) results(ops ...Op) (all []Result, err error) {
	h.t.Helper()
	all = h.decide(ops...)
	err = h.Commit(h.now)
	for i := range all {
		if err != nil && all[i].Pending {
			all[i] = Result{Lease: Lease{Key: ops[i].Key}, Err: err}
		}
	}
	return all, err
}

func (h *host) decide(ops ...Op) (all []Result) {
	for i := range ops {
		all = append(all, h.Decide(h.now, &ops[i]))
	}
	return all
}

// flush writes what Tick would write soon.
func (h *host) flush() {
	h.t.Helper()
	if err := h.write(h.now, flushMost); err != nil {
		h.t.Fatal(err)
	}
}

// undone decides, and fails to commit.
func (h *host) undone(ops ...Op) []string {
	h.t.Helper()
	db := peer(h.t, h.cfg.Path)
	mustExec(h.t, db, "BEGIN IMMEDIATE")
	all := short(h.decide(ops...))
	if err := h.Commit(h.now); !errors.Is(err, ErrStorage) {
		h.t.Errorf("commit: got %v, want ErrStorage", err)
	}
	mustExec(h.t, db, "ROLLBACK")
	return all
}

func short(results []Result) []string {
	var all []string
	for _, r := range results {
		s := [...]string{"refused", "granted", "renewed", "released", "not held"}[r.Outcome]
		if r.Lease.Table != 0 {
			s += fmt.Sprint(" ", r.Lease.Table)
		}
		for _, err := range []error{ErrExhausted, ErrFamily, ErrNotOwner, ErrStorage} {
			if errors.Is(r.Err, err) {
				s += ": " + err.Error()
			}
		}
		all = append(all, s)
	}
	return all
}

// wantPool fails unless so many tables of the pool of IPv4 are held and free, and so many leases
// are of tables in no pool.
func (h *host) wantPool(held, free, outside uint64) {
	h.t.Helper()
	var got [3]uint64
	if p := h.pools[Inet]; p != nil {
		got = [3]uint64{p.held, p.count - p.held}
	}
	for _, s := range h.due {
		if s.Family == Inet && !h.pools[Inet].contains(s.Table) {
			got[2]++
		}
	}
	if want := [3]uint64{held, free, outside}; got != want {
		h.t.Errorf("held, free, outside: got %d, want %d", got, want)
	}
}

func (h *host) want(ops []Op, want ...string) {
	h.t.Helper()
	if got := h.do(ops...); !slices.Equal(got, want) {
		h.t.Errorf("got  %q\nwant %q", got, want)
	}
}

func key(n int) Key { return Key{Inet, "eth0", fmt.Sprintf("192.0.2.%d", n)} }

func get(n int) Op { return Op{Key: key(n)} }

func give(n int) Op { return Op{Release: true, Key: key(n)} }

func ops(o ...Op) []Op { return o }

// peer is another program that looks at the database.
func peer(t testing.TB, path string) *sql.DB {
	t.Helper()
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	db.SetMaxOpenConns(1)
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	return db
}

func mustExec(t testing.TB, db *sql.DB, text string, args ...any) {
	t.Helper()
	if _, err := db.Exec(text, args...); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
}

// query returns rows as sqlite3 prints them.
func query(t testing.TB, db *sql.DB, text string) []string {
	t.Helper()
	rows, err := db.Query(text)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	columns, err := rows.Columns()
	if err != nil {
		t.Fatal(err)
	}
	all := []string{}
	for rows.Next() {
		values, into := make([]sql.NullString, len(columns)), make([]any, len(columns))
		for i := range values {
			into[i] = &values[i]
		}
		if err := rows.Scan(into...); err != nil {
			t.Fatal(err)
		}
		line := ""
		for _, v := range values {
			line += "|" + v.String
		}
		all = append(all, line[1:])
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return all
}

func wantRows(t testing.TB, db *sql.DB, text string, want ...string) {
	t.Helper()
	if got := query(t, db, text); !slices.Equal(got, want) {
		t.Errorf("%s\ngot  %q\nwant %q", text, got, want)
	}
}

func TestLeases(t *testing.T) {
	user := func(uid uint32, o Op) Op { o.UID = uid; return o }
	type step struct {
		wait int64
		ops  []Op
		want []string
	}
	for _, c := range []struct {
		name  string
		count uint64
		steps []step
	}{
		{"lowest number first", 3, []step{
			{0, ops(get(1), get(2)), []string{"granted 10000", "granted 10001"}},
			{0, ops(get(1)), []string{"renewed 10000"}},
		}},
		{"pool of one", 1, []step{
			{0, ops(get(1), get(2)), []string{"granted 10000", "refused: no table is free"}},
			{0, ops(give(1), get(2)), []string{"released 10000", "granted 10000"}},
		}},
		{"pool of three", 3, []step{
			{0, ops(get(1), get(2), get(3), get(4)), []string{"granted 10000", "granted 10001", "granted 10002", "refused: no table is free"}},
		}},
		{"unused for longest once all were used", 3, []step{
			{0, ops(get(1), get(2), get(3)), []string{"granted 10000", "granted 10001", "granted 10002"}},
			{0, ops(give(2), give(3), give(1)), []string{"released 10001", "released 10002", "released 10000"}},
			{0, ops(get(4), get(5), get(6)), []string{"granted 10001", "granted 10002", "granted 10000"}},
		}},
		{"same number again", 3, []step{
			{0, ops(get(1), get(2)), []string{"granted 10000", "granted 10001"}},
			{0, ops(give(1), give(2)), []string{"released 10000", "released 10001"}},
			{0, ops(get(2), get(3), get(1)), []string{"granted 10001", "granted 10002", "granted 10000"}},
		}},
		{"not the same number once another needed it", 1, []step{
			{0, ops(get(1), give(1), get(2), give(2), get(1)), []string{"granted 10000", "released 10000", "granted 10000", "released 10000", "granted 10000"}},
		}},
		{"in one batch", 3, []step{
			{0, ops(get(1), get(1), give(1), give(1), get(1)), []string{"granted 10000", "renewed 10000", "released 10000", "not held", "granted 10000"}},
		}},
		{"release of what is not held", 3, []step{
			{0, ops(give(1)), []string{"not held"}},
		}},
		{"families", 3, []step{
			{0, ops(Op{Key: Key{Inet6, "eth0", "2001:db8::1"}}), []string{"refused: family is not served"}},
			{0, ops(Op{Release: true, Key: Key{Inet6, "eth0", "2001:db8::1"}}), []string{"not held"}},
		}},
		{"owners", 3, []step{
			{0, ops(user(1000, get(1)), user(1001, get(1)), user(1001, give(1))), []string{"granted 10000",
				"refused: the lease belongs to another user", "refused: the lease belongs to another user"}},
			{0, ops(user(1000, get(1)), user(0, get(1))), []string{"renewed 10000", "granted 10000"}}, // root takes it over
			{0, ops(user(1000, get(1)), user(1000, give(1))), []string{"refused: the lease belongs to another user",
				"refused: the lease belongs to another user"}},
			{0, ops(user(0, give(1)), user(1001, get(1))), []string{"released 10000", "granted 10000"}},
			{0, ops(get(2), user(1000, get(2))), []string{"granted 10001", "refused: the lease belongs to another user"}},
		}},
		{"a due lease blocks nobody", 1, []step{
			{0, ops(get(1)), []string{"granted 10000"}},
			{timeout - 1, ops(get(2)), []string{"refused: no table is free"}},
			{1, ops(get(2), get(1)), []string{"granted 10000", "refused: no table is free"}},
		}},
		{"renewed in time", 1, []step{
			{0, ops(get(1)), []string{"granted 10000"}},
			{timeout - 1, ops(get(1)), []string{"renewed 10000"}},
			{timeout - 1, ops(get(1), get(2)), []string{"renewed 10000", "refused: no table is free"}},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := start(t, config(t, inet(10000, c.count)))
			for _, s := range c.steps {
				h.now += s.wait
				h.want(s.ops, s.want...)
			}
		})
	}
}

// TestTakeOver: root gets another number while a rule names that of the user, and the same one where it may
// have had the lease before this run of the server.
func TestTakeOver(t *testing.T) {
	user := Sender{PID: 7}
	cfg := config(t, inet(10000, 2))
	named := true
	cfg.Named = func(Family, uint32) bool { return named }
	h := start(t, cfg)
	h.want(ops(Op{Key: key(1), UID: 1000, Sender: user}, get(1)), "granted 10000", "granted 10001")
	h.want(ops(Op{Key: key(1), UID: 1000}, get(1)), "refused: the lease belongs to another user", "renewed 10001")
	h.want(ops(Op{Key: key(2), UID: 1000, Sender: user}, get(2)), "granted 10000", "refused: no table is free")
	named = false
	h.want(ops(get(2), Op{Key: key(2), UID: 1000}), "granted 10000", "refused: the lease belongs to another user")
	h.want(ops(give(2), Op{Key: key(2), UID: 1000, Sender: user}), "released 10000", "granted 10000")
	h.stop()
	named = true
	h.open()
	h.want(ops(get(2), Op{Key: key(2), UID: 1000}), "granted 10000", "refused: the lease belongs to another user")
}

// TestShares: users get what root's share leaves, and each no more than user_tables.
func TestShares(t *testing.T) {
	of := func(uid uint32, n int) Op { return Op{Key: key(n), UID: uid} }
	cfg := config(t, inet(10000, 6))
	cfg.RootTables, cfg.UserTables, cfg.Self = 2, 3, 500
	h := start(t, cfg)
	h.want(ops(of(1000, 1), of(1000, 2), of(1000, 3), of(1000, 4)), "granted 10000", "granted 10001", "granted 10002",
		"refused: no table is free")
	h.want(ops(of(1001, 4), of(1001, 5)), "granted 10003", "refused: no table is free")
	h.want(ops(of(500, 5), of(0, 6), of(0, 7)), "granted 10004", "granted 10005", "refused: no table is free")
	h.stop()
	h.open() // the counts are of the database, too
	h.want(ops(of(1001, 4), of(1001, 8)), "renewed 10003", "refused: no table is free")
	release := of(1000, 1)
	release.Release = true
	h.want(ops(release, of(1001, 8)), "released 10000", "granted 10000")
	h.want(ops(of(0, 2), of(1001, 9)), "granted 10001", "refused: no table is free") // a take-over is root's
	h.now += timeout
	h.want(ops(of(1001, 9), of(1001, 10), of(1001, 11)), "granted 10000", "granted 10001", "granted 10002")
}

// TestSendersThatEnded: such a sender may release what it leased itself, by its pid or its name.
func TestSendersThatEnded(t *testing.T) {
	gone := func(release bool, n int, s Sender) Op {
		return Op{Release: release, Key: key(n), Sender: s, Gone: true}
	}
	h := start(t, config(t, inet(10000, 4)))
	for n := range 3 {
		h.do(Op{Key: key(n), Sender: Sender{PID: int32(n + 1), Name: uint64(n + 1)}})
	}
	h.do(Op{Key: key(3), UID: 1000, Sender: Sender{PID: 9}})
	const refused = "refused: the lease belongs to another user"
	h.want(ops(gone(true, 0, Sender{PID: 2, Name: 2}), gone(false, 0, Sender{PID: 1, Name: 1}), gone(true, 3, Sender{PID: 9})), refused, refused, refused)
	h.want(ops(gone(true, 0, Sender{PID: 1}), gone(true, 1, Sender{PID: 9, Name: 2})), "released 10000", "released 10001")
	h.want(ops(gone(true, 2, Sender{PID: 9})), refused) // neither has a name
	h.want(ops(gone(false, 5, Sender{PID: 9})), refused)
}

func TestFortyOneForForty(t *testing.T) {
	h := start(t, config(t, inet(10000, 40)))
	var all []Op
	for n := range 41 {
		all = append(all, get(n))
	}
	got := h.do(all...)
	for n := range 40 {
		if want := fmt.Sprint("granted ", 10000+n); got[n] != want {
			t.Errorf("request %d: got %q, want %q", n, got[n], want)
		}
	}
	if want := "refused: no table is free"; got[40] != want {
		t.Errorf("got %q, want %q", got[40], want)
	}
	h.wantPool(40, 0, 0)
}

func TestResults(t *testing.T) {
	h := start(t, config(t, inet(10000, 2)))
	first := h.decide(Op{Key: key(1), Tag: "one", UID: 1000})
	want := Result{Outcome: Granted, Lease: Lease{key(1), 10000, "one", 1000, h.now + timeout}, Pending: true}
	if got := first[0]; got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if err := h.Commit(h.now); err != nil {
		t.Fatal(err)
	}
	h.now += 10
	results := h.decide(
		Op{Key: key(1), Tag: "two", UID: 1000},
		get(2),
		get(2),
		Op{Key: key(2), UID: 1000},
		get(3),
		Op{Release: true, Key: key(1), UID: 1000},
		Op{Release: true, Key: key(1), UID: 1000},
		give(9),
	)
	lease1, lease2 := Lease{key(1), 10000, "two", 1000, h.now + timeout}, Lease{key(2), 10001, "", 0, h.now + timeout}
	for i, want := range []Result{
		{Outcome: Renewed, Lease: lease1},
		{Outcome: Granted, Lease: lease2, Pending: true},
		{Outcome: Renewed, Lease: lease2, Pending: true},
		{Outcome: Refused, Lease: Lease{Key: key(2)}, Err: ErrNotOwner, Pending: true},
		{Outcome: Refused, Lease: Lease{Key: key(3)}, Err: ErrExhausted, Pending: true},
		{Outcome: Released, Lease: lease1, Pending: true},
		{Outcome: NotHeld, Lease: Lease{Key: key(1)}, Pending: true},
		{Outcome: NotHeld, Lease: Lease{Key: key(9)}},
	} {
		if got := results[i]; got != want {
			t.Errorf("%d: got %+v, want %+v", i, got, want)
		}
	}
}

func TestExpiry(t *testing.T) {
	h := start(t, config(t, inet(10000, 2)))
	h.do(get(1))
	h.now += 5
	h.do(get(2))
	for _, c := range []struct {
		at   int64
		want []uint32
		next int64
	}{
		{1005 + 60, nil, 1005 + 120},
		{1000 + timeout - 1, nil, 1000 + timeout},
		{1000 + timeout, []uint32{10000}, 1000 + timeout + 5},
		{1000 + timeout + 5, []uint32{10001}, 1000 + timeout + 65},
	} {
		expired, err := h.Tick(c.at)
		if err != nil {
			t.Fatal(err)
		}
		var got []uint32
		for _, l := range expired {
			got = append(got, l.Table)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("at %d: expired %v, want %v", c.at, got, c.want)
		}
		if got := h.Next(); got != c.next {
			t.Errorf("at %d: next %d, want %d", c.at, got, c.next)
		}
	}
	wantRows(t, peer(t, h.cfg.Path), "SELECT count(*) FROM RtTables", "0")
}

// What Decide finds to be over is still reported, at once, by the next Tick.
func TestExpiryOnDemandIsReported(t *testing.T) {
	h := start(t, config(t, inet(10000, 1)))
	h.do(get(1))
	h.now += timeout
	h.want(ops(get(2)), "granted 10000")
	if got := h.Next(); got > h.now {
		t.Errorf("next %d, want no later than %d", got, h.now)
	}
	expired, err := h.Tick(h.now)
	if err != nil || len(expired) != 1 || expired[0].Key != key(1) {
		t.Errorf("got %+v, %v, want the lease of %+v", expired, err, key(1))
	}
}

func TestRenewalIsWrittenBehind(t *testing.T) {
	h := start(t, config(t, inet(10000, 2)))
	h.do(get(1))
	db := peer(t, h.cfg.Path)
	const stored = "SELECT LeaseExpires, Tag FROM RtTables"
	h.now += 10
	h.want(ops(Op{Key: key(1), Tag: "new"}), "renewed 10000")
	wantRows(t, db, stored, "4600|")
	if got, want := h.Next(), h.now+1; got != want {
		t.Errorf("next %d, want %d", got, want)
	}
	if _, err := h.Tick(h.now + 1); err != nil {
		t.Fatal(err)
	}
	wantRows(t, db, stored, "4610|new")
	h.now += 10
	h.do(get(1), get(2)) // not with the next commit, which somebody waits for
	wantRows(t, db, stored+" ORDER BY RtTable", "4610|new", "4620|")
	h.now += 10
	h.do(get(2))
	h.stop() // with the end
	wantRows(t, db, stored+" ORDER BY RtTable", "4620|", "4630|")
}

func TestAvoid(t *testing.T) {
	cached, fresh := map[uint32]bool{}, map[uint32]bool{}
	var holders []Key
	cfg := config(t, inet(10000, 3))
	cfg.Avoid = func(table uint32, _, last Key, now bool) bool {
		holders = append(holders, last)
		if now {
			return fresh[table]
		}
		return cached[table]
	}
	h := start(t, cfg)
	cached[10000] = true
	h.want(ops(get(1), get(2), get(3)), "granted 10001", "granted 10002", "granted 10000")

	fresh[10000] = true
	h.do(give(3))
	h.want(ops(get(4)), "refused: no table is free")
	cached[10000], fresh[10000] = false, false
	holders = nil
	h.want(ops(get(4)), "granted 10000")
	if want := []Key{key(3)}; !slices.Equal(holders, want) {
		t.Errorf("last holder %v, want %v", holders, want)
	}

	h.do(give(4))
	h.stop()
	h.cfg.Epoch.Boot = "another"
	h.open()
	holders = nil
	h.want(ops(get(4)), "granted 10000")
	if want := []Key{{}}; !slices.Equal(holders, want) {
		t.Errorf("last holder after a reboot %v, want nobody", holders)
	}
}

func TestAvoidEverywhereEnds(t *testing.T) {
	cfg := config(t, inet(256, 4_000_000_000))
	cfg.Avoid = func(uint32, Key, Key, bool) bool { return true }
	h := start(t, cfg)
	h.want(ops(get(1)), "refused: no table is free")
}

func TestPools(t *testing.T) {
	for _, c := range []struct {
		name  string
		pools map[Family]Pool
		want  string // "" if good
	}{
		{"the largest", map[Family]Pool{Unspec: {First: 256, Count: 1<<32 - 256}}, ""},
		{"the last", inet(1<<32-1, 1), ""},
		{"before the reserved", inet(1, 252), ""},
		{"none", nil, "no family has a pool"},
		{"empty", inet(10000, 0), "end at"},
		{"wraps", inet(1<<32-1, 2), "end at"},
		{"huge", inet(300, 1<<63), "end at"},
		{"zero", inet(0, 10), "keeps"},
		{"253", inet(1, 253), "keeps"},
		{"255", inet(255, 1), "keeps"},
		{"around", inet(200, 100), "keeps"},
		{"family", map[Family]Pool{7: {First: 300, Count: 1}}, "no such family"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := config(t, c.pools)
			a, err := Open(cfg, 1000, slog.New(slog.DiscardHandler))
			if c.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				if err := a.Close(1000); err != nil {
					t.Fatal(err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			if _, err := os.Stat(cfg.Path); err == nil {
				t.Error("the file was made")
			}
		})
	}
}

// A database can know tables at the far end of a pool of four billion.
func TestHugePool(t *testing.T) {
	const last = 1<<32 - 1
	h := start(t, config(t, inet(last-1, 2)))
	h.want(ops(get(1), get(2), give(2)), "granted 4294967294", "granted 4294967295", "released 4294967295")
	h.stop()
	h.cfg.Pools = inet(256, 1<<32-256)
	h.open()
	h.want(ops(get(1), get(2), get(3)), "renewed 4294967294", "granted 4294967295", "granted 256")
	h.wantPool(3, 1<<32-256-3, 0)
}

func TestRestart(t *testing.T) {
	for _, c := range []struct {
		name    string
		restart func(*host)
	}{
		{"clean", func(h *host) { h.stop(); h.open() }},
		{"crash", (*host).crash},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := start(t, config(t, inet(10000, 4)))
			h.do(get(1), get(2), get(3), get(4))
			h.do(give(3))
			h.do(give(2))
			h.now += 3 * timeout // nobody could renew meanwhile
			c.restart(h)
			if got, want := h.Next(), h.now+60; got != want {
				t.Errorf("next %d, want %d", got, want)
			}
			h.now += timeout - 1
			if expired, err := h.Tick(h.now); err != nil || len(expired) > 0 {
				t.Errorf("expired %v, %v", expired, err)
			}
			h.want(ops(get(1), get(5), get(4), get(6)), "renewed 10000", "granted 10002", "renewed 10003", "granted 10001")
		})
	}
}

func TestAnotherBootOrNamespace(t *testing.T) {
	for _, c := range []struct {
		name  string
		epoch Epoch
	}{
		{"boot", Epoch{"another", here.Netns}},
		{"namespace", Epoch{here.Boot, here.Netns + 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := start(t, config(t, inet(10000, 3)))
			h.do(Op{Key: key(1), UID: 1000}, get(2), get(3))
			h.stop()
			h.cfg.Epoch, h.now = c.epoch, 50
			h.open()
			h.wantPool(0, 3, 0)
			wantRows(t, peer(t, h.cfg.Path), "SELECT * FROM leases")
			wantRows(t, peer(t, h.cfg.Path), "SELECT * FROM RtTables")
			h.want(ops(get(3), get(4), get(1)), "granted 10002", "granted 10000", "granted 10001")
		})
	}
}

func TestPoolMoves(t *testing.T) {
	h := start(t, config(t, inet(10000, 3)))
	h.do(Op{Key: key(1), UID: 1000}, get(2), get(3))
	h.stop()
	h.cfg.Pools = inet(10002, 2)
	h.open()
	h.wantPool(1, 1, 2)
	h.want(ops(get(1)), "granted 10003")
	h.want(ops(get(2)), "renewed 10001") // exhausted: the old one stays
	h.want(ops(get(3)), "renewed 10002")
	wantRows(t, peer(t, h.cfg.Path), "SELECT RtTable, Owner FROM RtTables ORDER BY 1", "10001|0", "10002|0", "10003|0")
	h.now += timeout
	if expired, err := h.Tick(h.now); err != nil || len(expired) != 3 {
		t.Errorf("expired %v, %v, want three", expired, err)
	}
	h.want(ops(get(2), get(4), get(5)), "granted 10002", "granted 10003", "refused: no table is free")

	h.stop()
	h.cfg.Pools = map[Family]Pool{Inet6: {First: 10000, Count: 3}}
	h.open()
	h.want(ops(get(2), give(4)), "refused: family is not served", "released 10003")
	h.wantPool(0, 0, 1)

	h.stop()
	h.cfg.Pools = inet(10000, 4)
	h.open()
	h.want(ops(get(1), get(2), get(4), get(5)), "granted 10000", "renewed 10002", "granted 10003", "granted 10001")
}

func TestManyFreeTablesAreForgotten(t *testing.T) {
	h := start(t, config(t, inet(10000, 1_000_000)))
	h.pools[Inet].enough = 5
	for n := range 5 {
		h.do(get(n), give(n))
	}
	h.want(ops(get(11), get(12)), "granted 10000", "granted 10005")
	h.do(give(11))
	h.want(ops(get(13), get(14)), "granted 10001", "granted 10006")
}

func TestView(t *testing.T) {
	h := start(t, config(t, map[Family]Pool{Inet: {10000, 9}, Inet6: {10000, 9}, Unspec: {20000, 9}}))
	utc := time.Date(2031, 5, 6, 7, 8, 9, 0, time.UTC)
	h.utc = func() time.Time { return utc }
	h.do(
		Op{Key: Key{Unspec, "wwan0", "modem"}, UID: 1000},
		Op{Key: Key{Inet6, "eth0", "2001:db8::1"}, Tag: "six"},
		Op{Key: key(1)}, Op{Key: key(2), Tag: "it's two"})
	h.now += 100
	utc = utc.Add(100 * time.Second)
	h.do(get(1), get(3))
	h.flush()
	const text = `SELECT "table", family, ifname, address, tag, owner, expires_at FROM leases`
	want := []string{
		"10000|inet|eth0|192.0.2.1||0|2031-05-06 08:09:49",
		"10001|inet|eth0|192.0.2.2|it's two|0|2031-05-06 08:08:09",
		"10002|inet|eth0|192.0.2.3||0|2031-05-06 08:09:49",
		"10000|inet6|eth0|2001:db8::1|six|0|2031-05-06 08:08:09",
		"20000|unspec|wwan0|modem||1000|2031-05-06 08:08:09",
	}
	db := peer(t, h.cfg.Path)
	wantRows(t, db, text, want...)
	if out, err := exec.LookPath("sqlite3"); err == nil {
		got, err := exec.Command(out, h.cfg.Path, text).CombinedOutput()
		if err != nil || string(got) != strings.Join(want, "\n")+"\n" {
			t.Errorf("sqlite3: %v\n%s", err, got)
		}
	}
	utc = time.Now()
	h.do(get(4))
	var left int
	if err := db.QueryRow("SELECT seconds_left FROM leases WHERE address = '192.0.2.4'").Scan(&left); err != nil || left < timeout-30 || left > timeout {
		t.Errorf("seconds_left %d, %v", left, err)
	}
	mustExec(t, db, "INSERT INTO RtTables (RtTable, AddrFamily, Ifname, Addr, LeaseExpires, Tag) VALUES (10008, 2, 'eth9', '192.0.2.99', 9999, 'c')")
	if got := len(query(t, db, "SELECT * FROM leases")); got != 6 {
		t.Errorf("%d rows, want the 6 of this boot", got)
	}
}

// The wall clock is for people: however it jumps, over a suspended night too, in which the
// clock of leases stands still, leases last as long as before.
func TestWallClockJumps(t *testing.T) {
	h := start(t, config(t, inet(10000, 9)))
	utc := time.Date(2031, 5, 6, 7, 8, 9, 0, time.UTC)
	h.utc = func() time.Time { return utc }
	h.do(get(1), get(2))
	db := peer(t, h.cfg.Path)
	jumps := []struct {
		name string
		to   time.Time
	}{
		{"years ahead", utc.AddDate(40, 0, 0)},
		{"years back", utc.AddDate(-10, 0, 0)},
		{"no battery", time.Unix(0, 0)},
		{"before 1970", time.Date(1901, 12, 13, 0, 0, 0, 0, time.UTC)},
		{"past 32 bits", time.Date(2038, 1, 19, 3, 14, 8, 0, time.UTC)},
		{"past the year 9999", time.Date(12000, 1, 1, 0, 0, 0, 0, time.UTC)},
		{"a night of suspend", utc.Add(9 * time.Hour)},
	}
	for i, c := range jumps {
		utc = c.to
		h.now += timeout / 20
		granted := fmt.Sprint("granted ", 10002+i)
		h.want(ops(get(1), get(3+i), give(99)), "renewed 10000", granted, "not held")
		h.flush()
		if expired, err := h.Tick(h.now); err != nil || len(expired) > 0 {
			t.Errorf("%s: expired %v, %v", c.name, expired, err)
		}
		if got, want := h.Next(), h.now+60; got > want {
			t.Errorf("%s: next %d, want %d at most", c.name, got, want)
		}
		if c.to.Year() <= 9999 {
			wantRows(t, db, "SELECT expires_at FROM leases WHERE address = '192.0.2.1'", c.to.Add(timeout*time.Second).Format(time.DateTime))
		}
		if i == 3 { // and at the start of a server
			h.stop()
			h.open()
			h.utc = func() time.Time { return utc }
		}
	}
	t.Logf("%d jumps, from the year 1901 to 12000", len(jumps))
	h.now = 1000 + timeout/20*4 + timeout // of the restart, from which on all had their time again
	expired, err := h.Tick(h.now)
	if err != nil || len(expired) != 5 { // the one never renewed, and those of the first four jumps
		t.Errorf("expired %v, %v, want five", expired, err)
	}
	h.want(ops(get(1)), "renewed 10000")
}

// TestMonth: a holder renews for a month, while others come, go, and die without a word.
func TestMonth(t *testing.T) {
	h := start(t, config(t, inet(10000, 9)))
	h.do(get(1), get(2))
	const renewals = 31 * 24 * 3600 / (timeout / 2)
	ended := 0
	for n := range renewals {
		h.now += timeout / 2
		h.want(ops(get(1), get(2)), "renewed 10000", "renewed 10001")
		switch n % 5 {
		case 0:
			h.want(ops(get(3)), "granted 10002")
		case 1:
			h.want(ops(get(3), get(4)), "renewed 10002", "granted 10003") // the last that is heard of 4
		case 2, 3:
			h.want(ops(get(3)), "renewed 10002")
		case 4:
			h.want(ops(give(3)), "released 10002")
		}
		expired, err := h.Tick(h.now)
		if err != nil {
			t.Fatal(err)
		}
		if ended += len(expired); len(expired) > 0 && (len(expired) != 1 || expired[0].Key != key(4)) {
			t.Fatalf("renewal %d: expired %+v", n, expired)
		}
		if n%48 == 47 { // once a day
			h.stop()
			h.open()
		}
	}
	t.Logf("%d renewals each half hour, %d leases ended by themselves", renewals, ended)
	if ended < renewals/5-1 {
		t.Errorf("%d leases ended by themselves, want one in %d", ended, renewals/5)
	}
	if got := h.Held(); got > 4 {
		t.Errorf("%d leases are left, want 4 at most", got)
	}
}

func TestClockRow(t *testing.T) {
	h := start(t, config(t, inet(10000, 9)))
	db := peer(t, h.cfg.Path)
	const clock = "SELECT boot, netns, monotonic FROM clock"
	wantRows(t, db, clock, here.Boot+"|7|1000")
	for _, c := range []struct{ at, want int64 }{{1059, 1000}, {1060, 1060}, {1070, 1060}, {1200, 1200}} {
		if _, err := h.Tick(c.at); err != nil {
			t.Fatal(err)
		}
		wantRows(t, db, clock, fmt.Sprint(here.Boot, "|7|", c.want))
	}
}

func TestWriteFails(t *testing.T) {
	for _, c := range []struct {
		name        string
		fail, allow func(h *host, db *sql.DB)
		want        string
	}{
		{"locked",
			func(h *host, db *sql.DB) { mustExec(h.t, db, "BEGIN IMMEDIATE") },
			func(h *host, db *sql.DB) { mustExec(h.t, db, "ROLLBACK") },
			"another program holds a lock"},
		{"full",
			func(h *host, db *sql.DB) {
				pages := query(h.t, db, "PRAGMA page_count")[0]
				if got := readPragma(h, "max_page_count = "+pages); got != pages {
					h.t.Fatalf("max_page_count is %s, want %s", got, pages)
				}
			},
			func(h *host, db *sql.DB) { readPragma(h, "max_page_count = 1000000") },
			"make room"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := start(t, config(t, inet(10000, 3000)))
			h.do(Op{Key: key(1), Tag: "old"}, get(2), get(3))
			h.do(give(3))
			db := peer(t, h.cfg.Path)
			c.fail(h, db)

			// Enough for the database to need new pages. The last three concern what is there.
			many := ops(Op{Key: key(1), Tag: "new"}, give(2), get(2), get(3))
			for n := range 900 {
				many = append(many, Op{Key: Key{Inet, "eth1", fmt.Sprint(n)}, Tag: strings.Repeat("x", 100)})
			}
			began := time.Now()
			h.now += 10
			results, err := h.results(many...)
			if got := results[0]; got.Outcome != Renewed || got.Pending {
				t.Errorf("got %+v, want a renewal at once", got)
			}
			if !errors.Is(err, ErrStorage) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want ErrStorage and %q", err, c.want)
			}
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("it took %v", took)
			}
			for i, r := range results[1:] {
				if r.Outcome != Refused || !errors.Is(r.Err, ErrStorage) || r.Lease.Table != 0 || r.Lease.Key != many[i+1].Key {
					t.Fatalf("got %+v, want a refusal", r)
				}
			}
			h.wantPool(2, 2998, 0)
			if c.name == "locked" {
				if _, err := h.Tick(h.now + retryAfter); err == nil {
					t.Error("Tick wrote to a locked database")
				}
				if got, want := h.Next(), h.now+2*retryAfter; got != want {
					t.Errorf("next %d, want %d", got, want)
				}
			}
			h.want(ops(Op{Key: key(1), Tag: "newer"}, Op{Key: key(2), Tag: "two"}), "renewed 10000", "renewed 10001")

			c.allow(h, db)
			if _, err := h.Tick(h.now + 3*retryAfter); err != nil {
				t.Fatal(err)
			}
			wantRows(t, db, "SELECT RtTable, Tag, LeaseExpires FROM RtTables ORDER BY 1", "10000|newer|4610", "10001|two|4610")
			h.want(ops(get(3), get(4)), "granted 10002", "granted 10003")
		})
	}
}

func readPragma(h *host, pragma string) (value string) {
	if err := h.store.db.query("PRAGMA "+pragma, func(row []driver.Value) error {
		value = fmt.Sprint(row[0])
		return nil
	}); err != nil {
		h.t.Fatal(err)
	}
	return value
}

// A database that is gone is made anew as soon as what was in the way is gone, too.
func TestNotMadeInVain(t *testing.T) {
	h := start(t, config(t, inet(10000, 3)))
	h.do(get(1))
	for _, suffix := range companions {
		if err := os.Remove(h.cfg.Path + suffix); err != nil {
			t.Fatal(err)
		}
	}
	inTheWay := h.cfg.Path + "-wal"
	if err := os.Mkdir(inTheWay, 0o700); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := h.results(get(2)); err == nil || !strings.Contains(err.Error(), inTheWay+": it is not a regular file") {
			t.Errorf("got %v", err)
		}
	}
	if err := os.Remove(inTheWay); err != nil {
		t.Fatal(err)
	}
	h.want(ops(get(2), get(1)), "granted 10001", "renewed 10000")
	wantRows(t, peer(t, h.cfg.Path), "SELECT RtTable FROM RtTables ORDER BY 1", "10000", "10001")
}

// Refused requests must leave nothing behind, or a full disk eats the memory.
func TestFailedWritesDoNotPileUp(t *testing.T) {
	h := start(t, config(t, inet(10000, 3)))
	db := peer(t, h.cfg.Path)
	mustExec(t, db, "BEGIN IMMEDIATE")
	for n := range 100 {
		h.want(ops(get(n)), "refused: "+ErrStorage.Error())
	}
	if len(h.unsaved)+len(h.dirty) != 0 || len(h.byKey) != 0 || len(h.due) != 0 {
		t.Errorf("%d dirty, %d keys, %d due, want none", len(h.unsaved)+len(h.dirty), len(h.byKey), len(h.due))
	}
	mustExec(t, db, "ROLLBACK")
	h.want(ops(get(1)), "granted 10000")
}

// However many renewals wait for the disk, one write takes some of them only, and what has
// to be there before a reply goes first.
func TestManyRenewalsWait(t *testing.T) {
	const many = flushMost + 100
	h := start(t, config(t, inet(10000, 2*many)))
	db := peer(t, h.cfg.Path)
	stored := func(where string) (n int) {
		t.Helper()
		if err := db.QueryRowContext(t.Context(), "SELECT count(*) FROM RtTables WHERE "+where).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	var all []Op
	for n := range many {
		all = append(all, Op{Key: Key{Inet, "eth0", fmt.Sprintf("10.1.%d.%d", n/256, n%256)}})
	}
	h.do(all...)
	if n := stored("true"); n != many {
		t.Fatalf("stored at the commit: %d leases, want %d", n, many)
	}
	for i := range all {
		all[i].Tag = "renewed"
	}
	h.do(all...)
	h.want(ops(get(1), Op{Key: all[0].Key, Release: true}), fmt.Sprint("granted ", 10000+many), "released 10000")
	if n := stored(fmt.Sprint("RtTable = ", 10000+many)); n != 1 {
		t.Error("the new lease is not there")
	}
	if n := stored("RtTable = 10000"); n != 0 {
		t.Error("the released one is still there")
	}
	if n := stored("Tag = 'renewed'"); n != 0 {
		t.Errorf("written with it: %d renewals, want none", n)
	}
	for h.now++; h.Next() <= h.now; {
		before := stored("Tag = 'renewed'")
		if _, err := h.Tick(h.now); err != nil {
			t.Fatal(err)
		}
		if n := stored("Tag = 'renewed'") - before; n > flushMost || n == 0 {
			t.Fatalf("one tick writes %d renewals", n)
		}
	}
	if n := stored("Tag = 'renewed'"); n != many-1 {
		t.Errorf("written in the end: %d renewals, want %d", n, many-1)
	}
	// After a restart they are there for a while more, which is written bit by bit, too.
	h.stop()
	h.now += 10
	h.open()
	end := fmt.Sprint("LeaseExpires >= ", h.now+h.cfg.Timeout)
	if n := stored(end); n != flushMost {
		t.Errorf("written at the start: %d, want %d", n, flushMost)
	}
	for h.now++; h.Next() <= h.now; {
		if _, err := h.Tick(h.now); err != nil {
			t.Fatal(err)
		}
	}
	if n := stored(end); n != many {
		t.Errorf("written after the start: %d, want %d", n, many)
	}
}

// What a failed batch handed out and took back in turn goes to its old place in the order.
func TestUndoKeepsTheOrder(t *testing.T) {
	h := start(t, config(t, inet(10000, 3)))
	h.do(get(1), get(2), get(3), give(1), give(2), give(3))
	h.undone(get(4), give(4), get(5), give(5), get(1), get(4))
	h.want(ops(get(6), get(7), get(8)), "granted 10000", "granted 10001", "granted 10002")
}

func TestUndoKeepsThePreference(t *testing.T) {
	avoided := false
	cfg := config(t, inet(10000, 3))
	cfg.Avoid = func(table uint32, _, _ Key, _ bool) bool { return avoided && table == 10000 }
	h := start(t, cfg)
	h.do(get(1), give(1))
	avoided = true
	if got, want := h.undone(get(1))[0], "granted 10001"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	avoided = false
	h.want(ops(get(1)), "granted 10000")
}

func TestReaderDelaysNobody(t *testing.T) {
	h := start(t, config(t, inet(10000, 3)))
	h.do(get(1))
	db := peer(t, h.cfg.Path)
	mustExec(t, db, "BEGIN")
	wantRows(t, db, "SELECT count(*) FROM leases", "1")
	h.want(ops(get(2), give(1)), "granted 10001", "released 10000")
	wantRows(t, db, "SELECT count(*), max(RtTable) FROM RtTables", "1|10000") // its snapshot
	mustExec(t, db, "ROLLBACK")
	wantRows(t, db, "SELECT count(*), max(RtTable) FROM RtTables", "1|10001")
	h.stop()
}

// A lease whose end cannot be written is over all the same.
func TestExpiryThatCannotBeWritten(t *testing.T) {
	h := start(t, config(t, inet(10000, 2)))
	h.do(get(1), get(2))
	db := peer(t, h.cfg.Path)
	mustExec(t, db, "BEGIN IMMEDIATE")
	h.now += timeout
	expired, err := h.Tick(h.now)
	if err == nil || len(expired) != 2 {
		t.Errorf("got %v, %v, want two leases and an error", expired, err)
	}
	mustExec(t, db, "ROLLBACK")
	h.want(ops(get(3)), "granted 10000")
	h.flush()
	wantRows(t, db, "SELECT RtTable, Addr FROM RtTables", "10000|192.0.2.3")
}
