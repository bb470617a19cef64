package route

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

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

// TestAddRouteGatewayElsewhere: a table may lead to a gateway over a link that had its network before, although main leads
// to it over another link now.
func TestAddRouteGatewayElsewhere(t *testing.T) {
	t.Parallel()
	n, c, _, peer := uplink(t)
	nettest.Veth(t, n, "lan0", peer, "lan0")
	n.IP(t, "addr add fd00::77:1/112 dev lan0 nodad")
	n.IP(t, "-6 route add fd50::/32 via fd00::77:9")
	n.IP(t, "addr add 198.51.100.1/24 dev lan0")
	n.IP(t, "route add 10.0.0.0/8 via 198.51.100.9")
	n.IP(t, "addr add 198.51.100.7/16 dev eth0")
	n.IP(t, "addr add 198.51.100.2/32 dev lan0")
	for _, addr := range []string{"fd00::77:1/112", "198.51.100.1/24"} {
		n.IP(t, "addr del "+addr+" dev lan0") // both gateways are eth0's now
	}
	for family, prefix := range map[int]string{unix.AF_INET: "10.0.0.0/8", unix.AF_INET6: "fd50::/32"} {
		var want []Route
		for _, r := range mustRoutes(t, c, family, unix.RT_TABLE_MAIN) {
			if r.Dst == netip.MustParsePrefix(prefix) {
				want = append(want, r.In(10000, netip.Addr{}))
			}
		}
		if len(want) != 1 {
			t.Fatalf("main has %d routes to %s", len(want), prefix)
		}
		for range 2 {
			if _, _, err := c.SyncRoutes(family, 10000, want); err != nil {
				t.Error(err)
			}
			if got := mustRoutes(t, c, family, 10000); len(got) != 1 || got[0].Gateway != want[0].Gateway || got[0].Index != want[0].Index {
				t.Errorf("routes are\n%swant\n%s", lines(got), want)
			}
		}
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
