package allocator

import (
	"database/sql/driver"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// The schema of the original, and the INSERT that it writes with.
const (
	originalSchema = `CREATE TABLE RtTables(RtTable INTEGER NOT NULL, AddrFamily INTEGER NOT NULL, Ifname TEXT NOT NULL, Addr TEXT NOT NULL,
		LeaseExpires INTEGER NOT NULL, Tag TEXT, PRIMARY KEY (RtTable, AddrFamily) ON CONFLICT REPLACE)`
	originalInsert = "INSERT INTO RtTables(RtTable,AddrFamily,Ifname,Addr,LeaseExpires,Tag) VALUES (?,?,?,?,?,?)"
)

func original(t *testing.T, cfg Config, rows ...[]any) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(cfg.Path), 0o700); err != nil {
		t.Fatal(err)
	}
	db := peer(t, cfg.Path)
	mustExec(t, db, originalSchema)
	for _, r := range rows {
		mustExec(t, db, originalInsert, r...)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestOriginalTakenOver(t *testing.T) {
	cfg := config(t, map[Family]Pool{Inet: {10000, 9}, Inet6: {10000, 9}})
	original(t, cfg,
		[]any{10000, 2, "eth0", "192.0.2.1", 1001, "just"},
		[]any{10001, 2, "eth0", "192.0.2.2", 1000 + timeout, nil},
		[]any{10002, 2, "eth0", "192.0.2.3", 1000, nil},           // over
		[]any{10003, 2, "eth0", "192.0.2.4", 1001 + timeout, nil}, // of an earlier boot: further away than a lease can be
		[]any{10004, 10, "eth0", "fd00::02", 1500, nil},
		[]any{10005, 10, "eth0", "fd00:0::2", 1600, "later"}, // the same holder
		[]any{20000, 2, "eth0", "192.0.2.5", 1500, nil},      // outside
		[]any{10006, 0, "id", "x", 1500, nil},                // not served
	)
	if err := os.WriteFile(cfg.Path+".original", []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	h := start(t, cfg)
	if got := h.log.String(); !strings.Contains(got, "database of the original taken over") || !strings.Contains(got, "leases.db.original.1") {
		t.Errorf("log: %s", got)
	}
	db := peer(t, cfg.Path)
	wantRows(t, db, "SELECT RtTable, AddrFamily, Addr, LeaseExpires, Owner, Boot = '"+here.Boot+"', Netns FROM RtTables ORDER BY 1",
		"10000|2|192.0.2.1|4600|0|1|7", "10001|2|192.0.2.2|4600|0|1|7", "10005|10|fd00::2|4600|0|1|7",
		"10006|0|x|4600|0|1|7", "20000|2|192.0.2.5|4600|0|1|7")
	h.want(ops(Op{Key: key(1), UID: 1000}, get(4), get(3), get(9), Op{Key: Key{Inet6, "eth0", "fd00::2"}}, get(5)),
		"refused: the lease belongs to another user", "granted 10003", "granted 10002", "granted 10005", "renewed 10005", "granted 10004")

	copied := cfg.Path + ".original.1"
	info, err := os.Stat(copied)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the copy: %v, %v", info, err)
	}
	if got, err := os.ReadFile(cfg.Path + ".original"); err != nil || string(got) != "precious" {
		t.Errorf("the file in the way: %q, %v", got, err)
	}
	kept := peer(t, copied)
	wantRows(t, kept, "PRAGMA user_version", "0")
	wantRows(t, kept, "SELECT count(*), sum(LeaseExpires) FROM RtTables", "8|"+strconv.Itoa(1001+1000+timeout+1000+1001+timeout+1500+1600+1500+1500))

	// The original's INSERT works on what it has become. What it says counts from the next start on.
	h.stop()
	mustExec(t, db, originalInsert, 10008, 2, "eth0", "192.0.2.8", h.now+100, nil)
	mustExec(t, db, originalInsert, 10007, 2, "eth0", "192.0.2.7", h.now-100, nil)
	mustExec(t, db, originalInsert, 10000, 2, "eth0", "192.0.2.80", h.now+100, nil)
	h.open()
	h.want(ops(get(8), get(80), get(7), get(10)), "renewed 10008", "renewed 10000", "granted 10007", "granted 10006")
	if _, err := os.Stat(cfg.Path + ".original.2"); err == nil {
		t.Error("a second copy was made")
	}
}

func TestOddRows(t *testing.T) {
	cfg := config(t, inet(10000, 9))
	odd := [][]any{
		{-1, 2, "eth0", "192.0.2.1", 1500, nil},
		{int64(1) << 32, 2, "eth0", "192.0.2.1", 1500, nil},
		{"x", 2, "eth0", "192.0.2.1", 1500, nil},
		{10000.5, 2, "eth0", "192.0.2.1", 1500, nil},
		{10000, 258, "eth0", "192.0.2.1", 1500, nil},
		{10001, 2, "", "192.0.2.1", 1500, nil},
		{10002, 2, "an-ifname-that-is-too-long", "192.0.2.1", 1500, nil},
		{10003, 2, "eth\x000", "192.0.2.1", 1500, nil},
		{10004, 2, "eth0", "", 1500, nil},
		{10005, 2, "eth0", "192.0.2.256", 1500, nil},
		{10006, 2, "eth0", "fd00::1", 1500, nil},
		{10007, 10, "eth0", "fe80::1%eth0", 1500, nil},
		{10008, 2, "eth0", []byte("192.0.2.1"), 1500, nil},
		{10009, 2, "eth0", "192.0.2.1", "soon", nil},
		{10010, 2, "eth0\n", "192.0.2.1", 1500, nil},
		{10011, 2, "eth0", "192.0.2.1\xff", 1500, nil},
	}
	original(t, cfg, odd...)
	db := peer(t, cfg.Path)
	mustExec(t, db, originalInsert, 10012, 2, "eth0", "192.0.2.1", 1500, "a\x00b")
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	h := start(t, cfg)
	if got := strings.Count(h.log.String(), "makes no sense, deleted"); got != len(odd) {
		t.Errorf("%d rows logged, want %d:\n%s", got, len(odd), h.log)
	}
	wantRows(t, peer(t, cfg.Path), "SELECT RtTable, Tag FROM RtTables", "10012|")
	h.want(ops(get(1), get(2)), "granted 10000", "granted 10001")
}

// FuzzLeaseRow: what makes no sense is no lease, whatever columns a row has.
func FuzzLeaseRow(f *testing.F) {
	f.Add(int64(10000), int64(2), "eth0", "192.0.2.1", int64(1500), "tag", int64(0), here.Boot, int64(7), uint16(0))
	f.Add(int64(10000), int64(10), "eth0", "FD00::01", int64(1500), "", int64(1000), "", int64(0), uint16(0))
	f.Fuzz(func(t *testing.T, table, family int64, ifname, addr string, expires int64, tag string, owner int64, bootID string, netns int64, odd uint16) {
		row := []driver.Value{table, family, ifname, addr, expires, tag, owner, bootID, netns}
		for i := range row {
			if odd>>i&1 != 0 {
				row[i] = []any{nil, 1.5, []byte(addr), tag, netns}[(int(odd>>9)+i)%5]
			}
		}
		s, _, err := parseLease(row)
		if err != nil {
			return
		}
		canonical, err := wire.Key{Family: wire.Family(s.Family), Ifname: s.Ifname, Address: s.Addr}.Canonical()
		if err != nil || canonical.Address != s.Addr || wire.CheckTag(s.Tag) != nil {
			t.Errorf("%+v was let through: %+v, %v", s.Lease, canonical, err)
		}
	})
}

// Somebody's table with the name but no primary key, and NULLs in it.
func TestOriginalWithNulls(t *testing.T) {
	cfg := config(t, inet(10000, 9))
	if err := os.MkdirAll(filepath.Dir(cfg.Path), 0o700); err != nil {
		t.Fatal(err)
	}
	db := peer(t, cfg.Path)
	mustExec(t, db, strings.ReplaceAll(originalSchema, "NOT NULL", ""))
	mustExec(t, db, originalInsert, nil, nil, nil, nil, nil, nil)
	mustExec(t, db, originalInsert, 10000, 2, "eth0", "192.0.2.1", nil, nil)
	mustExec(t, db, originalInsert, 10001, 2, "eth0", "192.0.2.1", 1100, nil)
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	h := start(t, cfg)
	h.want(ops(get(1)), "renewed 10001")
	wantRows(t, peer(t, cfg.Path), "SELECT count(*) FROM RtTables", "1")
}

// Nothing of ours writes two rows for one key, but people can.
func TestTwoLeasesOfOneKey(t *testing.T) {
	h := start(t, config(t, inet(10000, 3)))
	h.do(get(1), get(2), get(3))
	h.stop()
	db := peer(t, h.cfg.Path)
	mustExec(t, db, "UPDATE RtTables SET Addr = '192.0.2.1', Boot = '' WHERE RtTable = 10001")
	h.open()
	if got := h.log.String(); !strings.Contains(got, "another lease of the same key ends later") {
		t.Errorf("log: %s", got)
	}
	h.want(ops(get(1), get(4)), "renewed 10001", "granted 10000")
}

func TestTwoServers(t *testing.T) {
	h := start(t, config(t, inet(10000, 3)))
	_, err := Open(h.cfg, h.now, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "open database "+h.cfg.Path+": another server uses it") {
		t.Errorf("got %v", err)
	}
	h.want(ops(get(1)), "granted 10000")
}

func TestLockHolderIsNamed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "leases.db")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("flock", path, "sh", "-c", "echo; exec sleep 60")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill() // it may have ended, which the test has noticed then
		_ = cmd.Wait()         // killed
	}()
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	_, err = Open(Config{Path: path, Pools: inet(10000, 1), Limits: Limits{Timeout: 1}, Epoch: here}, 1000, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "another server uses it") {
		t.Fatalf("got %v", err)
	}
	// Where /proc/locks does not know the device of the file, there is no pid to name.
	if strings.Contains(err.Error(), "pid") && !strings.Contains(err.Error(), strconv.Itoa(cmd.Process.Pid)) {
		t.Errorf("got %v, want pid %d", err, cmd.Process.Pid)
	}
}

