package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// stuck is what inject does for a disk that does not answer.
const stuck = "delay_enter=600s"

// isStuck reports whether the server is in one of some system calls, which are stuck.
func (h *host) isStuck(server *process, calls string) bool {
	h.t.Helper()
	states, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/syscall", server.cmd.Process.Pid))
	if err != nil {
		h.t.Fatal(err)
	}
	for _, path := range states {
		text, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // the thread is gone
		}
		if err != nil {
			h.t.Fatal(err)
		}
		var number uint64
		if n, _ := fmt.Sscan(string(text), &number); n != 1 { // "running"
			continue
		}
		for name, its := range map[string]uint64{"fsync": unix.SYS_FSYNC, "fdatasync": unix.SYS_FDATASYNC, "pwrite64": unix.SYS_PWRITE64, "ftruncate": unix.SYS_FTRUNCATE} {
			if number == its && slices.Contains(strings.Split(calls, ","), name) {
				return true
			}
		}
	}
	return false
}

// TestServerSyncHangs: nobody waits for a disk that does not say that it has what was written: not
// who gets or gives back a lease, not when the log is moved into the database, not the end.
func TestServerSyncHangs(t *testing.T) {
	h := newHost(t)
	server := h.serve(`"num_tables":5000`)
	p, exact := h.cPeer("peer"), h.exactPeer("exact")
	mend := inject(syncs, stuck)(h, server)
	defer mend()
	before := h.written()
	n := 0
	for ; h.written() == before; n++ {
		if n == 20000 {
			t.Fatal("the log is never moved into the database")
		}
		granted(t, p.ask(acquire(0)))
		granted(t, exact.ask(acquire(1)))
		if got := p.ask(release(0)); got != released {
			t.Fatalf("release: got %s", got)
		}
	}
	if got := p.ask(askMark); !strings.HasSuffix(got, markEth0) {
		t.Errorf("mark: got %s", got)
	}
	if code := server.stop(); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
	t.Logf("the log was moved after %d leases", n)
}

// written is when the database itself was written to, not its log.
func (h *host) written() time.Time {
	h.t.Helper()
	info, err := os.Stat(h.db)
	if err != nil {
		h.t.Fatal(err)
	}
	return info.ModTime()
}

// TestServerNeverSyncs: from its start to its end the server asks for no data to reach the disk.
func TestServerNeverSyncs(t *testing.T) {
	h := newHost(t)
	h.sqlite(originalSchema + originalInsert(10005, 2, "eth0", "10.9.0.5", wire.Seconds(wire.Now())+900, "")) // which is copied, too
	trace := filepath.Join(h.dir, "strace")
	const calls = "fsync,fdatasync,sync_file_range,msync,sync,syncfs"
	server := h.start(exec.Command("strace", "-f", "-o", trace, "-e", "trace=ftruncate,"+calls, bin(t, serverBin), "-c", h.config()))
	server.waitLog("msg=serving")
	pid := h.pids(serverBin)[0]
	t.Cleanup(func() { _ = unix.Kill(pid, unix.SIGKILL) }) // it outlives strace, and ends before it else
	p := h.cPeer("peer")
	for n := range 50 {
		granted(t, p.ask(acquire(n%30)))
	}
	if err := unix.Kill(pid, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := server.wait(); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
	text, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), "ftruncate") { // of the shared memory
		t.Fatalf("the trace has nothing of the database:\n%s", text)
	}
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, "sync") {
			t.Errorf("got %s", line)
		}
	}
}

// TestServerWriteHangs: while a write does not end nobody is answered, clients keep their rules,
// and afterwards everybody has his answer and nobody lost a lease, however long it took.
func TestServerWriteHangs(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	server := h.serve(`"table_timeout":2`)
	holder, exact, other := h.cPeer("holder"), h.exactPeer("exact"), h.cPeer("other")
	if got := h.lease("10.77.0.2", "wan0"); got != 10000 {
		t.Fatalf("table: got %d", got)
	}
	rules := clientRules("10.77.0.2", "10.77.0.0/24", 10000)
	h.wantRules(rules...)
	_, expires := granted(t, holder.ask(acquire(0)))
	mend := inject(writes, stuck)(h, server)
	h.writeUntilStuck(server, writes, other)
	// Whoever asks now waits, with others before him who would like his table.
	exact.send(`{"want":10001,` + acquire(9)[1:])
	holder.send(acquire(0))
	h.waitClientLog(1, "the server does not answer; the rules stay")
	h.waitPast(expires + 4)
	h.wantRules(rules...)
	if !h.isStuck(server, writes) {
		t.Fatal("the disk was faster than the test")
	}
	holder.nothing()
	exact.nothing()
	mend()
	answer, _ := holder.receive()
	wantTable(t, answer, 10001)
	answer, _ = exact.receive()
	if table, _ := granted(t, answer); table == 10000 || table == 10001 {
		t.Errorf("table %d went to another", table)
	}
	server.waitLog("the server stood still, so all leases last longer")
	eventually(t, "the client renews", func() error {
		if log := h.clientLog(); !strings.Contains(log, "the server answers again") {
			return errors.New(log)
		}
		return nil
	})
	h.wantRules(rules...)
	if code := server.stop(); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
}

