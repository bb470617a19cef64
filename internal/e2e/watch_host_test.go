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
)

// TestWatchRestart: killed and started again, stopped and started again, it changes
// nothing; what changed meanwhile it finds.
func TestWatchRestart(t *testing.T) {
	for _, mode := range []string{"copy", "move"} {
		t.Run(mode, func(t *testing.T) {
			h := newHost(t)
			h.link("wan0", "10.77.0.2/24")
			h.link("wan1", "10.78.0.2/24", "10.78.0.3/24")
			h.isp.IP(t, "address add 10.78.0.1/24 dev wan1")
			h.isp.IP(t, "address add 100.64.0.1/32 dev lo")
			h.isp.IP(t, "address add 2001:db8::1/64 dev wan1 nodad")
			h.isp.IP(t, "address add 2001:db8:ffff::1/128 dev lo nodad")
			h.ns.IP(t, "address add 2001:db8::2/64 dev wan1 nodad")
			h.ns.IP(t, "route add default via 2001:db8::1 dev wan1")
			h.ns.IP(t, "route add default via 10.77.0.1 dev wan0 metric 1")
			h.ns.IP(t, "route add default via 10.78.0.1 dev wan1 metric 2")
			h.serve()
			args := []string{"--routes", mode, "--on-loss", "block"}
			p := h.watch(args...)
			tables := map[string]string{}
			for _, addr := range []string{"10.77.0.2", "10.78.0.2", "10.78.0.3", "2001:db8::2"} {
				tables[addr] = h.served(addr)
			}
			held := 4
			settle := func() {
				t.Helper()
				eventually(t, "the watch holds all", func() error {
					r := h.run(bin(t, clientBin), "status")
					if r.code != 0 || strings.Count(r.stdout, "\n") < held+1 {
						return errors.New(r.stdout + r.stderr)
					}
					return nil
				})
			}
			settle()
			routes := append(h.routes(tables["10.77.0.2"]), h.routes(tables["10.78.0.2"])...)
			stop4, stop6 := h.hear("4"), h.hear("6")
			flows := []func() (int, int){h.flow("10.78.0.2:7000", "100.64.0.1:7000"), h.flow("[2001:db8::2]:7000", "[2001:db8:ffff::1]:7000")}
			for range 3 {
				p.kill()
				p = h.watch(args...)
				settle()
				if code := p.stop(); code != 0 {
					t.Errorf("exit code %d", code)
				}
				p = h.watch(args...)
				settle()
			}
			for _, done := range flows {
				if sent, came := done(); sent != came {
					t.Errorf("%d packets of %d came", came, sent)
				}
			}
			for _, stop := range []func() []string{stop4, stop6} {
				if heard := stop(); len(heard) > 0 {
					t.Errorf("rules changed: %q", heard)
				}
			}
			if diff := unordered(append(h.routes(tables["10.77.0.2"]), h.routes(tables["10.78.0.2"])...), routes); diff != "" {
				t.Errorf("routes changed: %s", diff)
			}
			p.kill()
			h.ns.IP(t, "address del 10.78.0.3/24 dev wan1")
			h.ns.IP(t, "address add 10.78.0.4/24 dev wan1")
			h.ns.IP(t, "link del wan0")
			h.watch(args...)
			held = 3
			settle()
			h.served("10.78.0.4")
			h.waitNotServed("10.78.0.3")
			h.waitNotServed("10.77.0.2")
			h.waitRoutes(tables["10.78.0.3"])
			if got := h.served("10.78.0.2"); got != tables["10.78.0.2"] {
				t.Errorf("table of 10.78.0.2: %s, before %s", got, tables["10.78.0.2"])
			}
		})
	}
}

