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

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
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

var (
	addr   = netip.MustParseAddr
	prefix = netip.MustParsePrefix

	deviceName   = regexp.MustCompile(`dev (\S+)`)
	protocolName = regexp.MustCompile(`proto [a-z]+`)
)

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

// What String says is what `ip route` says.
func TestRouteString(t *testing.T) {
	t.Parallel()
	n, c, index, peer := uplink(t)
	addCrowd(t, n)
	for _, down := range []bool{false, true} {
		if down {
			carrierLost(t, n, c, index, peer)
		}
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			var got, want strings.Builder
			for _, r := range mustRoutes(t, c, family, 1000) {
				if s := r.String(); !strings.Contains(s, "[") {
					got.WriteString(expires.ReplaceAllString(s, "") + "\n")
				}
			}
			for line := range strings.Lines(expires.ReplaceAllString(ipRoutes(t, n, family, "1000"), "")) {
				if !strings.Contains(line, "nexthop ") && !strings.Contains(line, "encap ") && !strings.Contains(line, "realm") {
					// Rejecting routes of IPv6 have no link in a Route.
					want.WriteString(strings.Replace(line, " dev #1", "", 1))
				}
			}
			if got.String() != want.String() {
				t.Errorf("routes are\n%swant\n%s", got.String(), want.String())
			}
			if strings.Contains(got.String(), "linkdown") != down {
				t.Errorf("link down %t:\n%s", down, got.String())
			}
		}
	}
	for _, test := range []struct {
		family int
		want   string
	}{
		{unix.AF_INET, "10.12.0.0/16 dev #2 table 1000 scope link linkdown [metric4=f0000000 metric13=e8030000 realms=04000300]"},
		{unix.AF_INET, "10.10.0.0/16 table 1000 linkdown [nexthops=100000010200000008000500c0000201100004000200000008000500c0000202]"},
		{unix.AF_INET6, "fd11::/64 table 1000 metric 1024 pref medium [nexthops=1c00000002000000140005" +
			"00fd0000000000000000000000000000011c00000202000000140005" + "00fd000000000000000000000000000002]"},
	} {
		var got []string
		for _, r := range mustRoutes(t, c, test.family, 1000) {
			got = append(got, r.String())
		}
		if !slices.Contains(got, test.want) {
			t.Errorf("routes are\n%s\nwant\n%s", strings.Join(got, "\n"), test.want)
		}
	}
}

// carrierLost sets peer's end of a link down and waits until the routes tell.
func carrierLost(t testing.TB, n *nettest.Namespace, c *Conn, index int, peer *nettest.Namespace) {
	t.Helper()
	var w *Watcher
	var err error
	n.Do(func() { w, err = Watch(Links) })
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	peer.IP(t, "link set eth0 down")
	for {
		l, _, err := c.LinkByIndex(index)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(n.IP(t, "link show "+l.Name), "NO-CARRIER") {
			return
		}
		if _, err := w.Next(); err != nil {
			t.Fatal(err)
		}
	}
}

// A route that moves to another table keeps all that it has.
func TestRouteIn(t *testing.T) {
	t.Parallel()
	n, c, index, peer := uplink(t)
	addCrowd(t, n)
	for i, test := range []struct {
		family int
		src    netip.Addr
	}{
		{unix.AF_INET, netip.Addr{}}, {unix.AF_INET, addr("192.0.2.6")}, {unix.AF_INET6, netip.Addr{}}, {unix.AF_INET6, addr("fd00::6")},
		{unix.AF_INET, addr("192.0.2.5")}, {unix.AF_INET6, addr("fd00::5")},
	} {
		down := i >= 4
		if i == 4 {
			// The state of the link is not carried along. Nexthop objects go, and their routes.
			carrierLost(t, n, c, index, peer)
		}
		var want []Route
		for _, r := range mustRoutes(t, c, test.family, 1000) {
			want = append(want, r.In(1<<31, test.src))
		}
		if !down && len(want) != len(map[int][]string{unix.AF_INET: crowd4, unix.AF_INET6: crowd6}[test.family])+len(unnamed[test.family]) {
			t.Fatalf("%d routes", len(want))
		}
		slices.Reverse(want)
		slices.SortStableFunc(want, linksFirst)
		for _, r := range want {
			for range 2 {
				if err := c.AddRoute(r); err != nil {
					t.Error(err)
				}
			}
		}
		got := mustRoutes(t, c, test.family, 1<<31)
		for _, r := range want {
			if !slices.ContainsFunc(got, r.Equal) {
				t.Errorf("%q does not come back in\n%s", r, lines(got))
			}
			if r.Type == unix.RTN_UNICAST && test.src.IsValid() && r.Src != test.src {
				t.Errorf("%q: source is not %v", r, test.src)
			}
		}
		// `ip` sees no difference but the table, the protocol and the source.
		other := regexp.MustCompile(` (table|proto|src) \S+| linkdown`)
		before := other.ReplaceAllString(expires.ReplaceAllString(ipRoutes(t, n, test.family, "1000"), ""), "")
		after := other.ReplaceAllString(expires.ReplaceAllString(ipRoutes(t, n, test.family, "2147483648"), ""), "")
		if sorted(before) != sorted(after) {
			t.Errorf("copies are\n%swant\n%s", after, before)
		}
		mustSyncRoutes(t, c, test.family, 1<<31, want, 0, 0)
		for _, r := range want {
			for range 2 {
				if _, err := c.DeleteRoute(r); err != nil {
					t.Error(err)
				}
			}
		}
		checkRoutes(t, n, test.family, "2147483648", "")
	}
}

