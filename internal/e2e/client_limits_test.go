package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// TestManyRenames: a link that is renamed again and again has one lease and the rules of one address afterwards.
func TestManyRenames(t *testing.T) {
	for name, watched := range map[string]bool{"client": false, "watch": true} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.link("wan0", "10.77.0.2/24")
			h.serve()
			if watched {
				h.watch("--ifname", "*", "--exclude", "lo")
				h.served("10.77.0.2")
			} else {
				h.lease("10.77.0.2", "wan0", "--routes", "copy")
			}
			var renames []string
			last := "wan0"
			for i := range 1000 {
				next := fmt.Sprint("w", i)
				renames = append(renames, fmt.Sprintf("link set dev %s name %s", last, next))
				last = next
			}
			h.ns.Batch(t, renames...)
			eventually(t, "one lease is left, with its rules", func() error {
				leases := h.leases()
				if len(leases) != 1 || !strings.Contains(leases[0], "|inet|"+last+"|10.77.0.2|") {
					return fmt.Errorf("leases %q", leases)
				}
				table := h.tableNumber("10.77.0.2")
				if diff := unordered(h.rules(), copyRules("10.77.0.2", "10.77.0.0/24", table)); diff != "" {
					return fmt.Errorf("%s", diff)
				}
				return nil
			})
		})
	}
}

// TestLongCall: a call whose settings are too long for a holder is refused in words, and leaves the holder as it is.
func TestLongCall(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	h.lease("10.77.0.2", "wan0", "--routes", "copy", "--gateway", "10.77.0.1")
	pid := h.onlyClient()
	rules := h.rules()
	args := []string{"-4", "-a", "10.77.0.2", "-i", "wan0", "--routes", "copy"}
	for i := range 2000 {
		args = append(args, "--route", fmt.Sprintf("10.%d.%d.0/24,10.77.0.1", i/250, i%250))
	}
	if r := h.client(args...); r.stdout != "0\n" || !strings.Contains(r.stderr, "takes 65536 bytes") {
		t.Errorf("%.100s, %.300s, exit code %d", r.stdout, r.stderr, r.code)
	}
	if now := h.onlyClient(); now != pid {
		t.Errorf("holder %d is %d now", pid, now)
	}
	h.wantRules(rules...)
	// Of a program that sends it all the same.
	p := h.peer("asker", false)
	if answer := p.askAt("wan0-10.77.0.2-2", request(2, "wan0", "10.77.0.2", 3)+strings.Repeat(" ", 70000), patience); !strings.Contains(answer, "longer than 65536 bytes") {
		t.Errorf("answer %q", answer)
	}
	h.waitClientLog(1, "longer than 65536 bytes")
}

// TestSoakRoutesOfDaemons: of more routes of routing daemons than max_routes some are left out, which log and status say
// once. Default routes, on-link networks and static routes are carried over in any case, also if they come last.
func TestSoakRoutesOfDaemons(t *testing.T) {
	routes, file := 6000, `{"links":[{"ifname":"wan*"}],"max_routes":2500}`
	if fullSize() {
		routes, file = 1_000_000, `{"links":[{"ifname":"wan*"}]}`
	}
	u := newHost(t).behind(routed(0), routed(1))
	u.address(0)
	u.address(1)
	u.link("lan0", "10.200.0.1/24")
	u.isp.Batch(t, "address add 10.200.0.9/24 dev lan0", "route add default via 10.200.0.1")
	u.isp.Do(func() { serveWho(t, "10.200.0.9:7") })
	u.serve()
	u.ns.IP(t, "route add 203.0.112.0/24 via 10.1.0.7 dev wan0 proto static")
	lines := make([]string, routes)
	for i := range lines {
		n := i % 2
		lines[i] = fmt.Sprintf("route add %d.%d.%d.%d/32 via 10.%d.0.1 dev wan%d proto bird", 100+i>>24, i>>16&255, i>>8&255, i&255, n+1, n)
	}
	u.ns.Batch(t, lines...)
	u.ns.IP(t, "route add 203.0.113.0/24 via 10.2.0.7 dev wan1 proto static")
	p := u.watchPlain("-c", u.watchFile(file))
	addrs := make([]string, 2)
	for n := range addrs {
		addrs[n], _ = at(n)
		u.served(addrs[n])
		u.waitUplink(n, addrs[n])
	}
	for _, tt := range []struct{ to, from, want string }{
		{"203.0.112.9", addrs[0], "via 10.1.0.7 dev wan0"},
		{"203.0.113.9", addrs[1], "via 10.2.0.7 dev wan1"},
		{"10.200.0.9", addrs[0], "dev lan0"},
		{"10.200.0.9", addrs[1], "dev lan0"},
	} {
		eventually(t, tt.to+" is reached from "+tt.from, func() error {
			if got := u.ns.IP(t, "route get "+tt.to+" from "+tt.from); !strings.Contains(got, tt.want) {
				return fmt.Errorf("%s", got)
			}
			return nil
		})
	}
	for _, addr := range addrs { // a neighbour behind another link, which a default route would send to the provider
		eventually(t, "packets from "+addr+" reach the LAN", func() error { return u.arrives(packet{source: addr, to: "10.200.0.9"}, addr) })
	}
	eventually(t, "status says what is left out", func() error {
		for _, row := range u.statusRows() {
			if slices.Contains(addrs, row.Address) && !strings.Contains(row.Missing, "(above max_routes)") {
				return fmt.Errorf("%s misses %q", row.Address, row.Missing)
			}
		}
		return nil
	})
	// What comes now is carried over, too.
	u.ns.Batch(t, "route add 203.0.114.0/24 via 10.1.0.7 dev wan0 proto static", "route del 203.0.112.0/24 via 10.1.0.7 dev wan0 proto static")
	eventually(t, "a new static route is carried over, and a deleted one deleted", func() error {
		if got := u.ns.IP(t, "route get 203.0.114.9 from "+addrs[0]); !strings.Contains(got, "via 10.1.0.7") {
			return fmt.Errorf("%s", got)
		}
		if got := u.ns.IP(t, "route get 203.0.112.9 from "+addrs[0]); !strings.Contains(got, "via 10.1.0.1 ") {
			return fmt.Errorf("%s", got)
		}
		return nil
	})
	for n, addr := range addrs {
		u.waitUplink(n, addr)
		if got := strings.Count(p.log.String(), `msg="cannot place the routes" ifname=`+fmt.Sprint("wan", n)+" addr="+addr); got != 1 {
			t.Errorf("the log says %d times that routes of %s are left out", got, addr)
		}
	}
	if pss := pssOf(t, p.cmd.Process.Pid); fullSize() {
		t.Logf("%d routes: %d MiB", routes, pss>>10)
		if pss > 256<<10 {
			t.Errorf("memory: %d MiB, want at most 256", pss>>10)
		}
	}
}
