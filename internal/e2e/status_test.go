package e2e

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// twoUplinks is a host with two uplinks that have default routes, a server and a watch. The last argument is that of watch.
func twoUplinks(t *testing.T, watch ...string) *host {
	t.Helper()
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24", "2001:db8:77::2/64")
	h.link("wan1", "10.78.0.2/24", "2001:db8:78::2/64")
	h.ns.Batch(t, "route add default via 10.77.0.1 dev wan0 metric 100", "route add default via 10.78.0.1 dev wan1 metric 200",
		"route add default via 2001:db8:77::1 dev wan0 metric 100", "route add default via 2001:db8:78::1 dev wan1 metric 200")
	h.serve()
	h.watch(watch...)
	h.waitStatus("10.78.0.2", "ok", "")
	h.waitStatus("2001:db8:78::2", "ok", "")
	return h
}

// waitStatus waits until the state of an address is this, and what is missing begins with text, also in what people read.
func (h *host) waitStatus(addr, state, text string) {
	h.t.Helper()
	eventually(h.t, fmt.Sprintf("%s is %s", addr, state), func() error {
		rows := h.statusRows()
		at := slices.IndexFunc(rows, func(r row) bool { return r.Address == addr })
		if at < 0 || rows[at].State != state || !strings.HasPrefix(rows[at].Missing, text) {
			return fmt.Errorf("%+v", rows)
		}
		if shown := h.run(bin(h.t, clientBin), "status").stdout; text != "" && !strings.Contains(shown, text) {
			return fmt.Errorf("%s", shown)
		}
		return nil
	})
}

// TestStatusTellsWhere: each way in which packets leave by another link than their address's is said, with exit code 1,
// and after the cure nothing is.
func TestStatusTellsWhere(t *testing.T) {
	const four, six = "10.78.0.2", "2001:db8:78::2"
	for _, tt := range []struct {
		name          string
		watch         []string
		addr          string
		provoke, cure string // lines of ip, separated by ;
		state, says   string
	}{
		{"no default", nil, four, "route del default via 10.78.0.1", "route add default via 10.78.0.1 dev wan1 metric 200", "no-route", "no route (leaves by wan0)"},
		{"no default, IPv6", nil, six, "route del default via 2001:db8:78::1", "route add default via 2001:db8:78::1 dev wan1 metric 200", "no-route", "no route (leaves by wan0)"},
		{"no default, blocked", []string{"--on-loss", "block"}, four, "route del default via 10.78.0.1", "route add default via 10.78.0.1 dev wan1 metric 200", "blocked", "blocked: no route"},
		{"no default, blocked, IPv6", []string{"--on-loss", "block"}, six, "route del default via 2001:db8:78::1", "route add default via 2001:db8:78::1 dev wan1 metric 200", "blocked", "blocked: no route"},
		{"a rule before ours", nil, four, "route add default via 10.77.0.1 dev wan0 table 200;rule add pref 100 lookup 200", "rule del pref 100", "shadowed", "shadowed by rule 100 (lookup 200) (leaves by wan0)"},
		{"a rule before ours, IPv6", nil, six, "-6 route add default via 2001:db8:77::1 dev wan0 table 200;-6 rule add pref 100 lookup 200", "-6 rule del pref 100", "shadowed", "shadowed by rule 100 (lookup 200) (leaves by wan0)"},
		{"half of a VPN before ours", nil, four, "route add 128.0.0.0/1 via 10.77.0.1 dev wan0 table 200;rule add pref 100 from 10.78.0.0/24 lookup 200", "rule del pref 100", "shadowed", "shadowed by rule 100 (lookup 200) (leaves by wan0)"},
		{"a rule that refuses", nil, four, "rule add pref 100 from 10.78.0.2 prohibit", "rule del pref 100", "shadowed", "shadowed by rule 100 (prohibit) (blocked)"},
		{"an error in main first", []string{"--specific-first"}, four, "route add unreachable default metric 4", "route del unreachable default metric 4", "no-route", "no route: table main answers with an error"},
		{"a route of another program", nil, four, "route add default via 10.77.0.1 dev wan0 table 10001", "route del default via 10.77.0.1 dev wan0 table 10001", "no-route", "no route (leaves by wan0)"},
		{"a port of a bridge", nil, six, "link add br0 type bridge;link set br0 up;link set wan1 master br0;-6 route del default via 2001:db8:78::1", "link set wan1 nomaster;-6 route add default via 2001:db8:78::1 dev wan1 metric 200", "no-route", "no route: a port of br0 (leaves by wan0)"},
		{"link down", nil, four, "link set wan1 down", "link set wan1 up;address replace 2001:db8:78::2/64 dev wan1 nodad;route add default via 10.78.0.1 dev wan1 metric 200", "link-down", "link down (leaves by wan0)"},
		{"the same address on two links", nil, four, "address add 10.78.0.2/24 dev wan0", "address del 10.78.0.2/24 dev wan0", "shadowed", "shadowed by the same address on wan1 (leaves by wan1)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := twoUplinks(t, tt.watch...)
			ip := func(lines string) {
				for line := range strings.SplitSeq(lines, ";") {
					h.ns.IP(t, line)
				}
			}
			if strings.Contains(tt.provoke, "table 10001") { // of the address, whatever its number is
				table := " table " + h.tableOf(four)
				tt.provoke, tt.cure = strings.ReplaceAll(tt.provoke, " table 10001", table), strings.ReplaceAll(tt.cure, " table 10001", table)
			}
			ip(tt.provoke)
			h.waitStatus(tt.addr, tt.state, tt.says)
			ip(tt.cure)
			h.waitStatus(tt.addr, "ok", "")
			if r := h.run(bin(t, clientBin), "status", "-4", "wan0"); r.code != 0 {
				t.Errorf("the other link, exit code %d:\n%s", r.code, r.stdout)
			}
		})
	}
}