// TestServerStopped: a server that did not run for longer than leases last ends none of them before
// it has read who renewed.
func TestServerStopped(t *testing.T) {
	h := newHost(t)
	server := h.serve(`"table_timeout":2`, `"num_tables":1`)
	p, other := h.cPeer("peer"), h.cPeer("other")
	var expires int64
	for wire.Seconds(wire.Now()) >= expires { // stopped before it is over
		if err := server.cmd.Process.Signal(unix.SIGCONT); err != nil {
			t.Fatal(err)
		}
		_, expires = granted(t, p.ask(acquire(0)))
		h.freeze(server.cmd.Process.Pid)
	}
	h.waitPast(expires + 4)
	other.send(acquire(1))
	p.send(acquire(0))
	if err := server.cmd.Process.Signal(unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	answer, _ := other.receive()
	wantRefusal(t, answer, wire.Exhausted, "")
	answer, _ = p.receive()
	wantTable(t, answer, 10000)
}

// waitPast waits until the lease clock is past a second.
func (h *host) waitPast(second int64) {
	h.t.Helper()
	eventually(h.t, "the time has passed", func() error {
		if now := wire.Seconds(wire.Now()); now <= second {
			return fmt.Errorf("it is %d, want more than %d", now, second)
		}
		return nil
	})
}

// writeUntilStuck has a peer lease and release until it gets no answer, since the server
// waits for its disk, and returns how often it asked.
func (h *host) writeUntilStuck(server *process, calls string, p *rawPeer) (asked int) {
	h.t.Helper()
	for ; asked < 20000; asked++ {
		p.send([]string{acquire(2), release(2)}[asked%2])
		for !p.answered(10 * time.Millisecond) {
			if h.isStuck(server, calls) && !p.answered(0) {
				return asked + 1
			}
		}
		p.receive()
	}
	h.t.Fatal("nothing reached the disk")
	return 0
}

// waitStored waits until the database knows that a lease lasts so long, or longer.
func (h *host) waitStored(table uint32, expires int64) {
	h.t.Helper()
	eventually(h.t, "the renewals are stored", func() error {
		var stored int64
		if _, err := fmt.Sscan(h.sqlite(fmt.Sprint("select LeaseExpires from RtTables where RtTable = ", table)), &stored); err != nil {
			return err
		}
		if stored < expires {
			return fmt.Errorf("got %d, want %d", stored, expires)
		}
		return nil
	})
}

// TestServerSlowDisk: a disk that is slow all the time, and callers that never stop, leave room
// for what is due, and for both names of the server.
func TestServerSlowDisk(t *testing.T) {
	h := newHost(t)
	server := h.serve()
	exact := h.exactPeer("exact")
	const held = 20
	renew := func() (expires int64) {
		for n := range held {
			_, expires = granted(t, exact.ask(acquire(n)))
		}
		return expires
	}
	first := renew()
	mend := inject("pwrite64", "delay_enter=5ms")(h, server)
	ending := make(chan struct{})
	var callers sync.WaitGroup
	defer func() {
		close(ending)
		callers.Wait()
		mend()
	}()
	for i := range 4 {
		p := h.cPeer(fmt.Sprint("caller", i))
		callers.Go(func() {
			for n := 0; ; n++ {
				p.send([]string{acquire(held + i), release(held + i)}[n%2])
				for !p.answered(10 * time.Millisecond) {
					select {
					case <-ending:
						return
					default:
					}
				}
				p.receive()
			}
		})
	}
	expires := renew()
	for expires == first {
		expires = renew()
	}
	h.waitStored(10000+held-1, expires)
}
