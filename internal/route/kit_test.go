package route

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
	"golang.org/x/sys/unix"
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

func sorted(lines string) string {
	return strings.Join(slices.Sorted(strings.Lines(lines)), "")
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

func mustSync(t *testing.T, c *Conn, family int, owned func(Rule) bool, want []Rule, wantAdded, wantDeleted int) {
	t.Helper()
	added, deleted, err := c.SyncRules(family, owned, want)
	if err != nil || len(added) != wantAdded || len(deleted) != wantDeleted {
		t.Fatalf("SyncRules added %q, deleted %q, %v; want %d and %d", added, deleted, err, wantAdded, wantDeleted)
	}
}

var (
	addr   = netip.MustParseAddr
	prefix = netip.MustParsePrefix

	deviceName   = regexp.MustCompile(`dev (\S+)`)
	protocolName = regexp.MustCompile(`proto [a-z]+`)
)

// uplink returns a namespace with eth0, which has 192.0.2.5/24, 192.0.2.6/24, fd00::5/64 and
// fd00::6/64, a Conn into it, the ifindex and the namespace at the far end.
func uplink(t testing.TB) (n *nettest.Namespace, c *Conn, index int, peer *nettest.Namespace) {
	t.Helper()
	n, c = dial(t)
	peer = nettest.New(t, "peer")
	nettest.Veth(t, n, "eth0", peer, "eth0")
	for _, a := range []string{"192.0.2.5/24", "192.0.2.6/24", "fd00::5/64", "fd00::6/64"} {
		n.IP(t, "addr add "+a+" dev eth0 nodad")
	}
	link, ok, err := c.LinkByName("eth0")
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	return n, c, link.Index, peer
}

// ipRoutes returns the routes of table as `ip` prints them, in the words of Route.String, without
// the remaining lifetimes.
func ipRoutes(t testing.TB, n *nettest.Namespace, family int, table string) string {
	t.Helper()
	version := "-4"
	if family == unix.AF_INET6 {
		version = "-6"
	}
	index := make(map[string]string)
	for line := range strings.Lines(n.IP(t, "-o link")) {
		words := strings.Split(line, ": ")
		name, _, _ := strings.Cut(words[1], "@")
		index[name] = words[0]
	}
	var b strings.Builder
	for line := range strings.Lines(n.IP(t, "-o "+version+" route show table all")) {
		words := strings.Fields(line)
		if i := slices.Index(words, "table"); table == "main" && i >= 0 || table != "main" && (i < 0 || words[i+1] != table) {
			continue
		}
		line = deviceName.ReplaceAllStringFunc(strings.ReplaceAll(strings.Join(words, " "), "medium\\", "medium \\"), func(s string) string {
			return "dev #" + index[strings.TrimPrefix(s, "dev ")]
		})
		line = protocolName.ReplaceAllStringFunc(line, func(s string) string {
			numbers := map[string]int{"kernel": 2, "boot": 3, "static": 4, "ra": 9, "dhcp": 16}
			return fmt.Sprint("proto ", numbers[strings.TrimPrefix(s, "proto ")])
		})
		b.WriteString(line + "\n")
	}
	return b.String()
}

func checkRoutes(t testing.TB, n *nettest.Namespace, family int, table, want string) {
	t.Helper()
	if got := expires.ReplaceAllString(ipRoutes(t, n, family, table), ""); got != want {
		t.Errorf("routes of table %s are\n%swant\n%s", table, got, want)
	}
}

func mustRoutes(t testing.TB, c *Conn, family int, table uint32) []Route {
	t.Helper()
	routes, err := c.Routes(family, table)
	if err != nil {
		t.Fatal(err)
	}
	return routes
}

// lines returns routes as checkRoutes wants them.
func lines(routes []Route) string {
	var b strings.Builder
	for _, r := range routes {
		b.WriteString(expires.ReplaceAllString(r.String(), "") + "\n")
	}
	return b.String()
}

func mustSyncRoutes(t testing.TB, c *Conn, family int, table uint32, want []Route, wantAdded, wantDeleted int) {
	t.Helper()
	added, deleted, err := c.SyncRoutes(family, table, want)
	if err != nil || len(added) != wantAdded || len(deleted) != wantDeleted {
		t.Fatalf("SyncRoutes added\n%sdeleted\n%s%v; want %d and %d", lines(added), lines(deleted), err, wantAdded, wantDeleted)
	}
}

// crowd4 and crowd6 are routes with everything that a Route has, as words for `ip route add`.
var crowd4 = []string{
	"192.0.2.0/24 dev eth0 scope link src 192.0.2.5",
	"default via 192.0.2.1 metric 5 mtu 1400 advmss 1300",
	"default via 192.0.2.1 metric 6 mtu lock 1400 initcwnd 5 initrwnd 6 quickack 1 congctl reno",
	"198.51.100.1 dev eth0 scope link",
	"198.51.100.128/25 via 192.0.2.1 src 192.0.2.6 proto dhcp",
	"203.0.113.0/24 via 198.18.0.1 dev eth0 onlink proto static",
	"10.0.0.0/8 via 192.0.2.1 tos 0x10",
	"10.2.0.0/16 via inet6 fe80::1 dev eth0",
	"10.3.0.0/16 dev eth0 scope host",
	"10.4.0.0/16 dev eth0 scope 77",
	"unreachable default metric 4294967295",
	"blackhole 10.5.0.0/16",
	"prohibit 10.6.0.0/16 tos 0x04",
	"throw 10.7.0.0/16",
	"10.8.0.0/16 nhid 5",
}

var crowd6 = []string{
	"fd00::/64 dev eth0 metric 7",
	"default via fd00::1 metric 5 mtu 1400 hoplimit 33 pref high",
	"default via fe80::1 dev eth0 metric 6 pref low",
	"fd01::1 via fd00::1 src fd00::6 proto dhcp",
	"fd02::/64 dev eth0 src fd00::5 expires 1000",
	"fd03::/64 via 2001:db8::1 dev eth0 onlink proto static",
	"fd04::/64 from fd00::/64 via fd00::1 dev eth0",
	"unreachable default metric 4294967295",
	"blackhole fd05::/64",
	"prohibit fd06::/64",
	"throw fd07::/64",
	"fd08::/64 nhid 6",
}

// unnamed are routes whose attributes have no words of ours.
var unnamed = map[int][]string{
	unix.AF_INET: {
		"10.10.0.0/16 nexthop via 192.0.2.1 weight 2 nexthop via 192.0.2.2 dev eth0 onlink",
		"10.11.0.0/16 encap ip id 5 dst 192.0.2.9 dev eth0", "10.12.0.0/16 dev eth0 scope link realm 3/4 rtt 30ms rto_min 1s",
		"10.13.0.0/16 nhid 7",
	},
	unix.AF_INET6: {
		"fd11::/64 nexthop via fd00::1 nexthop via fd00::2 weight 3", "fd12::/64 encap ip6 id 5 dst fd00::9 dev eth0",
		"fd13::/64 encap seg6 mode encap segs fd00::9,fd00::a dev eth0",
	},
}

func addCrowd(t testing.TB, n *nettest.Namespace) {
	t.Helper()
	n.IP(t, "nexthop add id 5 via 192.0.2.1 dev eth0")
	n.IP(t, "nexthop add id 6 via fd00::1 dev eth0")
	n.IP(t, "nexthop add id 8 via 192.0.2.2 dev eth0")
	n.IP(t, "nexthop add id 7 group 5/8")
	for _, r := range slices.Concat(crowd4, unnamed[unix.AF_INET]) {
		n.IP(t, "-4 route add table 1000 "+r)
	}
	for _, r := range slices.Concat(crowd6, unnamed[unix.AF_INET6]) {
		n.IP(t, "-6 route add table 1000 "+r)
	}
}

// byKernel tells of routes that come with addresses, whenever these are ready.
func byKernel(e Event) bool { return e.Protocol == unix.RTPROT_KERNEL }

// quiet fails the test if f changes a route, and thus is heard of.
func quiet(t testing.TB, n *nettest.Namespace, f func()) {
	t.Helper()
	var w *Watcher
	var err error
	n.Do(func() { w, err = Watch(Routes4 | Routes6) })
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	f()
	n.IP(t, "route add 203.0.113.77 dev lo table 77")
	n.IP(t, "route del 203.0.113.77 dev lo table 77")
	var all []Event
	for len(all) == 0 || all[len(all)-1].Table != 77 {
		events, err := w.Next()
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, slices.DeleteFunc(events, byKernel)...)
	}
	if all[0].Table != 77 {
		t.Errorf("there were changes: %+v", all)
	}
}
