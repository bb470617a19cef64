package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// wrongUplink is a way in which packets from an address leave by another link than its own, or not at all.
type wrongUplink struct {
	name          string
	watch         string // more keys of its profile
	addr, to      string
	provoke, cure func(h *host)
	status        string   // what status says of the address
	code          int      // of explain
	explain       string   // what explain says
	doctor        []string // the checks that find it
	history       string   // what happened
	do            string   // what status says to do about it; "": anything
}

// ip makes a step of lines of ip, separated by ;. T1 is the table of an address.
func ipStep(addr, lines string) func(h *host) {
	return func(h *host) {
		for line := range strings.SplitSeq(lines, ";") {
			h.ns.IP(h.t, strings.ReplaceAll(line, "T1", h.tableOf(addr)))
		}
	}
}

// wrongUplinks are the ways, for wan1 of twoUplinks.
func wrongUplinks() []wrongUplink {
	const four, six, far4, far6 = "10.78.0.2", "2001:db8:78::2", "9.9.9.9", "2600::9"
	carrier := func(to string) func(h *host) {
		return func(h *host) { h.isp.IP(h.t, "link set wan1 "+to) }
	}
	del4, add4 := ipStep(four, "route del default via 10.78.0.1"), ipStep(four, "route add default via 10.78.0.1 dev wan1 metric 200")
	del6, add6 := ipStep(six, "route del default via 2001:db8:78::1"), ipStep(six, "route add default via 2001:db8:78::1 dev wan1 metric 200")
	empty, before := []string{"table-empty"}, []string{"rule-before-ours"}
	return []wrongUplink{
		{"no route", "", four, far4, del4, add4, "no route (leaves by wan0)", 0, "leaves by wan0 with " + four, empty, "lost its default route, leaves by wan0 through 10.77.0.1", ""},
		{"no route, IPv6", "", six, far6, del6, add6, "no route (leaves by wan0)", 0, "leaves by wan0 with " + six, empty, "lost its default route, leaves by wan0 through 2001:db8:77::1", ""},
		{"blocked", `, "on_loss": "block"`, four, far4, del4, add4, "blocked: no route", 1, "no route: network is unreachable (rule 10001)", empty, "lost its default route, nothing leaves", ""},
		{"blocked, IPv6", `, "on_loss": "block"`, six, far6, del6, add6, "blocked: no route", 1, "no route: network is unreachable (rule 10001)", empty, "lost its default route, nothing leaves", ""},
		{"a rule of a VPN", "", four, far4, ipStep(four, "route add default via 10.77.0.1 dev wan0 table 52;rule add pref 5270 lookup 52"), ipStep(four, "rule del pref 5270"),
			"shadowed by rule 5270 (lookup 52) (leaves by wan0)", 0, "without rule 5270 (tailscale, probably): wan1", before, "another rule comes first and leads to table 52, leaves by wan0", ""},
		{"a rule of a VPN, IPv6", "", six, far6, ipStep(six, "-6 route add default via 2001:db8:77::1 dev wan0 table 52;-6 rule add pref 5270 lookup 52"), ipStep(six, "-6 rule del pref 5270"),
			"shadowed by rule 5270 (lookup 52) (leaves by wan0)", 0, "without rule 5270 (tailscale, probably): wan1", before, "another rule comes first and leads to table 52, leaves by wan0", ""},
		{"a rule that refuses", "", four, far4, ipStep(four, "rule add pref 0 from 10.78.0.0/24 prohibit"), ipStep(four, "rule del pref 0 from 10.78.0.0/24 prohibit"),
			"shadowed by rule 0 (prohibit) (blocked)", 1, "no route: permission denied (rule 0)", before, "another rule comes first, nothing leaves", ""},
		{"a route of another program in the table", `, "cgroup": true`, four, far4, ipStep(four, "route add default via 10.77.0.1 dev wan0 table T1"), ipStep(four, "route del default via 10.77.0.1 dev wan0 table T1"),
			"no route (leaves by wan0)", 0, "leaves by wan0 with " + four, []string{"table-empty", "table-shared"}, "another program has a default route in table T1, leaves by wan0", "ip route delete default via 10.77.0.1 dev wan0 table T1"},
		{"a route that answers with an error", "", four, far4, ipStep(four, "route add blackhole default table T1"), ipStep(four, "route del blackhole default table T1"),
			"no route (blocked)", 1, "no route: invalid argument (blackhole default table T1)", []string{"table-empty", "table-shared"}, "another program has \"blackhole default table T1\", nothing leaves", ""},
		{"a route that sends packets on", "", four, far4, ipStep(four, "route add throw default table T1"), ipStep(four, "route del throw default table T1"),
			"no route (leaves by wan0)", 0, "leaves by wan0 with " + four, []string{"table-empty", "table-shared"}, "another program has \"throw default table T1\", leaves by wan0", ""},
		{"a rule leads past ours", "", four, far4, ipStep(four, "rule add pref 5270 goto 32766"), ipStep(four, "rule del pref 5270"),
			"shadowed by rule 5270 (goto 32766) (leaves by wan0)", 0, "leaves by wan0 with " + four, before, "another rule comes first and leads to main, leaves by wan0", ""},
		{"a rule leads past nothing of ours", "", four, far4, ipStep(four, "route add default via 10.77.0.1 dev wan0 table 200;rule add pref 5000 goto 5270;rule add pref 5270 lookup 200"), ipStep(four, "rule del pref 5000;rule del pref 5270"),
			"shadowed by rule 5270 (lookup 200) (leaves by wan0)", 0, "without rule 5270 (another program): wan1", before, "another rule comes first and leads to table 200, leaves by wan0", ""},
		{"no carrier", "", four, far4, carrier("down"), carrier("up"), "no carrier", 0, "warning: wan1 has no carrier", []string{"carrier"}, "its link has no carrier, nothing leaves", ""},
	}
}

