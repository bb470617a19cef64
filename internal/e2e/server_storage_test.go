package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// fault makes the system calls of a server that runs fail as a broken disk makes them,
// where they are about its database.
func fault(errno, calls string) func(*host, *process) (mend func()) {
	return inject(calls, "error="+errno)
}

// inject has strace do something to those system calls.
func inject(calls, what string) func(*host, *process) (mend func()) {
	return func(h *host, server *process) func() {
		h.t.Helper()
		args := []string{"-f", "-q", "-o", filepath.Join(h.dir, "trace"), "-p", fmt.Sprint(server.cmd.Process.Pid),
			"-e", "trace=" + calls, "-e", "inject=" + calls + ":" + what}
		for _, suffix := range []string{"", "-wal", "-shm"} {
			args = append(args, "-P", h.db+suffix)
		}
		tracer := h.start(exec.Command("strace", args...))
		eventually(h.t, "strace has all threads", func() error {
			for _, pid := range status(h.t, server.cmd.Process.Pid, "TracerPid") {
				if pid != fmt.Sprint(tracer.cmd.Process.Pid) {
					return fmt.Errorf("a thread has tracer %s", pid)
				}
			}
			return nil
		})
		return func() { tracer.stop() }
	}
}

const (
	writes = "pwrite64,write,fsync,fdatasync,ftruncate"
	syncs  = "fsync,fdatasync"
)

// locked is somebody's sqlite3 in a transaction.
func locked(h *host, _ *process) (mend func()) {
	h.t.Helper()
	cmd := exec.Command("sqlite3", h.db)
	in, err := cmd.StdinPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	p := h.start(cmd)
	say := func(line string) {
		if _, err := io.WriteString(in, line+"\n"); err != nil {
			h.t.Error(err)
		}
	}
	say(".timeout 5000\nbegin immediate; select 'locked';")
	p.waitLog("locked")
	return func() {
		say("rollback; select 'free';")
		p.waitLog("free")
	}
}

// replaced puts another file in the place of the database, as who restores one does.
func replaced(h *host, _ *process) (mend func()) {
	h.t.Helper()
	other := database{h.t, h.db + ".other"}
	other.sqlite(originalSchema + originalInsert(10001, 2, "eth7", "10.9.7.7", wire.Seconds(wire.Now())+3600, ""))
	rename := func(from, to string) {
		if err := os.Rename(from, to); err != nil {
			h.t.Error(err)
		}
	}
	rename(other.db, h.db)
	return func() {
		rename(h.db, other.db)
		if got := other.sqlite("select RtTable, Addr from RtTables"); got != "10001|10.9.7.7\n" {
			h.t.Errorf("the other file has %q", got)
		}
	}
}

// inTheWay is a directory of that name; the database itself is gone.
func inTheWay(h *host, _ *process) (mend func()) {
	h.t.Helper()
	if err := errors.Join(os.Remove(h.db), os.Mkdir(h.db, 0o700)); err != nil {
		h.t.Fatal(err)
	}
	return func() {
		if err := os.Remove(h.db); err != nil {
			h.t.Error(err)
		}
	}
}

// noDirectory is a file where the directory of the database was.
func noDirectory(h *host, _ *process) (mend func()) {
	h.t.Helper()
	dir := filepath.Dir(h.db)
	if err := errors.Join(os.RemoveAll(dir), os.WriteFile(dir, nil, 0o600)); err != nil {
		h.t.Fatal(err)
	}
	return func() {
		if err := os.Remove(dir); err != nil {
			h.t.Error(err)
		}
	}
}

// full leaves no room on the file system, not even in pages that the database has.
func full(h *host, _ *process) (mend func()) {
	h.t.Helper()
	filler := fillUp(h.t, filepath.Dir(h.db))
	p := h.cPeer("filler")
	n := 0
	eventually(h.t, "the disk is full for the database, too", func() error {
		if n++; strings.Contains(p.ask(request(10, "eth0", fmt.Sprint("fd00::", n), 0)), `"table":0`) {
			return nil
		}
		return errors.New("there was room")
	})
	return func() {
		if err := os.Remove(filler); err != nil {
			h.t.Error(err)
		}
	}
}

