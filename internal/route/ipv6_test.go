package route

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// advert is a router advertisement, RFC 4861 section 4.2.
type advert struct {
	lifetime uint16 // of the router, in seconds
	pref     uint8
	prefix   string // on the link and for addresses
	valid    uint32 // seconds
	route    string // RFC 4191
}

// advertise sends a from an address of the link eth0 of n. The kernel at the far end does the rest.
func advertise(t testing.TB, n *nettest.Namespace, from string, a advert) {
	t.Helper()
	link, _, err := dialIn(t, n).LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	b := []byte{134, 0, 0, 0, 64, a.pref << 3}
	b = binary.BigEndian.AppendUint16(b, a.lifetime)
	b = append(b, make([]byte, 8)...)
	if a.prefix != "" {
		p := prefix(a.prefix)
		b = append(b, 3, 4, byte(p.Bits()), 0xc0)
		b = binary.BigEndian.AppendUint32(b, a.valid)
		b = binary.BigEndian.AppendUint32(b, a.valid)
		b = append(b, 0, 0, 0, 0)
		b = append(b, p.Addr().AsSlice()...)
	}
	if a.route != "" {
		p := prefix(a.route)
		b = append(b, 24, 3, byte(p.Bits()), a.pref<<3)
		b = binary.BigEndian.AppendUint32(b, uint32(a.lifetime))
		b = append(b, p.Addr().AsSlice()...)
	}
	n.Do(func() {
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMPV6)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		zone := uint32(link.Index)
		if err := errors.Join(
			unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_HOPS, 255),
			unix.Bind(fd, &unix.SockaddrInet6{Addr: addr(from).As16(), ZoneId: zone}),
			unix.Sendto(fd, b, 0, &unix.SockaddrInet6{Addr: addr("ff02::1").As16(), ZoneId: zone}),
		); err != nil {
			t.Fatal(err)
		}
	})
}

// until reads events until ok.
func until(t testing.TB, w *Watcher, ok func() bool) {
	t.Helper()
	late := time.AfterFunc(time.Minute, func() { w.Close() })
	defer late.Stop()
	for !ok() {
		if _, err := w.Next(); err != nil {
			t.Fatal("it does not happen:", err)
		}
	}
}