func TestNewRoute(t *testing.T) {
	t.Parallel()
	n, c, eth0, _ := uplink(t)
	for _, test := range []struct {
		r    Route
		want string
	}{
		{NewRoute(10000, prefix("192.0.2.5/24"), netip.Addr{}, eth0), "192.0.2.0/24 dev #2 table 10000 proto 116 scope link"},
		{NewRoute(10000, prefix("0.0.0.0/0"), addr("192.0.2.1"), eth0), "default via 192.0.2.1 dev #2 table 10000 proto 116"},
		{NewRoute(10000, prefix("fd00::5/64"), netip.Addr{}, eth0), "fd00::/64 dev #2 table 10000 proto 116 metric 1024 pref medium"},
		{NewRoute(10000, prefix("::/0"), addr("fe80::1%eth0"), eth0), "default via fe80::1 dev #2 table 10000 proto 116 metric 1024 pref medium"},
		{Route{Family: unix.AF_INET, Dst: prefix("0.0.0.0/0"), Type: unix.RTN_UNREACHABLE, Table: 10001, Metric: 1<<32 - 1, Protocol: Protocol}, "unreachable default table 10001 proto 116 metric 4294967295"},
		{Route{Family: unix.AF_INET, Dst: prefix("0.0.0.0/0"), Index: eth0, Table: 10002}, "default dev #2 table 10002 proto 0"},
	} {
		if got := test.r.String(); got != test.want {
			t.Errorf("route is %q\nwant %q", got, test.want)
		}
		if err := c.AddRoute(test.r); err != nil {
			t.Error(err)
		}
		if got := mustRoutes(t, c, test.r.Family, test.r.Table); !slices.ContainsFunc(got, test.r.Equal) {
			t.Errorf("%q comes back as\n%s", test.r, lines(got))
		}
	}
	checkRoutes(t, n, unix.AF_INET, "10000", "default via 192.0.2.1 dev #2 table 10000 proto 116\n192.0.2.0/24 dev #2 table 10000 proto 116 scope link\n")

	unreachable := Route{Family: unix.AF_INET, Dst: prefix("0.0.0.0/0"), Type: unix.RTN_UNREACHABLE}
	if got := unreachable.In(7, addr("192.0.2.5")).String(); got != "unreachable default table 7 proto 116" {
		t.Errorf("in table 7 it is %q", got)
	}
}

