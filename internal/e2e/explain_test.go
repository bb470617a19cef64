package e2e

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// explain runs explain, and returns its lines with single spaces.
func (h *host) explain(code int, args ...string) string {
	h.t.Helper()
	r := h.run(bin(h.t, clientBin), append([]string{"explain"}, args...)...)
	if r.code != code {
		h.t.Errorf("explain %q: exit code %d, want %d\n%s%s", args, r.code, code, r.stdout, r.stderr)
	}
	return strings.Join(lines(r.stdout), "\n") + "\n"
}

// TestExplain: the texts for the usual situations.
func TestExplain(t *testing.T) {
	h := twoUplinks(t)
	table0, table1 := h.tableOf("10.77.0.2"), h.tableOf("10.78.0.2")
	named := strings.NewReplacer("T0", table0, "T1", table1)
	for _, tt := range []struct {
		name, setup, args string
		code              int
		want              string
	}{
		{"from an address", "", "9.9.9.9 --from 10.78.0.2", 0, `
to 9.9.9.9 from this host, source 10.78.0.2, mark 0x0, uid 0
0 from all lookup local the table has nothing for it
10000 from 10.77.0.2 lookup T0 proto 116 (ours, wan0) other source
10000 from 10.78.0.2 lookup T1 proto 116 > (ours, wan1) default via 10.78.0.1 dev wan1 table T1 src 10.78.0.2 metric 200
leaves by wan1 with 10.78.0.2 through 10.78.0.1, MTU 1500 (link)
without rule 10000 (ours, wan1): wan0
replies: arrive on wan1, rp_filter 0: accepted
kernel agrees (socket: ok, source 10.78.0.2)
`},
		{"unbound: IPv4 looks again with the source", "", "9.9.9.9", 0, `
to 9.9.9.9 from this host, source none, mark 0x0, uid 0
0 from all lookup local the table has nothing for it
10000 from 10.77.0.2 lookup T0 proto 116 (ours, wan0) no source yet
10000 from 10.78.0.2 lookup T1 proto 116 (ours, wan1) no source yet
19999 from all to 10.77.0.0/24 lookup main suppress_prefixlength 23 proto 116 (ours) other destination
19999 from all to 10.78.0.0/24 lookup main suppress_prefixlength 23 proto 116 (ours) other destination
20000 from all to 10.77.0.0/24 lookup T0 proto 116 (ours, wan0) other destination
20000 from all to 10.78.0.0/24 lookup T1 proto 116 (ours, wan1) other destination
32766 from all lookup main > default via 10.77.0.1 dev wan0 metric 100
source 10.77.0.2, then looked up again from it:
0 from all lookup local the table has nothing for it
10000 from 10.77.0.2 lookup T0 proto 116 > (ours, wan0) default via 10.77.0.1 dev wan0 table T0 src 10.77.0.2 metric 100
leaves by wan0 with 10.77.0.2 through 10.77.0.1, MTU 1500 (link)
replies: arrive on wan0, rp_filter 0: accepted
kernel agrees (socket: ok, source 10.77.0.2)
`},
		{"a rule before ours", "route add default via 10.77.0.1 dev wan0 table 52 mtu 1280;rule add pref 5270 lookup 52", "9.9.9.9 --from 10.78.0.2", 0, `
to 9.9.9.9 from this host, source 10.78.0.2, mark 0x0, uid 0
0 from all lookup local the table has nothing for it
5270 from all lookup 52 > (tailscale, probably) default via 10.77.0.1 dev wan0 table 52 mtu 1280
leaves by wan0 with 10.78.0.2 through 10.77.0.1, MTU 1280 (route)
warning: 10.78.0.2 is an address of wan1: unless NAT replaces it, the provider of wan0 may drop the packet, and replies arrive on wan1
without rule 5270 (tailscale, probably): wan1
replies: arrive on wan1, rp_filter 0: accepted
kernel agrees (socket: ok, source 10.78.0.2)
`},
		{"to this host", "rule del pref 5270", "10.78.0.2", 0, `
to 10.78.0.2 from this host, source none, mark 0x0, uid 0
0 from all lookup local > local 10.78.0.2 dev wan1 table local scope host src 10.78.0.2 (kernel)
delivered to this host
kernel agrees (socket: ok, source 10.78.0.2)
`},
		{"refused", "rule add pref 50 fwmark 7 prohibit", "9.9.9.9 --from 10.78.0.2 --mark 0x17/0xf", 1, `
to 9.9.9.9 from this host, source 10.78.0.2, mark 0x7, uid 0
0 from all lookup local the table has nothing for it
50 from all fwmark 0x7 prohibit > (another program)
no route: permission denied (rule 50)
without rule 50 (another program): wan1
kernel agrees (socket: connect a socket to 9.9.9.9: permission denied)
`},
		{"another family", "rule del pref 50", "2600::9 --from 2001:db8:78::2", 0, `
to 2600::9 from this host, source 2001:db8:78::2, mark 0x0, uid 0
0 from all lookup local the table has nothing for it
10000 from 2001:db8:77::2 lookup T0 proto 116 (ours, wan0) other source
10000 from 2001:db8:78::2 lookup T1 proto 116 > (ours, wan1) default via 2001:db8:78::1 dev wan1 table T1 src 2001:db8:78::2 metric 200 pref medium
leaves by wan1 with 2001:db8:78::2 through 2001:db8:78::1, MTU 1500 (link)
without rule 10000 (ours, wan1): wan0
kernel agrees (socket: ok, source 2001:db8:78::2)
`},
	} {
		for line := range strings.SplitSeq(tt.setup, ";") {
			if line != "" {
				h.ns.IP(t, line)
			}
		}
		got := h.explain(tt.code, strings.Fields(tt.args)...)
		if want := named.Replace(strings.TrimPrefix(tt.want, "\n")); withoutOthers(got) != withoutOthers(want) {
			t.Errorf("%s: got\n%s", tt.name, got)
		}
	}
	for _, tt := range []struct {
		args string
		code int
		want string
	}{
		{"9.9.9.9 --from 198.51.100.1 --iif wan1", 1, "does not forward what arrives by wan1"},
		{"2600::9 --from 2001:db8:99::1 --forwarded-from wan1", 1, "does not forward"},
		{"9.9.9.9 --oif wan1", 0, "leaves by wan1 with 10.78.0.2"},
		{"9.9.9.9 --oif lo", 0, "kernel agrees"},
		{"9.9.9.9 --uid 12345 --proto tcp --sport 7000 --dport 443", 0, "uid 12345, protocol 6"},
		{"9.9.9.9 --all", 0, "91000 from all iif lo"},
	} {
		if got := h.explain(tt.code, strings.Fields(tt.args)...); tt.args != "9.9.9.9 --all" && !strings.Contains(got, tt.want) {
			t.Errorf("%s: got\n%s", tt.args, got)
		}
	}
	for _, args := range []string{"", "9.9.9.9 10.0.0.1", "9.9.9.9 --oif wna0", "9.9.9.9 --iif wan0", "9.9.9.9 --from 2001:db8::1", "9.9.9.9 --mark x", "9.9.9.9 --pid 4194304"} {
		h.explain(2, strings.Fields(args)...)
	}
}