// The routes of two routers are copied, get metrics of their own, and follow.
func TestRouterAdvertisements(t *testing.T) {
	t.Parallel()
	n, c, eth0, peer := uplink(t)
	n.Run(t, "sysctl", "-qw", "net.ipv6.conf.eth0.accept_ra_rt_info_max_plen=64", "net.ipv6.conf.eth0.use_tempaddr=2", "net.ipv6.conf.eth0.dad_transmits=0")
	peer.IP(t, "addr add fe80::1/64 dev eth0 nodad")
	peer.IP(t, "addr add fe80::2/64 dev eth0 nodad")
	w := watch(t, n, Routes6|Addresses6)
	main := func() []Route {
		return slices.DeleteFunc(mustRoutes(t, c, unix.AF_INET6, unix.RT_TABLE_MAIN), func(r Route) bool {
			return r.Index != eth0 || r.Expires == 0
		})
	}
	const src = "fd00::5"
	sync := func(wantAdded, wantDeleted int) {
		t.Helper()
		var want []Route
		for _, r := range main() {
			want = append(want, r.In(10000, addr(src)))
		}
		mustSyncRoutes(t, c, unix.AF_INET6, 10000, Spread(want), wantAdded, wantDeleted)
	}
	check := func(want string) {
		t.Helper()
		checkRoutes(t, n, unix.AF_INET6, "10000", want)
		for _, r := range mustRoutes(t, c, unix.AF_INET6, 10000) {
			if r.Expires == 0 {
				t.Errorf("%q is forever", r)
			}
		}
	}

	advertise(t, peer, "fe80::1", advert{lifetime: 1800, prefix: "2001:db8:1::/64", valid: 3600, route: "2001:db8:ff::/48"})
	advertise(t, peer, "fe80::2", advert{lifetime: 1800, pref: PrefHigh, route: "2001:db8:ff::/48"})
	until(t, w, func() bool { return len(main()) == 5 })
	sync(5, 0)
	check(`2001:db8:1::/64 dev #2 table 10000 proto 116 src fd00::5 metric 256 pref medium
2001:db8:ff::/48 via fe80::2 dev #2 table 10000 proto 116 src fd00::5 metric 1024 pref high
2001:db8:ff::/48 via fe80::1 dev #2 table 10000 proto 116 src fd00::5 metric 1025 pref medium
default via fe80::2 dev #2 table 10000 proto 116 src fd00::5 metric 1024 hoplimit 64 pref high
default via fe80::1 dev #2 table 10000 proto 116 src fd00::5 metric 1025 hoplimit 64 pref medium
`)
	quiet(t, n, func() { sync(0, 0) })
	for _, r := range mustRoutes(t, c, unix.AF_INET6, 10000) {
		if limit := map[bool]int{true: 3600, false: 1800}[r.Dst.Bits() == 64]; r.Expires <= limit/2 || r.Expires > limit {
			t.Errorf("%q ends in %d s, want %d", r, r.Expires, limit)
		}
	}

	// A longer lifetime is taken over in place.
	advertise(t, peer, "fe80::1", advert{lifetime: 9000, prefix: "2001:db8:1::/64", valid: 36000, route: "2001:db8:ff::/48"})
	until(t, w, func() bool {
		return slices.ContainsFunc(main(), func(r Route) bool { return r.Gateway == addr("fe80::1") && r.Dst.Bits() == 0 && r.Expires > 8000 })
	})
	quiet(t, n, func() { sync(0, 0) })
	for _, r := range mustRoutes(t, c, unix.AF_INET6, 10000) {
		if got, want := r.Expires > 4000, r.Gateway != addr("fe80::2"); got != want {
			t.Errorf("%q ends in %d s", r, r.Expires)
		}
	}

	// The preferred router says goodbye, and the other one's routes take the places.
	advertise(t, peer, "fe80::2", advert{lifetime: 0, pref: PrefHigh, route: "2001:db8:ff::/48"})
	until(t, w, func() bool { return len(main()) == 3 })
	sync(2, 4)
	check(`2001:db8:1::/64 dev #2 table 10000 proto 116 src fd00::5 metric 256 pref medium
2001:db8:ff::/48 via fe80::1 dev #2 table 10000 proto 116 src fd00::5 metric 1024 pref medium
default via fe80::1 dev #2 table 10000 proto 116 src fd00::5 metric 1024 hoplimit 64 pref medium
`)

	// The advertised prefix has brought a temporary address and another.
	var temporary, stable int
	for _, a := range mustAddresses(t, c) {
		if a.Addr.Is6() && prefix("2001:db8:1::/64").Contains(a.Addr) {
			if a.Flags&unix.IFA_F_TEMPORARY != 0 {
				temporary++
			} else {
				stable++
			}
		}
	}
	if temporary != 1 || stable != 1 {
		t.Errorf("%d temporary and %d other addresses", temporary, stable)
	}
}

func mustAddresses(t testing.TB, c *Conn) []Address {
	t.Helper()
	addrs, err := c.Addresses(unix.AF_UNSPEC)
	if err != nil {
		t.Fatal(err)
	}
	return addrs
}

// Whatever lifetime there is, afterwards there is the wanted one.
func TestLifetimes(t *testing.T) {
	t.Parallel()
	_, c, eth0, _ := uplink(t)
	for i, test := range []struct {
		have, want int
		alone      bool
	}{{0, 0, true}, {1000, 1000, true}, {1000, 5000, true}, {5000, 1000, true}, {1000, 0, true}, {0, 1000, true}, {0, 1000, false}, {1000, 0, false}, {1000, 5000, false}} {
		for j, gateway := range []netip.Addr{{}, addr("fd00::1")} {
			r := NewRoute(10000, netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 9, byte(i), byte(j)}), 64), gateway, eth0)
			r.Expires = test.have
			flags := uint16(unix.NLM_F_CREATE | unix.NLM_F_EXCL)
			if !test.alone {
				// Another's stands before it.
				flags = unix.NLM_F_CREATE | unix.NLM_F_APPEND
				beside := NewRoute(10000, r.Dst, netip.Addr{}, 1)
				beside.Protocol = 200
				if err := c.AddRoute(beside); err != nil {
					t.Fatal(err)
				}
			}
			if err := c.change(unix.RTM_NEWROUTE, flags, r.encode()); err != nil {
				t.Fatal(err)
			}
			before := mustRoutes(t, c, unix.AF_INET6, 10000)
			r.Expires = test.want
			if err := c.AddRoute(r); err != nil {
				t.Error(err)
			}
			after := mustRoutes(t, c, unix.AF_INET6, 10000)
			if sorted(lines(before)) != sorted(lines(after)) {
				t.Errorf("routes are\n%swant\n%s", lines(after), lines(before))
			}
			got := after[slices.IndexFunc(after, r.Equal)].Expires
			if got > test.want || got < test.want/2 {
				t.Errorf("%d s instead of %d became %d", test.want, test.have, got)
			}
		}
	}
}

