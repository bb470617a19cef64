package route

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

func TestSyncRules(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name          string
		family        int
		addr, network string
		table         uint32
		golden        string
	}{
		{"inet", unix.AF_INET, "10.77.0.2", "10.77.0.2/24", 10000, `10000: from 10.77.0.2 lookup 10000 proto 116
20000: from all to 10.77.0.2/24 lookup 10000 proto 116
91000: from all iif lo lookup 10000 proto 116
`},
		{"inet highest table", unix.AF_INET, "192.0.2.5", "192.0.2.0/24", 4294967295, `10000: from 192.0.2.5 lookup 4294967295 proto 116
20000: from all to 192.0.2.0/24 lookup 4294967295 proto 116
91000: from all iif lo lookup 4294967295 proto 116
`},
		{"inet table of one byte", unix.AF_INET, "192.0.2.5", "192.0.2.0/24", 100, `10000: from 192.0.2.5 lookup 100 proto 116
20000: from all to 192.0.2.0/24 lookup 100 proto 116
91000: from all iif lo lookup 100 proto 116
`},
		{"inet6", unix.AF_INET6, "fd00::2", "fd00::2/64", 10001, `10000: from fd00::2 lookup 10001 proto 116
20000: from all to fd00::2/64 lookup 10001 proto 116
91000: from all iif lo lookup 10001 proto 116
`},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			n, c := dial(t)
			want := three(test.addr, test.network, test.table, Protocol)
			mustSync(t, c, test.family, ours, want, 3, 0)
			checkRules(t, n, test.family, test.golden)
			mustSync(t, c, test.family, ours, want, 0, 0)
			checkRules(t, n, test.family, test.golden)
			mustSync(t, c, test.family, ours, append(want, want...), 0, 0)

			moved := three(test.addr, test.network, 77, Protocol)
			mustSync(t, c, test.family, ours, moved, 3, 3)
			checkRules(t, n, test.family, strings.ReplaceAll(test.golden, fmt.Sprint("lookup ", test.table), "lookup 77"))
			mustSync(t, c, test.family, ours, nil, 0, 3)
			checkRules(t, n, test.family, "")
			mustSync(t, c, test.family, ours, nil, 0, 0)
		})
	}
}

// What String says is what `ip rule` says, and what is read back is what was written.
func TestRuleString(t *testing.T) {
	t.Parallel()
	n, c := dial(t)
	source := netip.MustParsePrefix("192.0.2.5/32")
	want := []Rule{
		{Priority: 0, Src: source, Table: 7, Protocol: Protocol},
		{Priority: 5, Src: source, Table: unix.RT_TABLE_MAIN, MinLength: 1, Protocol: Protocol},
		{Priority: 6, Src: source, Action: Unreachable, Protocol: Protocol},
		{Priority: 7, Src: source, Action: Prohibit, Protocol: Protocol},
		{Priority: 8, Flags: flagInvert, Src: source, Dst: netip.MustParsePrefix("10.0.0.0/8"), Action: Blackhole, Protocol: Protocol},
		{Priority: 9, Oif: "lo", Traffic: Traffic{Iif: "lo"}, Table: 1 << 31, Protocol: 200},
		{Priority: 10, Src: source, Oif: "lo", Table: 9, Traffic: Traffic{Iif: "lo", Mark: 0x2000000, Mask: 0xff000000, UIDs: UIDs{1, 1<<32 - 2, true},
			IPProto: unix.IPPROTO_TCP, Sports: Ports{1, 1}, Dports: Ports{80, 65534}}, Protocol: Protocol},
		{Priority: 11, Action: Unreachable, Traffic: Traffic{Mark: 7, Mask: 1<<32 - 1}},
		{Priority: 11, Action: Nop, Traffic: Traffic{Mask: 0xff}},
		{Priority: 11, Action: Nop, Traffic: Traffic{UIDs: UIDs{Set: true}}, Protocol: Protocol},
		{Priority: 11, Flags: flagInvert, Table: 9, Traffic: Traffic{IPProto: unix.IPPROTO_UDP, Dports: Ports{53, 53}}},
		{Priority: 9, Table: unix.RT_TABLE_DEFAULT},
		{Priority: 19999, Dst: netip.MustParsePrefix("10.0.0.0/24"), Table: unix.RT_TABLE_MAIN, MinLength: 24, Protocol: Protocol},
		{Priority: 1<<32 - 1, Table: 300, MinLength: 33, Protocol: Protocol},
	}
	for _, proto := range []uint8{unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6, unix.IPPROTO_SCTP, unix.IPPROTO_DCCP, unix.IPPROTO_UDPLITE, 200, 255} {
		want = append(want, Rule{Priority: 30000, Table: 9, Traffic: Traffic{IPProto: proto}})
	}
	mustSync(t, c, unix.AF_INET, func(r Rule) bool { return r.Protocol != unix.RTPROT_KERNEL }, want, len(want), 0)
	rules, err := c.Rules(unix.AF_INET)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range want {
		if !slices.Contains(rules, r) {
			t.Errorf("%q does not come back", r)
		}
	}
	var got strings.Builder
	for _, r := range rules {
		got.WriteString(r.String() + "\n")
	}
	if want := strings.ReplaceAll(n.IP(t, "rule"), "\t", " "); got.String() != want {
		t.Errorf("rules are\n%swant\n%s", got.String(), want)
	}
}