// TestWatchBesideClients: whoever holds a key answers for it.
func TestWatchBesideClients(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.link("wan1", "10.78.0.2/24")
	h.serve()
	before := h.lease("10.77.0.2", "wan0", "-t", "client", "--routes", "copy", "--gateway", "10.77.0.1")
	client := h.onlyClient()
	servers := filepath.Join(h.dir, "servers")
	file := h.watchFile(`{"links":[{"tag":"watch","dnsmasq_servers":"` + servers + `"}],"reconcile_seconds":1}`)
	p := h.watch("-c", file)
	table := h.served("10.78.0.2")
	p.waitLog("another client serves this address")
	h.wantLeases(fmt.Sprintf("%d|inet|wan0|10.77.0.2|client|0", before), table+"|inet|wan1|10.78.0.2|watch|0")

	// A hook's call gets the table at once, and what it says is taken over.
	if got := h.lease("10.78.0.2", "wan1", "--routes", "copy", "--gateway", "10.78.0.1", "--nameserver", "10.78.0.53", "--dnsmasq-servers", servers); fmt.Sprint(got) != table {
		t.Errorf("table for a hook: got %d, want %s", got, table)
	}
	network := "10.78.0.0/24 dev wan1 proto 116 scope link src 10.78.0.2"
	gateway := "default via 10.78.0.1 dev wan1 proto 116 src 10.78.0.2"
	h.waitRoutes(table, network, gateway)
	resolver := func() {
		t.Helper()
		eventually(t, "the resolver line is there", func() error {
			if text, _ := os.ReadFile(servers); string(text) != "server=10.78.0.53@10.78.0.2\n" {
				return fmt.Errorf("%q", text)
			}
			return nil
		})
	}
	resolver()
	h.wantLeases(fmt.Sprintf("%d|inet|wan0|10.77.0.2|client|0", before), table+"|inet|wan1|10.78.0.2|watch|0")
	if pids := h.waitClients(2); !slices.Contains(pids, client) || !slices.Contains(pids, p.cmd.Process.Pid) {
		t.Errorf("processes %d", pids)
	}
	// Another profile leaves in place what the hook said of the network.
	h.watchFile(`{"links":[{"tag":"again","on_loss":"block","dnsmasq_servers":"` + servers + `"}],"reconcile_seconds":1}`)
	p.again()
	eventually(t, "the block rule is there", func() error {
		if !strings.Contains(strings.Join(h.rules(), "\n"), "10001: from 10.78.0.2 unreachable") {
			return errors.New("not yet")
		}
		return nil
	})
	h.waitRoutes(table, network, gateway)
	resolver()
	h.watchFile(`{"links":[{"tag":"watch","dnsmasq_servers":"` + servers + `"}],"reconcile_seconds":1}`)
	p.again()

	// Given back on request it stays so while the address stands.
	if r := h.client("-r", "-4", "-a", "10.78.0.2", "-i", "wan1"); r.code != 0 {
		t.Fatalf("release: %s", r.stderr)
	}
	h.waitRules(copyRules("10.77.0.2", "10.77.0.0/24", before)...)
	h.ns.IP(t, "address add 10.79.0.2/24 dev wan1")
	h.served("10.79.0.2")
	h.notServed("10.78.0.2")
	h.ns.IP(t, "address del 10.78.0.2/24 dev wan1")
	h.served("10.79.0.2")
	h.ns.IP(t, "address add 10.78.0.2/24 dev wan1")
	h.served("10.78.0.2")
	// The client ends: its address is the watch's now.
	if err := syscall.Kill(client, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the watch has the lease", func() error {
		if leases := strings.Join(h.leases(), " "); !strings.Contains(leases, "|wan0|10.77.0.2|watch|") {
			return errors.New(leases)
		}
		return nil
	})
	h.served("10.77.0.2")
}

// TestWatchTwice: each address has one holder.
func TestWatchTwice(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	first := h.watch()
	table := h.served("10.77.0.2")
	stop := h.hear("4")
	file := h.watchFile(`{"links":[{"routes":"move","on_loss":"block"}],"reconcile_seconds":1}`)
	second := h.watch("-c", file)
	second.waitLog(fmt.Sprintf("pid %d (ta-watch", first.cmd.Process.Pid))
	h.ns.IP(t, "address add 10.77.0.3/24 dev wan0")
	h.served("10.77.0.3")
	h.ns.IP(t, "address del 10.77.0.3/24 dev wan0")
	h.waitNotServed("10.77.0.3")
	second.again()
	if n := strings.Count(second.log.String(), "another client serves this address"); n > 2 {
		t.Errorf("said %d times", n)
	}
	for _, line := range stop() {
		if strings.Contains(line, "10.77.0.2") {
			t.Errorf("rules changed: %q", line)
		}
	}
	// When the first is gone the second has it.
	first.kill()
	eventually(t, "the second one serves it", func() error {
		r := h.run(bin(t, clientBin), "status", "--json")
		if !strings.Contains(r.stdout, fmt.Sprintf(`"pid":%d`, second.cmd.Process.Pid)) {
			return errors.New(r.stdout)
		}
		return nil
	})
	if got := h.served("10.77.0.2"); got != table {
		t.Errorf("table: got %s, want %s", got, table)
	}
}