// A router that is advertised for a few seconds only, again and again, never lapses.
func TestLifetimeShort(t *testing.T) {
	t.Parallel()
	_, c, eth0, _ := uplink(t)
	r := NewRoute(10000, prefix("::/0"), addr("fd00::1"), eth0)
	r.Expires = 2
	mustSyncRoutes(t, c, unix.AF_INET6, 10000, []Route{r}, 1, 0)
	r.Expires = 4
	mustSyncRoutes(t, c, unix.AF_INET6, 10000, []Route{r}, 0, 0)
	if got := mustRoutes(t, c, unix.AF_INET6, 10000); len(got) != 1 || got[0].Expires < 3 {
		t.Errorf("routes are\n%s", lines(got))
	}
	for _, test := range []struct {
		a, b int
		same bool
	}{{0, 0, true}, {0, 1000, false}, {1000, 0, false}, {1, 1, true}, {2, 3, false}, {3, 4, false}, {5, 6, true}, {6, 8, false}, {8, 10, true}, {998, 1000, true}, {997, 1000, false}} {
		if got := sameEnd(test.a, test.b); got != test.same {
			t.Errorf("%d s and %d s end together: %v", test.a, test.b, got)
		}
	}
}

// A lifetime that is over leaves a route for a while that is none.
func TestLifetimeOver(t *testing.T) {
	t.Parallel()
	n, c, eth0, _ := uplink(t)
	r := NewRoute(10000, prefix("::/0"), addr("fd00::1"), eth0)
	r.Expires = 1
	mustSyncRoutes(t, c, unix.AF_INET6, 10000, []Route{r}, 1, 0)
	for deadline := time.Now().Add(20 * time.Second); len(mustRoutes(t, c, unix.AF_INET6, 10000)) > 0; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("its lifetime is never over")
		}
	}
	if !strings.Contains(ipRoutes(t, n, unix.AF_INET6, "10000"), "expires -") {
		t.Log("the kernel has taken it out")
	}
	r.Expires = 1000
	if _, _, err := c.SyncRoutes(unix.AF_INET6, 10000, []Route{r}); err != nil {
		t.Error(err)
	}
	if got := mustRoutes(t, c, unix.AF_INET6, 10000); len(got) != 1 || !got[0].Equal(r) || got[0].Expires < 500 {
		t.Errorf("routes are\n%s", lines(got))
	}
}

func TestSpread(t *testing.T) {
	t.Parallel()
	route := func(dst, gateway string, metric uint32, pref uint8) Route {
		r := NewRoute(7, prefix(dst), addr(gateway), 2)
		r.Metric, r.Pref = metric, pref
		return r
	}
	expiring := route("::/0", "fe80::2", 1024, PrefMedium)
	expiring.Expires = 5
	for _, test := range []struct {
		name   string
		routes []Route
		want   string
	}{
		{"none", nil, ""},
		{"by preference", []Route{route("::/0", "fe80::1", 0, PrefLow), route("::/0", "fe80::2", 0, PrefMedium), route("::/0", "fe80::3", 1024, PrefHigh), expiring},
			`default via fe80::3 dev #2 table 7 proto 116 metric 1024 pref high
default via fe80::2 dev #2 table 7 proto 116 metric 1025 pref medium
default via fe80::1 dev #2 table 7 proto 116 metric 1026 pref low
`},
		{"with one behind", []Route{route("::/0", "fe80::3", 1025, PrefHigh), route("::/0", "fe80::1", 0, 0), route("::/0", "fe80::2", 0, 0), route("fd00::/8", "fe80::2", 0, 0)},
			`default via fe80::1 dev #2 table 7 proto 116 metric 1024 pref medium
default via fe80::2 dev #2 table 7 proto 116 metric 1025 pref medium
fd00::/8 via fe80::2 dev #2 table 7 proto 116 metric 1024 pref medium
default via fe80::3 dev #2 table 7 proto 116 metric 1026 pref high
`},
		{"inet", []Route{route("0.0.0.0/0", "10.0.0.1", 0, 0), route("0.0.0.0/0", "10.0.0.2", 0, 0), route("0.0.0.0/0", "10.0.0.1", 0, 0)},
			"default via 10.0.0.1 dev #2 table 7 proto 116\ndefault via 10.0.0.2 dev #2 table 7 proto 116 metric 1\n"},
		{"at the end", []Route{route("0.0.0.0/0", "10.0.0.1", 1<<32-1, 0), route("0.0.0.0/0", "10.0.0.2", 1<<32-1, 0)},
			"default via 10.0.0.1 dev #2 table 7 proto 116 metric 4294967295\ndefault via 10.0.0.2 dev #2 table 7 proto 116 metric 4294967295\n"},
	} {
		if got := lines(Spread(test.routes)); sorted(got) != sorted(test.want) {
			t.Errorf("%s: routes are\n%swant\n%s", test.name, got, test.want)
		}
	}
}

