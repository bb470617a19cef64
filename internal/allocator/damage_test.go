package allocator

import (
	"bytes"
	"errors"
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
	cfg                         Config
	granted                     map[Key]Lease // each lease that was ever granted, the last of each key
	refused, aside, unseen, all int
	read, rows                  int // of what was set aside
}

// try opens a database with these files, damaged, and checks what comes of it.
func (d *damage) try(t *testing.T, what string, files map[string][]byte) {
	t.Helper()
	dir := filepath.Dir(d.cfg.Path)
	if err := errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700)); err != nil {
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
		// A number of a schema that is not known yet may be right.
		if !strings.HasPrefix(err.Error(), "open database "+d.cfg.Path+": it has schema version ") {
			t.Errorf("%s: %v", what, err)
		}
		if left, err := os.ReadFile(d.cfg.Path); err != nil || !bytes.Equal(left, files[""]) {
			t.Errorf("%s: the file is not as it was: %v", what, err)
		}
		return
	}
	h := &host{Allocator: a, t: t, cfg: d.cfg, now: 1010, log: log}
	sets, err := filepath.Glob(d.cfg.Path + asideMark + "*")
	if err != nil {
		t.Fatal(err)
	}
	if len(sets) == 0 {
		d.unseen++
	} else {
		d.checkAside(h, what, sets[0], files[""])
	}
	tables := make(map[place]Key)
	for _, s := range h.due {
		at := place{s.Family, s.Table}
		if other, ok := tables[at]; ok || h.byKey[s.Key] != s {
			t.Errorf("%s: table %v is held by %v and %v", what, at, s.Key, other)
		}
		tables[at] = s.Key
	}
	// And it can be used, also after a restart.
	h.want(ops(Op{Key: Key{Inet6, "eth9", "2001:db8:9::1"}, Want: 10008}), "granted 10008")
	h.stop()
	h.open()
	h.want(ops(Op{Key: Key{Inet6, "eth9", "2001:db8:9::1"}}), "renewed 10008")
	h.stop()
}

// checkAside looks at a database that was set aside, and at what was made of it.
func (d *damage) checkAside(h *host, what, aside string, data []byte) {
	h.t.Helper()
	d.aside++
	if left, err := os.ReadFile(aside); err != nil || !bytes.Equal(left, data) {
		h.t.Errorf("%s: what was set aside is not what it was: %v", what, err)
	}
	if n := strings.Count(h.log.String(), "level=WARN"); n != 1 || !strings.Contains(h.log.String(), "so it is set aside") {
		h.t.Errorf("%s: want one warning, the log has %q", what, h.log)
	}
	if len(h.due) > 0 {
		h.t.Errorf("%s: %d leases of a damaged database are in force", what, len(h.due))
	}
	d.rows += len(d.granted)
	for key, was := range d.granted {
		s := h.byKey[key]
		if s == nil || s.reserved == 0 {
			continue
		}
		d.read++
		stranger := Key{key.Family, "eth8", "198.51.100.8"}
		if key.Family == Inet6 {
			stranger.Addr = "2001:db8:8::8"
		}
		if got := h.decide(Op{Key: stranger, Want: s.Table}); got[0].Lease.Table == s.Table {
			h.t.Errorf("%s: the table of %v went to another: %v", what, key, got)
		}
		want := fmt.Sprint("granted ", s.Table)
		if got := h.do(Op{Key: stranger, Release: true}, Op{Key: key}); got[1] != want {
			h.t.Errorf("%s: %v, which had %d: got %s, want %s", what, key, was.Table, got[1], want)
		}
	}
}

// regions calls f with each region of a file that is to be damaged: small by small those that
// have something in them, in turn a byte and more of it, and one of sixteen of the others.
func regions(data []byte, full bool, f func(n, from, to int)) {
	n := 0
	sizes := []int{64}
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

// region is a part of a file.
type region struct{ from, to int }

// add adds what another count has.
func (d *damage) add(other *damage) {
	d.refused += other.refused
	d.aside += other.aside
	d.unseen += other.unseen
	d.all += other.all
	d.read += other.read
	d.rows += other.rows
}

// TestSoakDamaged: whichever region of a small database is damaged, the server starts. If SQLite
// notices, it starts with a new one, in which what could be read is kept for whom it was.
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
	var all damage
	t.Run("regions", func(t *testing.T) {
		for k, kind := range ruined { // beside each other, since each takes minutes
			var parts []region
			regions(whole, full, func(n, from, to int) {
				of := len(ruined)
				switch {
				case to-from == 1:
					of = 3 // to one byte the others do the same, or nothing
				case full:
					of = 1 // each kind
				}
				if of == 1 || n%of == k {
					parts = append(parts, region{from, to})
				}
			})
			d := &damage{cfg: config(t, h.cfg.Pools), granted: granted}
			t.Run(kind.name, func(t *testing.T) {
				t.Parallel()
				for _, one := range parts {
					data := bytes.Clone(whole)
					kind.make(data[one.from:one.to])
					if !bytes.Equal(data, whole) {
						d.try(t, fmt.Sprintf("bytes %d to %d", one.from, one.to), map[string][]byte{"": data})
					}
				}
			})
			t.Cleanup(func() { all.add(d) })
		}
	})
	t.Logf("a database of %d bytes, damaged %d times: %d times set aside, with %d of %d leases read; %d times not noticed; %d times of a later schema",
		len(whole), all.all, all.aside, all.read, all.rows, all.unseen, all.refused)
	if all.aside == 0 || all.read < all.rows/2 || all.unseen == 0 {
		t.Error("one of these never happened")
	}
}

// TestSoakDamagedLog: a write-ahead log that a killed server left and that is damaged counts
// as far as it goes: what it says is what was once granted.
func TestSoakDamagedLog(t *testing.T) {
	t.Parallel()
	full := os.Getenv("SOAK") == "full"
	h := start(t, config(t, map[Family]Pool{Inet: {10000, 9}, Inet6: {10000, 9}}))
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
		d.try(t, fmt.Sprintf("bytes %d to %d of the log, %s", from, to, kind.name), damaged)
	})
	t.Logf("a log of %d bytes, damaged %d times in %v: %d times set aside, %d times not noticed", len(whole), d.all, time.Since(begun).Round(time.Millisecond), d.aside, d.unseen)
	if d.refused > 0 {
		t.Errorf("%d times refused", d.refused)
	}
}
