package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/nettest"
	peers "github.com/table-allocator/table-allocator/internal/peer"
)

// TestClientAddressLater: an address, or a link, that is not there yet is normal.
func TestClientAddressLater(t *testing.T) {
	h := newHost(t)
	h.link("wan0")
	h.serve()
	// -n is then needed.
	if r := h.client("-4", "-a", "10.77.0.2", "-i", "wan0"); r.stdout != "" || r.code != 1 || !strings.Contains(r.stderr, "-n MASK is needed") {
		t.Errorf("without -n: got %+v", r)
	}
	if got := h.lease("10.77.0.2", "wan0", "-n", "24"); got != 10000 {
		t.Errorf("table %d", got)
	}
	want := clientRules("10.77.0.2", "10.77.0.0/24", 10000)
	h.wantRules(want...)
	// Others come and go; it comes, and is followed.
	h.ns.IP(t, "address add 10.77.0.3/24 dev wan0")
	h.ns.IP(t, "address del 10.77.0.3/24 dev wan0")
	h.ns.IP(t, "address add 10.77.0.2/24 dev wan0")
	h.lease("10.77.0.3", "wan0", "-n", "24") // and this one does not come
	h.waitRules(append(clientRules("10.77.0.3", "10.77.0.0/24", 10001), want...)...)
	h.ns.IP(t, "address del 10.77.0.2/24 dev wan0")
	h.waitRules(clientRules("10.77.0.3", "10.77.0.0/24", 10001)...)
	h.ns.IP(t, "link del wan0")
	h.waitClean()
	h.waitClientLog(1, `addr=10.77.0.2 family=inet table=10000 why="the address is gone" lease=released`)
	h.waitClientLog(1, `addr=10.77.0.3 family=inet table=10001 why="the link is gone" lease=released`)

	if got := h.lease("10.79.0.2", "wan5", "-n", "24"); got != 10000 && got != 10002 {
		t.Errorf("no link: table %d", got)
	}
	h.link("wan4", "10.79.0.2/24") // the address on another link is not it
	h.link("wan5")
	h.ns.IP(t, "link del wan4")
	h.ns.IP(t, "address add 10.79.0.2/24 dev wan5")
	h.onlyClient()
	h.ns.IP(t, "address del 10.79.0.2/24 dev wan5")
	h.waitClean()
}

// TestClientBridgePort: leaving a bridge sends RTM_DELLINK too, and is not the link's end.
func TestClientBridgePort(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	h.ns.IP(t, "link add br0 type bridge")
	h.ns.IP(t, "link set wan0 master br0")
	h.lease("10.77.0.2", "wan0")
	pid := h.onlyClient()
	h.ns.IP(t, "link set wan0 nomaster")
	h.ns.IP(t, "link del br0")
	h.ns.IP(t, "link set wan0 down")
	h.ns.IP(t, "link set wan0 up")
	// It has seen all that when it has seen the new name.
	h.rename("wan0", "wan9")
	h.waitLeases("10001|inet|wan9|10.77.0.2||0")
	h.waitRules(clientRules("10.77.0.2", "10.77.0.0/24", 10001)...)
	if got := h.onlyClient(); got != pid {
		t.Errorf("process %d instead of %d", got, pid)
	}
	h.ns.IP(t, "link del wan9")
	h.waitClean()
}

