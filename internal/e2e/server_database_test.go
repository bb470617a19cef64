package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// originalSchema is the one table of the original.
const originalSchema = `CREATE TABLE RtTables(RtTable INTEGER NOT NULL, AddrFamily INTEGER NOT NULL, Ifname TEXT NOT NULL, ` +
	`Addr TEXT NOT NULL, LeaseExpires INTEGER NOT NULL, Tag TEXT, PRIMARY KEY (RtTable, AddrFamily) ON CONFLICT REPLACE);`

// originalInsert is how the original writes a lease.
func originalInsert(table, family int, ifname, addr string, expires int64, tag string) string {
	return fmt.Sprintf("INSERT INTO RtTables (RtTable,AddrFamily,Ifname,Addr,LeaseExpires,Tag) VALUES (%d,%d,'%s','%s',%d,'%s');",
		table, family, ifname, addr, expires, tag)
}

// TestServerTakesOverOriginal: the database of the original is opened as it is.
func TestServerTakesOverOriginal(t *testing.T) {
	h := newHost(t)
	now := wire.Seconds(wire.Now())
	h.sqlite(originalSchema +
		originalInsert(10005, 2, "eth0", "10.9.0.1", now+900, "live") +
		originalInsert(10006, 2, "eth0", "10.9.0.2", now-10, "over") +
		originalInsert(10007, 2, "eth0", "10.9.0.3", now+100_000, "of an earlier boot") +
		originalInsert(10000, 10, "eth0", "fd00::01", now+900, ""))
	before := h.sqlite("select * from RtTables")
	server := h.serve()
	server.waitLog("database of the original taken over")
	h.wantLeases("10005|inet|eth0|10.9.0.1|live|0", "10000|inet6|eth0|fd00::1||0")

	// The copy is the original's file still, for going back to it.
	copied := database{t, h.db + ".original"}
	if got := copied.sqlite("select * from RtTables; pragma user_version"); got != before+"0\n" {
		t.Errorf("copy: got %q, want %q", got, before+"0\n")
	}

	p := h.cPeer("peer")
	wantTable(t, p.ask(acquire(9)), 10000)
	wantTable(t, p.ask(acquire(1)), 10005)
	wantTable(t, p.ask(acquire(2)), 10006)
	wantTable(t, p.ask(acquire(3)), 10007)
	wantTable(t, p.ask(request(10, "eth0", "fd00::1", 0)), 10000)

	// The original's own statement works on it, also while the server runs, and is a lease
	// for the next start.
	h.sqlite(originalInsert(10020, 2, "eth0", "10.9.0.20", wire.Seconds(wire.Now())+900, "late"))
	if code := server.stop(); code != 0 {
		t.Fatalf("exit code: got %d, want 0", code)
	}
	h.restart()
	wantTable(t, p.ask(acquire(20)), 10020)
	if _, err := os.Stat(h.db + ".original.1"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a second copy: got %v, want none", err)
	}
}

// TestServerDatabasePlaces: where the database may be, and what becomes of it.
func TestServerDatabasePlaces(t *testing.T) {
	mode := func(t *testing.T, path string) os.FileMode {
		t.Helper()
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return info.Mode().Perm()
	}
	t.Run("a directory that is not there", func(t *testing.T) {
		h := newHost(t)
		h.db = h.dir + "/state/table-allocator/leases.db"
		h.serve()
		if got := mode(t, h.db); got != 0o600 {
			t.Errorf("mode: got %o, want 600", got)
		}
		if got := mode(t, filepath.Dir(h.db)); got != 0o700 {
			t.Errorf("mode of the directory: got %o, want 700", got)
		}
	})
	t.Run("a directory where anybody writes", func(t *testing.T) {
		h := newHost(t)
		h.db = h.dir + "/tmp/table_allocator_server.db"
		if err := errors.Join(os.Mkdir(filepath.Dir(h.db), 0), os.Chmod(filepath.Dir(h.db), 0o777|os.ModeSticky)); err != nil {
			t.Fatal(err)
		}
		h.sqlite(originalSchema)
		if err := os.Chmod(h.db, 0o644); err != nil {
			t.Fatal(err)
		}
		server := h.serve()
		server.waitLog(`level=WARN msg="anybody can write to the directory of the database"`)
		if got := mode(t, h.db); got != 0o600 {
			t.Errorf("mode: got %o, want 600", got)
		}
	})
	t.Run("the built-in one", func(t *testing.T) {
		h := newHost(t)
		h.db = "/var/lib/table-allocator/leases.db"
		if _, err := os.Stat(h.db); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("the sandbox has %s already: %v", h.db, err)
		}
		t.Cleanup(func() {
			if err := os.RemoveAll(filepath.Dir(h.db)); err != nil {
				t.Error(err)
			}
		})
		server := h.start(exec.Command(bin(t, serverBin)))
		server.waitLog("msg=serving")
		p := h.cPeer("peer")
		for _, datagram := range []string{acquire(1), request(10, "eth0", "fd00::1", 0), request(0, "eth0", "x", 0)} {
			before := wire.Seconds(wire.Now())
			table, expires := granted(t, p.ask(datagram))
			if table != 10000 || expires < before+3600 || expires > wire.Seconds(wire.Now())+3600 {
				t.Errorf("got table %d for %d seconds, want 10000 for an hour", table, expires-before)
			}
		}
		h.wantLeases("10000|inet|eth0|10.9.0.1||0", "10000|inet6|eth0|fd00::1||0", "10000|unspec|eth0|x||0")
		server.waitLog("tables=10000-10039")
	})
}

