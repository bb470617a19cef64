package route

import (
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// guards are rules as a binding has them, with and without an IPv6 twin.
func guards(table uint32) []Rule {
	mark := Traffic{Mark: 0x2000000, Mask: 0xff000000}
	user := Traffic{UIDs: UIDs{1000, 1000, true}}
	https := Traffic{IPProto: unix.IPPROTO_TCP, Dports: Ports{443, 443}}
	dns := Traffic{IPProto: unix.IPPROTO_UDP, Sports: Ports{1024, 2000}, Dports: Ports{53, 53}, UIDs: UIDs{0, 99, true}}
	var rules []Rule
	for _, t := range []Traffic{mark, user, https, dns} {
		rules = append(rules, Rule{Priority: 9002, Traffic: t, Table: table, Protocol: Protocol})
	}
	for _, t := range []Traffic{mark, user, https, dns} {
		rules = append(rules, Rule{Priority: 9003, Traffic: t, Action: Unreachable, Protocol: Protocol},
			Rule{Priority: 15003, Traffic: t, Action: Nop, Protocol: Protocol})
	}
	return rules
}

// TestSyncRulesTraffic: rules that differ in what traffic they select, or in nothing else
// than the table or the action, come and go one by one, in both families.
func TestSyncRulesTraffic(t *testing.T) {
	t.Parallel()
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		n, c := dial(t)
		all := guards(10000)
		mustSync(t, c, family, ours, all, len(all), 0)
		mustSync(t, c, family, ours, all, 0, 0)
		checkRules(t, n, family, `9002: from all fwmark 0x2000000/0xff000000 lookup 10000 proto 116
9002: from all uidrange 1000-1000 lookup 10000 proto 116
9002: from all ipproto tcp dport 443 lookup 10000 proto 116
9002: from all uidrange 0-99 ipproto udp sport 1024-2000 dport 53 lookup 10000 proto 116
9003: from all fwmark 0x2000000/0xff000000 unreachable proto 116
9003: from all uidrange 1000-1000 unreachable proto 116
9003: from all ipproto tcp dport 443 unreachable proto 116
9003: from all uidrange 0-99 ipproto udp sport 1024-2000 dport 53 unreachable proto 116
15003: from all fwmark 0x2000000/0xff000000 nop proto 116
15003: from all uidrange 1000-1000 nop proto 116
15003: from all ipproto tcp dport 443 nop proto 116
15003: from all uidrange 0-99 ipproto udp sport 1024-2000 dport 53 nop proto 116
`)
		moved := guards(10001)
		mustSync(t, c, family, ours, moved, 4, 4)
		// From the most general to the most special, and the other way round.
		backward := slices.Clone(moved)
		slices.Reverse(backward)
		for _, order := range [][]Rule{moved, backward} {
			mustSync(t, c, family, ours, moved, len(moved)-len(mustOurs(t, c, family)), 0)
			for i, r := range order {
				mustSync(t, c, family, func(other Rule) bool { return other == r }, nil, 0, 1)
				if got := len(mustOurs(t, c, family)); got != len(order)-i-1 {
					t.Fatalf("%d rules are left, want %d", got, len(order)-i-1)
				}
			}
		}
	}
}

func mustOurs(t *testing.T, c *Conn, family int) []Rule {
	t.Helper()
	rules, err := c.RulesWhere(family, func(r *Rule) bool { return ours(*r) })
	if err != nil {
		t.Fatal(err)
	}
	return rules
}

func TestTrafficCheck(t *testing.T) {
	t.Parallel()
	_, c := dial(t)
	for _, tt := range []struct {
		name    string
		traffic Traffic
		want    string
	}{
		{"mark outside", Traffic{Mark: 0x3, Mask: 0x1}, "fwmark 0x3 has bits outside of its mask 0x1"},
		{"mark without a mask", Traffic{Mark: 0x3}, "fwmark 0x3 has bits outside of its mask 0"},
		{"users in the wrong order", Traffic{UIDs: UIDs{2, 1, true}}, "uidrange 2-1 is no range of users"},
		{"nobody", Traffic{UIDs: UIDs{0, 1<<32 - 1, true}}, "uidrange 0-4294967295 is no range of users"},
		{"users not set", Traffic{UIDs: UIDs{1, 1, false}}, "uidrange has ends and is not set"},
		{"port 0", Traffic{Dports: Ports{0, 5}}, "ports 0-5: want a range within 1 to 65534"},
		{"ports in the wrong order", Traffic{Sports: Ports{5, 4}}, "ports 5-4: want a range within 1 to 65534"},
		{"the last port", Traffic{Dports: Ports{5, 65535}}, "ports 5-65535: want a range within 1 to 65534"},
	} {
		r := Rule{Priority: 9000, Table: 10000, Protocol: Protocol, Traffic: tt.traffic}
		_, _, err := c.SyncRules(unix.AF_INET, ours, []Rule{r})
		if want := `add rule "` + r.String() + `": ` + tt.want; err == nil || err.Error() != want {
			t.Errorf("%s: got error %v, want %s", tt.name, err, want)
		}
	}
}

