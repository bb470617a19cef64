package e2e

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestWatchMovedOrphans: an address goes while its watch, which was killed, has its default route. The next watch gives main
// the route back, which would have outlived the address there.
func TestWatchMovedOrphans(t *testing.T) {
	for _, row := range []struct {
		name     string
		build    []string
		gone     []string
		defaults string // arguments of "route show"
	}{
		{"IPv6", []string{"address add 2001:db8:1::2/64 dev wan0 nodad", "-6 route add default via fe80::1 dev wan0 metric 100"},
			[]string{"address del 2001:db8:1::2/64 dev wan0"}, "-6"},
		{"and the rules", []string{"address add 2001:db8:1::2/64 dev wan0 nodad", "-6 route add default via fe80::1 dev wan0 metric 100"},
			[]string{"address del 2001:db8:1::2/64 dev wan0", "-6 rule flush protocol 116"}, "-6"},
		{"one of two IPv4 addresses", []string{"address add 10.77.0.2/24 dev wan0", "address add 10.78.0.2/24 dev wan0", "route add default via 10.78.0.1 metric 100"},
			[]string{"address del 10.77.0.2/24 dev wan0", "rule flush protocol 116"}, "-4"},
	} {
		t.Run(row.name, func(t *testing.T) {
			h := newHost(t)
			h.link("wan0")
			for _, c := range row.build {
				h.ns.IP(t, c)
			}
			defaults := func() string { return strings.TrimSpace(h.ns.IP(t, row.defaults+" route show default")) }
			before := defaults()
			h.serve()
			w := h.watch("--routes", "move")
			wait := func(want string) {
				t.Helper()
				eventually(t, "main has its default routes", func() error {
					if got := defaults(); got != want {
						return fmt.Errorf("got %q, want %q", got, want)
					}
					return nil
				})
			}
			wait("")
			w.kill()
			for _, c := range row.gone {
				h.ns.IP(t, c)
			}
			w = h.watch("--routes", "move", "--clean")
			if row.defaults == "-6" { // else the other address takes it
				wait(before)
			}
			w.stop()
			if got := defaults(); got != before {
				t.Errorf("main has %q, want %q", got, before)
			}
		})
	}
}

// TestWatchWithoutServer: a watch that is started while the server is away goes on with the tables of the watch before, whose
// rules stand: they follow main, and the rules go with the address. The server that comes confirms them.
func TestWatchWithoutServer(t *testing.T) {
	for name, options := range map[string][]string{"copy": {"--routes", "copy"}, "move": {"--routes", "move", "--on-loss", "block"}} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.link("wan0", "10.77.0.2/24", "10.77.0.3/24")
			h.link("wan1", "10.78.0.2/24")
			h.ns.IP(t, "route add default via 10.77.0.1 dev wan0 metric 1")
			h.ns.IP(t, "route add default via 10.78.0.1 dev wan1 metric 2")
			server := h.serve()
			watch := h.watch(options...)
			h.served("10.77.0.2")
			h.served("10.77.0.3")
			h.served("10.78.0.2")
			tables := make(map[string]uint32)
			for _, addr := range []string{"10.77.0.2", "10.77.0.3", "10.78.0.2"} {
				tables[addr] = h.tableNumber(addr)
			}
			server.kill()
			watch.kill()
			h.ns.IP(t, "route replace default via 10.77.0.9 dev wan0 metric 1")
			h.ns.IP(t, "address del 10.77.0.3/24 dev wan0")
			h.watch(options...)
			leaves := func(addr, gateway string) {
				t.Helper()
				eventually(t, addr+" leaves through "+gateway, func() error {
					got, err := h.ns.Output("ip", "route", "get", "198.51.100.1", "from", addr)
					if err != nil || !strings.Contains(got, "via "+gateway+" ") || !strings.Contains(got, fmt.Sprintf("table %d", tables[addr])) {
						return fmt.Errorf("%s: %v", got, err)
					}
					return nil
				})
			}
			leaves("10.77.0.2", "10.77.0.9")
			h.ns.IP(t, "route replace default via 10.77.0.8 dev wan0 metric 1")
			leaves("10.77.0.2", "10.77.0.8")
			h.ns.IP(t, "address del 10.78.0.2/24 dev wan1")
			eventually(t, "rules of addresses that went are gone", func() error {
				if rules := strings.Join(h.rules(), "\n"); strings.Contains(rules, "10.77.0.3") || strings.Contains(rules, "10.78.0.2") {
					return errors.New(rules)
				}
				return nil
			})
			for _, suffix := range []string{"", "-wal", "-shm"} { // or a lease from before would do
				if err := os.Remove(h.db + suffix); err != nil && !errors.Is(err, os.ErrNotExist) {
					t.Fatal(err)
				}
			}
			h.serve()
			eventually(t, "the server confirms the lease", func() error {
				if leases := strings.Join(h.leases(), "\n"); !strings.Contains(leases, fmt.Sprintf("%d|inet|wan0|10.77.0.2||0", tables["10.77.0.2"])) {
					return errors.New(leases)
				}
				return nil
			})
			leaves("10.77.0.2", "10.77.0.8")
		})
	}
}