// TestWrongUplink: whoever looks is told what is wrong, since when, and what to do, by status, explain, doctor and history;
// after the cure nothing is wrong, and history says that, too.
func TestWrongUplink(t *testing.T) {
	for _, tt := range wrongUplinks() {
		t.Run(tt.name, func(t *testing.T) {
			h := twoUplinks(t, "-c", writeWatchFile(t, "", tt.watch))
			h.waitDiagnosis("")
			table := h.tableOf(tt.addr)
			began := time.Now().Unix()
			tt.provoke(h)
			h.waitTold(tt.addr, tt.status, began)
			shown := h.run(bin(t, clientBin), "status").stdout
			_, do, _ := strings.Cut(shown, "    do  ")
			if strings.Contains(shown, "dev #") || !strings.HasPrefix(do, strings.ReplaceAll(tt.do, "T1", table)) {
				t.Errorf("status names a link by its number, or does not say first to do %q:\n%s", tt.do, shown)
			}
			h.waitHistory("wan1", tt.addr+": "+strings.ReplaceAll(tt.history, "T1", table))
			h.waitDiagnosis("", tt.doctor...)
			if got := h.explain(tt.code, tt.to, "--from", tt.addr); !strings.Contains(got, strings.ReplaceAll(tt.explain, "T1", table)) {
				t.Errorf("explain does not say %q:\n%s", tt.explain, got)
			}
			tt.cure(h)
			h.waitStatus(tt.addr, "ok", "")
			h.waitDiagnosis("")
			h.waitHistory("wan1", strings.ReplaceAll(tt.history, "T1", table), tt.addr+": leaves by wan1", "again")
			if rows := h.sinceOf(tt.addr); rows != 0 {
				t.Errorf("wrong since %d, after the cure", rows)
			}
		})
	}
}