// withoutOthers leaves out the rules of ours that do not decide, which stand in the order in which addresses were served.
func withoutOthers(text string) string {
	return strings.Join(slices.DeleteFunc(lines(text), func(line string) bool {
		return strings.Contains(line, " proto 116 (ours")
	}), "\n")
}

// TestExplainReplies: what explain says about rp_filter is what happens to packets.
func TestExplainReplies(t *testing.T) {
	for _, tt := range []struct {
		name, filter, rule string
		accepted           bool
	}{
		{"none", "0", "", true},
		{"strict", "1", "", false},
		{"loose", "2", "", true},
		{"strict, and a rule from the address", "1", "rule add pref 10000 from 10.78.0.2 lookup 100", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			h.link("wan0", "10.77.0.2/24")
			h.link("wan1", "10.78.0.2/24")
			h.ns.Batch(t, "route add default via 10.77.0.1 dev wan0", "route add default via 10.78.0.1 dev wan1 table 100")
			h.ns.Sysctl(t, "net/ipv4/conf/all/rp_filter", "0")
			h.ns.Sysctl(t, "net/ipv4/conf/wan1/rp_filter", tt.filter)
			if tt.rule != "" {
				h.ns.IP(t, tt.rule)
			}
			h.isp.Batch(t, "address add 10.77.0.1/24 dev wan0", "address add 10.78.0.1/24 dev wan1", "address add 9.9.9.9/32 dev lo")
			h.isp.Sysctl(t, "net/ipv4/conf/all/rp_filter", "0")
			h.isp.Sysctl(t, "net/ipv4/conf/wan0/rp_filter", "0")
			// From a host behind wan1 to the address of wan1.
			_, err := h.isp.Output("ping", "-c1", "-W3", "-I", "9.9.9.9", "10.78.0.2")
			if answered := err == nil; answered != tt.accepted {
				t.Fatalf("the packet was answered: %v, want %v", answered, tt.accepted)
			}
			got := h.explain(0, "9.9.9.9", "--oif", "wan1", "--from", "10.78.0.2", "--json")
			var e struct{ Reverse struct{ Verdict string } }
			if err := json.Unmarshal([]byte(got), &e); err != nil {
				t.Fatal(err)
			}
			if says := e.Reverse.Verdict == "accepted"; says != tt.accepted {
				t.Errorf("explain says %q, want accepted %v", e.Reverse.Verdict, tt.accepted)
			}
		})
	}
}

