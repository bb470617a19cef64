package e2e

import (
	"strings"
	"testing"
)

// TestWrongPolicy: IPsec policies of other programs take the packets of an address, and drop them or lead them through a tunnel. The
// kernel's routes know nothing of that.
func TestWrongPolicy(t *testing.T) {
	h := twoUplinks(t)
	h.waitDiagnosis("")
	const four, six, tunnel = "10.78.0.2", "2001:db8:78::2", "tmpl src 10.77.0.2 dst 10.77.0.1 proto esp mode tunnel"
	if _, err := h.ns.Output("ip", "xfrm", "policy", "add", "src", four+"/32", "dst", "192.0.2.0/24", "dir", "out"); err != nil {
		t.Logf("left out, this kernel has no IPsec: %v", err)
		return
	}
	for _, tt := range []struct {
		name, policy, addr, to string
		state                  string // "": ok
		explain                string
		code                   int
	}{
		{"a tunnel by the other uplink", "src 10.78.0.2/32 dst 0.0.0.0/0 dir out tmpl src 10.77.0.2 dst 10.77.0.1 proto esp mode tunnel", four, "9.9.9.9",
			"shadowed by an IPsec policy: tunnel to 10.77.0.1 (leaves by wan0)", "takes the packet: the tunnel to 10.77.0.1 leaves by wan0", 0},
		{"IPv6", "src 2001:db8:78::/64 dst ::/0 dir out tmpl src 2001:db8:77::2 dst 2001:db8:77::1 proto esp mode tunnel", six, "2600::9",
			"shadowed by an IPsec policy: tunnel to 2001:db8:77::1 (leaves by wan0)", "the tunnel to 2001:db8:77::1 leaves by wan0", 0},
		{"IPv6 in IPv4, nowhere", "src 2001:db8:78::2/128 dst ::/0 dir out tmpl src 10.99.0.1 dst 10.99.0.2 proto esp mode tunnel", six, "2600::9",
			"shadowed by an IPsec policy: tunnel to 10.99.0.2 (blocked)", "the tunnel to 10.99.0.2 leaves by no link", 0},
		{"blocked", "src 10.78.0.2/32 dst 0.0.0.0/0 dir out action block", four, "9.9.9.9",
			"no route: the kernel refuses sockets", "dst 0.0.0.0/0 dir out priority 0\" blocks the packets", 1},
		{"a tunnel by its own link", "src 10.78.0.2/32 dst 0.0.0.0/0 dir out tmpl src 10.78.0.2 dst 10.78.0.1 proto esp mode tunnel", four, "9.9.9.9", "", "the tunnel to 10.78.0.1 leaves by wan1", 0},
		{"another address", "src 10.77.0.2/32 dst 0.0.0.0/0 dir out tmpl src 10.77.0.2 dst 10.77.0.1 proto esp mode tunnel", four, "9.9.9.9", "", "leaves by wan1 with 10.78.0.2", 0},
		{"what is forwarded to the address", "src 0.0.0.0/0 dst 10.78.0.2/32 dir fwd action block", four, "9.9.9.9", "", "leaves by wan1 with 10.78.0.2", 0},
		{"one port", "src 10.78.0.2/32 dst 0.0.0.0/0 proto tcp dport 443 dir out action block", four, "9.9.9.9", "", "leaves by wan1 with 10.78.0.2", 0},
		{"let through before", "src 10.78.0.2/32 dst 0.0.0.0/0 dir out priority 5; src 10.78.0.0/24 dst 0.0.0.0/0 dir out priority 9 " + tunnel, four, "9.9.9.9", "", "leaves by wan1 with 10.78.0.2", 0},
		{"let through earlier", "src 10.78.0.2/32 dst 0.0.0.0/0 dir out; src 10.78.0.0/24 dst 0.0.0.0/0 dir out " + tunnel, four, "9.9.9.9", "", "leaves by wan1 with 10.78.0.2", 0},
		{"let through too late", "src 10.78.0.0/24 dst 0.0.0.0/0 dir out action block; src 10.78.0.2/32 dst 0.0.0.0/0 dir out", four, "9.9.9.9",
			"no route: the kernel refuses sockets", "the IPsec policy \"src 10.78.0.0/24 dst 0.0.0.0/0 dir out priority 0\" blocks the packets", 1},
	} {
		for _, policy := range strings.Split(tt.policy, "; ") {
			h.ns.IP(t, "xfrm policy add "+policy)
		}
		r := h.run(bin(t, clientBin), "status")
		if code := map[bool]int{true: 0, false: 1}[tt.state == ""]; r.code != code || !strings.Contains(r.stdout, tt.state) {
			t.Errorf("%s: exit code %d, want %d and %q\n%s", tt.name, r.code, code, tt.state, r.stdout)
		}
		if got := h.explain(tt.code, tt.to, "--from", tt.addr); !strings.Contains(got, tt.explain) || strings.Contains(got, "DISAGREES") {
			t.Errorf("%s: no %q in\n%s", tt.name, tt.explain, got)
		}
		h.ns.IP(t, "xfrm policy flush")
		h.waitDiagnosis("")
	}
}