// TestWatchNameservers: resolver lines of a profile come and go with the addresses, also with
// those that go while no watch runs, and with the profile.
func TestWatchNameservers(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.link("wan1", "10.78.0.2/24")
	h.ns.IP(t, "address add 2001:db8::2/64 dev wan0 nodad")
	h.serve()
	servers := filepath.Join(h.dir, "servers")
	file := h.watchFile(`{"links":[
		{"ifname":"wan0","nameservers":["192.0.2.53","2001:db8::53"],"dnsmasq_servers":"` + servers + `"},
		{"ifname":"wan1","nameservers":["192.0.2.54"],"dnsmasq_servers":"` + servers + `"}]}`)
	lines := func(want ...string) {
		t.Helper()
		eventually(t, "the resolver lines are there", func() error {
			text, err := os.ReadFile(servers)
			return errors.Join(err, unorderedError(strings.Fields(string(text)), want))
		})
	}
	p := h.watch("-c", file)
	lines("server=192.0.2.53@10.77.0.2", "server=2001:db8::53@2001:db8::2", "server=192.0.2.54@10.78.0.2")
	h.ns.IP(t, "address del 10.77.0.2/24 dev wan0")
	lines("server=2001:db8::53@2001:db8::2", "server=192.0.2.54@10.78.0.2")
	h.ns.IP(t, "address add 10.77.0.3/24 dev wan0")
	lines("server=192.0.2.53@10.77.0.3", "server=2001:db8::53@2001:db8::2", "server=192.0.2.54@10.78.0.2")
	p.kill()
	h.ns.IP(t, "link del wan1")
	p = h.watch("-c", file)
	lines("server=192.0.2.53@10.77.0.3", "server=2001:db8::53@2001:db8::2")
	p.kill()
	h.watchFile(`{"links":[{"families":["inet"],"dnsmasq_servers":"` + servers + `"}]}`)
	h.watch("-c", file)
	lines()
}

// TestTableWanted: a number that is asked for, and had if it is free.
func TestTableWanted(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.link("wan1", "10.78.0.2/24")
	h.serve()
	if got := h.lease("10.77.0.2", "wan0", "--table", "10017"); got != 10017 {
		t.Errorf("table: got %d, want 10017", got)
	}
	for name, args := range map[string][]string{"held": {"--table", "10017"}, "of no pool": {"--table", "99"}} {
		if got := h.lease("10.78.0.2", "wan1", args...); got != 10000 {
			t.Errorf("%s: got %d, want 10000", name, got)
		}
		h.client("-r", "-4", "-a", "10.78.0.2", "-i", "wan1")
	}
	// Who has one keeps it.
	h.client("-r", "-4", "-a", "10.77.0.2", "-i", "wan0")
	h.lease("10.77.0.2", "wan0")
	if got := h.lease("10.77.0.2", "wan0", "--table", "10020"); got != 10017 {
		t.Errorf("table of one that holds 10017: got %d", got)
	}
	h.watch("-c", h.watchFile(`{"links":[{"ifname":"wan1","table":10030}]}`))
	if got := h.served("10.78.0.2"); got != "10030" {
		t.Errorf("table of the watch: got %s, want 10030", got)
	}
	if r := h.client("-4", "-a", "10.78.0.2", "-i", "wan1", "--table", "x"); r.code != 1 {
		t.Errorf("--table x: exit code %d", r.code)
	}
}

// TestWatchCapability: the right to change the network is all that it needs, as its unit
// gives it.
func TestWatchCapability(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0")
	h.ns.IP(t, "rule add from 10.99.0.1 lookup 777 pref 10000 proto 116")
	h.serve()
	path := publicBin(t, clientBin)
	p := h.start(exec.Command("setpriv", "--bounding-set", "-all,+net_admin", "--inh-caps", "-all,+net_admin", "--no-new-privs",
		path, "watch", "--routes", "move", "--specific-first"))
	table := h.served("10.77.0.2")
	h.waitRoutes(table, "10.77.0.0/24 dev wan0 proto 116 scope link src 10.77.0.2", "default via 10.77.0.1 dev wan0 proto 116 src 10.77.0.2")
	h.waitNotServed("10.99.0.1")
	if caps := status(t, p.cmd.Process.Pid, "CapEff"); caps[0] != "0000000000001000" {
		t.Errorf("it has the capabilities %s", caps[0])
	}
	h.lease("10.77.0.2", "wan0", "--routes", "move", "--specific-first", "--gateway", "10.77.0.1")
	eventually(t, "what a hook told is kept", func() error {
		if files := h.toldFiles(); len(files) != 1 {
			return fmt.Errorf("%q", files)
		}
		return nil
	})
	h.ns.IP(t, "rule flush protocol 116")
	h.served("10.77.0.2")
	if h.run(bin(t, clientBin), "status").code != 0 {
		t.Error("something is missing")
	}
	for _, word := range []string{"level=ERROR", "not permitted", "denied"} {
		if strings.Contains(p.log.String(), word) {
			t.Errorf("the log has %q", word)
		}
	}
	if code := p.stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// TestWatchClean: what is to be taken back at the end is.
func TestWatchClean(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0")
	h.ns.IP(t, "address add 2001:db8::2/64 dev wan0 nodad")
	h.serve()
	before := h.routes("main")
	p := h.watch("--clean", "--routes", "move")
	h.served("10.77.0.2")
	h.served("2001:db8::2")
	if code := p.stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	h.waitClean()
	h.waitRules6()
	h.waitRoutes("main", before...)
}