// TestClientRename: the new name is another key. Its lease stands before the old one is
// released, rules are never absent, and one table is printed.
func TestClientRename(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	server := h.serve()
	var stdout nettest.Log
	cmd := h.command("-f", "--debug", "-t", "cable", "-4", "-a", "10.77.0.2", "-i", "wan0")
	cmd.Stdout = &stdout
	p := h.start(cmd)
	h.waitRules(clientRules("10.77.0.2", "10.77.0.0/24", 10000)...)
	m := h.monitor()
	before := h.rules()
	h.rename("wan0", "wan9")
	h.waitLeases("10001|inet|wan9|10.77.0.2|cable|0")
	h.waitRules(clientRules("10.77.0.2", "10.77.0.0/24", 10001)...)
	for what, words := range map[string]string{"from the address": " from 10.77.0.2 ", "to the network": " to 10.77.0.0/24 ", "of unbound sockets": " iif lo "} {
		m.wantNeverWithout(what, before, func(rule string) bool { return strings.Contains(rule, words) })
	}
	log := server.log.String()
	if granted, released := strings.Index(log, `msg="lease granted" ifname=wan9`), strings.Index(log, `msg="lease released" ifname=wan0`); granted < 0 || released < granted {
		t.Errorf("the server logged:\n%s", log)
	}
	// The holder has moved along: to its new name, and only that.
	if got := h.lease("10.77.0.2", "wan9", "-t", "cable"); got != 10001 {
		t.Errorf("second call: table %d", got)
	}
	h.onlyClient()
	// And back, and through many names at once.
	h.rename("wan9", "wan0")
	h.waitLeases("10000|inet|wan0|10.77.0.2|cable|0")
	h.ns.IP(t, "link set wan0 down")
	for i, name := range []string{"wan1", "wan2", "wan3", "wan0", "wan4", "wan5"} {
		h.ns.IP(t, "link set "+[]string{"wan0", "wan1", "wan2", "wan3", "wan0", "wan4"}[i]+" name "+name)
	}
	h.ns.IP(t, "link set wan5 up")
	eventually(t, "there is one lease, of the last name", func() error {
		leases := h.leases()
		if len(leases) != 1 || !strings.Contains(leases[0], "|inet|wan5|10.77.0.2|cable|0") {
			return fmt.Errorf("leases: %q", leases)
		}
		var table uint32
		fmt.Sscanf(leases[0], "%d|", &table)
		if diff := unordered(h.rules(), clientRules("10.77.0.2", "10.77.0.0/24", table)); diff != "" {
			return errors.New(diff)
		}
		return nil
	})
	h.ns.IP(t, "link del wan5")
	if code := p.wait(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if got := stdout.String(); got != "10000\n" {
		t.Errorf("stdout: %q", got)
	}
	h.waitClean()
}

// TestClientRenameFirst: a link that gets its name before there is a server.
func TestClientRenameFirst(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	var stdout *nettest.Log
	var p *process
	for { // until no step is so slow that the client may have given up before it
		cmd := h.command("-f", "--debug", "-4", "-a", "10.77.0.2", "-i", "wan0")
		stdout = new(nettest.Log) // the client before may have got its table
		cmd.Stdout = stdout
		started := time.Now()
		inTime := func() bool { return time.Since(started) < peers.Tries*peers.TryEvery/2 }
		p = h.start(cmd)
		h.waitHolder()
		h.rename("wan0", "wan9")
		if inTime() {
			p.waitLog("the link was renamed")
			server := h.serve()
			if inTime() {
				break
			}
			p.stop()
			server.stop()
		}
		p.stop()
		h.rename("wan9", "wan0")
	}
	eventually(t, "one lease is left", func() error {
		leases := h.leases()
		if len(leases) != 1 || !strings.Contains(leases[0], "|inet|wan9|10.77.0.2||0") {
			return fmt.Errorf("leases: %q", leases)
		}
		if table, _, _ := strings.Cut(leases[0], "|"); stdout.String() != table+"\n" {
			return fmt.Errorf("leases: %q, stdout %q", leases, stdout.String())
		}
		return nil
	})
	p.stop()
	h.waitClean()
}

// TestClientSameAddressTwice: by address and link, not by address alone.
func TestClientSameAddressTwice(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.link("wan1", "10.77.0.2/24")
	h.serve()
	if a, b := h.lease("10.77.0.2", "wan0"), h.lease("10.77.0.2", "wan1"); a != 10000 || b != 10001 {
		t.Fatalf("tables %d and %d", a, b)
	}
	both := append(clientRules("10.77.0.2", "10.77.0.0/24", 10000), clientRules("10.77.0.2", "10.77.0.0/24", 10001)...)
	h.wantRules(both...)
	h.ns.IP(t, "address del 10.77.0.2/24 dev wan0")
	h.waitRules(clientRules("10.77.0.2", "10.77.0.0/24", 10001)...)
	h.waitLeases("10001|inet|wan1|10.77.0.2||0")
	h.onlyClient()
	// One that is killed leaves rules, which the other one's next call must not take for
	// its own.
	h.ns.IP(t, "address add 10.77.0.2/24 dev wan0")
	if got := h.lease("10.77.0.2", "wan0"); got != 10000 {
		t.Errorf("table %d", got)
	}
	h.wantRules(both...)
	h.ns.IP(t, "link del wan1")
	h.waitRules(clientRules("10.77.0.2", "10.77.0.0/24", 10000)...)
	h.ns.IP(t, "address flush dev wan0")
	h.waitClean()
}

// TestSameAddressEndsTwice: of two clients of one address that end at once each sees the other one, which may need the
// rule that blocks the address. The last one deletes it.
func TestSameAddressEndsTwice(t *testing.T) {
	for name, start := range map[string]func(h *host) (end func()){
		"watch": func(h *host) func() {
			h.watch("-c", h.watchFile(`{"links":[{"on_loss":"block"}],"reconcile_seconds":3600}`))
			return func() {
				h.ns.IP(h.t, "address flush dev wan0")
				h.ns.IP(h.t, "address flush dev wan1")
			}
		},
		"clients": func(h *host) func() {
			h.lease("10.77.0.2", "wan0", "--routes", "copy", "--on-loss", "block")
			h.lease("10.77.0.2", "wan1", "--routes", "copy", "--on-loss", "block")
			return func() { h.signalClients(syscall.SIGTERM) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.link("wan0", "10.77.0.2/24")
			h.link("wan1", "10.77.0.2/24")
			server := h.serve()
			end := start(h)
			h.waitLeases("10000|inet|wan0|10.77.0.2||0", "10001|inet|wan1|10.77.0.2||0")
			eventually(t, "the address is blocked", func() error {
				if rules := h.rules(); !slices.Contains(rules, "10001: from 10.77.0.2 unreachable proto 116") {
					return fmt.Errorf("rules: %q", rules)
				}
				return nil
			})
			h.freeze(server.cmd.Process.Pid) // so that both wait for its answer, and have their names
			end()
			eventually(t, "the rules to tables are gone", func() error {
				if rules := h.rules(); slices.ContainsFunc(rules, func(r string) bool { return strings.Contains(r, "lookup 1000") }) {
					return fmt.Errorf("rules: %q", rules)
				}
				return nil
			})
			if err := syscall.Kill(server.cmd.Process.Pid, syscall.SIGCONT); err != nil {
				t.Fatal(err)
			}
			h.waitRules()
		})
	}
}

// TestAddressLeavesNothing: a client whose address went leaves main none of the routes that its caller gave. The kernel keeps those
// while another link has the address, which is their source, and in IPv6.
func TestAddressLeavesNothing(t *testing.T) {
	for _, tt := range []struct {
		family, addr, gateway string
		serve, twice          bool
	}{
		{"-4", "10.77.0.2/24", "10.77.0.9", true, true},
		{"-4", "10.77.0.2/24", "10.77.0.9", false, true},
		{"-6", "2001:db8:7::2/64", "2001:db8:7::9", true, true},
		{"-6", "2001:db8:7::2/64", "2001:db8:7::9", false, true},
		{"-6", "2001:db8:7::2/64", "2001:db8:7::9", false, false},
	} {
		t.Run(fmt.Sprintf("%s, with a server: %v, on two links: %v", tt.family, tt.serve, tt.twice), func(t *testing.T) {
			h := newHost(t)
			h.link("wan0")
			h.link("wan1", "10.78.0.2/24", "2001:db8:8::2/64") // a link without addresses has no routes
			sysctl(t, h.ns, "net/ipv6/conf/wan0/accept_dad", "0")
			sysctl(t, h.ns, "net/ipv6/conf/wan1/accept_dad", "0")
			if tt.twice {
				h.ns.IP(t, "address add "+tt.addr+" dev wan0")
			}
			h.ns.IP(t, "address add "+tt.addr+" dev wan1")
			ours := func() []string { return lines(h.ns.IP(t, tt.family+" route show proto 116")) }
			if tt.serve {
				h.serve()
			}
			addr, _, _ := strings.Cut(tt.addr, "/")
			h.client(tt.family, "-a", addr, "-i", "wan1", "--routes", "move", "--gateway", tt.gateway)
			if !tt.serve {
				eventually(t, "main has the routes while there is no server", func() error {
					if len(ours()) == 0 {
						return errors.New(h.clientLog())
					}
					return nil
				})
			}
			h.ns.IP(t, "address del "+tt.addr+" dev wan1")
			if tt.serve {
				h.waitClientLog(1, "is served no more: the address is gone")
			}
			eventually(t, "main has no route of ours", func() error {
				if routes := ours(); len(routes) > 0 {
					return fmt.Errorf("%q", routes)
				}
				return nil
			})
		})
	}
}

// TestReleasedAddressGoes: what a client that ended left main for its address takes no traffic of another uplink in IPv6, neither
// before the address goes nor afterwards. The kernel keeps it then, and the next client of the link deletes it.
func TestReleasedAddressGoes(t *testing.T) {
	for _, tt := range []struct {
		routes string
		serve  bool
	}{{"move", true}, {"copy", true}, {"move", false}, {"copy", false}} {
		t.Run(fmt.Sprintf("%s, with a server: %v", tt.routes, tt.serve), func(t *testing.T) {
			h := newHost(t)
			for n, name := range []string{"wan0", "wan1"} {
				h.link(name)
				sysctl(t, h.ns, "net/ipv6/conf/"+name+"/accept_dad", "0")
				h.ns.IP(t, fmt.Sprintf("address add 2001:db8:%d::2/64 dev wan%d", n, n))
			}
			h.ns.IP(t, "address add 2001:db8:1::3/64 dev wan1")
			h.ns.IP(t, "-6 route add default via 2001:db8::1 dev wan0 proto ra metric 1024")
			if tt.serve {
				h.serve()
			}
			client := func(addr, gateway string) {
				h.client("-6", "-a", addr, "-i", "wan1", "--routes", tt.routes, "--gateway", gateway)
			}
			unbound := func(when string) {
				t.Helper()
				if got := h.ns.IP(t, "route get 2001:db8:99::1"); !strings.Contains(got, " dev wan0 ") {
					t.Errorf("%s unbound traffic leaves so: %s", when, got)
				}
			}
			client("2001:db8:1::2", "2001:db8:1::9")
			unbound("before the client ends")
			h.client("-6", "-r", "-a", "2001:db8:1::2", "-i", "wan1")
			unbound("after it ended")
			h.ns.IP(t, "address del 2001:db8:1::2/64 dev wan1")
			unbound("without the address")
			client("2001:db8:1::3", "2001:db8:1::8")
			eventually(t, "main has nothing of the address that went", func() error {
				if routes := h.ns.IP(t, "-6 route show default"); strings.Contains(routes, "2001:db8:1::9") {
					return errors.New(routes)
				}
				return nil
			})
			unbound("beside the next client")
		})
	}
}

// TestClientManyEvents: hundreds of changes at once do not hide the one that counts.
func TestClientManyEvents(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	h.lease("10.77.0.2", "wan0")
	pid := h.onlyClient()
	batch := func(name, verb string) string {
		var text strings.Builder
		for i := range 600 {
			fmt.Fprintf(&text, "address %s 10.99.%d.%d/32 dev wan0\n", verb, i/200, i%200+1)
		}
		path := filepath.Join(h.dir, name)
		if err := os.WriteFile(path, []byte(text.String()), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	add, del := batch("add", "add"), batch("del", "del")
	h.freeze(pid) // so that they pile up
	for range 3 {
		h.ns.IP(t, "-batch "+add)
		h.ns.IP(t, "-batch "+del)
	}
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if got := h.lease("10.77.0.2", "wan0"); got != 10000 || h.onlyClient() != pid {
		t.Errorf("table %d, process %d", got, pid)
	}
	h.freeze(pid)
	h.ns.IP(t, "-batch "+add)
	h.ns.IP(t, "address del 10.77.0.2/24 dev wan0")
	h.ns.IP(t, "-batch "+del)
	h.ns.IP(t, "-batch "+add)
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	h.waitClean()
}

// TestClientTwoHundred: so many at once, with the queue that the kernel gives a server by
// default, all get a table, and nothing is left when their addresses go.
func TestClientTwoHundred(t *testing.T) {
	const n = 200
	h := newHost(t)
	h.link("wan0")
	if got := strings.TrimSpace(h.ns.Run(t, "sysctl", "-n", "net.unix.max_dgram_qlen")); got != "10" {
		t.Logf("net.unix.max_dgram_qlen is %s here", got)
	}
	server := h.serve("num_tables:200")
	descriptors := func() int {
		t.Helper()
		fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", server.cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	h.lease("10.78.0.1", "wan0", "-n", "24") // what it opens once it opens for this
	h.signalClients(syscall.SIGTERM)
	h.waitClean()
	before := descriptors()
	var add, del strings.Builder
	var cmds []*exec.Cmd
	for i := range n {
		addr := fmt.Sprintf("10.77.0.%d", i+1)
		fmt.Fprintf(&add, "address add %s/24 dev wan0\n", addr)
		fmt.Fprintf(&del, "address del %s/24 dev wan0\n", addr)
		cmds = append(cmds, h.command("-l", filepath.Join(h.dir, "client.log"), "-4", "-a", addr, "-n", "24", "-i", "wan0"))
	}
	batch := func(name, text string) {
		t.Helper()
		path := filepath.Join(h.dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		h.ns.IP(t, "-batch "+path)
	}
	// Or the first one's end would take the others along.
	h.ns.Run(t, "sysctl", "-w", "net.ipv4.conf.wan0.promote_secondaries=1")
	batch("add", add.String())
	tables := make(map[string]int)
	for i, got := range h.together(cmds) {
		if other, ok := tables[got.stdout]; ok || got.stdout == "0\n" || got.code != 0 {
			t.Errorf("client %d: got %+v, as %d did", i, got, other)
		}
		tables[got.stdout] = i
	}
	if rules := h.rules(); len(rules) != 3*n {
		t.Errorf("%d rules, want %d", len(rules), 3*n)
	}
	if leases := h.leases(); len(leases) != n {
		t.Errorf("%d leases, want %d", len(leases), n)
	}
	if pids := h.pids(clientBin); len(pids) != n {
		t.Errorf("%d processes, want %d", len(pids), n)
	}
	batch("del", del.String())
	h.waitClean()
	if after := descriptors(); after != before {
		t.Errorf("the server has %d descriptors, and had %d", after, before)
	}
}