func TestAddRouteErrors(t *testing.T) {
	t.Parallel()
	n, c, eth0, _ := uplink(t)
	nettest.Veth(t, n, "eth1", nettest.New(t, "down"), "eth0")
	n.IP(t, "link set eth1 down")
	eth1, _, err := c.LinkByName("eth1")
	if err != nil {
		t.Fatal(err)
	}
	n.IP(t, "route add 10.0.0.0/8 via 192.0.2.9 table 10000 proto static")
	n.IP(t, "-6 route add fd10::/64 via fd00::9 table 10000 proto static")
	n.IP(t, "route add 10.1.0.0/16 via 192.0.2.9 table 10000 proto 116")
	n.IP(t, "route append 10.1.0.0/16 via 192.0.2.1 table 10000 proto static")
	to := func(dst, gateway string) Route { return NewRoute(10000, prefix(dst), addr(gateway), eth0) }
	src := func(r Route, a string) Route { r.Src = addr(a); return r }
	for _, test := range []struct {
		r    Route
		errs error
		want string
	}{
		{to("10.0.0.0/8", "192.0.2.1"), unix.EEXIST, `"10.0.0.0/8 via 192.0.2.9 dev #2 table 10000 proto 4" is in its place: file exists`},
		{to("10.1.0.0/16", "192.0.2.2"), unix.EEXIST, `"10.1.0.0/16 via 192.0.2.1 dev #2 table 10000 proto 4" is in its place: file exists`},
		{to("fd10::/64", "fd00::1"), unix.EEXIST, `"fd10::/64 via fd00::9 dev #2 table 10000 proto 4 metric 1024 pref medium" is in its place: file exists`},
		{to("0.0.0.0/0", "198.51.100.1"), unix.ENETUNREACH, "network is unreachable: Nexthop has invalid gateway"},
		{to("::/0", "2001:db8::1"), unix.EHOSTUNREACH, "no route to host"},
		{src(to("0.0.0.0/0", "192.0.2.1"), "192.0.2.77"), unix.EINVAL, "invalid argument: Invalid prefsrc address"},
		{src(to("::/0", "fd00::1"), "fd00::77"), unix.EINVAL, "invalid argument: Invalid source address"},
		{NewRoute(10000, prefix("10.2.0.0/16"), netip.Addr{}, eth1.Index), unix.ENETDOWN, "network is down: Device for nexthop is not up"},
		{NewRoute(10000, prefix("fd12::/64"), netip.Addr{}, eth1.Index), unix.ENETDOWN, "network is down: Nexthop device is not up"},
		{NewRoute(10000, prefix("10.2.0.0/16"), netip.Addr{}, 1<<30), unix.ENODEV, "no such device"},
		{NewRoute(10000, prefix("10.2.0.0/16"), netip.Addr{}, 0), nil, "a unicast route needs a link"},
		{NewRoute(0, prefix("10.2.0.0/16"), netip.Addr{}, 2), nil, "a route needs a table"},
		{Route{Family: unix.AF_BRIDGE}, unix.EAFNOSUPPORT, "family 7: address family not supported by protocol"},
		{Route{Family: unix.AF_INET, Table: 1, Index: 2}, nil, "invalid Prefix is no destination of this family"},
		{Route{Family: unix.AF_INET, Table: 1, Index: 2, Dst: prefix("10.2.3.4/8")}, nil, "10.2.3.4/8 is no destination of this family"},
		{Route{Family: unix.AF_INET6, Table: 1, Index: 2, Dst: prefix("10.0.0.0/8")}, nil, "10.0.0.0/8 is no destination of this family"},
		{Route{Family: unix.AF_INET6, Table: 1, Index: 2, Dst: prefix("::/0"), Gateway: addr("10.0.0.1")}, nil, "10.0.0.1 is no gateway of this family"},
		{Route{Family: unix.AF_INET6, Table: 1, Index: 2, Dst: prefix("::/0"), Src: addr("10.0.0.1")}, nil, "10.0.0.1 is no source address of this family"},
		{Route{Family: unix.AF_INET, Table: 1, Index: 2, Dst: prefix("0.0.0.0/0"), From: prefix("10.0.0.0/8")}, nil, "10.0.0.0/8 is no source of this family"},
		{Route{Family: unix.AF_INET6, Table: 1, Index: 2, Dst: prefix("::/0"), Expires: -1}, nil, "its lifetime is over"},
	} {
		before := ipRoutes(t, n, unix.AF_INET, "10000") + ipRoutes(t, n, unix.AF_INET6, "10000")
		want := fmt.Sprintf("add route %q: %s", test.r.normal(), test.want)
		err := c.AddRoute(test.r)
		if err == nil || strings.TrimSuffix(err.Error(), ".") != want || test.errs != nil && !errors.Is(err, test.errs) {
			t.Errorf("error is %v\nwant %s", err, want)
		}
		if after := ipRoutes(t, n, unix.AF_INET, "10000") + ipRoutes(t, n, unix.AF_INET6, "10000"); after != before {
			t.Errorf("%q: routes are\n%swant\n%s", test.r, after, before)
		}
	}
}

// A route of ours gives its place to another of ours, without a moment in which there is none.
func TestAddRouteReplaces(t *testing.T) {
	t.Parallel()
	n, c, eth0, _ := uplink(t)
	for _, test := range []struct {
		family     int
		group      Groups
		there, add string
		removes    bool
	}{
		{unix.AF_INET, Routes4, "10.0.0.0/8 via 192.0.2.9", "10.0.0.0/8 via 192.0.2.1", false},
		{unix.AF_INET, Routes4, "10.1.0.0/16 via 192.0.2.9", "10.1.0.0/16 dev eth0 src 192.0.2.6 mtu 1400", false},
		{unix.AF_INET, Routes4, "10.2.0.0/16 nexthop via 192.0.2.9 nexthop via 192.0.2.8", "10.2.0.0/16 via 192.0.2.9", false},
		{unix.AF_INET, Routes4, "unreachable 10.3.0.0/16", "10.3.0.0/16 via 192.0.2.9", false},
		{unix.AF_INET6, Routes6, "fd10::/64 via fd00::9", "fd10::/64 via fd00::1", false},
		{unix.AF_INET6, Routes6, "fd11::/64 via fd00::9", "fd11::/64 dev eth0 src fd00::6 mtu 1400", false},
		{unix.AF_INET6, Routes6, "fd12::/64 dev eth0", "fd12::/64 via fd00::9", false},
		{unix.AF_INET6, Routes6, "unreachable fd13::/64", "fd13::/64 via fd00::9", false},
		{unix.AF_INET6, Routes6, "fd14::/64 nexthop via fd00::9 nexthop via fd00::8", "fd14::/64 via fd00::9", true},
	} {
		version := map[int]string{unix.AF_INET: "-4 ", unix.AF_INET6: "-6 "}[test.family]
		n.IP(t, version+"route add table 9999 proto 116 "+test.add)
		want := mustRoutes(t, c, test.family, 9999)[0].In(10000, netip.Addr{})
		n.IP(t, version+"route flush table 9999")
		n.IP(t, version+"route add table 10000 proto 116 "+test.there)
		n.IP(t, version+"route add table 10000 proto 116 metric 7 "+test.there) // has another place
		w := watch(t, n, test.group)
		for range 2 {
			if err := c.AddRoute(want); err != nil {
				t.Error(err)
			}
		}
		last := Event{Kind: RouteChanged, Family: test.family, Table: 10000, Index: eth0, Protocol: Protocol}
		removed := slices.ContainsFunc(await(t, w, last), func(e Event) bool { return e.Deleted && e.Protocol == Protocol })
		if removed != test.removes {
			t.Errorf("%q replaced by %q: deleted before: %t", test.there, test.add, removed)
		}
		got := mustRoutes(t, c, test.family, 10000)
		if len(got) != 2 || !slices.ContainsFunc(got, want.Equal) {
			t.Errorf("routes are\n%swant\n%s", lines(got), want)
		}
		n.IP(t, version+"route flush table 10000")
	}
}