func TestOverlapping(t *testing.T) {
	t.Parallel()
	n, c := dial(t)
	for _, r := range []string{
		"pref 100 fwmark 0x80000/0xff0000 lookup 52", // Tailscale: beside ours
		"pref 101 fwmark 0x1e7700ce lookup 7",        // AppMesh
		"pref 102 fwmark 0x6d6f6c65 lookup 8",        // Mullvad
		"pref 103 fwmark 0/0xff000000 lookup 9",      // what we have not marked
		"pref 104 not fwmark 0xca6c lookup 51820",    // wg-quick
		"pref 105 not fwmark 0x2000000/0xff000000 lookup 9",
		"pref 106 lookup 10",
		"pref 107 fwmark 0x2000000/0xff000000 lookup 11 protocol 116",
		"pref 108 fwmark 0x200/0xf00 lookup 11", // Cilium
	} {
		n.IP(t, "rule add "+r)
	}
	rules, err := c.Rules(unix.AF_INET)
	if err != nil {
		t.Fatal(err)
	}
	var got []uint32
	for _, r := range Overlapping(rules, 0xff000000) {
		got = append(got, r.Priority)
	}
	if want := []uint32{101, 102, 103, 105}; !slices.Equal(got, want) {
		t.Errorf("got the rules of priority %d, want %d", got, want)
	}
}

// FuzzRule: whatever a message holds, what can be wanted is written as it is read.
func FuzzRule(f *testing.F) {
	for _, r := range append(guards(1<<32-1), three("10.0.0.1", "10.0.0.1/24", 10000, Protocol)...) {
		f.Add(r.encode(unix.AF_INET))
	}
	f.Add(Rule{Priority: 9, Traffic: Traffic{Iif: "lo"}, Oif: "lo", Src: netip.MustParsePrefix("fd00::1/128"), Table: 7, MinLength: 1}.encode(unix.AF_INET6))
	f.Add(appendUint32(appendUint32(guards(7)[0].encode(unix.AF_INET), unix.FRA_FWMASK, 0), fraDportMask, 0xff))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRule(b)
		if err != nil {
			return
		}
		_ = r.String() // must not panic
		family := int(b[0])
		if family != unix.AF_INET && family != unix.AF_INET6 || r.check(family) != nil {
			return
		}
		again, err := parseRule(r.encode(family))
		if err != nil || again != r {
			t.Errorf("%q comes back as %q, %v", r, again, err)
		}
		if !r.hits(again) {
			t.Errorf("a request to delete %q does not", r)
		}
	})
}

// TestHasSocket: a rule that selects by the mark, the owner or the ports selects the sockets that have these.
func TestHasSocket(t *testing.T) {
	s := Socket{Protocol: unix.IPPROTO_TCP, Local: netip.MustParseAddrPort("192.0.2.5:1000"), Remote: netip.MustParseAddrPort("203.0.113.9:443"), Mark: 0x02000001, UID: 1000}
	for text, tt := range map[string]struct {
		traffic Traffic
		has     bool
	}{
		"the mark":       {Traffic{Mark: 0x02000000, Mask: 0xff000000}, true},
		"another mark":   {Traffic{Mark: 0x03000000, Mask: 0xff000000}, false},
		"the owner":      {Traffic{UIDs: UIDs{1000, 1001, true}}, true},
		"another owner":  {Traffic{UIDs: UIDs{0, 999, true}}, false},
		"the protocol":   {Traffic{IPProto: unix.IPPROTO_TCP}, true},
		"another":        {Traffic{IPProto: unix.IPPROTO_UDP}, false},
		"the port":       {Traffic{IPProto: unix.IPPROTO_TCP, Dports: Ports{443, 443}}, true},
		"another port":   {Traffic{IPProto: unix.IPPROTO_TCP, Dports: Ports{80, 80}}, false},
		"the own port":   {Traffic{IPProto: unix.IPPROTO_TCP, Sports: Ports{1, 1000}}, true},
		"two, one of it": {Traffic{UIDs: UIDs{1000, 1000, true}, Dports: Ports{80, 80}}, false},
	} {
		if !tt.traffic.SelectsSockets() || tt.traffic.HasSocket(s) != tt.has {
			t.Errorf("%s: %v, want %v", text, !tt.has, tt.has)
		}
	}
	if (Traffic{Iif: "lo"}).SelectsSockets() {
		t.Error("a rule for all that this host sends selects sockets")
	}
}