// TestStatusOfABranch: a link to other networks that never had a default route is as its owner wants it, and one that lost
// its default route is not.
func TestStatusOfABranch(t *testing.T) {
	h := twoUplinks(t)
	h.link("lan0", "10.79.0.2/24", "2001:db8:79::2/64")
	h.ns.Batch(t, "route add 10.64.0.0/10 via 10.79.0.1", "route add 2001:db8:6400::/40 via 2001:db8:79::1")
	h.client("-4", "-a", "10.79.0.2", "-i", "lan0", "--routes", "copy")
	h.client("-6", "-a", "2001:db8:79::2", "-i", "lan0", "--routes", "copy")
	for addr, gateway := range map[string]string{"10.79.0.2": "10.79.0.1", "2001:db8:79::2": "2001:db8:79::1"} {
		h.waitStatus(addr, "no-default", "")
		if r := h.run(bin(t, clientBin), "status"); r.code != 0 || !strings.Contains(r.stdout, "no default route (leaves by wan0)") {
			t.Errorf("exit code %d:\n%s", r.code, r.stdout)
		}
		h.ns.IP(t, "route add default via "+gateway+" dev lan0 metric 300")
		h.waitStatus(addr, "ok", "")
		h.ns.IP(t, "route del default via "+gateway+" dev lan0")
		h.waitStatus(addr, "no-route", "no route (leaves by wan0)")
		h.ns.IP(t, "route add default via "+gateway+" dev lan0 metric 300")
		h.waitStatus(addr, "ok", "")
	}
}

// TestStatusOfALostDefault: what a table without a default route lacks, and what to do, is said once: nobody restores what main has lost.
func TestStatusOfALostDefault(t *testing.T) {
	h := twoUplinks(t)
	h.ns.IP(t, "-6 route del default via 2001:db8:78::1")
	h.waitStatus("2001:db8:78::2", "no-route", "no route (leaves by wan0)")
	r := h.run(bin(t, clientBin), "status", "-6", "wan1")
	if !strings.Contains(r.stdout, " has no route to the Internet, and wan1 lost the default route that main had over the link\n") || strings.Count(r.stdout, "    do  ") != 1 {
		t.Errorf("status:\n%s", r.stdout)
	}
}

