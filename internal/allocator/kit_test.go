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
	"testing"
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

func readPragma(h *host, pragma string) (value string) {
	if err := h.store.db.query("PRAGMA "+pragma, func(row []driver.Value) error {
		value = fmt.Sprint(row[0])
		return nil
	}); err != nil {
		h.t.Fatal(err)
	}
	return value
}
