package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestExplainTexts: the texts for containers, VPNs, bound users, uplinks without a route, and two uplinks with one network.
func TestExplainTexts(t *testing.T) {
	h := twoUplinks(t)
	h.ns.Batch(t, "link add docker0 type veth peer name veth0", "link set docker0 up", "link set veth0 up", "address add 10.99.0.1/24 dev docker0")
	h.ns.Sysctl(t, "net/ipv4/ip_forward", "1")
	client := func(args string) func() {
		return func() {
			if r := h.run(bin(t, clientBin), strings.Fields(args)...); r.code != 0 {
				t.Errorf("%s: %+v", args, r)
			}
		}
	}
	ip := func(lines ...string) func() { return func() { h.ns.Batch(t, lines...) } }
	const head = "0 from all lookup local the table has nothing for it\n"
	for _, tt := range []struct {
		name  string
		setup func()
		args  string
		code  int
		want  string
	}{
		{"of a container", ip(), "9.9.9.9 --iif docker0 --from 10.99.0.2", 0, `
to 9.9.9.9 from 10.99.0.2 arriving by docker0
` + head + `32766 from all lookup main > default via 10.77.0.1 dev wan0 metric 100
leaves by wan0 with 10.99.0.2 through 10.77.0.1, MTU 1500 (link)
without main's default routes: no route: network is unreachable
replies: arrive on wan0, rp_filter 0: accepted
kernel agrees (socket: none: the packet is forwarded)
`},
		{"to a container", ip(), "10.99.0.2 --from 10.78.0.2", 0, `
to 10.99.0.2 from this host, source 10.78.0.2, mark 0x0, uid 0
` + head + `10000 from 10.78.0.2 lookup T1 proto 116 > (ours, wan1) 10.99.0.0/24 dev docker0 table T1 src 10.99.0.1
leaves by docker0 with 10.78.0.2, MTU 1500 (link)
replies: arrive on docker0, rp_filter 0: accepted
kernel agrees (socket: ok, source 10.78.0.2)
`},
		{"a VPN behind", ip("route add default via 10.77.0.1 dev wan0 table 52", "rule add pref 32765 lookup 52"), "9.9.9.9 --from 10.78.0.2", 0, `
to 9.9.9.9 from this host, source 10.78.0.2, mark 0x0, uid 0
` + head + `10000 from 10.78.0.2 lookup T1 proto 116 > (ours, wan1) default via 10.78.0.1 dev wan1 table T1 src 10.78.0.2 metric 200
leaves by wan1 with 10.78.0.2 through 10.78.0.1, MTU 1500 (link)
without rule 10000 (ours, wan1): wan0
replies: arrive on wan1, rp_filter 0: accepted
kernel agrees (socket: ok, source 10.78.0.2)
`},
		{"a user who is bound", client("bind wan1 --uid 4711"), "9.9.9.9 --uid 4711", 0, `
to 9.9.9.9 from this host, source none, mark 0x0, uid 4711
` + head + `9002 from all uidrange 4711-4711 lookup T1 proto 116 > (ours, wan1) default via 10.78.0.1 dev wan1 table T1 src 10.78.0.2 metric 200
source 10.78.0.2, then looked up again from it:
` + head + `9002 from all uidrange 4711-4711 lookup T1 proto 116 > (ours, wan1) default via 10.78.0.1 dev wan1 table T1 src 10.78.0.2 metric 200
leaves by wan1 with 10.78.0.2 through 10.78.0.1, MTU 1500 (link)
without rule 9002 (ours, wan1): no route: network is unreachable
replies: arrive on wan1, rp_filter 0: accepted
kernel agrees (socket: ok, source 10.78.0.2)
`},
		{"an uplink without a route", func() { client("unbind wan1 --uid 4711")(); ip("rule del pref 32765", "route del default dev wan1")() }, "9.9.9.9 --from 10.78.0.2", 0, `
to 9.9.9.9 from this host, source 10.78.0.2, mark 0x0, uid 0
` + head + `32766 from all lookup main > default via 10.77.0.1 dev wan0 metric 100
leaves by wan0 with 10.78.0.2 through 10.77.0.1, MTU 1500 (link)
warning: 10.78.0.2 is an address of wan1: unless NAT replaces it, the provider of wan0 may drop the packet, and replies arrive on wan1
replies: arrive on wan1, rp_filter 0: accepted
kernel agrees (socket: ok, source 10.78.0.2)
`},
		{"two uplinks with one network", ip("address add 10.77.0.77/24 dev wan1"), "10.77.0.9 --from 10.77.0.77", 0, `
to 10.77.0.9 from this host, source 10.77.0.77, mark 0x0, uid 0
` + head + `10000 from 10.77.0.77 lookup T2 proto 116 > (ours, wan1) 10.77.0.0/24 dev wan1 table T2 scope link src 10.77.0.77
leaves by wan1 with 10.77.0.77, MTU 1500 (link)
without rule 10000 (ours, wan1): wan0
replies: arrive on wan1, rp_filter 0: accepted
kernel agrees (socket: ok, source 10.77.0.77)
`},
		{"IPv6 looks again when it finds nothing", func() {
			ip("route del default via 2001:db8:77::1", "route del default via 2001:db8:78::1", "address del 2001:db8:77::2/64 dev wan0", "route add default via 2001:db8:78::1 dev wan1 table 200")()
			h.ns.IP(t, "-6 rule add pref 5000 from 2001:db8:78::2 lookup 200")
		}, "2600::9", 0, `
to 2600::9 from this host, source none, mark 0x0, uid 0
` + head + `32766 from all lookup main the table has nothing for it
(rules for other packets: 1, see --all)
source 2001:db8:78::2, then looked up again from it:
` + head + `5000 from 2001:db8:78::2 lookup 200 > (another program) default via 2001:db8:78::1 dev wan1 table 200 metric 1024 pref medium
leaves by wan1 with 2001:db8:78::2 through 2001:db8:78::1, MTU 1500 (link)
without rule 5000 (another program): no route: network is unreachable
kernel agrees (socket: ok, source 2001:db8:78::2)
`},
	} {
		tt.setup()
		eventually(t, "explain has its text: "+tt.name, func() error {
			r := h.run(bin(t, clientBin), append([]string{"explain"}, strings.Fields(tt.args)...)...)
			got := strings.Join(lines(r.stdout), "\n") + "\n"
			named := strings.NewReplacer("T1", h.tableOf("10.78.0.2"))
			if strings.Contains(tt.want, "T2") {
				named = strings.NewReplacer("T2", h.tableOf("10.77.0.77"))
			}
			if want := named.Replace(strings.TrimPrefix(tt.want, "\n")); r.code != tt.code || withoutOthers(got) != withoutOthers(want) {
				return fmt.Errorf("exit code %d\n%s%s", r.code, got, r.stderr)
			}
			return nil
		})
	}
}

// TestExplainMany: a thousand rules and a hundred tables are walked through as the kernel does.
func TestExplainMany(t *testing.T) {
	h := twoUplinks(t)
	var rules []string
	for i := range 1000 {
		rules = append(rules, fmt.Sprintf("rule add pref %d from 10.50.%d.1 lookup %d", 20100+i, i%250, 500+i%100))
	}
	for i := range 100 {
		rules = append(rules, fmt.Sprintf("route add 10.60.0.0/16 via 10.77.0.1 dev wan0 table %d", 500+i))
	}
	h.ns.Batch(t, rules...)
	began := time.Now()
	if got := h.explain(0, "9.9.9.9"); !strings.Contains(got, "leaves by wan0") || !strings.Contains(got, "kernel agrees") {
		t.Errorf("explain: %s", got)
	}
	t.Logf("explain took %v", time.Since(began))
	h.waitDiagnosis("", "rules-many")
}