// TestServerDatabaseRefused: what it cannot use it says, with the cure, and leaves as it
// is.
func TestServerDatabaseRefused(t *testing.T) {
	h := newHost(t)
	cmd := func(db string) *exec.Cmd {
		return exec.Command(bin(t, serverBin), "-c", h.config(fmt.Sprintf(`"db_path":%q`, db)))
	}
	do := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	sqlite := func(name, statement string) string {
		path := filepath.Join(h.dir, name)
		database{t, path}.sqlite(statement)
		return path
	}
	place := filepath.Join(h.dir, "tmp")
	do(os.Mkdir(place, 0), os.Chmod(place, 0o777|os.ModeSticky))
	good := sqlite("good.db", originalSchema)

	link := filepath.Join(place, "symlink.db")
	hard := filepath.Join(place, "hardlink.db")
	theirs := sqlite("tmp/theirs.db", originalSchema)
	text := filepath.Join(h.dir, "text.db")
	fifo := filepath.Join(h.dir, "fifo.db")
	do(os.Symlink(good, link), os.Link(sqlite("second.db", originalSchema), hard), os.Chown(theirs, uidNobodyKnows, 0),
		os.WriteFile(text, []byte("these are my notes\n"), 0o644), unix.Mkfifo(fifo, 0o600))
	readOnly := filepath.Join(h.dir, "ro")
	h.mount(readOnly, "size=1m")
	sqlite("ro/leases.db", originalSchema)
	do(unix.Mount("", readOnly, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	full := filepath.Join(h.dir, "full")
	h.mount(full, "size=16k")
	sqlite("full/leases.db", originalSchema)
	fillUp(t, full)

	for _, tt := range []struct {
		name, db string
		texts    []string
	}{
		{"symbolic link", link, []string{"symbolic link", "give the path of the file itself"}},
		{"hard link", hard, []string{"2 hard links", "remove the others, or choose another path"}},
		{"of somebody else", theirs, []string{"belongs to uid 21999", "chown it if you trust its content, or choose another path"}},
		{"text", text, []string{"not a whole SQLite database", "choose another path"}},
		{"directory", place, []string{"is a directory"}},
		{"FIFO", fifo, []string{"not a regular file", "choose another path"}},
		{"another program's", sqlite("other.db", "CREATE TABLE notes (text)"), []string{"of another program", "choose another path"}},
		{"newer schema", sqlite("newer.db", originalSchema+"PRAGMA user_version = 99"),
			[]string{"schema version 99", "install the newer version again"}},
		{"read-only file system", readOnly + "/leases.db", []string{"read-only file system"}},
		{"new file on a read-only file system", readOnly + "/new/leases.db", []string{"read-only file system"}},
		{"full file system", full + "/leases.db", []string{"database or disk is full", "make room"}},
		{"below a file", text + "/leases.db", []string{"not a directory"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before, beforeErr := os.ReadFile(ordinary(tt.db))
			h := hostIn(t, h.ns)
			h.refuse(cmd(tt.db), append(tt.texts, tt.db, "level=ERROR")...)
			after, afterErr := os.ReadFile(ordinary(tt.db))
			if string(before) != string(after) || (beforeErr == nil) != (afterErr == nil) {
				t.Errorf("the file has changed: %d bytes, %v, then %d bytes, %v", len(before), beforeErr, len(after), afterErr)
			}
			if copies, _ := filepath.Glob(tt.db + ".original*"); len(copies) > 0 {
				t.Errorf("copies are left: %q", copies)
			}
		})
	}
}

// ordinary is path, or nothing that can be opened where reading would wait for ever.
func ordinary(path string) string {
	if info, err := os.Lstat(path); err == nil && info.Mode()&os.ModeNamedPipe != 0 {
		return ""
	}
	return path
}

// mount makes a small file system.
func (h *host) mount(dir, options string) {
	h.t.Helper()
	if err := errors.Join(os.Mkdir(dir, 0o755), unix.Mount("tmpfs", dir, "tmpfs", 0, options)); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			h.t.Error(err)
		}
	})
}

// fillUp writes a file until there is no room.
func fillUp(t *testing.T, dir string) (path string) {
	t.Helper()
	path = filepath.Join(dir, "filler")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	return path
}
