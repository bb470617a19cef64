package allocator

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
)

func unused(uint32) bool { return false }

// use is what the host uses of marks, none of which is certainly the interface's.
func use(by func(uint32) bool) Use { return Use{Of: func() uint32 { return 0 }, By: by} }

func (h *host) wantMark(ifname string, inUse func(uint32) bool, want uint32) {
	h.t.Helper()
	if got, err := h.TakeMark(h.now, ifname, use(inUse)); err != nil || got != want {
		h.t.Errorf("mark of %s: got %d, %v, want %d", ifname, got, err, want)
	}
	if got, ok := h.Mark(ifname); !ok || got != want {
		h.t.Errorf("mark of %s afterwards: got %d, %v, want %d", ifname, got, ok, want)
	}
}

func markConfig(t *testing.T, last uint32, skip ...uint32) Config {
	cfg := config(t, inet(10000, 9))
	cfg.Marks = Marks{Last: last, Skip: func(index uint32) bool {
		for _, s := range skip {
			if s == index {
				return true
			}
		}
		return false
	}}
	return cfg
}

// TestMarks: one for each interface, the lowest first, kept over restarts, crashes and boots.
func TestMarks(t *testing.T) {
	h := start(t, markConfig(t, 5, 2))
	if _, ok := h.Mark("wan0"); ok {
		t.Error("an interface has a mark before anybody asked")
	}
	h.wantMark("wan0", unused, 1)
	h.wantMark("wan1", unused, 3)
	h.wantMark("wan0", unused, 1)
	h.wantMark("wan2", func(index uint32) bool { return index == 4 }, 5)
	h.crash()
	h.wantMark("wan1", unused, 3)
	h.wantMark("wan2", unused, 5)
	h.stop()
	h.cfg.Epoch = Epoch{Boot: "5d6f2c9e-0000-4000-8000-000000000002", Netns: 8}
	h.open()
	h.wantMark("wan0", unused, 1)
	wantRows(t, peer(t, h.cfg.Path), "SELECT ifname, idx FROM marks ORDER BY idx", "wan0|1", "wan1|3", "wan2|5")

	// In a narrower mask some have none any more, and get another; back in the wide one, all.
	h.stop()
	h.cfg.Marks.Last = 4
	h.open()
	if got, ok := h.Mark("wan2"); ok {
		t.Errorf("wan2 has mark %d of 4", got)
	}
	h.wantMark("wan2", unused, 4)
	h.wantMark("wan1", unused, 3)
}

// TestMarksRunOut: the one unused for longest goes to another interface, unless rules refer
// to it.
func TestMarksRunOut(t *testing.T) {
	h := start(t, markConfig(t, 3))
	for i := range 3 {
		h.wantMark(fmt.Sprint("wan", i), unused, uint32(i+1))
	}
	h.wantMark("wan0", unused, 1) // so that wan1's is the oldest
	h.crash()
	h.wantMark("new0", unused, 2)
	if _, ok := h.Mark("wan1"); ok {
		t.Error("wan1 has a mark that it gave away")
	}
	h.wantMark("new1", func(index uint32) bool { return index == 3 }, 1)
	if got, err := h.TakeMark(h.now, "new2", use(func(uint32) bool { return true })); !errors.Is(err, ErrNoMark) {
		t.Errorf("all are in use: got %d, %v", got, err)
	}
	h.wantMark("new1", func(uint32) bool { return true }, 1) // what is there needs no look
	h.stop()
	h.cfg.Marks.Last = 0
	h.open()
	if got, err := h.TakeMark(h.now, "new1", use(unused)); !errors.Is(err, ErrNoMark) {
		t.Errorf("there are no marks: got %d, %v", got, err)
	}
}

// TestMarkNotWritten: what the database does not have nobody gets; what it has is good even
// if it cannot be written.
func TestMarkNotWritten(t *testing.T) {
	h := start(t, markConfig(t, 3))
	h.wantMark("wan0", unused, 1)
	h.wantMark("wan1", unused, 2)
	db := peer(t, h.cfg.Path)
	mustExec(t, db, "BEGIN IMMEDIATE")
	if got, err := h.TakeMark(h.now, "wan2", use(unused)); !errors.Is(err, ErrStorage) {
		t.Errorf("got %d, %v", got, err)
	}
	if _, ok := h.Mark("wan2"); ok {
		t.Error("there is a mark that is not in the database")
	}
	h.wantMark("wan0", unused, 1)
	mustExec(t, db, "ROLLBACK")
	h.wantMark("wan2", unused, 3)
}