// TestClientWithoutServer: a client that a hook calls while the server is away, and whose holder was killed, goes on with the
// table whose rules stand, by the gateway that the hook names.
func TestClientWithoutServer(t *testing.T) {
	for _, mode := range []string{"copy", "move"} {
		t.Run(mode, func(t *testing.T) {
			h := newHost(t)
			h.link("wan0", "10.77.0.2/24")
			server := h.serve()
			table := h.lease("10.77.0.2", "wan0", "--routes", mode, "--gateway", "10.77.0.1")
			rules := h.rules()
			server.kill()
			h.signalClients(syscall.SIGKILL)
			h.waitNoClient()
			if got := h.lease("10.77.0.2", "wan0", "--routes", mode, "--gateway", "10.77.0.9"); got != table {
				t.Errorf("table %d, before %d", got, table)
			}
			h.waitRoutes(fmt.Sprint(table), ourNetwork, "default via 10.77.0.9 dev wan0 proto 116 src 10.77.0.2")
			h.wantRules(rules...)
			if main := h.ns.IP(t, "route"); strings.Contains(main, "default") {
				t.Errorf("main has a default route:\n%s", main)
			}
			h.serve()
			if got := h.lease("10.77.0.2", "wan0", "--routes", mode, "--gateway", "10.77.0.8"); got != table {
				t.Errorf("table %d, before %d", got, table)
			}
			h.waitRoutes(fmt.Sprint(table), ourNetwork, "default via 10.77.0.8 dev wan0 proto 116 src 10.77.0.2")
			h.wantRules(rules...)
			h.ns.IP(t, "address del 10.77.0.2/24 dev wan0")
			eventually(t, "nothing stays", func() error { return h.left("10.77.0.2") })
		})
	}
}

// TestWatchMovedOfABridge: a bridge whose ports are cables, as those of containers, is an uplink since main has a default route
// over it. That stays so for the next watch if the one before, which was killed, has moved the route: its rules stand all the time.
func TestWatchMovedOfABridge(t *testing.T) {
	h := newHost(t)
	h.link("port0")
	for _, c := range []string{"link add wan0 type bridge", "link set wan0 up", "link set port0 master wan0", "address add 10.77.0.2/24 dev wan0",
		"route add default via 10.77.0.1 metric 5"} {
		h.ns.IP(t, c)
	}
	h.serve()
	w := h.watch("--routes", "move")
	h.served("10.77.0.2")
	h.waitRoutes("main", "10.77.0.0/24 dev wan0 proto kernel scope link src 10.77.0.2")
	w.kill()
	rules := h.hear("4")
	w = h.watch("--routes", "move", "--clean")
	w.waitLog("has table 10000")
	for _, line := range rules() {
		if strings.HasPrefix(line, "Deleted") {
			t.Errorf("the next watch deleted a rule: %s", line)
		}
	}
	w.stop()
	h.waitRoutes("main", "default via 10.77.0.1 dev wan0 metric 5", "10.77.0.0/24 dev wan0 proto kernel scope link src 10.77.0.2")
}

// TestWatchLinkMadeAgain: a link that was deleted and made again, with the same name, ifindex and addresses, before a watch heard of
// it has no default route that the link before had.
func TestWatchLinkMadeAgain(t *testing.T) {
	for _, mode := range []string{"copy", "move"} {
		t.Run(mode, func(t *testing.T) {
			h := newHost(t)
			h.serve()
			p := h.watch("--routes", mode)
			build := func() {
				h.ns.Batch(t, `link add wan0 index 77 type veth peer name peer0
link set peer0 up
link set wan0 up
address add 10.77.0.2/24 dev wan0
address add 2001:db8::2/64 dev wan0 nodad
`)
			}
			build()
			h.ns.Batch(t, "route add default via 10.77.0.1 dev wan0\nroute add default via 2001:db8::1 dev wan0\n")
			defaults := func(want bool) {
				t.Helper()
				for family, addr := range map[string]string{"-4": "10.77.0.2", "-6": "2001:db8::2"} {
					eventually(t, fmt.Sprintf("the table of %s has a default route: %t", addr, want), func() error {
						routes := h.routeLines(family, h.served(addr))
						if slices.ContainsFunc(routes, func(r string) bool { return strings.HasPrefix(r, "default ") }) != want || len(routes) == 0 {
							return fmt.Errorf("%q", routes)
						}
						return nil
					})
				}
			}
			defaults(true)
			h.freeze(p.cmd.Process.Pid)
			h.ns.IP(t, "link del wan0")
			build()
			_ = p.cmd.Process.Signal(syscall.SIGCONT)
			defaults(false)
		})
	}
}

// TestMovedAndEnding: what a holder has not heard when it is told to end, it hears before main gets a route back. A route that main
// would have lost with its link does not come and go, and another program that adds it then keeps its own.
func TestMovedAndEnding(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.ns.IP(t, "link set wan0 addrgenmode none") // without a link-local address only the events tell
	h.ns.IP(t, "-6 address flush dev wan0")
	h.serve()
	asker := h.peer("asker", false)
	const rounds = 6 // which of the two the holder takes first is a matter of chance
	for round := range rounds {
		h.ns.IP(t, "route add default via 10.77.0.1 dev wan0")
		p, _ := h.front("-4", "-a", "10.77.0.2", "-i", "wan0", "--routes", "move")
		h.waitMain("wan0")
		h.freeze(p.cmd.Process.Pid)
		h.ns.Batch(t, "link set wan0 down", "link set wan0 up")
		if errs := asker.conn.Send(wire.Message{Data: []byte(toHolder(int(wire.End), "")), To: padded(t, holderName)}); errs != nil {
			t.Fatal(errs[0])
		}
		if round%2 == 0 {
			err := p.cmd.Process.Signal(syscall.SIGTERM)
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := p.cmd.Process.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		p.wait()
		if log := p.log.String(); strings.Contains(log, "route restored in main") {
			t.Fatalf("round %d: main got a route that its link had lost:\n%s", round, log)
		}
		h.waitClean()
	}
}