// TestShadowedPart: rules of other programs lead a part of the packets from an address elsewhere. status says which part, and
// what it says to do mends that.
func TestShadowedPart(t *testing.T) {
	h := twoUplinks(t)
	h.waitDiagnosis("")
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0 table 200")
	h.ns.IP(t, "-6 route add default via 2001:db8:77::1 dev wan0 table 200")
	const four, six = "10.78.0.2", "2001:db8:78::2"
	began := time.Now().Unix()
	for _, tt := range []struct {
		rule, state string
		note        bool // it is no fault
	}{
		{"from 10.78.0.0/24 ipproto tcp lookup 200", "(lookup 200): ipproto tcp (leaves by wan0)", false},
		{"from all dport 443 lookup 200", "(lookup 200): dport 443 (leaves by wan0)", false},
		{"from 10.78.0.2 ipproto icmp prohibit", "(prohibit): ipproto icmp (blocked)", true},
		{"from all oif wan1 prohibit", "(prohibit): oif wan1 (leaves by wan1 without the gateway)", false},
		{"from all tos 0x10 lookup 200", "(lookup 200): tos 0x10 (leaves by wan0)", false},
		{"from 10.78.0.2 uidrange 4000-4010 lookup 200", "(lookup 200): uidrange 4000-4010 (leaves by wan0)", true},
		{"not from all ipproto udp lookup 200", "(lookup 200): all but ipproto udp (leaves by wan0)", false},
		{"from 2001:db8:78::/64 ipproto tcp dport 25 goto 32766", "(goto 32766): ipproto tcp dport 25 (leaves by wan0)", false},
	} {
		ip, addr := "ip", four
		if strings.Contains(tt.rule, "2001:db8:") {
			ip, addr = "ip -6", six
		}
		h.ns.IP(t, strings.TrimPrefix(ip, "ip")+" rule add priority 5270 "+tt.rule)
		r := h.run(bin(t, clientBin), "status")
		_, below, found := strings.Cut(r.stdout, " partly shadowed by rule 5270 "+tt.state)
		if code := map[bool]int{true: 0, false: 1}[tt.note]; !found || r.code != code {
			t.Errorf("%s: exit code %d, want %d:\n%s", tt.rule, r.code, code, r.stdout)
		}
		if !tt.note {
			eventually(t, "status says since when: "+tt.rule, func() error {
				if since := h.sinceOf(addr); since < began || since > time.Now().Unix() {
					return fmt.Errorf("since %d, not after %d", since, began)
				}
				return nil
			})
			_, cure, _ := strings.Cut(below, "    do  ")
			cure, _, _ = strings.Cut(cure, "\n")
			h.ns.Run(t, "sh", "-c", cure)
			h.waitStatus(addr, "ok", "")
			h.ns.IP(t, strings.TrimPrefix(ip, "ip")+" rule del priority 10002")
			continue
		}
		h.waitDiagnosis("")
		h.ns.IP(t, strings.TrimPrefix(ip, "ip")+" rule del priority 5270")
	}
	h.waitDiagnosis("")
	// Rules that decide of no such packet are not named, and there is one that asks for the destinations of others.
	h.ns.Batch(t, "rule add priority 5270 dport 443 lookup 200", "rule add priority 5280 ipproto tcp dport 443 lookup 200", "rule add priority 40000 dport 25 lookup 200",
		"route add 9.9.9.9/32 via 10.77.0.1 dev wan0 table "+h.tableOf(four))
	r := h.run(bin(t, clientBin), "status")
	if n := strings.Count(r.stdout, "partly shadowed by rule 5270 "); n != 1 || strings.Count(r.stdout, "partly shadowed") != n {
		t.Errorf("want rule 5270 alone:\n%s", r.stdout)
	}
}

// TestWaitingDAD: an address that the kernel still looks for elsewhere is no fault.
func TestWaitingDAD(t *testing.T) {
	h := twoUplinks(t)
	h.waitDiagnosis("")
	h.ns.Sysctl(t, "net/ipv6/conf/wan1/accept_dad", "1")
	h.ns.Sysctl(t, "net/ipv6/conf/wan1/dad_transmits", "10000") // one a second: it waits until the end of the test
	h.ns.IP(t, "address add 2001:db8:79::2/64 dev wan1")
	h.waitStatus("2001:db8:79::2", "waiting-dad", "")
	if r := h.run(bin(t, clientBin), "status"); r.code != 0 || !strings.Contains(r.stdout, "waiting for duplicate address detection") {
		t.Errorf("%+v", r)
	}
	h.waitDiagnosis("")
	h.ns.IP(t, "address del 2001:db8:79::2/64 dev wan1")
	h.waitDiagnosis("")
}