// TestServerStorageFails: while nothing can be written the log says why, nobody gets a
// lease and nobody loses one, renewals go on; and without a restart the server is whole
// again once the fault is mended.
func TestServerStorageFails(t *testing.T) {
	for _, tt := range []struct {
		name string
		fail func(*host, *process) (mend func())
		log  string
	}{
		{"disk full", full, "make room on the file system"},
		{"quota", fault("EDQUOT", writes), "the file system is full, read-only or broken"},
		{"I/O error", fault("EIO", writes), "the file system is full, read-only or broken"},
		{"I/O error, reading too", fault("EIO", writes+",pread64,fstat,newfstatat"), "the file system is full, read-only or broken"},
		{"remounted read-only", fault("EROFS", writes), "the file system is full, read-only or broken"},
		{"locked", locked, "another program holds a lock on it"},
		{"replaced", replaced, "another file is in its place: move that away"},
		{"a directory in its place", inTheWay, "another file is in its place: move that away"},
		{"a file for its directory", noDirectory, "not a directory"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			dir := filepath.Join(h.dir, "small")
			h.mount(dir, "size=400k")
			h.db = filepath.Join(dir, "state", "leases.db")
			server := h.serve()
			p := h.cPeer("peer")
			for n := range 3 {
				wantTable(t, p.ask(acquire(n)), uint32(10000+n))
			}
			mend := tt.fail(h, server)
			eventually(t, "the fault is seen", func() error {
				reply := p.ask(acquire(3))
				if !strings.Contains(reply, `"table":0`) {
					if got := p.ask(release(3)); got != released {
						t.Errorf("release: got %s", got)
					}
					return errors.New(reply)
				}
				wantRefusal(t, reply, wire.Storage, "cannot be written")
				return nil
			})
			server.waitLog(`level=ERROR msg="cannot write to the database, refusing new leases" err="`)
			server.waitLog(tt.log)
			wantRefusal(t, p.ask(release(1)), wire.Storage, "cannot be written")
			worst := time.Duration(0)
			const renewals = 50
			for n := range renewals {
				begun := time.Now()
				wantTable(t, p.ask(acquire(n%3)), uint32(10000+n%3))
				worst = max(worst, time.Since(begun))
			}
			wantRefusal(t, p.ask(acquire(4)), wire.Storage, "cannot be written")
			mend()
			mended := time.Now()
			refused := 0
			eventually(t, "leases are granted again", func() error {
				reply := p.ask(acquire(4))
				if strings.Contains(reply, `"table":0`) {
					refused++
					return errors.New(reply)
				}
				return nil
			})
			t.Logf("%s: %d renewals during the fault, the slowest took %v; a lease %v after it was mended, refused %d times before", tt.name,
				renewals, worst.Round(10*time.Microsecond), time.Since(mended).Round(10*time.Microsecond), refused)
			if got := p.ask(release(1)); got != released {
				t.Errorf("release: got %s", got)
			}
			four, _ := granted(t, p.ask(acquire(4)))
			if code := server.stop(); code != 0 {
				t.Errorf("exit code: got %d, want 0", code)
			}
			h.wantWhole(fmt.Sprintf("10000|eth0|10.9.0.0\n10002|eth0|10.9.0.2\n%d|eth0|10.9.0.4\n", four))
			h.restart()
			wantTable(t, p.ask(acquire(0)), 10000)
			wantTable(t, p.ask(acquire(2)), 10002)
			wantTable(t, p.ask(acquire(4)), four)
		})
	}
}

// wantWhole fails unless the database is sound and has exactly these leases of IPv4.
func (h *host) wantWhole(leases string) {
	h.t.Helper()
	got := h.sqlite("pragma integrity_check; select RtTable, Ifname, Addr from RtTables where AddrFamily = 2 order by 1")
	if got != "ok\n"+leases {
		h.t.Errorf("database: got\n%swant ok and\n%s", got, leases)
	}
}

