package allocator

import (
	"bytes"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// ruined makes a region of a file wrong, in the ways that disks and programs do.
var ruined = []struct {
	name string
	make func(region []byte)
}{
	{"zeros", func(b []byte) { clear(b) }},
	{"ones", func(b []byte) {
		for i := range b {
			b[i] = 0xff
		}
	}},
	{"one bit of each byte", func(b []byte) {
		for i := range b {
			b[i] ^= 1 << (i % 8)
		}
	}},
	{"digits", func(b []byte) { // of addresses, into others
		for i := range b {
			b[i] ^= 1
		}
	}},
	{"moved by one", func(b []byte) { copy(b, b[min(1, len(b)):]) }},
}

// damage counts what became of databases that were damaged.
type damage struct {
	cfg                       Config
	granted                   map[Key]Lease // each lease that was ever granted, the last of each key
	refused, lost, whole, all int
}

// try opens a database with these files, damaged, and checks what comes of it. With all, no
// lease may be missing without a word.
func (d *damage) try(t *testing.T, what string, files map[string][]byte, all bool) {
	t.Helper()
	dir := filepath.Dir(d.cfg.Path)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for suffix, data := range files {
		if err := os.WriteFile(d.cfg.Path+suffix, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d.all++
	log := &bytes.Buffer{}
	a, err := Open(d.cfg, 1010, slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		d.refused++
		if !strings.HasPrefix(err.Error(), "open database "+d.cfg.Path+": ") {
			t.Errorf("%s: the error does not say where: %v", what, err)
		}
		if left, err := os.ReadFile(d.cfg.Path); err != nil || !bytes.Equal(left, files[""]) {
			t.Errorf("%s: the file is not as it was: %v", what, err)
		}
		return
	}
	held := make(map[Key]Lease)
	for _, s := range a.due {
		held[s.Key] = s.Lease
		was, ok := d.granted[s.Key]
		if !ok || s.Table != was.Table || s.Owner != was.Owner || s.Expires > 1010+timeout {
			t.Errorf("%s: a lease that never was: %+v, want %+v", what, s.Lease, was)
		}
	}
	switch {
	case len(held) == len(d.granted):
		d.whole++
	case all && strings.Count(log.String(), "moved to table rejected") < len(d.granted)-len(held):
		t.Errorf("%s: leases are missing, and the log says only %q: %v", what, log, held)
	default:
		d.lost++
	}
	// And it can be used.
	ops := []Op{{Key: Key{Inet, "eth9", "198.51.100.1"}}, {Key: Key{Inet6, "eth9", "2001:db8:9::1"}}}
	b := a.Decide(1010, ops)
	if err := a.Commit(b); err == nil {
		for i, r := range b.Results() {
			for _, l := range held {
				if l.Family == ops[i].Key.Family && l.Table == r.Lease.Table {
					t.Errorf("%s: table %d of %+v went to another", what, l.Table, l)
				}
			}
		}
	}
	if err := a.Close(1010); err != nil {
		t.Errorf("%s: close: %v", what, err)
	}
	if a, err = Open(d.cfg, 1010, slog.New(slog.DiscardHandler)); err != nil {
		t.Errorf("%s: opened again: %v", what, err)
	} else if err := a.Close(1010); err != nil {
		t.Errorf("%s: close: %v", what, err)
	}
}

// regions calls f with each region of a file that is to be damaged: small by small those that
// have something in them, in turn a byte and more of it, and one of sixteen of the others.
func regions(data []byte, full bool, f func(n, from, to int)) {
	n := 0
	sizes := []int{24}
	if full {
		sizes = []int{1, 16, 100}
	}
	for _, size := range sizes {
		for from := 0; from < len(data); from += size {
			to := min(from+size, len(data))
			empty := len(bytes.Trim(data[from:to], "\x00")) == 0
			if n++; !empty || n%16 == 0 {
				f(n, from, to)
			}
		}
	}
}

// TestSoakDamaged: whichever region of a small database is damaged, the server does not
// start, says why and leaves the file as it is; or it starts without a lease that was not
// granted, and says which rows it could not believe.
func TestSoakDamaged(t *testing.T) {
	t.Parallel()
	full := os.Getenv("SOAK") == "full"
	h := start(t, config(t, map[Family]Pool{Inet: {10000, 9}, Inet6: {10000, 9}, Unspec: {10000, 9}}))
	h.do(Op{Key: key(1), Tag: "cable"}, Op{Key: key(2), UID: 1000}, get(3), get(4), Op{Key: Key{Inet6, "eth0", "2001:db8::1"}},
		Op{Key: Key{Inet6, "wwan0", "fd00::17"}}, Op{Key: Key{Unspec, "wwan0", "modem"}})
	h.do(give(3))
	granted := make(map[Key]Lease)
	for _, s := range h.due {
		granted[s.Key] = s.Lease
	}
	h.stop()
	whole, err := os.ReadFile(h.cfg.Path)
	if err != nil {
		t.Fatal(err)
	}
	d := &damage{cfg: config(t, h.cfg.Pools), granted: granted}
	begun := time.Now()
	regions(whole, full, func(n, from, to int) {
		kinds := ruined
		if !full {
			kinds = ruined[n%len(ruined):][:1]
		}
		for _, kind := range kinds {
			data := bytes.Clone(whole)
			kind.make(data[from:to])
			if !bytes.Equal(data, whole) {
				d.try(t, fmt.Sprintf("bytes %d to %d, %s", from, to, kind.name), map[string][]byte{"": data}, true)
			}
		}
	})
	t.Logf("a database of %d bytes, damaged %d times in %v: %d times refused, %d times a row was rejected, %d times nothing was lost",
		len(whole), d.all, time.Since(begun).Round(time.Millisecond), d.refused, d.lost, d.whole)
	if d.refused == 0 || d.lost == 0 || d.whole == 0 {
		t.Error("one of these never happened")
	}
}

// TestSoakDamagedLog: a write-ahead log that a killed server left and that is damaged counts
// as far as it goes: what it says is what was once granted.
func TestSoakDamagedLog(t *testing.T) {
	t.Parallel()
	full := os.Getenv("SOAK") == "full"
	h := start(t, config(t, inet(10000, 9)))
	granted := make(map[Key]Lease)
	for n := range 6 {
		h.do(get(n))
		for _, s := range h.due {
			granted[s.Key] = s.Lease
		}
	}
	h.do(give(2))
	files := make(map[string][]byte)
	for _, suffix := range []string{"", "-wal"} {
		data, err := os.ReadFile(h.cfg.Path + suffix)
		if err != nil {
			t.Fatal(err)
		}
		files[suffix] = data
	}
	whole := files["-wal"]
	d := &damage{cfg: config(t, h.cfg.Pools), granted: granted}
	begun := time.Now()
	step := 0
	regions(whole, false, func(n, from, to int) {
		if step++; !full && step%8 != 0 {
			return
		}
		damaged := maps.Clone(files)
		damaged["-wal"] = bytes.Clone(whole)
		kind := ruined[n%len(ruined)]
		kind.make(damaged["-wal"][from:to])
		d.try(t, fmt.Sprintf("bytes %d to %d of the log, %s", from, to, kind.name), damaged, false)
	})
	t.Logf("a log of %d bytes, damaged %d times in %v: %d times refused, %d times the last leases were lost, %d times nothing was",
		len(whole), d.all, time.Since(begun).Round(time.Millisecond), d.refused, d.lost, d.whole)
}