// TestStatusOfAFullPool: whoever reads that an address gets no table reads what gives it one.
func TestStatusOfAFullPool(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24", "10.77.0.3/24")
	h.serve(`"num_tables":1`)
	h.watch()
	eventually(t, "status says what to do", func() error {
		r := h.run(bin(t, clientBin), "status")
		if !strings.Contains(r.stdout, "no lease: no table is free") || !strings.Contains(r.stdout, "    do  raise num_tables in server.json") {
			return fmt.Errorf("exit code %d:\n%s", r.code, r.stdout)
		}
		return nil
	})
}

// TestStatusCarrier: a link without carrier is said as such, and by which link its packets leave if the kernel leaves out routes over it.
// explain agrees with the kernel.
func TestStatusCarrier(t *testing.T) {
	h := twoUplinks(t)
	h.isp.IP(t, "link set wan1 down")
	h.waitStatus("10.78.0.2", "no-carrier", "no carrier")
	h.ns.Sysctl(t, "net/ipv4/conf/all/ignore_routes_with_linkdown", "1")
	h.waitStatus("10.78.0.2", "no-carrier", "no carrier (leaves by wan0)")
	if got := h.explain(0, "198.51.100.1", "--from", "10.78.0.2"); !strings.Contains(got, "leaves by wan0 with 10.78.0.2") {
		t.Errorf("explain:\n%s", got)
	}
	h.isp.IP(t, "link set wan1 up")
	h.waitStatus("10.78.0.2", "ok", "")
}

// TestStatusOfNothing: names that nothing has are refused, and leases without an address are listed.
func TestStatusOfNothing(t *testing.T) {
	h := twoUplinks(t)
	if r := h.run(bin(t, clientBin), "status", "wna0"); r.code != 2 || r.stdout != "" || !strings.Contains(r.stderr, "wna0: no link and no lease") {
		t.Errorf("exit code %d, stdout %q, stderr %q", r.code, r.stdout, r.stderr)
	}
	if r := h.run(bin(t, clientBin), "status", "wna*"); r.code != 0 {
		t.Errorf("a pattern: exit code %d, stderr %q", r.code, r.stderr)
	}
	for args, want := range map[string]string{"10.78.0.2": "10.78.0.2", "10.78.0.2/24": "10.78.0.2", "wan0 2001:DB8:78::2": "10.77.0.2 2001:db8:77::2 2001:db8:78::2", "10.66.0.1": ""} {
		r := h.run(bin(t, clientBin), append([]string{"status", "--no-legend"}, strings.Fields(args)...)...)
		var got []string
		for _, line := range lines(r.stdout) {
			got = append(got, strings.Fields(line)[1])
		}
		if strings.Join(got, " ") != want || (r.code == 0) != (want != "") || want == "" && (r.code != 2 || !strings.Contains(r.stderr, "10.66.0.1: no link that can be an uplink")) {
			t.Errorf("status %s: %+v", args, r)
		}
	}
	h.client("-a", "vpn-one", "-i", "tun-0")
	p, _ := h.front("-4", "-a", "10.79.0.9", "-n", "24", "-i", "wan1")
	r := h.run(bin(t, clientBin), "status", "--json")
	var report struct {
		Server          struct{ State string }
		Uplinks, Others []row
	}
	if err := json.Unmarshal([]byte(r.stdout), &report); err != nil || r.code != 0 {
		t.Fatalf("exit code %d, %v:\n%s", r.code, err, r.stdout)
	}
	if o := report.Others; len(o) != 1 || o[0].Ifname != "tun-0" || o[0].Address != "vpn-one" || o[0].State != "ok" {
		t.Errorf("others: %+v", o)
	}
	if !slices.ContainsFunc(report.Uplinks, func(r row) bool {
		return r.Address == "10.79.0.9" && r.State == "waiting-address" && r.PID == p.cmd.Process.Pid
	}) {
		t.Errorf("waiting: %+v", report.Uplinks)
	}
	if report.Server.State != "running" {
		t.Errorf("server: %+v", report.Server)
	}
}