// TestExplainWhileRulesChange: no false alarm.
func TestExplainWhileRulesChange(t *testing.T) {
	h := twoUplinks(t)
	p := h.start(h.sh("while :; do ip rule add pref 100 lookup 200; ip rule del pref 100; done"))
	for range 20 {
		r := h.run(bin(t, clientBin), "explain", "9.9.9.9")
		if r.code != 0 {
			t.Errorf("exit code %d:\n%s%s", r.code, r.stdout, r.stderr)
		}
	}
	p.kill()
}

// TestExplainManyRoutes: where a table has more routes than anybody would read, only the kernel is asked, and explain says so.
func TestExplainManyRoutes(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	lines := []string{"route add default via 10.77.0.1 dev wan0", "rule add priority 100 lookup 300"}
	for n := range 100001 {
		lines = append(lines, fmt.Sprintf("route add 11.%d.%d.%d dev wan0 table 300", n>>16, n>>8&255, n&255))
	}
	h.ns.Batch(t, lines...)
	for to, want := range map[string]string{"9.9.9.9": "leaves by wan0 with 10.77.0.2 through 10.77.0.1,", "11.0.1.2": "leaves by wan0 with 10.77.0.2,"} {
		if got := h.explain(0, to); !strings.Contains(got, want) || !strings.Contains(got, "a table has more than 100000 routes: only the kernel is asked") {
			t.Errorf("%s: no %q in\n%s", to, want, got)
		}
	}
}

// TestExplainSchema: every key is always there.
func TestExplainSchema(t *testing.T) {
	h := twoUplinks(t)
	r := h.run(bin(t, clientBin), "explain", "9.9.9.9", "--from", "10.78.0.2", "--json")
	var e map[string]json.RawMessage
	if err := json.Unmarshal([]byte(r.stdout), &e); err != nil {
		t.Fatal(err)
	}
	keys := func(text json.RawMessage) string {
		var object map[string]json.RawMessage
		var list []map[string]json.RawMessage
		if json.Unmarshal(text, &object) != nil {
			if err := json.Unmarshal(text, &list); err != nil || len(list) == 0 {
				t.Fatalf("%v: %s", err, text)
			}
			object = list[0]
		}
		var names []string
		for name := range object {
			names = append(names, name)
		}
		slices.Sort(names)
		return strings.Join(names, " ")
	}
	for name, want := range map[string]string{
		"question": "dport from iif mark oif proto sport to tos uid",
		"steps":    "decides owner place priority route rule table why",
		"result":   "error gateway link mtu mtu_from source",
		"without":  "error link what",
		"reverse":  "link rp_filter verdict",
		"kernel":   "agrees getroute socket",
	} {
		if got := keys(e[name]); got != want {
			t.Errorf("%s: got %s, want %s", name, got, want)
		}
	}
	if got := keys([]byte(r.stdout)); got != "kernel question result reverse second steps warnings without" {
		t.Errorf("got %s", got)
	}
}

