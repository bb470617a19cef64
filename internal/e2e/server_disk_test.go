package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
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
		if err != nil {
			h.t.Fatal(err)
		}
		var number uint64
		if n, _ := fmt.Sscan(string(text), &number); n != 1 { // "running"
			continue
		}
		for name, its := range map[string]uint64{"fsync": unix.SYS_FSYNC, "fdatasync": unix.SYS_FDATASYNC, "pwrite64": unix.SYS_PWRITE64} {
			if number == its && slices.Contains(strings.Split(calls, ","), name) {
				return true
			}
		}
	}
	return false
}

func (h *host) waitStuck(server *process, calls string) {
	h.t.Helper()
	eventually(h.t, "the server waits for the disk", func() error {
		if h.isStuck(server, calls) {
			return nil
		}
		return errors.New("it does not")
	})
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
			server := h.serve()
			holder, exact, other, third := h.cPeer("holder"), h.rawPeer(exactName("exact")), h.cPeer("other"), h.cPeer("third")
			exact.to = exactName("tas_socket")
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
			holder.send(acquire(0)) // which comes after the release
			for _, p := range []*rawPeer{holder, other, third} {
				p.nothing()
			}
			if !h.isStuck(server, tt.calls) {
				t.Error("the disk was faster than the test")
			}
			mend()
			var got []string
			for _, p := range []*rawPeer{other, holder, holder, third, third, third, third} {
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
			if got, want := fmt.Sprint(got), "["+last+" released granted granted released granted mark]"; got != want {
				t.Errorf("answers: got %s, want %s", got, want)
			}
			t.Logf("the disk was silent from write %d on; meanwhile the slowest renewal of %d took %v", asked, 2*renewals, worst.Round(10*time.Microsecond))
			eventually(t, "the renewals are stored", func() error {
				stored := h.sqlite("select LeaseExpires from RtTables where RtTable = 10001")
				if stored == fmt.Sprintln(expires) {
					return nil
				}
				return fmt.Errorf("got %s, want %d", stored, expires)
			})
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

// TestServerSlowDiskFlooded: what a user asks for while the disk takes its time leaves room
// for root.
func TestServerSlowDiskFlooded(t *testing.T) {
	h := newHost(t)
	server := h.serve(fmt.Sprintf(`"allowed_users":[%d]`, uidNobodyKnows), `"num_tables":5000`)
	p := h.cPeer("peer")
	wantTable(t, p.ask(acquire(0)), 10000)
	mend := inject(writes, stuck)(h, server)
	h.writeUntilStuck(server, writes, h.cPeer("other"))

	user := h.rawPeer(sockaddr{unix.AF_UNIX, 0}) // the kernel finds a name
	const most, more = 2048, 100
	if err := asUser(uidNobodyKnows, uidNobodyKnows, func() error {
		for n := range most + more {
			if err := user.trySend(request(2, "eth1", fmt.Sprintf("10.8.%d.%d", n/256, n%256), 0)); err != nil {
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
	if got, want := strings.TrimSpace(h.sqlite("select count(*) from RtTables where Ifname = 'eth1'")), fmt.Sprint(most); got != want {
		t.Errorf("leases of the user: got %s, want %s", got, want)
	}
}
