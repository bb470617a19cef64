package e2e

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// notServed fails the test if an address has a rule now.
func (h *host) notServed(addr string) {
	h.t.Helper()
	for _, rule := range h.allRules() {
		if strings.Contains(rule, " from "+addr+" ") {
			h.t.Errorf("%s is served: %s", addr, rule)
		}
	}
}

func TestWatchLinks(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24", "10.77.0.3/24")
	h.link("wan1", "10.78.0.2/24")
	h.link("lan0", "10.79.0.2/24")
	h.ns.IP(t, "address add 2001:db8::2/64 dev wan0 nodad")
	h.ns.IP(t, "address add 2001:db8::3/128 dev lo")
	h.serve()
	p := h.watch("--ifname", "wan*", "--exclude", "wan1", "--exclude", "lo")
	h.served("10.77.0.2")
	h.served("10.77.0.3")
	h.served("2001:db8::2")
	// A link that appears, then its address.
	h.link("wan2")
	h.ns.IP(t, "address add 10.80.0.2/24 dev wan2")
	table := h.served("10.80.0.2")
	// With main's routes over links that are no uplinks: to what is behind them it leads, too.
	h.waitRoutes(table, "10.80.0.0/24 dev wan2 proto 116 scope link src 10.80.0.2",
		"10.78.0.0/24 dev wan1 proto 116 src 10.78.0.2", "10.79.0.0/24 dev lan0 proto 116 src 10.79.0.2")
	for _, addr := range []string{"10.78.0.2", "10.79.0.2", "2001:db8::3"} {
		h.notServed(addr)
	}
	// Renamed, it is another key; and one that is not selected.
	h.rename("wan2", "wan3")
	eventually(t, "the lease is of the new name", func() error {
		if all := strings.Join(h.leases(), " "); !strings.Contains(all, "|wan3|10.80.0.2|") || strings.Contains(all, "|wan2|") {
			return errors.New(all)
		}
		return nil
	})
	h.waitRules(ofAll(copyRules("10.77.0.2", "10.77.0.0/24", h.tableNumber("10.77.0.2")),
		copyRules("10.77.0.3", "10.77.0.0/24", h.tableNumber("10.77.0.3")),
		copyRules("10.80.0.2", "10.80.0.0/24", h.tableNumber("10.80.0.2")))...)
	h.rename("wan3", "lan3")
	h.waitNotServed("10.80.0.2")
	h.rename("lan3", "wan4")
	h.served("10.80.0.2")
	h.ns.IP(t, "link del wan4")
	h.waitNotServed("10.80.0.2")
	// An address that comes back at once, many times.
	for range 10 {
		h.ns.IP(t, "address del 10.77.0.3/24 dev wan0")
		h.ns.IP(t, "address add 10.77.0.3/24 dev wan0")
	}
	eventually(t, "it is served again, once", func() error {
		if n := strings.Count(strings.Join(h.leases(), "\n"), "|wan0|10.77.0.3|"); n != 1 {
			return fmt.Errorf("%d leases", n)
		}
		return unorderedError(h.rules(), ofAll(copyRules("10.77.0.2", "10.77.0.0/24", h.tableNumber("10.77.0.2")),
			copyRules("10.77.0.3", "10.77.0.0/24", h.tableNumber("10.77.0.3"))))
	})
	h.ns.IP(t, "link del wan0")
	h.waitRules()
	h.waitRules6()
	eventually(t, "no lease is left", func() error {
		if leases := h.leases(); len(leases) > 0 {
			return errors.New(strings.Join(leases, " "))
		}
		return nil
	})
	if code := p.stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

func TestWatchDefaults(t *testing.T) {
	for _, c := range []struct {
		name        string
		args        []string
		want, never []string
	}{
		{"all", nil, []string{"10.77.0.2", "2001:db8::2"}, nil},
		{"inet", []string{"-4"}, []string{"10.77.0.2"}, []string{"2001:db8::2"}},
		{"inet6", []string{"-6"}, []string{"2001:db8::2"}, []string{"10.77.0.2"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			for i, name := range []string{"veth1", "docker0", "br-0123456789ab", "vnet0"} {
				h.link(name, fmt.Sprintf("10.1.%d.2/24", i))
				c.never = append(c.never, fmt.Sprintf("10.1.%d.2", i))
			}
			h.ns.IP(t, "address add 10.2.0.1/32 dev lo")
			c.never = append(c.never, "10.2.0.1")
			h.link("eth0", "10.77.0.2/24", "169.254.7.7/16")
			h.ns.IP(t, "address add 2001:db8::2/64 dev eth0 nodad")
			h.serve()
			h.watch(c.args...)
			for _, addr := range c.want {
				h.served(addr)
			}
			// What comes last is served last.
			h.link("eth1", "10.78.0.2/24")
			h.ns.IP(t, "address add 2001:db8:1::2/64 dev eth1 nodad")
			if slices.Contains(c.want, "10.77.0.2") {
				h.served("10.78.0.2")
			}
			if slices.Contains(c.want, "2001:db8::2") {
				h.served("2001:db8:1::2")
			}
			for _, addr := range append(c.never, "169.254.7.7") {
				h.notServed(addr)
			}
			for _, lease := range h.leases() {
				if strings.Contains(lease, "fe80") {
					t.Errorf("lease of a link-local address: %s", lease)
				}
			}
		})
	}
}

// TestWatchLinkNotUp: a watch asks for no first lease while the link is not up, and one that is held stays while it is down.
func TestWatchLinkNotUp(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.link("wan1")
	h.ns.Batch(t, "link set wan1 down", "address add 10.78.0.2/24 dev wan1")
	h.serve()
	h.watch("--ifname", "*")
	h.served("10.77.0.2")
	h.ns.IP(t, "address add 10.77.1.2/24 dev wan0") // what comes last is served last
	h.served("10.77.1.2")
	h.notServed("10.78.0.2")
	h.isp.IP(t, "link set wan1 down")
	h.ns.IP(t, "link set wan1 up") // without a carrier
	table := h.served("10.78.0.2")
	h.ns.IP(t, "link set wan1 down")
	h.waitStatus("10.78.0.2", "link-down", "link down")
	h.ns.IP(t, "address del 10.77.1.2/24 dev wan0")
	h.waitNotServed("10.77.1.2")
	if again := h.served("10.78.0.2"); again != table {
		t.Errorf("table %s was %s before", again, table)
	}
}

// TestWatchRefused: a family that the server does not lease is not asked for again and again.
func TestWatchRefused(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.ns.IP(t, "address add 2001:db8::2/64 dev wan0 nodad")
	s := h.serve(`"addr_families":{"inet":true}`)
	p := h.watch()
	h.served("10.77.0.2")
	p.waitLog("not-served")
	// Each of these makes the watch look at the addresses of the host.
	for i := range 20 {
		h.ns.IP(t, fmt.Sprintf("link add wan%d type veth peer name veth%d", i+1, i+1))
	}
	h.ns.IP(t, "address add 10.77.1.2/24 dev wan0")
	h.served("10.77.1.2")
	if n := strings.Count(s.log.String(), `msg="lease refused"`); n > 2 {
		t.Errorf("asked for it %d times", n)
	}
}

// TestWatchRefusedNoMore: a server that is started again with another configuration serves
// the addresses that it refused.
func TestWatchRefusedNoMore(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	addrs := []string{"2001:db8::2", "2001:db8::3", "2001:db8::4"}
	for _, addr := range addrs {
		h.ns.IP(t, "address add "+addr+"/64 dev wan0 nodad")
	}
	s := h.serve(`"addr_families":{"inet":true}`)
	p := h.watch("-c", h.watchFile(`{"links":[{}],"reconcile_seconds":1}`))
	h.served("10.77.0.2")
	eventually(t, "one is asked for again", func() error {
		if n := strings.Count(s.log.String(), `msg="lease refused"`); n < len(addrs)+3 {
			return fmt.Errorf("%d refusals", n)
		}
		return nil
	})
	if n := strings.Count(p.log.String(), "level=WARN"); n != len(addrs) {
		t.Errorf("%d warnings for %d addresses", n, len(addrs))
	}
	s.kill()
	h.serve()
	for _, addr := range addrs {
		h.served(addr)
	}
}

// TestWatchSelectedAgain: a configuration that leaves an address out for a moment, while the server does not answer.
func TestWatchSelectedAgain(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.link("wan1", "10.78.0.2/24")
	s := h.serve()
	file := h.watchFile(`{"links":[{}]}`)
	p := h.watch("-c", file)
	h.served("10.77.0.2")
	h.served("10.78.0.2")
	h.freeze(s.cmd.Process.Pid)
	h.watchFile(`{"links":[{"ifname":"wan0"}]}`)
	p.again()
	h.watchFile(`{"links":[{}]}`)
	p.again() // while the address of wan1 is being taken back
	_ = s.cmd.Process.Signal(syscall.SIGCONT)
	h.served("10.78.0.2")
}

func TestWatchConfig(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0")
	h.link("lte0", "10.78.0.2/24")
	h.serve()
	const plain = `{ // of the test
	"links": [
		{"ifname": "wan*", "tag": "cable", "routes": "copy", "families": ["inet"]},
	],
}`
	file := h.watchFile(plain)
	p := h.watch("-c", file)
	table := h.served("10.77.0.2")
	copied := []string{"10.77.0.0/24 dev wan0 proto 116 scope link src 10.77.0.2", "default via 10.77.0.1 dev wan0 proto 116 src 10.77.0.2"}
	alone := append(copied, "10.78.0.0/24 dev lte0 proto 116 src 10.78.0.2") // lte0 is no uplink
	h.waitRoutes(table, alone...)
	h.wantLeases(table + "|inet|wan0|10.77.0.2|cable|0")
	rule := func(format string) string { return fmt.Sprintf(format, table) }
	number := h.tableNumber("10.77.0.2")
	h.waitRules(copyRules("10.77.0.2", "10.77.0.0/24", number)...)
	stop := h.hear("4")

	// The same again changes nothing.
	p.again()
	if heard := stop(); len(heard) > 0 {
		t.Errorf("reading the same configuration again changed rules: %q", heard)
	}
	// Tag, on-loss, order, priorities.
	h.watchFile(`{"links":[{"ifname":"wan*","tag":"fibre","routes":"copy","on_loss":"block","specific_first":true,
		"priority":[10100,20100,91100],"families":["inet"]},{"ifname":"lte0"}]}`)
	p.again()
	lte := h.served("10.78.0.2")
	h.waitRoutes(table, copied...)
	eventually(t, "the new priorities are in force", func() error {
		return unorderedError(h.rules(), append(copyRules("10.78.0.2", "10.78.0.0/24", h.tableNumber("10.78.0.2")),
			"10098: from 10.77.0.2 lookup main suppress_prefixlength 7 proto 116",
			rule("10100: from 10.77.0.2 lookup %s proto 116"),
			"10101: from 10.77.0.2 unreachable proto 116",
			"20099: from all to 10.77.0.0/24 lookup main suppress_prefixlength 23 proto 116",
			rule("20100: from all to 10.77.0.0/24 lookup %s proto 116"),
			rule("91100: from all iif lo lookup %s proto 116")))
	})
	h.waitLeases(table+"|inet|wan0|10.77.0.2|fibre|0", lte+"|inet|lte0|10.78.0.2||0")
	// Broken: the one before stays in force.
	for _, broken := range []struct{ text, want string }{
		{`{"links":[{"ifname":"wan*","rotues":"copy"}]}`, "links[0].rotues: unknown key"},
		{`{"lnks":[]}`, "lnks: unknown key"},
		{`{"links":[{"ifname":7}]}`, "links[0].ifname: want a pattern, have 7"},
		{`{"links":[{"tag":"x","priority":[1,2]}]}`, "links[0].priority: want three numbers"},
		{`{"links":[{"routes":"moved"}]}`, "want none, move or copy"},
		{`{"links":[{"families":["ipv4"]}]}`, "links[0].families"},
		{`{"links":[`, "configuration " + file},
	} {
		h.watchFile(broken.text)
		p.again()
		p.waitLog(strings.ReplaceAll(broken.want, `"`, `\"`))
		if r := h.run(bin(t, clientBin), "watch", "-c", file); r.code != 78 || !strings.Contains(r.stderr, broken.want) {
			t.Errorf("%s: exit code %d, stderr %s", broken.text, r.code, r.stderr)
		}
	}
	h.served("10.78.0.2")
	h.waitLeases(table+"|inet|wan0|10.77.0.2|fibre|0", lte+"|inet|lte0|10.78.0.2||0")

	// Moved, and copied again: main has what it had. lte0 is selected no longer.
	inMain := []string{"10.78.0.0/24 dev lte0 proto kernel scope link src 10.78.0.2",
		"10.77.0.0/24 dev wan0 proto kernel scope link src 10.77.0.2", "default via 10.77.0.1 dev wan0"}
	h.watchFile(strings.Replace(plain, "copy", "move", 1))
	p.again()
	h.waitRules(moveRules("10.77.0.2", "10.77.0.0/24", number)...)
	h.waitRoutes("main", inMain[:2]...)
	h.waitRoutes(table, alone...)
	h.watchFile(plain)
	p.again()
	h.waitRoutes("main", inMain...)
	h.waitRoutes(table, alone...)
	h.watchFile(strings.Replace(plain, "copy", "none", 1))
	p.again()
	h.waitRoutes(table)
	h.waitRoutes("main", inMain...)
	h.waitRules(clientRules("10.77.0.2", "10.77.0.0/24", number)...)
	h.waitLeases(table + "|inet|wan0|10.77.0.2|cable|0")
	if strings.Contains(p.log.String(), `msg=finished ifname=wan0`) {
		t.Error("the lease was dropped on the way")
	}
	h.watchFile(strings.Replace(plain, "{", `{"max_routes": 7, `, 1))
	p.again()
	p.waitLog("max_routes cannot change while the watch runs")
}