// Deletes match partially. Whatever resembles a route is still there when that has gone.
func TestDeleteRouteTwins(t *testing.T) {
	t.Parallel()
	n, c, _, peer := uplink(t)
	nettest.Veth(t, n, "eth1", peer, "eth1")
	for family, twins := range map[int][]string{
		unix.AF_INET: {
			"192.0.2.0/24 dev eth0 scope link", // for the gateways
			"default via 192.0.2.1 mtu 1400 proto 116", "default via 192.0.2.1 proto 116", "default via 192.0.2.1 mtu 1300 proto 116",
			"default via 192.0.2.1 proto static", "default via 192.0.2.2 proto 116", "default via 192.0.2.1 src 192.0.2.6 proto 116",
			"default via 192.0.2.1 src 192.0.2.5 proto 116", "default dev eth0 proto 116", "default dev eth0 scope global proto 116",
			"default via 192.0.2.1 metric 5 proto 116", "default via 192.0.2.1 tos 0x10 proto 116", "unreachable default proto 116",
			"default dev eth1 proto 116", "default via 192.0.2.1 dev eth0 onlink proto 116", "default via 192.0.2.1 realm 5 proto 116",
			"default nexthop via 192.0.2.1 nexthop via 192.0.2.2", "default metric 5 nexthop via 192.0.2.1 nexthop via 192.0.2.2",
		},
		unix.AF_INET6: {
			"default dev eth0 proto 116", "default dev eth1 proto 116", "default via fd00::1 proto 116", "default dev eth0 metric 5 proto 116",
			"default via fd00::1 metric 5 proto 116", "unreachable default proto 116 metric 5", "default from fd00::/64 dev eth0 proto 116",
			"default dev eth0 metric 6 src fd00::5 proto static", "default metric 5 dev eth1 src fd00::6 proto static",
		},
	} {
		version := map[int]string{unix.AF_INET: "-4 ", unix.AF_INET6: "-6 "}[family]
		for _, reverse := range []bool{false, true} {
			order := slices.Clone(twins)
			if reverse {
				slices.Reverse(order[1:])
			}
			for _, r := range order {
				n.IP(t, version+"route append table 10000 "+r)
			}
			all := mustRoutes(t, c, family, 10000)
			if len(all) != len(twins) {
				t.Fatalf("%d of %d routes\n%s", len(all), len(twins), lines(all))
			}
			for _, r := range all {
				before := mustRoutes(t, c, family, 10000)
				if _, err := c.DeleteRoute(r); err != nil {
					t.Error(err)
				}
				after := mustRoutes(t, c, family, 10000)
				before = slices.DeleteFunc(before, r.Equal)
				if sorted(lines(after)) != sorted(lines(before)) {
					t.Fatalf("without %q routes are\n%swant\n%s", r, lines(after), lines(before))
				}
				absent := r
				absent.Protocol = 117
				if deleted, err := c.DeleteRoute(absent); deleted || err != nil {
					t.Error(err)
				}
				n.IP(t, version+"route flush table 10000")
				for _, r := range order {
					n.IP(t, version+"route append table 10000 "+r)
				}
			}
			n.IP(t, version+"route flush table 10000")
		}
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

func TestSyncRoutes(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name                    string
		family                  int
		group                   Groups
		link, all               string
		gateways                [2]string
		src, moved, far         string
		foreign                 []string
		first, second, foreign2 string
	}{
		{
			name: "inet", family: unix.AF_INET, group: Routes4, link: "192.0.2.0/24", all: "0.0.0.0/0", gateways: [2]string{"192.0.2.1", "192.0.2.254"},
			src: "192.0.2.5", moved: "192.0.2.6", far: "198.51.100.0/24",
			foreign: []string{"-4 route add 10.9.0.0/16 dev eth0 table 10000 proto static", "-4 route add default dev eth0 table 10000 metric 9 proto 115", "-4 route add default dev eth0 table 10001 proto 116"},
			first: `default via 192.0.2.1 dev #2 table 10000 proto 116 src 192.0.2.5
default dev #2 table 10000 proto 115 scope link metric 9
default via 192.0.2.254 dev #2 table 10000 proto 116 src 192.0.2.5 metric 100
10.9.0.0/16 dev #2 table 10000 proto 4 scope link
192.0.2.0/24 dev #2 table 10000 proto 116 scope link src 192.0.2.5
198.51.100.0/24 via 192.0.2.1 dev #2 table 10000 proto 116 src 192.0.2.5
`,
			second: `default via 192.0.2.254 dev #2 table 10000 proto 116 src 192.0.2.6
default dev #2 table 10000 proto 115 scope link metric 9
10.9.0.0/16 dev #2 table 10000 proto 4 scope link
192.0.2.0/24 dev #2 table 10000 proto 116 scope link src 192.0.2.6
198.51.100.0/24 via 192.0.2.1 dev #2 table 10000 proto 116 src 192.0.2.6 metric 1
`,
			foreign2: "default dev #2 table 10000 proto 115 scope link metric 9\n10.9.0.0/16 dev #2 table 10000 proto 4 scope link\n",
		},
		{
			name: "inet6", family: unix.AF_INET6, group: Routes6, link: "fd00::/64", all: "::/0", gateways: [2]string{"fd00::1", "fe80::1"},
			src: "fd00::5", moved: "fd00::6", far: "2001:db8::/32",
			foreign: []string{"-6 route add fd09::/64 dev eth0 table 10000 proto static", "-6 route add default dev eth0 table 10000 metric 9 proto 115", "-6 route add default dev eth0 table 10001 proto 116"},
			first: `2001:db8::/32 via fd00::1 dev #2 table 10000 proto 116 src fd00::5 metric 1024 pref medium
fd00::/64 dev #2 table 10000 proto 116 src fd00::5 metric 1024 pref medium
fd09::/64 dev #2 table 10000 proto 4 metric 1024 pref medium
default dev #2 table 10000 proto 115 metric 9 pref medium
default via fe80::1 dev #2 table 10000 proto 116 src fd00::5 metric 100 pref medium
default via fd00::1 dev #2 table 10000 proto 116 src fd00::5 metric 1024 pref medium
`,
			second: `2001:db8::/32 via fd00::1 dev #2 table 10000 proto 116 src fd00::6 metric 1 pref medium
fd00::/64 dev #2 table 10000 proto 116 src fd00::6 metric 1024 pref medium
fd09::/64 dev #2 table 10000 proto 4 metric 1024 pref medium
default dev #2 table 10000 proto 115 metric 9 pref medium
default via fe80::1 dev #2 table 10000 proto 116 src fd00::6 metric 1024 pref medium
`,
			foreign2: "fd09::/64 dev #2 table 10000 proto 4 metric 1024 pref medium\ndefault dev #2 table 10000 proto 115 metric 9 pref medium\n",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			n, c, eth0, _ := uplink(t)
			for _, r := range test.foreign {
				n.IP(t, r)
			}
			route := func(dst, gateway, src string, metric uint32) Route {
				var via netip.Addr
				if gateway != "" {
					via = addr(gateway)
				}
				r := NewRoute(10000, prefix(dst), via, eth0).In(10000, addr(src))
				r.Metric = metric
				return r
			}
			// Gateways come first, as callers need not know.
			first := []Route{
				route(test.far, test.gateways[0], test.src, 0), route(test.all, test.gateways[0], test.src, 0),
				route(test.all, test.gateways[1], test.src, 100), route(test.link, "", test.src, 0),
			}
			mustSyncRoutes(t, c, test.family, 10000, first, 4, 0)
			checkRoutes(t, n, test.family, "10000", test.first)
			quiet(t, n, func() {
				mustSyncRoutes(t, c, test.family, 10000, first, 0, 0)
				slices.Reverse(first)
				mustSyncRoutes(t, c, test.family, 10000, append(first, first...), 0, 0)
			})
			// Another source and gateway take the places; another metric is another place.
			second := []Route{
				route(test.far, test.gateways[0], test.moved, 1), route(test.all, test.gateways[1], test.moved, 0), route(test.link, "", test.moved, 0),
			}
			w := watch(t, n, test.group)
			mustSyncRoutes(t, c, test.family, 10000, second, 3, 4)
			gone := Event{Kind: RouteChanged, Family: test.family, Table: 10000, Index: eth0, Protocol: Protocol, Deleted: true}
			events := slices.DeleteFunc(await(t, w, gone), byKernel)
			if i := slices.Index(events, gone); i != 3 {
				t.Errorf("deletes before adds: %+v", events)
			}
			checkRoutes(t, n, test.family, "10000", test.second)
			quiet(t, n, func() { mustSyncRoutes(t, c, test.family, 10000, second, 0, 0) })
			mustSyncRoutes(t, c, test.family, 10000, nil, 0, 3)
			checkRoutes(t, n, test.family, "10000", test.foreign2)
			quiet(t, n, func() { mustSyncRoutes(t, c, test.family, 10000, nil, 0, 0) })
			if got := ipRoutes(t, n, test.family, "10001"); strings.Count(got, "\n") != 1 {
				t.Errorf("table 10001 has\n%s", got)
			}

			// Ours behind others at one place, as `append` makes them, are brought in order.
			version := strings.Fields(test.foreign[0])[0]
			for _, r := range []string{"default via " + test.gateways[0] + " dev eth0", "default dev eth0", "default via " + test.gateways[1] + " dev eth0"} {
				n.IP(t, version+" route append table 10000 proto 116 "+r)
			}
			if _, _, err := c.SyncRoutes(test.family, 10000, second[1:]); err != nil {
				t.Error(err)
			}
			ours := slices.DeleteFunc(mustRoutes(t, c, test.family, 10000), func(r Route) bool { return r.Protocol != Protocol })
			if len(ours) != 2 || !slices.ContainsFunc(ours, second[1].Equal) || !slices.ContainsFunc(ours, second[2].Equal) {
				t.Errorf("ours are\n%s", lines(ours))
			}
		})
	}
}

