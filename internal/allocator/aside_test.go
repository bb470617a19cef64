package allocator

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// overwrite writes over a part of the database, as a broken disk or another program does.
func (h *host) overwrite(suffix string, at int64, with []byte) {
	h.t.Helper()
	f, err := os.OpenFile(h.cfg.Path+suffix, os.O_WRONLY, 0)
	if err != nil {
		h.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(with, at); err != nil {
		h.t.Fatal(err)
	}
}

// ruin makes all but the header of the database wrong.
func (h *host) ruin() {
	h.t.Helper()
	info, err := os.Stat(h.cfg.Path)
	if err != nil {
		h.t.Fatal(err)
	}
	h.overwrite("", headerBytes, bytes.Repeat([]byte{0xa5}, int(info.Size())-headerBytes))
}

// sets are the names of what was set aside, without companions.
func (h *host) sets() (sets []string) {
	h.t.Helper()
	all, err := filepath.Glob(h.cfg.Path + asideMark + "*")
	if err != nil {
		h.t.Fatal(err)
	}
	return slices.DeleteFunc(all, func(path string) bool {
		return strings.HasSuffix(path, companions[1]) || strings.HasSuffix(path, companions[2])
	})
}

// TestAsideAtStart: a database that is damaged when the server starts is set aside with all that
// belongs to it; of these three stay, the oldest two for good.
func TestAsideAtStart(t *testing.T) {
	h := start(t, config(t, inet(10000, 9)))
	h.want(ops(get(1)), "granted 10000")
	h.stop()
	var first []string
	for n := range 6 {
		h.ruin()
		if err := os.WriteFile(h.cfg.Path+"-wal", []byte(fmt.Sprint("log ", n)), 0o644); err != nil {
			t.Fatal(err)
		}
		h.open()
		h.want(ops(get(1)), "granted 10000")
		h.stop()
		sets := h.sets()
		if want := min(n+1, asideMost); len(sets) != want {
			t.Fatalf("%d databases were set aside, want %d", len(sets), want)
		}
		if n < asideMost {
			first = sets
			continue
		}
		if !slices.Equal(sets[:asideMost-1], first[:asideMost-1]) || sets[asideMost-1] == first[asideMost-1] {
			t.Errorf("got %q, want the last of %q replaced", sets, first)
		}
	}
	for _, set := range h.sets() {
		for _, suffix := range companions[:2] {
			if info, err := os.Stat(set + suffix); err != nil || info.Mode() != 0o600 {
				t.Errorf("%s: %v, %v", set+suffix, info, err)
			}
		}
	}
}

// TestAsideWhileRunning: damage that is found while the server runs costs nobody anything.
func TestAsideWhileRunning(t *testing.T) {
	h := start(t, markConfig(t, 9))
	h.want(ops(get(1), get(2), get(3), give(2)), "granted 10000", "granted 10001", "granted 10002", "released 10001")
	h.wantMark("wan0", unused, 1)
	for n, damage := range []func(){
		func() { h.ruin() },
		func() { mustExec(t, peer(t, h.cfg.Path), "DROP TABLE RtTables") },
	} {
		readPragma(h, "wal_checkpoint(TRUNCATE)")
		damage()
		readPragma(h, "shrink_memory")
		h.want(ops(get(4+n), get(1)), fmt.Sprint("granted ", 10003+n), "renewed 10000")
		if sets := h.sets(); len(sets) != n+1 {
			t.Errorf("set aside: %q, the log has\n%s", sets, h.log)
		}
	}
	if n := strings.Count(h.log.String(), "the database was begun anew, with all leases"); n != 2 {
		t.Errorf("the log has %q", h.log)
	}
	h.wantMark("wan1", unused, 2)
	h.crash()
	h.want(ops(get(1), get(2), get(3), get(4), get(5), get(6)),
		"renewed 10000", "granted 10001", "renewed 10002", "renewed 10003", "renewed 10004", "granted 10005")
	h.wantMark("wan0", unused, 1)
}

// TestReserved: numbers of a damaged database wait for their holders for as long as a lease lasts,
// over restarts too, and of an earlier boot not at all.
func TestReserved(t *testing.T) {
	for _, c := range []struct {
		name string
		here bool
	}{{"of this boot", true}, {"of another one", false}} {
		t.Run(c.name, func(t *testing.T) {
			h := start(t, config(t, map[Family]Pool{Unspec: {10000, 3}}))
			modem := func(n int) Op { return Op{Key: Key{Unspec, "wwan0", fmt.Sprint("modem", n)}} }
			h.want(ops(modem(1), modem(2)), "granted 10000", "granted 10001")
			h.stop()
			h.overwrite("", 18, []byte{9}) // a format that SQLite does not write to
			if !c.here {
				h.cfg.Epoch.Boot = "another"
			}
			h.open()
			if len(h.sets()) != 1 {
				t.Fatalf("it was not set aside; the log has %s", h.log)
			}
			h.want(ops(modem(3)), "granted 10002")
			if !c.here {
				h.want(ops(modem(4), modem(2), modem(1)), "granted 10000", "granted 10001", "refused: no table is free")
				return
			}
			h.want(ops(modem(4), modem(2)), "refused: no table is free", "granted 10001")
			h.stop()
			h.now += 10
			h.open()
			h.want(ops(modem(4)), "refused: no table is free")
			h.now += timeout - 11
			h.want(ops(modem(4)), "refused: no table is free")
			h.now++
			h.want(ops(modem(4), modem(1)), "granted 10000", "refused: no table is free")
		})
	}
}

// TestAsideOnlyOurs: what is not certainly ours is left alone.
func TestAsideOnlyOurs(t *testing.T) {
	whole := func(t *testing.T) []byte { // without the number in the header, as of an older version
		h := start(t, config(t, inet(10000, 9)))
		h.do(get(1))
		h.stop()
		data, err := os.ReadFile(h.cfg.Path)
		if err != nil {
			t.Fatal(err)
		}
		clear(data[applicationAt : applicationAt+4])
		return data
	}(t)
	cut := bytes.Clone(whole[:len(whole)/2])
	headless := bytes.Clone(whole)
	clear(headless[:headerBytes])
	for _, c := range []struct {
		name string
		data []byte
		ours bool
	}{
		{"cut", cut, true},
		{"without a header", headless, true},
		{"zeros", make([]byte, 5000), true},
		{"junk", bytes.Repeat([]byte("junk"), 5000), false},
		{"junk with a header", append(bytes.Clone(whole[:headerBytes]), bytes.Repeat([]byte("junk"), 5000)...), false},
		{"our name in a text", []byte("RtTables is the table of the original\n"), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := config(t, inet(10000, 9))
			if err := os.MkdirAll(filepath.Dir(cfg.Path), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(cfg.Path, c.data, 0o600); err != nil {
				t.Fatal(err)
			}
			if c.ours {
				h := start(t, cfg)
				if left, err := os.ReadFile(h.sets()[0]); err != nil || !bytes.Equal(left, c.data) {
					t.Errorf("what was set aside is not what it was: %v", err)
				}
				return
			}
			_, err := Open(cfg, 1000, slog.New(slog.DiscardHandler))
			if err == nil || !strings.HasSuffix(err.Error(), "move the file away, or choose another path") {
				t.Errorf("got %v", err)
			}
			if left, err := os.ReadFile(cfg.Path); err != nil || !bytes.Equal(left, c.data) {
				t.Errorf("it changed: %v", err)
			}
		})
	}
}