// TestPolicyExempt: a link, or the whole host, is exempt from IPsec policies.
func TestPolicyExempt(t *testing.T) {
	h := twoUplinks(t)
	h.waitDiagnosis("")
	if _, err := h.ns.Output("ip", "xfrm", "policy", "add", "src", "10.78.0.2/32", "dst", "0.0.0.0/0", "dir", "out",
		"tmpl", "src", "10.77.0.2", "dst", "10.77.0.1", "proto", "esp", "mode", "tunnel"); err != nil {
		t.Logf("left out, this kernel has no IPsec: %v", err)
		return
	}
	const tunnel = "shadowed by an IPsec policy: tunnel to 10.77.0.1 (leaves by wan0)"
	for _, tt := range []struct{ name, value, state string }{
		{"wan1", "0", tunnel},
		{"wan1", "1", ""},
		{"wan1", "0", tunnel},
		{"all", "1", ""},
		{"all", "0", tunnel},
		{"wan0", "1", tunnel},
	} {
		h.ns.Sysctl(t, "net/ipv4/conf/"+tt.name+"/disable_xfrm", tt.value)
		r := h.run(bin(t, clientBin), "status")
		if code := map[bool]int{true: 0, false: 1}[tt.state == ""]; r.code != code || !strings.Contains(r.stdout, tt.state) {
			t.Errorf("%s %s: exit code %d, want %d and %q\n%s", tt.name, tt.value, r.code, code, tt.state, r.stdout)
		}
		if got := h.explain(0, "9.9.9.9", "--from", "10.78.0.2"); strings.Contains(got, "takes the packet") != (tt.state != "") {
			t.Errorf("%s %s:\n%s", tt.name, tt.value, got)
		}
	}
}

// TestWrongTold: what other programs do to single destinations is no fault of an address, and what status says to do is a command.
func TestWrongTold(t *testing.T) {
	h := twoUplinks(t)
	h.waitDiagnosis("")
	const four, six = "10.78.0.2", "2001:db8:78::2"
	h.ns.Batch(t, "route add default via 10.77.0.1 dev wan0 table 200", "rule add priority 61 to 9.9.9.9 lookup 200", "rule add priority 62 to 150.1.2.3 unreachable")
	h.ns.IP(t, "-6 rule add priority 63 to 2600::9 prohibit")
	for _, addr := range []string{four, six} {
		h.waitStatus(addr, "ok", "")
	}
	if r := h.run(bin(t, clientBin), "status"); r.code != 0 {
		t.Errorf("rules for single destinations: %+v", r)
	}
	h.ns.Batch(t, "rule del priority 61", "rule del priority 62")
	h.ns.IP(t, "-6 rule del priority 63")
	table := h.tableOf(four)
	h.ns.Batch(t, "nexthop add id 1 via 10.77.0.1 dev wan0", "nexthop add id 2 via 10.78.0.1 dev wan1", "nexthop add id 9 group 1/2", "route add default nhid 9 table "+table)
	r := h.run(bin(t, clientBin), "status")
	cure := "ip route delete default nhid 9 table " + table
	if r.code != 1 || !strings.Contains(r.stdout, "do  "+cure+"\n") || !strings.Contains(r.stdout, "(over wan0 and wan1)") && !strings.Contains(r.stdout, "(over wan1 and wan0)") {
		t.Errorf("no %q in\n%s", cure, r.stdout)
	}
	h.ns.Run(t, "sh", "-c", cure)
	h.waitStatus(four, "ok", "")
	h.waitDiagnosis("")
	h.ns.IP(t, "route del local "+four+" dev wan1 table local") // what "ip route flush" may do
	cure = "ip route add local " + four + " dev wan1 table local"
	if r := h.run(bin(t, clientBin), "status"); r.code != 1 || !strings.Contains(r.stdout, "no route: the address is not in table local") || !strings.Contains(r.stdout, "do  "+cure+"\n") {
		t.Errorf("no %q in\n%s", cure, r.stdout)
	}
	h.ns.Run(t, "sh", "-c", cure)
	h.waitStatus(four, "ok", "")
}

// TestExplainServiceAddress: replies to an address of a link that is no uplink arrive where the packet leaves.
func TestExplainServiceAddress(t *testing.T) {
	h := twoUplinks(t, "-c", writeWatchFile(t, `, "lan0"`, ""))
	h.link("lan0", "198.51.100.7/32")
	h.ns.Sysctl(t, "net/ipv4/conf/all/rp_filter", "1")
	h.ns.IP(t, "route replace default via 10.77.0.1 dev wan0 metric 100 src 198.51.100.7")
	if got := h.explain(0, "9.9.9.9"); strings.Contains(got, "unless NAT") || !strings.Contains(got, "replies: arrive on wan0, rp_filter 1: accepted") {
		t.Errorf("an address of lan0:\n%s", got)
	}
}

// TestExplainForeignSource: a packet that leaves by one link with the address of another.
func TestExplainForeignSource(t *testing.T) {
	h := twoUplinks(t)
	const want = "10.78.0.2 is an address of wan1: unless NAT replaces it, the provider of wan0 may drop the packet, and replies arrive on wan1"
	if got := h.explain(0, "9.9.9.9", "--from", "10.78.0.2"); strings.Contains(got, "unless NAT") || !strings.Contains(got, "replies: arrive on wan1, rp_filter 0: accepted") {
		t.Errorf("by its own link:\n%s", got)
	}
	h.ns.Batch(t, "route add default via 10.77.0.1 dev wan0 table 200", "rule add priority 61 lookup 200")
	h.ns.Sysctl(t, "net/ipv4/conf/wan1/rp_filter", "1")
	if got := h.explain(0, "9.9.9.9", "--from", "10.78.0.2"); !strings.Contains(got, want) || !strings.Contains(got, "replies: arrive on wan1, rp_filter 1: dropped by rp_filter") {
		t.Errorf("by another link:\n%s", got)
	}
}
