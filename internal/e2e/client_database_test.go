package e2e

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestClientsDatabaseLost: whatever becomes of the database while clients live, no table that
// one of them uses goes to another, and each keeps its own.
func TestClientsDatabaseLost(t *testing.T) {
	remove := func(h *host) (err error) {
		for _, suffix := range []string{"", "-wal", "-shm"} {
			if e := os.Remove(h.db + suffix); !errors.Is(e, os.ErrNotExist) {
				err = errors.Join(err, e)
			}
		}
		return err
	}
	restore := func(h *host) error { return errors.Join(remove(h), os.Rename(h.db+".old", h.db)) }
	stop := func(h *host, server *process) {
		if code := server.stop(); code != 0 {
			h.t.Errorf("exit code: got %d, want 0", code)
		}
	}
	kill := func(_ *host, server *process) { server.kill() }
	for _, tt := range []struct {
		name string
		end  func(*host, *process) // of the server; nil: it goes on
		lose func(*host) error
	}{
		{"deleted under the server", nil, remove},
		{"deleted under the server, which is killed", kill, remove},
		{"deleted while the server is stopped", stop, remove},
		{"empty", stop, func(h *host) error { return errors.Join(remove(h), os.WriteFile(h.db, nil, 0o600)) }},
		{"an older copy", stop, restore},
		{"an older copy after a crash", kill, restore},
		{"of the original, with others in it", stop, func(h *host) error {
			err := remove(h)
			now := wire.Seconds(wire.Now())
			h.sqlite(originalSchema + originalInsert(10000, 2, "eth7", "10.9.7.7", now+5, "") +
				originalInsert(10002, 2, "wan0", "10.77.0.2", now+5, "") + originalInsert(10003, 2, "eth7", "10.9.7.8", now-5, ""))
			return err
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			const clients, gone = 6, 2 // the gone ones leave holes below the others' tables
			address := func(n int) string { return fmt.Sprintf("10.77.0.%d", n+2) }
			var addrs []string
			for n := range clients + gone + 3 {
				addrs = append(addrs, address(n)+"/24")
			}
			h.link("wan0", addrs...)
			server := h.serve(`"table_timeout":6`)
			tables := make(map[string]uint32)
			for n := range gone {
				h.lease(address(clients+n), "wan0")
			}
			for n := range clients {
				tables[address(n)] = h.lease(address(n), "wan0")
			}
			for n := range gone {
				h.client("-r", "-4", "-a", address(clients+n), "-i", "wan0")
			}
			// Where the copy is from the first two held each other's tables.
			h.sqlite(fmt.Sprintf(`vacuum into '%s.old'`, h.db))
			old := database{t, h.db + ".old"}
			old.sqlite(fmt.Sprintf(`update RtTables set Boot = '', LeaseExpires = LeaseExpires - 1;
				delete from RtTables where Addr > '%s';
				update RtTables set Addr = case Addr when '%s' then '%s' else '%s' end;`, address(1), address(0), address(1), address(0)))
			rules := h.rules()
			m := h.monitor()
			if tt.end != nil {
				tt.end(h, server)
			}
			if err := tt.lose(h); err != nil {
				t.Fatal(err)
			}
			if tt.end != nil {
				server = h.start(h.serverCommand("--debug"))
				server.waitLog("msg=serving")
			}
			// Who comes now comes perhaps before they have renewed.
			var used []uint32
			for _, table := range tables {
				used = append(used, table)
			}
			for n := range 3 {
				table := h.lease(address(clients+gone+n), "wan0")
				if table == 0 || slices.Contains(used, table) {
					t.Errorf("%s got %d, of %v in use", address(clients+gone+n), table, used)
				}
				used = append(used, table)
			}
			eventually(t, "all have renewed", func() error {
				leases := strings.Join(h.leases(), "\n")
				for addr, table := range tables {
					if !strings.Contains(leases, fmt.Sprintf("%d|inet|wan0|%s||0", table, addr)) {
						return fmt.Errorf("%s is not the holder of %d:\n%s", addr, table, leases)
					}
				}
				return nil
			})
			for _, change := range m.changes() {
				for addr := range tables {
					if strings.Contains(change, " "+addr+" ") {
						t.Errorf("a rule of a client that lived changed: %s", change)
					}
				}
			}
			var want []string
			for n := range 3 {
				want = append(want, clientRules(address(clients+gone+n), "10.77.0.0/24", used[clients+n])...)
			}
			h.wantRules(append(want, rules...)...)
			h.waitClients(clients + 3)
		})
	}
}