// inTheWay are variants that the kernel takes for an equal of the plain rule that is to be added.
var inTheWay = []string{
	"from 192.0.2.5 lookup 10000 pref 10000 tos 0x10 protocol 116",
	"from 192.0.2.5 lookup 10000 pref 10000 realms 3/4 protocol 116",
	"from 192.0.2.5 to 198.51.100.0/24 lookup 10000 pref 10000 protocol 116",
	"not from 192.0.2.5 lookup 10000 pref 10000 protocol 116",
}

// foreignRules are variants that differ from a rule of ours in one thing only.
var foreignRules = []string{
	"from 192.0.2.5 lookup 10000 pref 10000 suppress_prefixlength 0 protocol 116",
	"from 192.0.2.5 lookup 10000 pref 10000 suppress_prefixlength 8 protocol 116",
	"from 192.0.2.5 lookup 10000 pref 10000 suppress_ifgroup 5 protocol 116",
	"from 192.0.2.5 lookup 10000 pref 10000 fwmark 0x7 protocol 116",
	"from 192.0.2.5 lookup 10000 pref 10000 fwmark 0x7/0xff protocol 116",
	"from 192.0.2.5 lookup 10000 pref 10000 uidrange 0-0 protocol 116",
	"from 192.0.2.5 lookup 10000 pref 10000 ipproto tcp dport 80-90 protocol 116",
	"from 192.0.2.5 lookup 10000 pref 10000 ipproto udp sport 53 protocol 116",
	"from 192.0.2.5 lookup 10000 pref 10000 tun_id 9 protocol 116",
	"from 192.0.2.5 lookup 10000 pref 10000 iif eth9 protocol 116",
	"from 192.0.2.5 lookup 10000 pref 10000 oif eth9 protocol 116",
	"from 192.0.2.5 goto 20000 pref 10000 protocol 116",
	"from 192.0.2.5 unreachable pref 10000 protocol 116",
	"from 192.0.2.5 lookup 10001 pref 10000 protocol 116",
	"from 192.0.2.5 lookup 10000 pref 10001 protocol 116",
	"from 192.0.2.5 lookup 10000 pref 10000 protocol static",
	"from 192.0.2.0/24 lookup 10000 pref 10000 protocol 116",
	"not from 192.0.2.6 lookup 10000 pref 10000 protocol 116",
}

// Whatever stands before or behind ours is still there when ours has gone, and is the same.
func TestSyncRulesKeepsTwins(t *testing.T) {
	t.Parallel()
	our := three("192.0.2.5", "192.0.2.0/24", 10000, Protocol)[0]
	exactly := func(r Rule) bool { return r == our }
	for _, before := range []bool{true, false} {
		n, c := dial(t)
		if !before {
			mustSync(t, c, unix.AF_INET, exactly, []Rule{our}, 1, 0)
		}
		variants := foreignRules
		if !before {
			variants = append(slices.Clone(foreignRules), inTheWay[:3]...)
		}
		for _, r := range variants {
			n.IP(t, "rule add "+r)
		}
		foreign := ipRules(t, n, unix.AF_INET)
		if before {
			mustSync(t, c, unix.AF_INET, exactly, []Rule{our}, 1, 0)
		} else {
			foreign = strings.Replace(foreign, "10000: from 192.0.2.5 lookup 10000 proto 116\n", "", 1)
		}
		if got := strings.Count(ipRules(t, n, unix.AF_INET), "10000: from 192.0.2.5 lookup 10000 proto 116\n"); got != 1 {
			t.Fatalf("our rule is there %d times", got)
		}
		mustSync(t, c, unix.AF_INET, exactly, []Rule{our}, 0, 0)
		mustSync(t, c, unix.AF_INET, exactly, nil, 0, 1)
		// Rules that were in the way are put back behind the others of their priority.
		if got := ipRules(t, n, unix.AF_INET); sorted(got) != sorted(foreign) {
			t.Errorf("rules are\n%swant\n%s", got, foreign)
		}
		rules, err := c.Rules(unix.AF_INET)
		if err != nil {
			t.Fatal(err)
		}
		// Each of them can be deleted, too, and leaves the others alone.
		for _, r := range rules {
			if r.Priority == 10000 || r.Priority == 10001 {
				mustSync(t, c, unix.AF_INET, func(other Rule) bool { return other == r }, nil, 0, 1)
			}
		}
		checkRules(t, n, unix.AF_INET, "")
	}
}