// What the kernel refuses keeps nothing else from its place, and comes as soon as it can. A gateway that no route leads to
// is on the link by force.
func TestSyncRoutesRefused(t *testing.T) {
	t.Parallel()
	n, c, eth0, _ := uplink(t)
	n.IP(t, "route add 10.9.0.0/16 dev eth0 table 10000 proto static")
	to := func(dst, gateway string) Route { return NewRoute(10000, prefix(dst), addr(gateway), eth0) }
	want := []Route{
		to("0.0.0.0/0", "198.51.100.1"),
		to("10.1.0.0/16", "192.0.2.1"),
		to("10.2.0.0/16", "192.0.2.1").In(10000, addr("192.0.2.7")),
		to("10.9.0.0/16", "192.0.2.1"),
		to("10.1.0.0/16", "192.0.2.2"),
		to("10.3.0.0/16", "192.0.2.1").In(10001, netip.Addr{}),
		NewRoute(10000, prefix("192.0.2.0/24"), netip.Addr{}, eth0),
	}
	for range 2 {
		added, deleted, err := c.SyncRoutes(unix.AF_INET, 10000, want)
		if len(deleted) != 0 || !errors.Is(err, unix.EINVAL) || !errors.Is(err, unix.EEXIST) {
			t.Errorf("added\n%sdeleted\n%s%v", lines(added), lines(deleted), err)
		}
		if got := strings.ReplaceAll(err.Error(), ".\n", "\n"); got != `add route "10.1.0.0/16 via 192.0.2.2 dev #2 table 10000 proto 116": another route is wanted in its place
add route "10.3.0.0/16 via 192.0.2.1 dev #2 table 10001 proto 116": is not for family 2 and table 10000, or not ours
add route "10.2.0.0/16 via 192.0.2.1 dev #2 table 10000 proto 116 src 192.0.2.7": invalid argument: Invalid prefsrc address
add route "10.9.0.0/16 via 192.0.2.1 dev #2 table 10000 proto 116": "10.9.0.0/16 dev #2 table 10000 proto 4 scope link" is in its place: file exists` {
			t.Errorf("error is\n%s", got)
		}
		checkRoutes(t, n, unix.AF_INET, "10000", `default via 198.51.100.1 dev #2 table 10000 proto 116 onlink
10.1.0.0/16 via 192.0.2.1 dev #2 table 10000 proto 116
10.9.0.0/16 dev #2 table 10000 proto 4 scope link
192.0.2.0/24 dev #2 table 10000 proto 116 scope link
`)
	}
	n.IP(t, "addr add 192.0.2.7/24 dev eth0")
	n.IP(t, "addr add 198.51.100.5/24 dev eth0")
	n.IP(t, "route del 10.9.0.0/16 dev eth0 table 10000 proto static")
	mustSyncRoutes(t, c, unix.AF_INET, 10000, append(want[:4:4], want[6]), 2, 0)
}

