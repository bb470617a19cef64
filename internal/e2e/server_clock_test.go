package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/nettest"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestUptime: leases are what they are after a month of uptime, after the 49.7 days in which
// 32 bits of milliseconds end, and after forty years.
func TestUptime(t *testing.T) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	const day = 24 * time.Hour
	for _, tt := range []struct {
		name   string
		uptime time.Duration
	}{
		{"a month", 31 * day},
		{"just before 2^32 milliseconds", 1<<32*time.Millisecond - wire.Now() - 5*time.Second},
		{"forty years", 40 * 365 * day},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			h.link("wan0", "10.77.0.2/24")
			server := h.start(nettest.RebootCommand(context.Background(), tt.uptime, strings.TrimSpace(string(boot)),
				bin(t, serverBin), "--debug", "-c", h.config(`"table_timeout":4`)))
			server.waitLog("msg=serving")
			// What follows lives by the server's clock, too. The command becomes the program.
			clock := func(pid int, command ...string) []string {
				return append([]string{fmt.Sprintf("--time=/proc/%d/ns/time", pid), "--"}, command...)
			}
			if r := h.run("nsenter", clock(server.cmd.Process.Pid, bin(t, clientBin), "-l", filepath.Join(h.dir, "client.log"), "--debug",
				"-4", "-a", "10.77.0.2", "-i", "wan0")...); r.stdout != "10000\n" {
				t.Fatalf("client: %+v", r)
			}
			rules := clientRules("10.77.0.2", "10.77.0.0/24", 10000)
			h.wantRules(rules...)
			renewals := func(server *process, n int) {
				t.Helper()
				eventually(t, "it renews", func() error {
					if got := strings.Count(server.log.String(), `msg="lease renewed" ifname=wan0`); got < n {
						return fmt.Errorf("%d renewals", got)
					}
					return nil
				})
			}
			renewals(server, 2)
			since := tt.uptime + wire.Now()
			table, expires := granted(t, h.cPeer("peer").ask(acquire(1)))
			if least := wire.Seconds(since); table != 10001 || expires < least+3 || expires > least+4+int64(patience.Seconds()) {
				t.Errorf("at %d: got table %d until %d", least, table, expires)
			}
			if left := strings.TrimSpace(h.sqlite("select seconds_left between 0 and 5 from leases where address = '10.77.0.2'")); left != "1" {
				t.Errorf("seconds left: %s", h.sqlite("select * from leases"))
			}
			// The lease of who does not renew ends, of who does goes on, also at a next server.
			server.waitLog(`msg="lease expired" ifname=eth0 addr=10.9.0.1`)
			server.kill()
			server = h.start(exec.Command("nsenter", clock(h.onlyClient(), h.serverCommand("--debug").Args...)...))
			server.waitLog("msg=serving")
			renewals(server, 2)
			h.wantRules(rules...)
			h.wantTables("10.77.0.2")
			h.ns.IP(t, "address del 10.77.0.2/24 dev wan0")
			h.waitClean()
			t.Logf("%s: uptime %v and later: leases of 4 s renewed, expired, kept over a restart, and released", tt.name, since.Round(time.Second))
			if now := tt.uptime + wire.Now(); strings.HasPrefix(tt.name, "just") && now < 1<<32*time.Millisecond {
				t.Errorf("the end of 32 bits is at %v, and was not passed", 1<<32*time.Millisecond)
			}
		})
	}
}