// A delete of the C original's unmarked rules matches ours, too, whichever stand first.
func TestSyncRulesUnmarkedTwins(t *testing.T) {
	t.Parallel()
	marked := three("10.77.0.2", "10.77.0.2/24", 10000, Protocol)
	unmarked := three("10.77.0.2", "10.77.0.2/24", 10000, unix.RTPROT_UNSPEC)
	isMarked := func(r Rule) bool { return slices.Contains(marked, r) }
	isUnmarked := func(r Rule) bool { return slices.Contains(unmarked, r) }
	either := func(r Rule) bool { return isMarked(r) || isUnmarked(r) }
	for _, test := range []struct {
		name           string
		first, second  []Rule
		owned          func(Rule) bool
		want           []Rule
		added, deleted int
	}{
		{"ours first, unmarked go", marked, unmarked, isUnmarked, nil, 0, 3},
		{"unmarked first, unmarked go", unmarked, marked, isUnmarked, nil, 0, 3},
		{"ours first, ours go", marked, unmarked, isMarked, nil, 0, 3},
		{"unmarked first, ours go", unmarked, marked, isMarked, nil, 0, 3},
		{"both go", marked, unmarked, either, nil, 0, 6},
		{"ours replace unmarked", unmarked, nil, either, marked, 3, 3},
		{"ours stay", marked, unmarked, either, marked, 0, 3},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			n, c := dial(t)
			mustSync(t, c, unix.AF_INET, either, test.first, len(test.first), 0)
			mustSync(t, c, unix.AF_INET, either, append(slices.Clone(test.first), test.second...), len(test.second), 0)
			if test.name == "both go" && ipRules(t, n, unix.AF_INET) != `10000: from 10.77.0.2 lookup 10000 proto 116
10000: from 10.77.0.2 lookup 10000 proto unspec
20000: from all to 10.77.0.2/24 lookup 10000 proto 116
20000: from all to 10.77.0.2/24 lookup 10000 proto unspec
91000: from all iif lo lookup 10000 proto 116
91000: from all iif lo lookup 10000 proto unspec
` {
				t.Errorf("both are not there:\n%s", ipRules(t, n, unix.AF_INET))
			}
			wantLeft := test.want
			if test.want == nil {
				for _, r := range append(slices.Clone(test.first), test.second...) {
					if !test.owned(r) {
						wantLeft = append(wantLeft, r)
					}
				}
			}
			mustSync(t, c, unix.AF_INET, test.owned, test.want, test.added, test.deleted)
			rules, err := c.Rules(unix.AF_INET)
			if err != nil {
				t.Fatal(err)
			}
			rules = slices.DeleteFunc(rules, func(r Rule) bool { return r.Protocol == unix.RTPROT_KERNEL })
			if !slices.Equal(rules, wantLeft) {
				t.Errorf("rules are %q, want %q", rules, wantLeft)
			}
		})
	}
}