// An address need not bring a route for its network: gateways are found in the table alone.
func TestSyncRoutesLinksFirst(t *testing.T) {
	t.Parallel()
	n, c, eth0, _ := uplink(t)
	n.IP(t, "addr add 198.51.100.5/32 dev eth0")
	n.IP(t, "addr add 2001:db8::5/128 dev eth0 nodad")
	for family, test := range map[int][3]string{
		unix.AF_INET: {"198.51.100.5", "198.51.100.1/32", "0.0.0.0/0"}, unix.AF_INET6: {"2001:db8::5", "2001:db8::1/128", "::/0"},
	} {
		gateway := prefix(test[1])
		want := []Route{
			NewRoute(10000, prefix(test[2]), gateway.Addr(), eth0).In(10000, addr(test[0])),
			NewRoute(10000, gateway, netip.Addr{}, eth0).In(10000, addr(test[0])),
		}
		if err := c.AddRoute(want[0]); !errors.Is(err, unix.ENETUNREACH) && !errors.Is(err, unix.EHOSTUNREACH) {
			t.Errorf("error is %v", err)
		}
		mustSyncRoutes(t, c, family, 10000, want, 2, 0)
		mustSyncRoutes(t, c, family, 10000, nil, 0, 2)
	}
}

// What the kernel does to tables by itself, and that SyncRoutes fills them again.
func TestRoutesGoByThemselves(t *testing.T) {
	t.Parallel()
	n, c, eth0, _ := uplink(t)
	nettest.Veth(t, n, "eth1", nettest.New(t, "other"), "eth0")
	n.IP(t, "addr add 203.0.113.5/24 dev eth1")
	n.IP(t, "addr add 198.51.100.5/24 dev eth0")
	src4, src6 := addr("192.0.2.5"), addr("fd00::5")
	want4 := []Route{
		NewRoute(10000, prefix("192.0.2.0/24"), netip.Addr{}, eth0).In(10000, src4),
		NewRoute(10000, prefix("0.0.0.0/0"), addr("192.0.2.1"), eth0).In(10000, src4),
		{Family: unix.AF_INET, Dst: prefix("0.0.0.0/0"), Type: unix.RTN_UNREACHABLE, Table: 10000, Metric: 1<<32 - 1, Protocol: Protocol},
	}
	want6 := []Route{
		NewRoute(10000, prefix("fd00::/64"), netip.Addr{}, eth0).In(10000, src6),
		NewRoute(10000, prefix("::/0"), addr("fe80::1"), eth0).In(10000, src6),
		{Family: unix.AF_INET6, Dst: prefix("::/0"), Type: unix.RTN_UNREACHABLE, Table: 10000, Metric: 1<<32 - 1, Protocol: Protocol},
	}
	mustSyncRoutes(t, c, unix.AF_INET, 10000, want4, 3, 0)
	mustSyncRoutes(t, c, unix.AF_INET6, 10000, want6, 3, 0)
	full4, full6 := lines(mustRoutes(t, c, unix.AF_INET, 10000)), lines(mustRoutes(t, c, unix.AF_INET6, 10000))
	const left4 = "unreachable default table 10000 proto 116 metric 4294967295\n"
	const left6 = "unreachable default dev #1 table 10000 proto 116 metric 4294967295 pref medium\n"

	for _, step := range []struct {
		name, gone, back string
		left4, left6     string
		add4, add6       int
		del6             int // routes without their source are others
	}{
		{"the address, another is left", "addr del 192.0.2.5/24 dev eth0", "addr add 192.0.2.5/24 dev eth0", full4, full6, 0, 0, 0},
		{"the other address", "addr del 198.51.100.5/24 dev eth0", "route list", full4, full6, 0, 0, 0},
		{"the last address", "addr del 192.0.2.5/24 dev eth0", "addr add 192.0.2.5/24 dev eth0", left4, full6, 2, 0, 0},
		{"the IPv6 address", "addr del fd00::5/64 dev eth0", "addr add fd00::5/64 dev eth0 nodad", full4, strings.ReplaceAll(full6, " src fd00::5", ""), 0, 2, 2},
		{"the link", "link set eth0 down", "link set eth0 up", left4, left6, 2, 2, 0},
	} {
		deleted := Event{Kind: RouteChanged, Family: unix.AF_INET, Table: 10000, Index: eth0, Protocol: Protocol, Deleted: true}
		w := watch(t, n, Routes4|Links)
		n.IP(t, step.gone)
		n.IP(t, "route add 10.77.0.0/16 dev lo table 77")
		n.IP(t, "route del 10.77.0.0/16 dev lo table 77")
		if slices.Contains(await(t, w, Event{Kind: RouteChanged, Family: unix.AF_INET, Table: 77, Index: 1, Protocol: unix.RTPROT_BOOT, Deleted: true}), deleted) {
			t.Errorf("%s: the kernel now tells that the routes went", step.name)
		}
		checkRoutes(t, n, unix.AF_INET, "10000", step.left4)
		if got := strings.ReplaceAll(expires.ReplaceAllString(ipRoutes(t, n, unix.AF_INET6, "10000"), ""), " dev #1", ""); got != strings.ReplaceAll(step.left6, " dev #1", "") {
			t.Errorf("%s: routes are\n%swant\n%s", step.name, got, step.left6)
		}
		n.IP(t, step.back)
		if step.name == "the link" {
			n.IP(t, "addr add fd00::5/64 dev eth0 nodad") // it went, too
		}
		mustSyncRoutes(t, c, unix.AF_INET, 10000, want4, step.add4, 0)
		mustSyncRoutes(t, c, unix.AF_INET6, 10000, want6, step.add6, step.del6)
	}
}

