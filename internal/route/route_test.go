package route

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// In a sandbox ip prints the same on every machine.
func TestMain(m *testing.M) { nettest.Main(m) }

// dial returns a namespace of its own for the test and a Conn into it.
func dial(t testing.TB) (*nettest.Namespace, *Conn) {
	t.Helper()
	n := nettest.New(t, "host")
	return n, dialIn(t, n)
}

func dialIn(t testing.TB, n *nettest.Namespace) *Conn {
	t.Helper()
	var c *Conn
	var err error
	n.Do(func() { c, err = Dial() })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// ipRules returns what `ip -d rule` shows, without the kernel's own three (two in IPv6).
func ipRules(t *testing.T, n *nettest.Namespace, family int) string {
	t.Helper()
	version := "-4"
	if family == unix.AF_INET6 {
		version = "-6"
	}
	var b strings.Builder
	for line := range strings.Lines(n.IP(t, version+" -d rule")) {
		if !strings.Contains(line, "proto kernel") {
			b.WriteString(strings.Replace(line, "\t", " ", 1))
		}
	}
	return b.String()
}

func checkRules(t *testing.T, n *nettest.Namespace, family int, want string) {
	t.Helper()
	if got := ipRules(t, n, family); got != want {
		t.Errorf("rules are\n%swant\n%s", got, want)
	}
}

func ours(r Rule) bool { return r.Protocol == Protocol }

// three returns the client's rules for an address and its network.
func three(addr, network string, table uint32, protocol uint8) []Rule {
	a := netip.MustParseAddr(addr)
	return []Rule{
		{Priority: 10000, Src: netip.PrefixFrom(a, a.BitLen()), Table: table, Protocol: protocol},
		{Priority: 20000, Dst: netip.MustParsePrefix(network), Table: table, Protocol: protocol},
		{Priority: 91000, Traffic: Traffic{Iif: "lo"}, Table: table, Protocol: protocol},
	}
}

func mustSync(t *testing.T, c *Conn, family int, owned func(Rule) bool, want []Rule, wantAdded, wantDeleted int) {
	t.Helper()
	added, deleted, err := c.SyncRules(family, owned, want)
	if err != nil || len(added) != wantAdded || len(deleted) != wantDeleted {
		t.Fatalf("SyncRules added %q, deleted %q, %v; want %d and %d", added, deleted, err, wantAdded, wantDeleted)
	}
}

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

func sorted(lines string) string {
	return strings.Join(slices.Sorted(strings.Lines(lines)), "")
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

// withoutCapabilities runs f on this thread, which has to be locked, as a user who has none.
func withoutCapabilities(t *testing.T, f func()) {
	t.Helper()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var all [2]unix.CapUserData
	if err := unix.Capget(&header, &all[0]); err != nil {
		t.Fatal(err)
	}
	none := all
	none[0].Effective, none[1].Effective = 0, 0
	if err := unix.Capset(&header, &none[0]); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Capset(&header, &all[0]); err != nil {
			t.Error(err)
		}
	}()
	f()
}

func TestUnprivileged(t *testing.T) {
	t.Parallel()
	n, root := dial(t)
	want := three("192.0.2.5", "192.0.2.0/24", 10000, Protocol)
	mustSync(t, root, unix.AF_INET, ours, want[:1], 1, 0)
	n.Do(func() {
		withoutCapabilities(t, func() {
			c, err := Dial()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if rules, err := c.Rules(unix.AF_INET); err != nil || !slices.Contains(rules, want[0]) {
				t.Errorf("Rules: %q, %v", rules, err)
			}
			if links, err := c.Links(); err != nil || len(links) == 0 {
				t.Errorf("Links: %v, %v", links, err)
			}
			if _, err := c.Addresses(unix.AF_UNSPEC); err != nil {
				t.Errorf("Addresses: %v", err)
			}
			if routes, err := c.Routes(unix.AF_INET, 0); err != nil || len(routes) == 0 {
				t.Errorf("Routes: %v, %v", routes, err)
			}
			refused := NewRoute(10000, netip.MustParsePrefix("192.0.2.0/24"), netip.Addr{}, 1)
			if _, _, err := c.SyncRoutes(unix.AF_INET, 10000, []Route{refused}); !errors.Is(err, unix.EPERM) {
				t.Errorf("SyncRoutes: %v", err)
			}
			mustSync(t, c, unix.AF_INET, ours, want[:1], 0, 0)
			_, _, err = c.SyncRules(unix.AF_INET, ours, want)
			if got := `add rule "20000: from all to 192.0.2.0/24 lookup 10000 proto 116": operation not permitted`; !errors.Is(err, unix.EPERM) || err.Error() != got {
				t.Errorf("SyncRules that adds: %v", err)
			}
			_, _, err = c.SyncRules(unix.AF_INET, ours, nil)
			if got := `delete rule "10000: from 192.0.2.5 lookup 10000 proto 116": operation not permitted`; !errors.Is(err, unix.EPERM) || err.Error() != got {
				t.Errorf("SyncRules that deletes: %v", err)
			}
			w, err := Watch(Links | Addresses4 | Rules4)
			if err != nil {
				t.Fatalf("Watch: %v", err)
			}
			w.Close()
		})
	})
	checkRules(t, n, unix.AF_INET, "10000: from 192.0.2.5 lookup 10000 proto 116\n")
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

var expires = regexp.MustCompile(` expires \d+sec`)

func TestFlushTable(t *testing.T) {
	t.Parallel()
	n, c := dial(t)
	peer := nettest.New(t, "peer")
	nettest.Veth(t, n, "eth0", peer, "eth0")
	n.IP(t, "addr add 192.0.2.5/24 dev eth0")
	n.IP(t, "addr add fd00::5/64 dev eth0 nodad")
	for _, family := range []struct {
		number  int
		version string
		routes  []string
	}{
		{unix.AF_INET, "-4", []string{
			"192.0.2.0/24 dev eth0 scope link src 192.0.2.5", "default via 192.0.2.1 metric 5 mtu 1400 advmss 1300", "default via 192.0.2.1 metric 6",
			"198.51.100.0/24 nexthop via 192.0.2.1 weight 2 nexthop via 192.0.2.2", "unreachable default metric 4294967295", "203.0.113.0/24 via 198.18.0.1 dev eth0 onlink",
			"10.0.0.0/8 via 192.0.2.1 tos 0x10", "10.1.0.0/16 encap ip id 5 dst 192.0.2.9 dev eth0",
		}},
		{unix.AF_INET6, "-6", []string{
			"fd00::/64 dev eth0", "default via fd00::1 metric 5 mtu 1400 pref high", "default via fd00::2 metric 6",
			"fd01::/64 nexthop via fd00::1 nexthop via fd00::2 weight 3", "unreachable default metric 4294967295", "fd02::/64 dev eth0 src fd00::5 expires 1000",
		}},
	} {
		for _, table := range []uint32{100, 10000, 4294967295, unix.RT_TABLE_MAIN} {
			for i, r := range family.routes {
				if i == 0 && table == unix.RT_TABLE_MAIN {
					continue // the kernel has put it there
				}
				n.IP(t, fmt.Sprintf("%s route add table %d proto %d %s", family.version, table, Protocol, r))
			}
			n.IP(t, fmt.Sprintf("%s route add unreachable default metric 77 table %d proto static", family.version, table))
		}
		show := func() string {
			var b strings.Builder
			// -o puts the nexthops of a route on its line. Lifetimes run, and the kernel's own
			// routes come when it likes.
			for line := range strings.Lines(n.IP(t, "-o "+family.version+" route show table all")) {
				if strings.Contains(line, "proto 116") || strings.Contains(line, "proto static") {
					b.WriteString(expires.ReplaceAllString(line, ""))
				}
			}
			return b.String()
		}
		for _, table := range []uint32{100, 10000, 4294967295} {
			var want strings.Builder
			for line := range strings.Lines(show()) {
				if !strings.Contains(line, fmt.Sprintf("table %d ", table)) || !strings.Contains(line, "proto 116") {
					want.WriteString(line)
				}
			}
			if err := c.FlushTable(family.number, table); err != nil {
				t.Fatal(err)
			}
			if got := show(); got != want.String() {
				t.Errorf("after flushing table %d routes are\n%swant\n%s", table, got, want.String())
			}
		}
		if got := strings.Count(show(), "proto 116"); got < len(family.routes)-1 {
			t.Errorf("main has %d routes of ours left, want %d", got, len(family.routes)-1)
		}
		if err := c.FlushTable(family.number, 12345); err != nil {
			t.Errorf("flush of a table that is not there: %v", err)
		}
	}
}

func TestAddressesAndLinks(t *testing.T) {
	t.Parallel()
	n, c := dial(t)
	peer := nettest.New(t, "peer")
	nettest.Veth(t, n, "eth0", peer, "eth0")
	nettest.Veth(t, n, "wan", peer, "wan")
	n.IP(t, "link property add dev wan altname uplink0")
	n.IP(t, "link set eth0 addrgenmode none")
	n.IP(t, "link set wan addrgenmode none")
	n.IP(t, "-6 addr flush scope link")
	n.IP(t, "addr add 192.0.2.5/24 dev eth0")
	n.IP(t, "addr add 192.0.2.6/24 dev eth0")
	n.IP(t, "addr add 198.51.100.1 peer 198.51.100.2/32 dev wan")
	n.IP(t, "addr add 203.0.113.9/32 dev wan")
	n.IP(t, "addr add fd00::5/64 dev eth0 nodad")
	n.IP(t, "addr add fd00::6 peer fd01::6/64 dev wan nodad noprefixroute")
	peer.IP(t, "link set wan down") // a link without a carrier is up all the same

	eth0, ok, err := c.LinkByName("eth0")
	if err != nil || !ok || eth0 != (Link{Index: eth0.Index, Name: "eth0", Up: true, Carrier: true, Kind: "veth", MTU: 1500}) || eth0.Index < 2 {
		t.Fatalf("eth0 is %+v, %v, %v", eth0, ok, err)
	}
	wan, ok, err := c.LinkByName("uplink0")
	if err != nil || !ok || wan != (Link{Index: wan.Index, Name: "wan", Up: true, Kind: "veth", MTU: 1500}) {
		t.Fatalf("uplink0 is %+v, %v, %v", wan, ok, err)
	}
	if again, ok, err := c.LinkByIndex(wan.Index); err != nil || !ok || again != wan {
		t.Errorf("link %d is %+v, %v, %v", wan.Index, again, ok, err)
	}
	if links, err := c.Links(); err != nil || !slices.Contains(links, eth0) || !slices.Contains(links, wan) || !slices.Contains(links, Link{Index: 1, Name: "lo", Up: true, Carrier: true, MTU: 65536}) {
		t.Errorf("links are %v, %v", links, err)
	}
	for _, name := range []string{"", "nolink", "abcdefghijklmnop"} {
		if l, ok, err := c.LinkByName(name); ok || err != nil {
			t.Errorf("LinkByName(%q) = %v, %v, %v", name, l, ok, err)
		}
	}
	for _, index := range []int{-1, 0, 1 << 30} {
		if l, ok, err := c.LinkByIndex(index); ok || err != nil {
			t.Errorf("LinkByIndex(%d) = %v, %v, %v", index, l, ok, err)
		}
	}

	addr := netip.MustParseAddr
	lo4 := Address{Index: 1, Addr: addr("127.0.0.1"), Bits: 8, Flags: unix.IFA_F_PERMANENT, Scope: unix.RT_SCOPE_HOST}
	lo6 := Address{Index: 1, Addr: addr("::1"), Bits: 128, Flags: unix.IFA_F_PERMANENT, Scope: unix.RT_SCOPE_HOST}
	inet := []Address{
		{Index: eth0.Index, Addr: addr("192.0.2.5"), Bits: 24, Flags: unix.IFA_F_PERMANENT},
		{Index: eth0.Index, Addr: addr("192.0.2.6"), Bits: 24, Flags: unix.IFA_F_PERMANENT | unix.IFA_F_SECONDARY},
		{Index: wan.Index, Addr: addr("198.51.100.1"), Bits: 32, Peer: addr("198.51.100.2"), Flags: unix.IFA_F_PERMANENT},
		{Index: wan.Index, Addr: addr("203.0.113.9"), Bits: 32, Flags: unix.IFA_F_PERMANENT},
	}
	inet6 := []Address{
		{Index: eth0.Index, Addr: addr("fd00::5"), Bits: 64, Flags: unix.IFA_F_PERMANENT | unix.IFA_F_NODAD},
		{Index: wan.Index, Addr: addr("fd00::6"), Bits: 64, Peer: addr("fd01::6"), Flags: unix.IFA_F_PERMANENT | unix.IFA_F_NODAD | unix.IFA_F_NOPREFIXROUTE},
	}
	for _, test := range []struct {
		name          string
		family, index int
		want          []Address
	}{
		{"inet", unix.AF_INET, 0, append([]Address{lo4}, inet...)},
		{"inet on eth0", unix.AF_INET, eth0.Index, inet[:2]},
		{"inet6 on wan", unix.AF_INET6, wan.Index, inet6[1:]},
		{"both on eth0", unix.AF_UNSPEC, eth0.Index, append(slices.Clone(inet[:2]), inet6[0])},
		{"inet6", unix.AF_INET6, 0, append([]Address{lo6}, inet6...)},
		{"both", unix.AF_UNSPEC, 0, slices.Concat([]Address{lo4}, inet, []Address{lo6}, inet6)},
		{"no such link", unix.AF_INET, 1 << 30, nil},
	} {
		order := func(a, b Address) int { return a.Addr.Compare(b.Addr) }
		got, err := c.AddressesOn(test.family, test.index)
		slices.SortFunc(got, order)
		slices.SortFunc(test.want, order)
		for i := range got {
			if got[i].Created == 0 {
				t.Errorf("%s: %v was created at no time", test.name, got[i].Addr)
			}
			got[i].Created = 0
		}
		if err != nil || !slices.Equal(got, test.want) {
			t.Errorf("%s: addresses are\n%v, %v\nwant\n%v", test.name, got, err, test.want)
		}
	}
	for _, test := range []struct {
		ifname, addr string
		want         bool
	}{{"eth0", "192.0.2.6", true}, {"eth0", "fd00::5", true}, {"eth0", "198.51.100.1", false}, {"nolink", "192.0.2.6", false}} {
		got, found, err := c.AddressOn(test.ifname, addr(test.addr))
		if err != nil || found != test.want || found && (got.Addr != addr(test.addr) || got.Index != eth0.Index) {
			t.Errorf("AddressOn(%s, %s) = %v, %v, %v", test.ifname, test.addr, got, found, err)
		}
	}
	if got := inet[0].Network().String(); got != "192.0.2.5/24" {
		t.Errorf("network of a plain address is %s", got)
	}
	if got := inet[2].Network().String(); got != "198.51.100.2/32" {
		t.Errorf("network of a point-to-point address is %s", got)
	}

	// The secondary one goes with its primary one, and deleting what is gone is no error.
	for _, a := range append(inet, inet6...) {
		if err := c.DeleteAddress(a); err != nil {
			t.Error(err)
		}
	}
	if got, err := c.Addresses(unix.AF_UNSPEC); err != nil || len(got) != 2 {
		t.Errorf("all but those of lo are deleted: %v, %v", got, err)
	}
	if err := c.DeleteAddress(Address{Index: 1 << 30, Addr: addr("192.0.2.5"), Bits: 24}); err != nil {
		t.Errorf("on a link that is gone: %v", err)
	}
}

// Dumps of addresses and links that others change meanwhile are asked for again.
func TestDumpsDuringChanges(t *testing.T) {
	t.Parallel()
	n, c := dial(t)
	var batch strings.Builder
	for i := range 1000 {
		fmt.Fprintf(&batch, "addr add 10.0.%d.%d/32 dev lo\n", i/250, i%250+1)
	}
	ipBatch(t, n, batch.String())
	churn := nettest.New(t, "peer")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				n.Output("ip", "addr", "add", "192.0.2.1/32", "dev", "lo")
				n.Output("ip", "addr", "del", "192.0.2.1/32", "dev", "lo")
				n.Output("ip", "link", "add", "tmp0", "type", "veth", "peer", "name", "tmp0", "netns", churn.Path())
				n.Output("ip", "link", "del", "tmp0")
			}
		}
	})
	defer func() {
		close(stop)
		wg.Wait()
	}()
	for range 200 {
		addrs, err := c.Addresses(unix.AF_INET)
		if err != nil || len(addrs) < 1001 {
			t.Fatalf("%d addresses, %v", len(addrs), err)
		}
		if _, err := c.Links(); err != nil {
			t.Fatal(err)
		}
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

// TestAddressCreated: the time stays the same as long as the address is not put on the link anew.
func TestAddressCreated(t *testing.T) {
	t.Parallel()
	ns, c := dial(t)
	for _, test := range []struct{ family, addr string }{{"-4", "192.0.2.5/24"}, {"-6", "fd00::5/64"}} {
		created := func() uint32 {
			t.Helper()
			addrs, err := c.Addresses(unix.AF_UNSPEC)
			for _, a := range addrs {
				if a.Addr == netip.MustParsePrefix(test.addr).Addr() {
					return a.Created
				}
			}
			t.Fatalf("%s is not there: %v", test.addr, err)
			return 0
		}
		ns.IP(t, test.family+" address add "+test.addr+" dev lo valid_lft 100 preferred_lft 100")
		before := created()
		time.Sleep(20 * time.Millisecond) // two units
		ns.IP(t, test.family+" address change "+test.addr+" dev lo valid_lft 200 preferred_lft 200")
		if after := created(); after != before {
			t.Errorf("%s: with another lifetime created at %d, before %d", test.addr, after, before)
		}
		ns.IP(t, test.family+" address del "+test.addr+" dev lo")
		ns.IP(t, test.family+" address add "+test.addr+" dev lo")
		if after := created(); after == before {
			t.Errorf("%s: created anew at the time of before, %d", test.addr, after)
		}
	}
}