// The states of addresses as the kernel makes them, and which of them can be a source.
func TestAddressState(t *testing.T) {
	t.Parallel()
	n, c, eth0, peer := uplink(t)
	n.Run(t, "sysctl", "-qw", "net.ipv6.neigh.eth0.retrans_time_ms=100", "net.ipv6.conf.eth0.optimistic_dad=1")
	w := watch(t, n, Addresses6)
	find := func(a string) Address {
		addrs := mustAddresses(t, c)
		return addrs[slices.IndexFunc(addrs, func(have Address) bool { return have.Addr == addr(a) })]
	}
	peer.IP(t, "addr add fd00::77/64 dev eth0 nodad")
	n.IP(t, "addr add fd00::77/64 dev eth0")
	until(t, w, func() bool { return find("fd00::77").DADFailed() })
	n.IP(t, "addr add fd00::78/64 dev eth0")
	until(t, w, func() bool { return !find("fd00::78").Tentative() })
	n.IP(t, "addr add fd00::79/64 dev eth0 nodad preferred_lft 0 valid_lft 1000")
	carrierLost(t, n, c, eth0, peer)
	n.Run(t, "sysctl", "-qw", "net.ipv6.conf.eth0.dad_transmits=1000") // IPv6 may hear later that the carrier is lost
	n.IP(t, "addr add fd00::7a/64 dev eth0")
	n.IP(t, "addr add fd00::7b/64 dev eth0 optimistic")
	for _, test := range []struct {
		addr, want string
		usable     bool
	}{
		{"192.0.2.5", "", true},
		{"192.0.2.6", "", true}, // secondary
		{"fd00::5", "", true},
		{"fd00::77", "tentative failed", false},
		{"fd00::78", "", true},
		{"fd00::79", "", true}, // deprecated
		{"fd00::7a", "tentative", false},
		{"fd00::7b", "", true},
	} {
		a := find(test.addr)
		var got []string
		for _, state := range []struct {
			is   bool
			name string
		}{{a.Tentative(), "tentative"}, {a.DADFailed(), "failed"}} {
			if state.is {
				got = append(got, state.name)
			}
		}
		if got := strings.Join(got, " "); got != test.want {
			t.Errorf("%s is %q, want %q (flags %#x)", test.addr, got, test.want, a.Flags)
		}
		dst := netip.PrefixFrom(a.Addr, 8).Masked()
		err := c.AddRoute(NewRoute(10000, dst, netip.Addr{}, eth0).In(10000, a.Addr))
		if test.usable && err != nil || !test.usable && !errors.Is(err, unix.EINVAL) {
			t.Errorf("route with source %s: %v", test.addr, err)
		}
		if err := c.FlushTable(unix.AF_INET6, 10000); err != nil {
			t.Error(err)
		}
	}
}

// The rules that lead to a table, and away from it when it has no route.
func TestRuleChain(t *testing.T) {
	t.Parallel()
	for family, addr := range map[int]string{unix.AF_INET: "192.0.2.5/32", unix.AF_INET6: "fd00::5/128"} {
		n, c := dial(t)
		rule := func(priority, table uint32) Rule {
			return Rule{Priority: priority, Src: prefix(addr), Table: table, Protocol: Protocol}
		}
		want := []Rule{rule(9998, 10000), rule(9999, unix.RT_TABLE_MAIN), rule(10000, 10000), rule(10001, 0), {Priority: 15000, Oif: "eth0", Table: 10000, Protocol: Protocol}}
		want[0].MinLength, want[1].MinLength, want[3].Action = 1, 1, Unreachable
		mustSync(t, c, family, ours, want, len(want), 0)
		checkRules(t, n, family, strings.ReplaceAll(`9998: from A lookup 10000 suppress_prefixlength 0 proto 116
9999: from A lookup main suppress_prefixlength 0 proto 116
10000: from A lookup 10000 proto 116
10001: from A unreachable proto 116
15000: from all oif eth0 [detached] lookup 10000 proto 116
`, "A", prefix(addr).Addr().String()))
		mustSync(t, c, family, ours, want, 0, 0)
		mustSync(t, c, family, ours, want[2:3], 0, 4)
		checkRules(t, n, family, fmt.Sprintf("10000: from %v lookup 10000 proto 116\n", prefix(addr).Addr()))
	}
}