// At one place the kernel of IPv4 has several, and replaces the first of them, whoever made it.
func TestKernelPlaces(t *testing.T) {
	t.Parallel()
	n, c, eth0, _ := uplink(t)
	r := func(gateway string, protocol uint8) []byte {
		r := NewRoute(10000, prefix("0.0.0.0/0"), addr(gateway), eth0)
		r.Protocol = protocol
		return r.encode()
	}
	r6 := func(gateway string, protocol uint8) []byte {
		r := NewRoute(10000, prefix("::/0"), addr(gateway), eth0)
		r.Protocol = protocol
		return r.encode()
	}
	const create = unix.NLM_F_CREATE
	for _, step := range []struct {
		flags uint16
		body  []byte
		err   error
		want  string
	}{
		{create | unix.NLM_F_EXCL, r("192.0.2.1", 4), nil, "default via 192.0.2.1 dev #2 table 10000 proto 4\n"},
		{create | unix.NLM_F_EXCL, r("192.0.2.2", 116), unix.EEXIST, "default via 192.0.2.1 dev #2 table 10000 proto 4\n"},
		{create | unix.NLM_F_APPEND, r("192.0.2.2", 116), nil, "default via 192.0.2.1 dev #2 table 10000 proto 4\ndefault via 192.0.2.2 dev #2 table 10000 proto 116\n"},
		{create | unix.NLM_F_REPLACE, r("192.0.2.3", 116), nil, "default via 192.0.2.3 dev #2 table 10000 proto 116\ndefault via 192.0.2.2 dev #2 table 10000 proto 116\n"},
		{create | unix.NLM_F_REPLACE, r("192.0.2.2", 116), unix.EEXIST, "default via 192.0.2.3 dev #2 table 10000 proto 116\ndefault via 192.0.2.2 dev #2 table 10000 proto 116\n"},
		{create | unix.NLM_F_EXCL, r6("fd00::1", 116), nil, "default via fd00::1 dev #2 table 10000 proto 116 metric 1024 pref medium\n"},
		{create | unix.NLM_F_EXCL, r6("fd00::2", 4), unix.EEXIST, "default via fd00::1 dev #2 table 10000 proto 116 metric 1024 pref medium\n"},
		// The second gateway's protocol cannot be seen.
		{create | unix.NLM_F_APPEND, r6("fd00::2", 4), nil, "default table 10000 proto 116 metric 1024 pref medium \\ nexthop via fd00::1 dev #2 weight 1 \\ nexthop via fd00::2 dev #2 weight 1\n"},
	} {
		if err := c.change(unix.RTM_NEWROUTE, step.flags, step.body); !errors.Is(err, step.err) {
			t.Errorf("error is %v, want %v", err, step.err)
		}
		checkRoutes(t, n, int(step.body[0]), "10000", step.want)
	}
	// Another's gateway beside ours survives us, and then is in the way.
	_, _, err := c.SyncRoutes(unix.AF_INET6, 10000, []Route{NewRoute(10000, prefix("::/0"), addr("fd00::3"), eth0)})
	if !errors.Is(err, unix.EEXIST) {
		t.Errorf("error is %v", err)
	}
	checkRoutes(t, n, unix.AF_INET6, "10000", "default via fd00::2 dev #2 table 10000 proto 4 metric 1024 pref medium\n")
}

