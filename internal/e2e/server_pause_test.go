package e2e

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestServerStandsStill: a server that was stopped for longer than its leases last takes no table from who is alive,
// even if another request was first in its queue.
func TestServerStandsStill(t *testing.T) {
	for _, timeout := range []int{2, 4} {
		t.Run(fmt.Sprint(timeout), func(t *testing.T) {
			h := newHost(t)
			server := h.serve(`"num_tables":2`, fmt.Sprintf(`"table_timeout":%d`, timeout))
			p, q, third := h.cPeer("one"), h.cPeer("two"), h.cPeer("third")
			for range 3 {
				wantTable(t, p.ask(acquire(1)), 10000)
				wantTable(t, q.ask(acquire(2)), 10001)
				if err := server.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
					t.Fatal(err)
				}
				third.send(acquire(3))
				time.Sleep(time.Duration(timeout+2) * time.Second) // the leases end meanwhile
				p.send(acquire(1))
				if err := server.cmd.Process.Signal(syscall.SIGCONT); err != nil {
					t.Fatal(err)
				}
				reply, _ := p.receive()
				wantTable(t, reply, 10000)
				wantTable(t, q.ask(acquire(2)), 10001) // it could not send before
			}
			if strings.Contains(server.log.String(), "lease expired") {
				t.Error("a lease expired")
			}
		})
	}
}

// TestClientInTimeNamespace: a client whose clock is not the server's renews in time.
func TestClientInTimeNamespace(t *testing.T) {
	for _, offset := range []string{"-1000", "1000000"} {
		t.Run(offset, func(t *testing.T) {
			if wire.Now() < 1001*time.Second && offset[0] == '-' {
				offset = fmt.Sprint(-int(wire.Now().Seconds()) + 1)
			}
			h := newHost(t)
			h.link("wan0", "10.77.0.2/24")
			server := h.serve(`"table_timeout":4`)
			client := h.start(exec.Command("unshare", "--time", "--monotonic", offset, "--fork", "--kill-child", bin(t, clientBin),
				"-f", "-l", filepath.Join(h.dir, "client.log"), "-4", "-a", "10.77.0.2", "-i", "wan0"))
			eventually(t, "it renews thrice", func() error {
				if n := strings.Count(server.log.String(), `msg="lease renewed"`); n < 3 {
					return fmt.Errorf("%d renewals", n)
				}
				return nil
			})
			if strings.Contains(server.log.String(), "lease expired") {
				t.Error("the lease expired")
			}
			if rows := h.statusRows(); len(rows) != 1 || rows[0].LeaseLeft < 1 || rows[0].LeaseLeft > 4 {
				t.Errorf("the lease of 4 s lasts, by status: %+v", rows)
			}
			client.kill()
		})
	}
}
