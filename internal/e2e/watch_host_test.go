package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// again makes a watch read its configuration again.
func (p *process) again() {
	p.t.Helper()
	before := strings.Count(p.log.String(), "the configuration") + strings.Count(p.log.String(), "configuration read again")
	if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		p.t.Fatal(err)
	}
	eventually(p.t, "the configuration is read again", func() error {
		if strings.Count(p.log.String(), "the configuration")+strings.Count(p.log.String(), "configuration read again") == before {
			return errors.New("not yet")
		}
		return nil
	})
}

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

// TestWatchCollects: what an earlier run or a client that was killed has left goes, and
// nobody else's.
func TestWatchCollects(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.link("lan0", "10.78.0.2/24", "10.78.0.3/24")
	h.ns.IP(t, "route add default via 10.78.0.1 dev lan0")
	h.serve()
	// A client that lives, one that is killed and took main's routes, and one whose address goes, too.
	living := h.lease("10.78.0.3", "lan0", "--routes", "copy")
	alive := h.pids(clientBin)
	h.lease("10.78.0.2", "lan0", "--routes", "move")
	h.link("lan1", "10.79.0.2/24", "10.79.1.3/24") // with the last address all routes would go
	h.lease("10.79.0.2", "lan1", "--routes", "copy")
	h.waitRoutes("10002", "10.79.0.0/24 dev lan1 proto 116 scope link src 10.79.0.2", "10.79.1.0/24 dev lan1 proto 116 scope link src 10.79.0.2")
	for _, pid := range h.pids(clientBin) {
		if !slices.Contains(alive, pid) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	h.waitClients(1)
	h.ns.IP(t, "address del 10.79.0.2/24 dev lan1")
	for _, args := range []string{
		"rule add from 10.99.0.1 lookup 777 pref 10000 proto 116",
		"rule add iif lo lookup 777 pref 91000 proto 116",
		"rule add from 10.99.0.2 unreachable pref 10001 proto 116",
		"rule add from 10.99.0.3 lookup 777 pref 10000 proto 200",
		"rule add from 10.99.0.4 lookup 778 pref 10000",
		"route add 10.99.0.0/16 via 10.77.0.9 table 777 proto 116",
		"route add 10.98.0.0/16 via 10.77.0.9 table 777 proto 200",
		"rule add oif gone0 lookup 777 pref 90000 proto 116", // [detached]
		"rule add iif gone0 lookup 778 pref 90000 proto 200",
		"-6 rule add from 2001:db8:9::1 lookup 777 pref 10000 proto 116",
		"-6 route add 2001:db8:9::/64 dev wan0 table 777 proto 116",
	} {
		h.ns.IP(t, args)
	}
	file := h.watchFile(`{"links":[{"ifname":"wan*"}],"reconcile_seconds":1}`)
	p := h.watch("-c", file)
	table := h.served("10.77.0.2")
	theirs := []string{"10000: from 10.99.0.3 lookup 777 proto 200", "10000: from 10.99.0.4 lookup 778 proto unspec",
		"90000: from all iif gone0 [detached] lookup 778 proto 200"}
	want := append(append(copyRules("10.78.0.3", "10.78.0.0/24", living), copyRules("10.77.0.2", "10.77.0.0/24", h.tableNumber("10.77.0.2"))...), theirs...)
	h.waitRules(want...)
	h.waitRules6()
	h.waitRoutes("777", "10.98.0.0/16 via 10.77.0.9 dev wan0 proto 200")
	h.waitRoutes6("777")
	h.waitRoutes("10001")
	h.waitRoutes("10002")
	h.waitLeases(fmt.Sprintf("%d|inet|lan0|10.78.0.3||0", living), table+"|inet|wan0|10.77.0.2||0")
	eventually(t, "main has the routes of the one that was killed", func() error {
		if main := strings.Join(h.routes("main"), "\n"); !strings.Contains(main, "default via 10.78.0.1 dev lan0") {
			return errors.New(main)
		}
		return nil
	})
	// One that is killed while the watch runs is found within a period.
	_ = syscall.Kill(alive[0], syscall.SIGKILL)
	h.waitRules(append(copyRules("10.77.0.2", "10.77.0.0/24", h.tableNumber("10.77.0.2")), theirs...)...)
	h.waitLeases(table + "|inet|wan0|10.77.0.2||0")
	// What nobody told it of comes back, too: it was stopped while events were lost, say.
	h.freeze(p.cmd.Process.Pid)
	h.ns.IP(t, "route flush table "+table)
	h.ns.IP(t, "rule del pref 10000 from 10.77.0.2")
	_ = syscall.Kill(p.cmd.Process.Pid, syscall.SIGCONT)
	h.served("10.77.0.2")
	h.waitRoutes(table, "10.77.0.0/24 dev wan0 proto 116 scope link src 10.77.0.2", "10.79.1.0/24 dev lan1 proto 116 src 10.79.1.3")
}

func TestWatchHeals(t *testing.T) {
	h := newHost(t)
	for i := range 4 {
		h.link(fmt.Sprintf("wan%d", i), fmt.Sprintf("10.77.%d.2/24", i))
		h.ns.IP(t, fmt.Sprintf("address add 2001:db8:%d::2/64 dev wan%d nodad", i+1, i))
	}
	h.serve()
	p := h.watch("--specific-first")
	for i := range 4 {
		h.served(fmt.Sprintf("10.77.%d.2", i))
		h.served(fmt.Sprintf("2001:db8:%d::2", i+1))
	}
	var want, want6 []string
	eventually(t, "all rules are there", func() error {
		if want, want6 = h.rules(), h.rules6(); len(want) != 20 || len(want6) != 20 {
			return fmt.Errorf("%d and %d rules", len(want), len(want6))
		}
		return nil
	})
	healed := func(what string) {
		t.Helper()
		eventually(t, what+" is healed, and the order is the one of before", func() error {
			if err := errors.Join(unorderedError(h.rules(), want), unorderedError(h.rules6(), want6)); err != nil {
				return err
			}
			for _, order := range [][2][]string{{unbound(h.rules()), unbound(want)}, {unbound(h.rules6()), unbound(want6)}} {
				if !slices.Equal(order[0], order[1]) {
					return fmt.Errorf("order %q, want %q", order[0], order[1])
				}
			}
			return nil
		})
	}
	first := unbound(want)[0]
	h.ns.IP(t, "rule del pref 10000 from 10.77.0.2")
	healed("one rule")
	h.ns.IP(t, "rule del iif lo lookup "+first)
	healed("an unbound rule")
	h.ns.IP(t, "-6 rule del iif lo lookup "+unbound(want6)[1])
	healed("an unbound rule of IPv6")
	// As wg-quick does it: the first that matches. Of what it looks for, suppress_prefixlength 0, we have nothing.
	for range 3 {
		h.ns.IP(t, "rule del table main suppress_prefixlength 7")
		h.ns.IP(t, "-6 rule del table main suppress_prefixlength 6")
	}
	h.ns.IP(t, "rule add table main suppress_prefixlength 0 pref 32000")
	h.ns.IP(t, "rule del table main suppress_prefixlength 0")
	healed("the first that matches")
	h.ns.IP(t, "rule flush")
	h.ns.IP(t, "rule add pref 32766 lookup main")
	h.ns.IP(t, "rule add pref 32767 lookup default")
	h.ns.IP(t, "-6 rule flush")
	h.ns.IP(t, "-6 rule add pref 32766 lookup main")
	want = append(want, "32766: from all lookup main proto unspec", "32767: from all lookup default proto unspec")
	want6 = append(want6, "32766: from all lookup main proto unspec")
	healed("everything")
	// The order is healed even where no rule is missing.
	h.freeze(p.cmd.Process.Pid)
	h.ns.IP(t, "rule del iif lo lookup "+first+" pref 91000 proto 116")
	h.ns.IP(t, "rule add iif lo lookup "+first+" pref 91000 proto 116")
	_ = syscall.Kill(p.cmd.Process.Pid, syscall.SIGCONT) // it is there
	healed("the order")
	h.ns.IP(t, "route flush table "+first)
	eventually(t, "the table is filled again", func() error {
		if len(h.routes(first)) != 1 {
			return errors.New("no route")
		}
		return nil
	})
	if n := strings.Count(p.log.String(), "another program deletes our rules"); n != 1 {
		t.Errorf("%d warnings, want one", n)
	}
}

// TestWatchAttacked: somebody who deletes for ever is not fought with.
func TestWatchAttacked(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0")
	h.serve()
	p := h.watch()
	table := h.served("10.77.0.2")
	rules := copyRules("10.77.0.2", "10.77.0.0/24", h.tableNumber("10.77.0.2")) // read before they are deleted
	h.waitRoutes(table, "10.77.0.0/24 dev wan0 proto 116 scope link src 10.77.0.2", "default via 10.77.0.1 dev wan0 proto 116 src 10.77.0.2")
	attack := h.start(h.sh("while :; do ip rule flush protocol 116; ip route flush table " + table + "; done 2>/dev/null"))
	p.waitLog("another program deletes them again and again")
	attack.kill()
	additions := strings.Count(p.log.String(), "rule added")
	if additions > 100 {
		t.Errorf("%d rules were added meanwhile", additions)
	}
	if n := strings.Count(p.log.String(), "level=WARN"); n > 2 {
		t.Errorf("%d warnings, want one of rules and one of routes", n)
	}
	h.waitRules(rules...)
	h.waitRoutes(table, "10.77.0.0/24 dev wan0 proto 116 scope link src 10.77.0.2", "default via 10.77.0.1 dev wan0 proto 116 src 10.77.0.2")
}

// send sends datagrams from an address of the host to another one of the far end, which
// counts them, until stop; that says how many were sent and came.
func (h *host) flow(from, to string) (stop func() (sent, came int)) {
	h.t.Helper()
	listen := func(ns *nettest.Namespace, addr string) (c *net.UDPConn) {
		h.t.Helper()
		var err error
		ns.Do(func() { c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(addr))) })
		if err != nil {
			h.t.Fatal(err)
		}
		h.t.Cleanup(func() { c.Close() })
		return c
	}
	server, client := listen(h.isp, to), listen(h.ns, from)
	var count atomic.Int64
	go func() {
		buf := make([]byte, 64)
		for {
			if _, _, err := server.ReadFromUDPAddrPort(buf); err != nil {
				return
			}
			count.Add(1)
		}
	}()
	ended, end := make(chan int), make(chan struct{})
	go func() {
		n, failed := 0, 0
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-end:
				ended <- n
				return
			case <-tick.C:
				n++
				_, err := client.WriteToUDPAddrPort([]byte("x"), netip.MustParseAddrPort(to))
				if err == nil {
					continue
				}
				if failed++; failed == 1 {
					h.t.Errorf("packet %d from %s: %v", n, from, err)
				}
			}
		}
	}()
	finish := sync.OnceValue(func() (sent int) {
		close(end)
		return <-ended
	})
	h.t.Cleanup(func() { finish() })
	eventually(h.t, "packets come from "+from, func() error {
		if count.Load() < 5 {
			return errors.New("none")
		}
		return nil
	})
	return func() (int, int) {
		sent := finish()
		for until := time.Now().Add(patience); int(count.Load()) < sent && time.Now().Before(until); {
			time.Sleep(5 * time.Millisecond)
		}
		return sent, int(count.Load())
	}
}

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