// TestServerDatabaseDeleted: what is deleted or moved away under a server is there again
// with the next lease, whole.
func TestServerDatabaseDeleted(t *testing.T) {
	remove := func(suffixes ...string) func(h *host) error {
		return func(h *host) (err error) {
			for _, suffix := range suffixes {
				err = errors.Join(err, os.Remove(h.db+suffix))
			}
			return err
		}
	}
	for _, tt := range []struct {
		name string
		lose func(*host) error
	}{
		{"the database", remove("")},
		{"all its files", remove("", "-wal", "-shm")},
		{"its log", remove("-wal")},
		{"its shared memory", remove("-shm")},
		{"its directory", func(h *host) error { return os.RemoveAll(filepath.Dir(h.db)) }},
		{"moved away", func(h *host) error { return os.Rename(h.db, h.db+".old") }},
		{"twice", func(h *host) error {
			return errors.Join(os.Remove(h.db), os.WriteFile(h.db, nil, 0o600), os.Remove(h.db))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			h.db = filepath.Join(h.dir, "state", "leases.db")
			server := h.serve()
			p := h.cPeer("peer")
			for n := range 4 {
				wantTable(t, p.ask(acquire(n)), uint32(10000+n))
			}
			if got := p.ask(release(0)); got != released {
				t.Errorf("release: got %s", got)
			}
			if err := tt.lose(h); err != nil {
				t.Fatal(err)
			}
			wantTable(t, p.ask(acquire(2)), 10002)
			wantTable(t, p.ask(acquire(5)), 10004)
			server.waitLog(`level=WARN msg="the database was begun anew, with all leases"`)
			if got := p.ask(release(1)); got != released {
				t.Errorf("release: got %s", got)
			}
			// What was promised is there for a server that comes after this one, however it ends.
			server.kill()
			h.restart()
			h.wantWhole("10002|eth0|10.9.0.2\n10003|eth0|10.9.0.3\n10004|eth0|10.9.0.5\n")
			wantTable(t, p.ask(acquire(0)), 10000) // its number of before
			wantTable(t, p.ask(acquire(1)), 10001)
			wantTable(t, p.ask(acquire(3)), 10003)
			wantTable(t, p.ask(acquire(6)), 10005)
		})
	}
}

// TestServerDatabaseOverwritten: whatever somebody copies over the database while the server runs,
// it is served on, and the next server starts: where there is no database any more with a new one, but
// for a file of another program, which is to be moved away first.
func TestServerDatabaseOverwritten(t *testing.T) {
	write := func(path string, data []byte) error { // into the file that is there
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
		if err != nil {
			return err
		}
		_, err = f.Write(data)
		return errors.Join(err, f.Close())
	}
	for _, tt := range []struct {
		name string
		do   func(h *host, whole, older []byte) error
	}{
		{"emptied", func(h *host, _, _ []byte) error { return os.Truncate(h.db, 0) }},
		{"cut", func(h *host, whole, _ []byte) error { return os.Truncate(h.db, int64(len(whole)/2)) }},
		{"an older copy", func(h *host, _, older []byte) error { return write(h.db, older) }},
		{"itself", func(h *host, whole, _ []byte) error { return write(h.db, whole) }},
		{"another file", func(h *host, whole, _ []byte) error {
			return write(h.db, bytes.Repeat([]byte("my notes "), len(whole)/9))
		}},
		{"sqlite3 moves the log into it", func(h *host, _, _ []byte) error {
			h.sqlite("pragma wal_checkpoint")
			return nil
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			server := h.serve()
			p := h.cPeer("peer")
			for n := range 3 {
				wantTable(t, p.ask(acquire(n)), uint32(10000+n))
			}
			stop := func() {
				if code := server.stop(); code != 0 {
					t.Errorf("exit code: got %d, want 0", code)
				}
			}
			read := func() []byte {
				data, err := os.ReadFile(h.db)
				if err != nil {
					t.Fatal(err)
				}
				return data
			}
			stop()
			older := read()
			server = h.restart()
			wantTable(t, p.ask(acquire(3)), 10003)
			if got := p.ask(release(0)); got != released {
				t.Errorf("release: got %s", got)
			}
			stop()
			server = h.restart() // everything is in the file now
			wantTable(t, p.ask(acquire(4)), 10004)
			if err := tt.do(h, read(), older); err != nil {
				t.Fatal(err)
			}
			wantTable(t, p.ask(acquire(5)), 10005)
			server.kill()
			server = h.launch()
			eventually(t, "it serves", func() error {
				if log := server.log.String(); strings.Contains(log, "move the file away") {
					if err := os.Rename(h.db, h.db+".another"); err != nil {
						t.Fatal(err)
					}
					server = h.launch()
					return errors.New("it was moved away")
				} else if !strings.Contains(log, "msg=serving") {
					return errors.New(log)
				}
				return nil
			})
			// Clients that live know their numbers, and nobody else gets them.
			for n := 1; n <= 5; n++ {
				wantTable(t, p.ask(fmt.Sprintf(`{"want":%d,%s`, 10000+n, acquire(n)[1:])), uint32(10000+n))
			}
			wantTable(t, p.ask(acquire(0)), 10000)
			server.stop()
			h.wantWhole("10000|eth0|10.9.0.0\n10001|eth0|10.9.0.1\n10002|eth0|10.9.0.2\n10003|eth0|10.9.0.3\n10004|eth0|10.9.0.4\n10005|eth0|10.9.0.5\n")
		})
	}
}