// Every refusal to open names the reason and leaves every byte as it was.
func TestOpenRefuses(t *testing.T) {
	database := func(t *testing.T, path string, text ...string) {
		db := peer(t, path)
		for _, s := range text {
			mustExec(t, db, s)
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
	}
	must := func(t *testing.T, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name string
		make func(t *testing.T, path string)
		want string
	}{
		{"not a database", func(t *testing.T, path string) { must(t, os.WriteFile(path, []byte("dear diary"), 0o600)) }, "not a whole SQLite database: move the file away"},
		{"not a database inside", func(t *testing.T, path string) {
			must(t, os.WriteFile(path, []byte("SQLite format 3\x00"+strings.Repeat("junk", 5000)), 0o600))
		}, "move the file away, or choose another path"},
		{"of another program", func(t *testing.T, path string) { database(t, path, "CREATE TABLE places (url TEXT)") }, "of another program"},
		{"with another RtTables", func(t *testing.T, path string) { database(t, path, "CREATE TABLE RtTables (a)") }, "of another program"},
		{"newer", func(t *testing.T, path string) { database(t, path, originalSchema, "PRAGMA user_version = 99") }, "schema version 99"},
		{"symlink", func(t *testing.T, path string) { must(t, os.Symlink("elsewhere", path)) }, "symbolic link"},
		{"hard link", func(t *testing.T, path string) {
			must(t, os.WriteFile(path, nil, 0o600))
			must(t, os.Link(path, path+".too"))
		}, "2 hard links"},
		{"directory", func(t *testing.T, path string) { must(t, os.Mkdir(path, 0o700)) }, "is a directory"},
		{"fifo", func(t *testing.T, path string) { must(t, exec.Command("mkfifo", path).Run()) }, "not a regular file"},
		{"planted wal", func(t *testing.T, path string) { must(t, os.Symlink("elsewhere", path+"-wal")) }, "-wal: it is not a regular file"},
		{"planted shm", func(t *testing.T, path string) { must(t, os.Mkdir(path+"-shm", 0o700)) }, "-shm: it is not a regular file"},
		{"planted journal", func(t *testing.T, path string) {
			must(t, os.WriteFile(path+"-journal", nil, 0o600))
			must(t, os.Link(path+"-journal", path+".too"))
		}, "-journal: it has 2 hard links"},
		{"file for a directory", func(t *testing.T, path string) {
			must(t, os.Remove(filepath.Dir(path)))
			must(t, os.WriteFile(filepath.Dir(path), nil, 0o600))
		}, "not a directory"},
		{"locked", func(t *testing.T, path string) {
			database(t, path, originalSchema)
			db := peer(t, path)
			mustExec(t, db, "BEGIN EXCLUSIVE")
		}, "another program holds a lock"},
		{"locked for writing", func(t *testing.T, path string) {
			database(t, path, originalSchema, "INSERT INTO RtTables VALUES (1, 2, 'a', 'b', 3, NULL)")
			db := peer(t, path)
			mustExec(t, db, "BEGIN IMMEDIATE")
		}, "another program holds a lock"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := config(t, inet(10000, 3))
			must(t, os.MkdirAll(filepath.Dir(cfg.Path), 0o700))
			c.make(t, cfg.Path)
			before := tree(t, cfg.Path)
			_, err := Open(cfg, 1000, slog.New(slog.DiscardHandler))
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), "open database "+cfg.Path+": ") {
				t.Errorf("got %v, want %q", err, c.want)
			}
			if after := tree(t, cfg.Path); after != before && before != "" {
				t.Errorf("the files changed from\n%s\nto\n%s", before, after)
			}
		})
	}
}