// Routes that stand are never missing from a dump, whatever comes and goes before them.
func TestRoutesDuringChanges(t *testing.T) {
	t.Parallel()
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		n, c, eth0, _ := uplink(t)
		dst := func(i int) netip.Prefix {
			if family == unix.AF_INET {
				return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), 32)
			}
			return netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 1, 14: byte(i >> 8), 15: byte(i)}), 128)
		}
		var standing []Route
		for i := range 800 {
			standing = append(standing, NewRoute(10000, dst(i+500), netip.Addr{}, eth0))
		}
		mustSyncRoutes(t, c, family, 10000, standing, len(standing), 0)
		other := dialIn(t, n)
		stop := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				r := NewRoute(10000, dst(i%500), netip.Addr{}, eth0)
				r.Protocol = 200
				if err := errors.Join(other.change(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, r.encode()),
					other.change(unix.RTM_DELROUTE, 0, r.encode())); err != nil {
					t.Errorf("change routes: %v", err)
				}
			}
		})
		for range 5 {
			routes := slices.DeleteFunc(mustRoutes(t, c, family, 10000), func(r Route) bool { return r.Protocol != Protocol })
			if sorted(lines(routes)) != sorted(lines(standing)) {
				t.Errorf("%d of %d routes seen", len(routes), len(standing))
			}
			mustSyncRoutes(t, c, family, 10000, standing, 0, 0)
		}
		close(stop)
		wg.Wait()
	}
}

// 1,000 routes in main cost those nothing who read another table.
func BenchmarkRoutes(b *testing.B) {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		_, c, eth0, _ := uplink(b)
		for i := range 1000 {
			r := NewRoute(unix.RT_TABLE_MAIN, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), 32), netip.Addr{}, eth0)
			if family == unix.AF_INET6 {
				r = NewRoute(unix.RT_TABLE_MAIN, netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 1, 14: byte(i >> 8), 15: byte(i)}), 128), netip.Addr{}, eth0)
			}
			if err := c.AddRoute(r); err != nil {
				b.Fatal(err)
			}
			if r.Table = 10000; i < 10 {
				if err := c.AddRoute(r); err != nil {
					b.Fatal(err)
				}
			}
		}
		name := map[int]string{unix.AF_INET: "inet", unix.AF_INET6: "inet6"}[family]
		for _, table := range []uint32{10000, unix.RT_TABLE_MAIN} {
			b.Run(fmt.Sprintf("%s/table %d", name, table), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if routes, err := c.Routes(family, table); err != nil || len(routes) < 10 {
						b.Fatalf("%d routes, %v", len(routes), err)
					}
				}
			})
		}
		want := mustRoutes(b, c, family, 10000)
		b.Run(name+"/sync unchanged", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if added, deleted, err := c.SyncRoutes(family, 10000, want); err != nil || len(added)+len(deleted) > 0 {
					b.Fatal(added, deleted, err)
				}
			}
		})
	}
}