// TestStatusSchema: every key is always there, and a new one goes into this list and into the manual page.
func TestStatusSchema(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	r := h.run(bin(t, clientBin), "status", "--json")
	var report map[string]json.RawMessage
	if err := json.Unmarshal([]byte(r.stdout), &report); err != nil || string(report["version"]) != "1" {
		t.Fatalf("%v: %s", err, r.stdout)
	}
	var server map[string]json.RawMessage
	var uplinks []map[string]json.RawMessage
	var findings, unbound []map[string]json.RawMessage
	for _, part := range []struct {
		name string
		into any
	}{{"server", &server}, {"uplinks", &uplinks}, {"unbound", &unbound}} {
		if err := json.Unmarshal(report[part.name], part.into); err != nil {
			t.Fatal(err)
		}
	}
	if len(uplinks) != 1 {
		t.Fatalf("%s", r.stdout)
	}
	if err := json.Unmarshal(uplinks[0]["findings"], &findings); err != nil || len(findings) != 1 {
		t.Fatalf("%v: %s", err, r.stdout)
	}
	for _, tt := range []struct {
		name string
		got  map[string]json.RawMessage
		want string
	}{
		{"report", report, "namespaces others server unbound uplinks version"},
		{"server", server, "pid since state uid version"},
		{"uplink", uplinks[0], "address family findings gateway ifname lease_left leaves_by missing mode pid probe since state table"},
		{"unbound", unbound[0], "chosen family gateway ifname table why"},
		{"finding", findings[0], "cure evidence name severity what"},
	} {
		var keys []string
		for key := range tt.got {
			keys = append(keys, key)
		}
		slices.Sort(keys)
		if got := strings.Join(keys, " "); got != tt.want {
			t.Errorf("%s: got %s, want %s", tt.name, got, tt.want)
		}
	}
}

// TestStatusOfABoundShell: a shell that is bound to a link, as by run, is told the same as any other.
func TestStatusOfABoundShell(t *testing.T) {
	c := newCrossing(t)
	c.waitStatus("10.1.0.2", "ok", "")
	c.waitStatus("10.2.0.2", "ok", "")
	if r := c.do("run", "wan1", bin(t, clientBin), "status"); r.code != 0 {
		t.Errorf("status: %+v", r)
	}
	c.ns.IP(t, "route del default dev wan1")
	c.waitStatus("10.2.0.2", "no-route", "")
	for _, args := range []string{"status --no-legend wan0", "explain " + internet, "explain " + internet + " --from 10.1.0.2"} {
		own, bound := c.do(strings.Fields(args)...), c.do(append([]string{"run", "wan1", bin(t, clientBin)}, strings.Fields(args)...)...)
		if own.code != 0 || bound.code != own.code || strings.Contains(bound.stdout, "DISAGREES") || strings.Contains(bound.stdout, "refuses sockets") {
			t.Errorf("%s: %+v, and of a program under run: %+v", args, own, bound)
		}
		if strings.HasPrefix(args, "explain") && !strings.Contains(bound.stdout, "this process is bound to a link, and --pid asks as a process does") {
			t.Errorf("%s says nothing of the link:\n%s", args, bound.stdout)
		}
	}
}

// TestStatusBySource: where main has IPv6 default routes for some sources only, as OpenWrt adds them, a socket looks again with the
// source that it gets. Status says where that leads, and doctor does not want to have moved what stays in main.
func TestStatusBySource(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "2001:db8:77::2/64")
	h.link("wan1", "2001:db8:78::2/64")
	h.ns.IP(t, "route add default from 2001:db8:77::/64 via fe80::1 dev wan0")
	h.ns.IP(t, "route add default from 2001:db8:78::/64 via fe80::1 dev wan1")
	h.serve()
	h.watch("--routes", "move")
	eventually(t, "status says where unbound traffic of IPv6 leaves", func() error {
		r := h.run(bin(t, clientBin), "status", "--json")
		var report struct {
			Unbound []struct{ Family, Ifname, Gateway string }
		}
		if err := json.Unmarshal([]byte(r.stdout), &report); err != nil {
			return err
		}
		for _, u := range report.Unbound {
			if u.Family == "inet6" && u.Ifname != "" && u.Gateway == "fe80::1" {
				return nil
			}
		}
		return fmt.Errorf("%s", r.stdout)
	})
	h.waitStatus("2001:db8:78::2", "ok", "")
	h.waitDiagnosis("")
}