// TestWrongUplinkExcluded: a configuration leaves a link out that main has a default route over, so that what its address
// sends leaves by another one.
func TestWrongUplinkExcluded(t *testing.T) {
	file := writeWatchFile(t, "", "")
	h := twoUplinks(t, "-c", file)
	began := time.Now().Unix()
	change := func(exclude string) {
		t.Helper()
		if err := os.Rename(writeWatchFile(t, exclude, ""), file); err != nil {
			t.Fatal(err)
		}
		for _, pid := range h.pids(clientBin) {
			if err := syscall.Kill(pid, syscall.SIGHUP); err != nil {
				t.Fatal(err)
			}
		}
	}
	change(`, "wan1"`)
	eventually(t, "status says that wan1 is excluded", func() error {
		r := h.run(bin(t, clientBin), "status", "-c", file)
		if r.code != 1 || !strings.Contains(r.stdout, "excluded, but main has a default route over it") || !strings.Contains(r.stdout, "since ") {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	h.waitHistory("wan1", "main has a default route over this link, and the configuration excludes it")
	if r := h.run(bin(t, clientBin), "doctor", "-c", file, "--only", "excluded"); r.code != 3 || !strings.Contains(r.stdout, "take the link out of exclude") {
		t.Errorf("doctor: %+v", r)
	}
	if got := h.explain(0, "9.9.9.9", "--from", "10.78.0.2"); !strings.Contains(got, "leaves by wan0") {
		t.Errorf("explain:\n%s", got)
	}
	change("")
	h.waitStatus("10.78.0.2", "ok", "")
	h.waitStatus("2001:db8:78::2", "ok", "")
	eventually(t, "doctor finds nothing after the cure", func() error {
		if r := h.run(bin(t, clientBin), "doctor", "-c", file); r.code != 0 {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	if h.sinceOf("10.78.0.2") != 0 || began == 0 {
		t.Error("wrong since a moment, after the cure")
	}
}

// writeWatchFile writes a configuration of a watch: more that it excludes, and more keys of its profile.
func writeWatchFile(t *testing.T, exclude, keys string) string {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "watch.json")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := fmt.Fprintf(f, `{"links": [{"ifname": "*"%s}], "exclude": ["lo"%s]}`, keys, exclude); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// sinceOf is when the fault of an address began, as status says it; 0: there is none.
func (h *host) sinceOf(addr string) int64 {
	h.t.Helper()
	r := h.run(bin(h.t, clientBin), "status", "--json")
	var report struct {
		Uplinks []struct {
			Address string
			Since   int64
		}
	}
	if err := json.Unmarshal([]byte(r.stdout), &report); err != nil {
		h.t.Fatalf("%v: %s", err, r.stdout)
	}
	at := slices.IndexFunc(report.Uplinks, func(u struct {
		Address string
		Since   int64
	}) bool {
		return u.Address == addr
	})
	if at < 0 {
		h.t.Fatalf("no %s in %s", addr, r.stdout)
	}
	return report.Uplinks[at].Since
}

// waitTold waits until status says this of an address, that it is so since a moment after began, and what to do.
func (h *host) waitTold(addr, text string, began int64) {
	h.t.Helper()
	eventually(h.t, "status says "+text, func() error {
		r := h.run(bin(h.t, clientBin), "status")
		_, below, found := strings.Cut(r.stdout, " "+text)
		line, below, _ := strings.Cut(below, "\n")
		if r.code != 1 || !found {
			return fmt.Errorf("exit code %d:\n%s", r.code, r.stdout)
		}
		for _, part := range []string{"    since ", "    why ", "    do  "} {
			if !strings.HasPrefix(below, part) {
				return fmt.Errorf("no %q behind %q:\n%s", part, line, r.stdout)
			}
			_, below, _ = strings.Cut(below, "\n")
		}
		if since := h.sinceOf(addr); since < began || since > time.Now().Unix() {
			return fmt.Errorf("since %d, which is not after %d", since, began)
		}
		return nil
	})
}
