package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

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

// TestWatchCollectsLate: an address goes while the next watch has it, and no table for it.
func TestWatchCollectsLate(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.link("wan1", "10.78.0.2/24")
	s := h.serve()
	file := h.watchFile(`{"links":[{}],"reconcile_seconds":3600}`)
	p := h.watchPlain("-c", file)
	h.served("10.77.0.2")
	h.served("10.78.0.2")
	p.kill()
	s.kill()
	h.watchPlain("-c", file)
	eventually(t, "the next watch holds the address", func() error {
		if sockets := h.run("cat", "/proc/net/unix").stdout; !strings.Contains(sockets, "@wan1-10.78.0.2-") {
			return errors.New(sockets)
		}
		return nil
	})
	h.ns.IP(t, "address del 10.78.0.2/24 dev wan1")
	eventually(t, "no rule is left of the address", func() error {
		if rules := h.rulesFrom("10.78.0.2"); len(rules) > 0 {
			return fmt.Errorf("%q", rules)
		}
		return nil
	})
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