// TestMarksModel compares many random requests and restarts with the rule in its simplest form.
func TestMarksModel(t *testing.T) {
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 0))
	const last, skipped = 6, 4
	h := start(t, markConfig(t, last, skipped))
	owner := make(map[uint32]string)
	turn := make(map[uint32]int)
	for step := range 500 {
		if rnd.IntN(20) == 0 {
			h.stop()
			h.open()
		}
		busy := rnd.Uint32() & rnd.Uint32() // a bit each
		inUse := func(index uint32) bool { return busy>>index&1 != 0 }
		ifname := fmt.Sprint("wan", rnd.IntN(9))
		var want uint32
		for index := uint32(last); index >= 1; index-- { // the lowest that nobody has
			if owner[index] == "" && index != skipped && !inUse(index) {
				want = index
			}
		}
		for index := uint32(1); index <= last && (want == 0 || owner[want] != ""); index++ { // the oldest
			if owner[index] != "" && !inUse(index) && (want == 0 || turn[index] < turn[want]) {
				want = index
			}
		}
		for index, who := range owner {
			if who == ifname {
				want = index
			}
		}
		got, err := h.TakeMark(h.now, ifname, use(inUse))
		if got != want || errors.Is(err, ErrNoMark) != (want == 0) {
			t.Fatalf("seed %d, step %d: %s gets %d, %v, want %d", seed, step, ifname, got, err, want)
		}
		if want != 0 {
			owner[want], turn[want] = ifname, step+1
		}
		for index, who := range owner {
			if got, ok := h.Mark(who); !ok || got != index {
				t.Fatalf("seed %d, step %d: %s has %d, %v, want %d", seed, step, who, got, ok, index)
			}
		}
	}
}

// TestMarksWrittenAnew: a database that is deleted gets the marks again, too.
func TestMarksWrittenAnew(t *testing.T) {
	h := start(t, markConfig(t, 9))
	h.wantMark("wan0", unused, 1)
	for i, ifname := range []string{"wan1", "wan2"} {
		for _, suffix := range []string{"", "-wal", "-shm"} {
			if err := os.Remove(h.cfg.Path + suffix); err != nil {
				t.Fatal(err)
			}
		}
		h.wantMark(ifname, unused, uint32(i+2))
	}
	h.want(ops(get(1)), "granted 10000")
	h.crash()
	h.wantMark("wan2", unused, 3)
	h.wantMark("wan0", unused, 1)
	wantRows(t, peer(t, h.cfg.Path), "SELECT ifname, idx FROM marks ORDER BY idx", "wan0|1", "wan1|2", "wan2|3")
}

// TestRestoreMark: an interface gets the mark again that it had, if it has none and nobody else has that.
func TestRestoreMark(t *testing.T) {
	h := start(t, markConfig(t, 4, 3))
	h.wantMark("wan0", unused, 1)
	for _, c := range []struct {
		ifname string
		index  uint32
		want   uint32 // 0: none
	}{{"wan0", 2, 1}, {"wan1", 1, 0}, {"wan1", 3, 0}, {"wan1", 5, 0}, {"wan1", 0, 0}, {"wan1", 4, 4}, {"wan1", 2, 4}} {
		h.RestoreMark(h.now, c.ifname, c.index)
		if got, ok := h.Mark(c.ifname); ok != (c.want != 0) || ok && got != c.want {
			t.Errorf("%s had %d: got %d, %v, want %d", c.ifname, c.index, got, ok, c.want)
		}
	}
	h.crash()
	h.wantMark("wan1", unused, 4)
	own := Use{Of: func() uint32 { return 2 }, By: func(uint32) bool { return true }}
	if got, err := h.TakeMark(h.now, "wan2", own); err != nil || got != 2 {
		t.Errorf("the mark that the host uses for it: got %d, %v", got, err)
	}
	if got, err := h.TakeMark(h.now, "wan3", own); !errors.Is(err, ErrNoMark) {
		t.Errorf("the mark of another one: got %d, %v", got, err)
	}
}