func TestSyncRulesErrors(t *testing.T) {
	t.Parallel()
	_, c := dial(t)
	good := three("192.0.2.5", "192.0.2.0/24", 10000, Protocol)[0]
	for _, test := range []struct {
		name   string
		change func(*Rule)
		want   string
	}{
		{"no table", func(r *Rule) { r.Table = 0 }, `add rule "10000: from 192.0.2.5 lookup 0 proto 116": a lookup needs a table, any other action has none`},
		{"other family", func(r *Rule) { r.Src = netip.MustParsePrefix("fd00::1/128") }, `add rule "10000: from fd00::1 lookup 10000 proto 116": fd00::1/128 is no selector of this family`},
		{"all as a prefix", func(r *Rule) { r.Dst = netip.MustParsePrefix("0.0.0.0/0") }, `add rule "10000: from 192.0.2.5 to 0.0.0.0/0 lookup 10000 proto 116": 0.0.0.0/0 is no selector of this family`},
		{"unknown attribute", func(r *Rule) { r.Other = "fwmark=07" }, `add rule "10000: from 192.0.2.5 lookup 10000 proto 116 [fwmark=07]": has attributes that we cannot write`},
		{"link name too long", func(r *Rule) { r.Iif = "abcdefghijklmnop" }, `add rule "10000: from 192.0.2.5 iif abcdefghijklmnop lookup 10000 proto 116": numerical result out of range: Error parsing msg`},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := good
			test.change(&r)
			_, _, err := c.SyncRules(unix.AF_INET, ours, []Rule{r})
			if err == nil || err.Error() != test.want {
				t.Errorf("error is %v\nwant %s", err, test.want)
			}
		})
	}
	if _, err := c.Rules(unix.AF_BRIDGE); !errors.Is(err, unix.EAFNOSUPPORT) {
		t.Errorf("rules of bridges: %v", err)
	}
}

// What the kernel says is there already, is not always there.
func TestSyncRulesVariantInTheWay(t *testing.T) {
	t.Parallel()
	our := three("192.0.2.5", "192.0.2.0/24", 10000, Protocol)[0]
	exactly := func(r Rule) bool { return r == our }
	for _, variant := range inTheWay {
		n, c := dial(t)
		n.IP(t, "rule add "+variant)
		if added, _, err := c.SyncRules(unix.AF_INET, exactly, []Rule{our}); !errors.Is(err, errUnsettled) || len(added) != 0 {
			t.Errorf("with %q in the way: added %q, error is %v", variant, added, err)
		}
		// If it is ours it goes, and then there is room.
		mustSync(t, c, unix.AF_INET, ours, []Rule{our}, 1, 1)
		checkRules(t, n, unix.AF_INET, "10000: from 192.0.2.5 lookup 10000 proto 116\n")
	}
}

// While others add and delete rules before it, a rule that stands is never missing from a dump.
func TestRulesDuringChanges(t *testing.T) {
	t.Parallel()
	n, c := dial(t)
	var standing []Rule
	for i := range 600 {
		standing = append(standing, Rule{Priority: uint32(10000 + i), Traffic: Traffic{Iif: "lo"}, Table: 10000, Protocol: Protocol})
	}
	mustSync(t, c, unix.AF_INET, ours, standing, len(standing), 0)
	other := dialIn(t, n)
	stop := make(chan struct{})
	var changes int
	var wg sync.WaitGroup
	wg.Go(func() {
		early := Rule{Priority: 5, Traffic: Traffic{Iif: "lo"}, Table: 99, Protocol: 200}.encode(unix.AF_INET)
		for ; ; changes++ {
			select {
			case <-stop:
				return
			default:
			}
			if err := errors.Join(other.change(unix.RTM_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, early),
				other.change(unix.RTM_DELRULE, 0, early)); err != nil {
				t.Errorf("change rules: %v", err)
			}
		}
	})
	defer func() {
		close(stop)
		wg.Wait()
		t.Logf("%d changes meanwhile", changes)
	}()
	for range 40 {
		rules, err := c.Rules(unix.AF_INET)
		if err != nil {
			t.Fatal(err)
		}
		rules = slices.DeleteFunc(rules, func(r Rule) bool { return !ours(r) })
		if !slices.Equal(rules, standing) {
			t.Fatalf("%d of %d rules seen", len(rules), len(standing))
		}
		mustSync(t, c, unix.AF_INET, ours, standing, 0, 0)
	}
}

func BenchmarkRules(b *testing.B) {
	for _, count := range []int{10, 600, 6000} {
		b.Run(fmt.Sprint(count), func(b *testing.B) {
			_, c := dial(b)
			var rules []Rule
			for i := range count - 3 {
				rules = append(rules, Rule{Priority: 10000, Src: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), 32), Table: uint32(10000 + i), Protocol: Protocol})
			}
			if _, _, err := c.SyncRules(unix.AF_INET, ours, rules); err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				if rules, err := c.Rules(unix.AF_INET); err != nil || len(rules) != count {
					b.Fatalf("%d rules, %v", len(rules), err)
				}
			}
		})
	}
}