// TestExplainNotAsked: what the kernel cannot be asked for is no disagreement, and what nobody can ask is wrong usage.
func TestExplainNotAsked(t *testing.T) {
	h := twoUplinks(t)
	h.waitLinkLocal("wan1")
	for _, tt := range []struct {
		args string
		code int
		want string
	}{
		{"9.9.9.9 --from 9.9.9.10", 1, "no route: 9.9.9.10 is no address of this host"},
		{"2600::9 --from 2600::10", 1, "no route: 2600::10 is no address of this host"},
		{"9.9.9.9 --proto sctp", 0, "leaves by wan0 with 10.77.0.2 through 10.77.0.1"},
		{"2600::9 --proto icmp", 0, "the kernel cannot be asked for protocol 1"},
		{"9.9.9.9 --from 10.78.0.2 --proto sctp", 0, "leaves by wan1 with 10.78.0.2 through 10.78.0.1"},
		{"2600::9 --from 2001:db8:78::2 --proto 47", 0, "leaves by wan1 with 2001:db8:78::2"},
		{"9.9.9.9 --from 127.0.0.5", 1, "no route: a packet from 127.0.0.5 does not leave this host"},
		{"10.77.0.255", 0, "leaves by wan0 with 10.77.0.2"},
		{"255.255.255.255", 0, "leaves by wan0"},
		{"224.0.0.251", 0, "leaves by wan0"},
		{"224.0.0.251 --oif wan1", 0, "leaves by wan1 with 10.78.0.2"},
		{"ff02::1 --oif wan1", 0, "leaves by wan1 with fe80::"},
		{"fe80::9%wan1", 0, "leaves by wan1 with fe80::"},
	} {
		if got := h.explain(tt.code, strings.Fields(tt.args)...); !strings.Contains(got, tt.want) || strings.Contains(got, "DISAGREES") {
			t.Errorf("explain %s: no %q in\n%s", tt.args, tt.want, got)
		}
	}
	if got := h.explain(1, "224.0.0.251", "--iif", "wan1", "--from", "10.78.0.9"); strings.Contains(got, "a socket may choose") {
		t.Errorf("of a packet that arrives:\n%s", got)
	}
	h.ns.Sysctl(t, "net/ipv4/ip_nonlocal_bind", "1")
	if got := h.explain(0, "9.9.9.9", "--from", "9.9.9.10"); !strings.Contains(got, "leaves by wan0 with 9.9.9.10") {
		t.Errorf("a socket may have any source:\n%s", got)
	}
	for args, want := range map[string]string{
		"explain 9.9.9.9 --sport 70000":   "--sport 70000: want a port from 0 to 65535",
		"explain 9.9.9.9 --pid 4194999":   "process 4194999: no such process",
		"explain 0.0.0.0":                 "0.0.0.0 is no destination",
		"explain fe80::9":                 "fe80::9 is on every link: name one",
		"explain fe80::9%wan1 --oif wan0": "fe80::9%wan1 is on the link wan1",
		"bound ::ffff:10.77.0.2":          "link ::ffff:10.77.0.2: this is an address: give the name of its link",
		"attach fe80::1 1":                "link fe80::1: this is an address: give the name of its link",
		"bind -i :: --uid 0":              "--ifname ::: this is an address: give the name of its link",
		"history ::ffff:10.0.0.9":         "10.0.0.9: no link, no address, no lease and no event has this name",
		"history wna1":                    "wna1: no link, no address, no lease and no event has this name",
		"history --json wna1":             "wna1: no link, no address, no lease and no event has this name",
	} {
		if r := h.run(bin(t, clientBin), strings.Fields(args)...); r.code != 2 || !strings.Contains(r.stderr, want) {
			t.Errorf("%s: %+v, want 2 and %q", args, r, want)
		}
	}
	for _, args := range []string{"history 127.0.0.1", "history ::ffff:127.0.0.1", "history --json 127.0.0.1", "history wan1", "explain fe80::9%1 --oif lo --json"} {
		if r := h.run(bin(t, clientBin), strings.Fields(args)...); r.code == 2 {
			t.Errorf("%s: %+v", args, r)
		}
	}
}