// tree returns names and content of the files beside path, without the database that Open
// may create before it finds something wrong beside it.
func tree(t *testing.T, path string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", `cd "$1" 2>/dev/null || exit 0; for f in *; do
		[ -f "$f" ] && [ -s "$f" ] && { echo "$f"; cksum <"$f"; } || :; done`, "sh", filepath.Dir(path)).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

func TestModes(t *testing.T) {
	cfg := config(t, inet(10000, 3))
	h := start(t, cfg)
	h.do(get(1))
	for path, want := range map[string]os.FileMode{
		filepath.Dir(cfg.Path): 0o700 | os.ModeDir, cfg.Path: 0o600, cfg.Path + "-wal": 0o600, cfg.Path + "-shm": 0o600,
	} {
		if info, err := os.Stat(path); err != nil || info.Mode() != want {
			t.Errorf("%s: %v, %v, want %v", path, info.Mode(), err, want)
		}
	}
	h.stop()
	for _, suffix := range []string{"-wal", "-shm"} {
		if _, err := os.Stat(cfg.Path + suffix); err == nil {
			t.Errorf("%s is left", suffix)
		}
	}
	for path, mode := range map[string]os.FileMode{cfg.Path: 0o644, filepath.Dir(cfg.Path): 0o777} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	h.open()
	if info, err := os.Stat(cfg.Path); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v, want mode 0600", info.Mode(), err)
	}
	if got := h.log.String(); !strings.Contains(got, "level=WARN") || !strings.Contains(got, "anybody can write") {
		t.Errorf("log: %s", got)
	}
}

func TestForeignOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		const why = "only root can give a file away"
		if os.Getenv("CI") == "true" {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	for _, suffix := range []string{"", "-wal"} {
		cfg := config(t, inet(10000, 3))
		start(t, cfg).stop()
		if err := os.WriteFile(cfg.Path+suffix, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(cfg.Path+suffix, 1234, -1); err != nil {
			t.Fatal(err)
		}
		_, err := Open(cfg, 1000, slog.New(slog.DiscardHandler))
		if err == nil || !strings.Contains(err.Error(), "belongs to uid 1234") {
			t.Errorf("%q: got %v", suffix, err)
		}
	}
}

func TestStrangePath(t *testing.T) {
	for _, name := range []string{"a b", "a?mode=memory", "a%3fb", "a#b", "ü", "-x", ":memory:"} {
		cfg := config(t, inet(10000, 3))
		cfg.Path = filepath.Join(filepath.Dir(cfg.Path), name)
		h := start(t, cfg)
		h.do(get(1))
		h.stop()
		if info, err := os.Stat(cfg.Path); err != nil || info.Size() == 0 {
			t.Errorf("%q: %v", name, err)
		}
		h.open()
		h.want(ops(get(1)), "renewed 10000")
	}
}
