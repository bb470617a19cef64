package allocator

import (
	"database/sql"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

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
			if took := time.Since(began); took > time.Minute {
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
