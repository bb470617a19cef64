package e2e

import (
	"errors"
	"fmt"
	"os"
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

// isStuck tells whether the server is in one of some system calls, which are stuck.
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

// TestServerSlowDisk: while the disk takes its time, whoever holds a lease renews it, and
// nothing else that is asked for is lost.
func TestServerSlowDisk(t *testing.T) {
	for _, tt := range []struct{ name, calls string }{
		{"it writes", writes},
		{"it moves the log", syncs},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			server := h.serve(fmt.Sprintf(`"allowed_users":[%d]`, uidNobodyKnows))
			holder, exact, other, third := h.cPeer("holder"), h.exactPeer("exact"), h.cPeer("other"), h.cPeer("third")
			wantTable(t, holder.ask(acquire(0)), 10000)
			_, first := granted(t, exact.ask(acquire(1)))
			mend := inject(tt.calls, stuck)(h, server)
			asked := h.writeUntilStuck(server, tt.calls, other)

			third.send(acquire(3))
			third.send(release(3))
			third.send(acquire(3))
			third.send(acquire(3)) // as one asks again who hears nothing
			wantRefusal(t, third.ask("{"), wire.Malformed, "")
			third.send(`{"ifname":"eth0","cmd":16,"version":1}`)
			// Who may not is told so, and keeps nobody from renewing.
			user := h.cPeer("user")
			wantRefusal(t, user.askAs(uidNobodyKnows, uidNobodyKnows, acquire(0)), wire.Denied, "belongs to another user")
			wantRefusal(t, user.askAs(uidNobodyKnows, uidNobodyKnows, release(1)), wire.Denied, "belongs to another user")
			worst, expires, renewals := time.Duration(0), first, 0
			for ; renewals < 200 || expires == first; renewals++ {
				for i, p := range []*rawPeer{holder, exact} {
					begun := time.Now()
					answer := p.ask(acquire(i))
					wantTable(t, answer, uint32(10000+i))
					worst = max(worst, time.Since(begun))
					_, expires = granted(t, answer)
				}
			}
			holder.send(release(0))
			h.exactPeer("another").send(release(0))
			holder.send(acquire(0)) // which comes after the release, wherever that went
			beside := h.exactPeer("beside")
			beside.send(acquire(0))
			wantTable(t, holder.ask(acquire(1)), 10001) // all before this has been seen
			wantTable(t, exact.ask(acquire(1)), 10001)
			for _, p := range []*rawPeer{holder, beside, other, third} {
				p.nothing()
			}
			if !h.isStuck(server, tt.calls) {
				t.Error("the disk was faster than the test")
			}
			mend()
			var got []string
			for _, p := range []*rawPeer{other, holder, holder, beside, third, third, third, third} {
				switch answer, _ := p.receive(); {
				case answer == released:
					got = append(got, "released")
				case strings.Contains(answer, `"mark":`):
					got = append(got, "mark")
				default:
					granted(t, answer)
					got = append(got, "granted")
				}
			}
			last := []string{"granted", "released"}[(asked-1)%2]
			if got, want := fmt.Sprint(got), "["+last+" released granted granted granted released granted mark]"; got != want {
				t.Errorf("answers: got %s, want %s", got, want)
			}
			t.Logf("the disk was silent from write %d on; meanwhile the slowest renewal of %d took %v", asked, 2*renewals, worst.Round(10*time.Microsecond))
			h.waitStored(10001, expires)
			if code := server.stop(); code != 0 {
				t.Errorf("exit code: got %d, want 0", code)
			}
		})
	}
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

// TestServerSlowDiskFlooded: what a user asks for while the disk takes its time, and then does
// not read, leaves room for root.
func TestServerSlowDiskFlooded(t *testing.T) {
	h := newHost(t)
	server := h.serve(fmt.Sprintf(`"allowed_users":[%d]`, uidNobodyKnows), `"num_tables":5000`)
	p := h.cPeer("peer")
	wantTable(t, p.ask(acquire(0)), 10000)
	mend := inject(writes, stuck)(h, server)
	h.writeUntilStuck(server, writes, h.cPeer("other"))

	const most, more, each = 2048, 100, 10
	users := make([]*rawPeer, most/each)
	for i := range users {
		users[i] = h.rawPeer(sockaddr{unix.AF_UNIX, 0}) // the kernel finds a name
	}
	if err := asUser(uidNobodyKnows, uidNobodyKnows, func() error {
		for n := range most + more {
			if err := users[n%len(users)].trySend(request(2, "eth1", fmt.Sprintf("10.8.%d.%d", n/256, n%256), 0)); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	server.waitLog(`msg="request dropped: too many wait for the disk"`)
	p.send(acquire(1))
	root := h.cPeer("root")
	wantTable(t, root.ask(acquire(0)), 10000)
	p.nothing()
	mend()
	answer, _ := p.receive()
	granted(t, answer)
	for range 20 {
		wantTable(t, root.ask(acquire(0)), 10000)
	}
	if got, want := strings.TrimSpace(h.sqlite("select count(*) from RtTables where Ifname = 'eth1'")), fmt.Sprint(most); got != want {
		t.Errorf("leases of the user: got %s, want %s", got, want)
	}
}

// TestServerSlowDiskBusy: a disk that is slow all the time, and callers that never stop, leave
// room for what is due, and for both names of the server.
func TestServerSlowDiskBusy(t *testing.T) {
	h := newHost(t)
	server := h.serve()
	exact := h.exactPeer("exact")
	const held = 20 // more than a commit takes along
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
