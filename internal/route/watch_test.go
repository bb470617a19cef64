package route

import (
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

const allGroups = Links | Addresses4 | Addresses6 | Rules4 | Rules6 | Routes4 | Routes6 | Nexthops

func watch(t *testing.T, n *nettest.Namespace, groups Groups) *Watcher {
	t.Helper()
	var w *Watcher
	var err error
	n.Do(func() { w, err = Watch(groups) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() }) // again for those that a test has closed
	return w
}

// await returns the events up to the one that is wanted.
func await(t *testing.T, w *Watcher, want Event) []Event {
	t.Helper()
	var all []Event
	late := time.AfterFunc(time.Minute, func() { w.Close() })
	defer late.Stop()
	for !slices.Contains(all, want) {
		events, err := w.Next()
		if err != nil {
			t.Fatalf("no %+v: %v; got\n%+v", want, err, all)
		}
		for _, e := range events {
			all = append(all, e.bare())
		}
	}
	return all
}

// bare is the event without the route and without who asked for it, which have tests of their own.
func (e Event) bare() Event {
	e.Route, e.Network, e.Replaced, e.Port = nil, netip.Prefix{}, false, 0
	return e
}

func ipBatch(t *testing.T, n *nettest.Namespace, commands string) {
	t.Helper()
	cmd := exec.Command("ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(commands)
	cmd.Stderr = os.Stderr
	if err := n.Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
}

func TestWatch(t *testing.T) {
	t.Parallel()
	n, c := dial(t)
	peer := nettest.New(t, "peer")
	w := watch(t, n, allGroups)
	nettest.Veth(t, n, "eth0", peer, "eth0")
	eth0, _, err := c.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	i := eth0.Index
	addr, addr6 := netip.MustParseAddr("192.0.2.5"), netip.MustParseAddr("fd00::5")
	for _, step := range []struct {
		command string
		want    Event
	}{
		{"link set eth0 mtu 1400", Event{Kind: LinkChanged, Index: i, Name: "eth0"}},
		{"addr add 192.0.2.5 peer 192.0.2.6/32 dev eth0", Event{Kind: AddressChanged, Family: unix.AF_INET, Index: i, Addr: addr}},
		{"addr del 192.0.2.5 peer 192.0.2.6/32 dev eth0", Event{Kind: AddressChanged, Family: unix.AF_INET, Index: i, Addr: addr, Deleted: true}},
		{"addr add fd00::5/64 dev eth0 nodad", Event{Kind: AddressChanged, Family: unix.AF_INET6, Index: i, Addr: addr6}},
		{"addr del fd00::5/64 dev eth0", Event{Kind: AddressChanged, Family: unix.AF_INET6, Index: i, Addr: addr6, Deleted: true}},
		{"rule add pref 77 from 192.0.2.5 lookup 4294967295 protocol 116", Event{Kind: RuleChanged, Family: unix.AF_INET, Priority: 77, Table: 4294967295, Protocol: Protocol}},
		{"rule del pref 77 from 192.0.2.5 lookup 4294967295", Event{Kind: RuleChanged, Family: unix.AF_INET, Priority: 77, Table: 4294967295, Protocol: Protocol, Deleted: true}},
		{"-6 rule add pref 78 from fd00::5 lookup 10000", Event{Kind: RuleChanged, Family: unix.AF_INET6, Priority: 78, Table: 10000}},
		{"route add 198.51.100.0/24 dev eth0 table 10000 proto 116", Event{Kind: RouteChanged, Family: unix.AF_INET, Table: 10000, Index: i, Protocol: Protocol}},
		{"route del 198.51.100.0/24 dev eth0 table 10000", Event{Kind: RouteChanged, Family: unix.AF_INET, Table: 10000, Index: i, Protocol: Protocol, Deleted: true}},
		{"route add 198.51.100.0/24 dev eth0", Event{Kind: RouteChanged, Family: unix.AF_INET, Table: unix.RT_TABLE_MAIN, Index: i, Protocol: unix.RTPROT_BOOT}},
		{"route replace 198.51.100.0/24 dev eth0 proto dhcp", Event{Kind: RouteChanged, Family: unix.AF_INET, Table: unix.RT_TABLE_MAIN, Index: i, Protocol: unix.RTPROT_DHCP}},
		{"route append 198.51.100.0/24 dev eth0 proto static", Event{Kind: RouteChanged, Family: unix.AF_INET, Table: unix.RT_TABLE_MAIN, Index: i, Protocol: unix.RTPROT_STATIC, Appended: true}},
		{"route append 198.51.100.128/25 dev eth0", Event{Kind: RouteChanged, Family: unix.AF_INET, Table: unix.RT_TABLE_MAIN, Index: i, Protocol: unix.RTPROT_BOOT}},
		{"route add 203.0.113.0/24 proto static nexthop dev eth0 nexthop dev lo", Event{Kind: RouteChanged, Family: unix.AF_INET, Table: unix.RT_TABLE_MAIN, Protocol: unix.RTPROT_STATIC}},
		{"route del 203.0.113.0/24", Event{Kind: RouteChanged, Family: unix.AF_INET, Table: unix.RT_TABLE_MAIN, Protocol: unix.RTPROT_STATIC, Deleted: true}},
		{"nexthop add id 5 via 198.51.100.9 dev eth0", Event{Kind: NexthopChanged, Nexthop: 5}},
		{"nexthop del id 5", Event{Kind: NexthopChanged, Nexthop: 5, Deleted: true}},
		{"route add unreachable default table 10000", Event{Kind: RouteChanged, Family: unix.AF_INET, Table: 10000, Protocol: unix.RTPROT_BOOT}},
		{"-6 route add fd01::/64 dev eth0", Event{Kind: RouteChanged, Family: unix.AF_INET6, Table: unix.RT_TABLE_MAIN, Index: i, Protocol: unix.RTPROT_BOOT}},
		{"-6 route append fd03::/64 dev eth0", Event{Kind: RouteChanged, Family: unix.AF_INET6, Table: unix.RT_TABLE_MAIN, Index: i, Protocol: unix.RTPROT_BOOT, Appended: true}},
		{"-6 route add fd02::/64 nexthop via fd01::1 dev eth0 nexthop via fd01::2 dev eth0", Event{Kind: RouteChanged, Family: unix.AF_INET6, Table: unix.RT_TABLE_MAIN, Protocol: unix.RTPROT_BOOT}},
		{"link set eth0 down", Event{Kind: LinkChanged, Index: i, Name: "eth0", Down: true}},
		{"link set eth0 name wan0", Event{Kind: LinkChanged, Index: i, Name: "wan0", Down: true}},
		{"link set wan0 netns " + peer.Path() + " name back0", Event{Kind: LinkGone, Index: i, Name: "wan0", Down: true}},
	} {
		n.IP(t, step.command)
		events := await(t, w, step.want)
		if step.want.Kind != LinkGone && slices.ContainsFunc(events, func(e Event) bool { return e.Kind == LinkGone || e.Kind == Overrun }) {
			t.Errorf("%s: events are %+v", step.command, events)
		}
	}
	peer.IP(t, "link del back0")
}

// TestMade: an event tells whose change it is of. The kernel deletes IPv6 routes with their link, for nobody.
func TestMade(t *testing.T) {
	n := nettest.New(t, "host")
	nettest.Veth(t, n, "eth0", nettest.New(t, "peer"), "eth0")
	c := dialIn(t, n)
	w := watch(t, n, Routes6)
	n.IP(t, "-6 route add fd01::/64 dev eth0")
	n.IP(t, "-6 route add fd02::/64 dev eth0")
	n.IP(t, "-6 route add fd03::/64 dev eth0")
	n.Do(func() {
		routes, err := c.Routes(unix.AF_INET6, unix.RT_TABLE_MAIN)
		at := slices.IndexFunc(routes, func(r Route) bool { return r.Dst == netip.MustParsePrefix("fd01::/64") })
		if err != nil || at < 0 {
			t.Fatal(routes, err)
		}
		if _, err := c.DeleteRoute(routes[at]); err != nil {
			t.Fatal(err)
		}
	})
	n.IP(t, "-6 route del fd02::/64 dev eth0")
	n.IP(t, "link set eth0 down")
	made := make(map[string]bool)
	for len(made) < 3 {
		events, err := w.Next()
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range events {
			if e.Deleted && strings.HasPrefix(e.Route.Dst.String(), "fd0") {
				made[e.Route.Dst.String()] = c.Made(e)
			}
		}
	}
	if want := map[string]bool{"fd01::/64": true, "fd02::/64": false, "fd03::/64": false}; !maps.Equal(made, want) {
		t.Errorf("made are %v, want %v", made, want)
	}
}

func TestWatchGroups(t *testing.T) {
	t.Parallel()
	n, _ := dial(t)
	w := watch(t, n, Rules4)
	n.IP(t, "addr add 192.0.2.5/24 dev lo")
	n.IP(t, "-6 rule add lookup 99")
	n.IP(t, "rule add pref 77 lookup 100")
	want := Event{Kind: RuleChanged, Family: unix.AF_INET, Priority: 77, Table: 100}
	if events := await(t, w, want); len(events) != 1 {
		t.Errorf("events are %+v, want the rule alone", events)
	}
}

func TestWatchBridgePort(t *testing.T) {
	t.Parallel()
	n, c := dial(t)
	peer := nettest.New(t, "peer")
	nettest.Veth(t, n, "eth0", peer, "eth0")
	n.IP(t, "link add br0 type bridge")
	eth0, _, err := c.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	w := watch(t, n, Links)
	n.IP(t, "link set eth0 master br0")
	n.IP(t, "link set eth0 nomaster")
	n.IP(t, "link del eth0")
	var gone int
	for _, e := range await(t, w, Event{Kind: LinkGone, Index: eth0.Index, Name: "eth0", Down: true}) {
		if e.Kind == LinkGone {
			gone++
		}
	}
	if gone != 1 {
		t.Errorf("the link was reported gone %d times: leaving the bridge is not that", gone)
	}
}

func TestWatchOverrun(t *testing.T) {
	t.Parallel()
	n, _ := dial(t)
	w := watch(t, n, Addresses4)
	if err := unix.SetsockoptInt(int(fdOf(t, w)), unix.SOL_SOCKET, unix.SO_RCVBUF, 4096); err != nil {
		t.Fatal(err)
	}
	var add, del strings.Builder
	for i := range 500 {
		fmt.Fprintf(&add, "addr add 10.0.%d.%d/32 dev lo\n", i/250, i%250+1)
		fmt.Fprintf(&del, "addr del 10.0.%d.%d/32 dev lo\n", i/250, i%250+1)
	}
	for range 3 {
		ipBatch(t, n, add.String())
		if events, err := w.Next(); err != nil || !slices.Equal(events, []Event{{Kind: Overrun}}) {
			t.Fatalf("after 500 addresses: %+v, %v; want an overrun alone", events, err)
		}
		// The next change is told: the kernel drops nothing any more.
		n.IP(t, "addr add 192.0.2.5/32 dev lo")
		want := Event{Kind: AddressChanged, Family: unix.AF_INET, Index: 1, Addr: netip.MustParseAddr("192.0.2.5")}
		if events := await(t, w, want); len(events) != 1 {
			t.Errorf("events are %+v, want one", events)
		}
		n.IP(t, "addr del 192.0.2.5/32 dev lo")
		await(t, w, Event{Kind: AddressChanged, Family: unix.AF_INET, Index: 1, Addr: netip.MustParseAddr("192.0.2.5"), Deleted: true})
		ipBatch(t, n, del.String())
		if events, err := w.Next(); err != nil || !slices.Equal(events, []Event{{Kind: Overrun}}) {
			t.Fatalf("after 500 addresses: %+v, %v; want an overrun alone", events, err)
		}
	}
}

// The buffer that Watch asks for holds a burst that nobody reads meanwhile.
func TestWatchBurst(t *testing.T) {
	t.Parallel()
	n, _ := dial(t)
	w := watch(t, n, Addresses4)
	var add strings.Builder
	for i := range 2000 {
		fmt.Fprintf(&add, "addr add 10.0.%d.%d/32 dev lo\n", i/250, i%250+1)
	}
	ipBatch(t, n, add.String())
	last := Event{Kind: AddressChanged, Family: unix.AF_INET, Index: 1, Addr: netip.MustParseAddr("10.0.7.250")}
	if events := await(t, w, last); len(events) != 2000 {
		t.Errorf("%d events for 2,000 addresses", len(events))
	}
}

func fdOf(t *testing.T, w *Watcher) (fd uintptr) {
	t.Helper()
	if err := w.conn.Control(func(f uintptr) { fd = f }); err != nil {
		t.Fatal(err)
	}
	return fd
}

func TestWatchClose(t *testing.T) {
	t.Parallel()
	n, _ := dial(t)
	w := watch(t, n, allGroups)
	failed := make(chan error)
	go func() {
		_, err := w.Next()
		failed <- err
	}()
	time.Sleep(20 * time.Millisecond) // most likely Next then waits; either way it has to end
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-failed:
		if err != os.ErrClosed {
			t.Errorf("Next ended with %v", err)
		}
	case <-time.After(time.Minute):
		t.Fatal("Next goes on after Close")
	}
	if _, err := w.Next(); err != os.ErrClosed {
		t.Errorf("Next after Close: %v", err)
	}
}

// The corpus has a message of each kind as kernel 6.18 sends it.
func FuzzParseEvents(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, e := range parseEvents(b) {
			if strings.HasPrefix(e.Kind.String(), "event") {
				t.Errorf("event of no kind: %+v", e)
			}
		}
		// The bodies of dumps go through the same parsers, whatever their type.
		checkBody(t, b)
		checkBody(t, b[min(unix.SizeofNlMsghdr, len(b)):])
	})
}

func checkBody(t *testing.T, b []byte) {
	if r, err := parseRule(b); err == nil {
		_ = r.String() // must not panic
	}
	if a, _, err := parseAddress(b); err == nil {
		_ = a.Network().String() // must not panic
	}
	_, _, _ = parseLink(b) // must not panic
	r, _, err := parseRoute(b)
	if err != nil {
		return
	}
	_ = r.String()                     // must not panic
	_ = r.In(7, netip.Addr{}).Equal(r) // likewise
	// What was read is what would be written. Of a nexthop object it is the number alone.
	if r.check() != nil || r.NexthopID != 0 {
		return
	}
	if again, _, err := parseRoute(r.encode()); err != nil || !again.Equal(r) {
		t.Errorf("%q is written as %q, %v", r, again, err)
	}
}

// Each message of the corpus gives the event that it was captured for.
func TestParseEvents(t *testing.T) {
	for name, want := range map[string]Event{
		"newlink":             {Kind: LinkChanged, Index: 2, Name: "eth0"},
		"dellink":             {Kind: LinkGone, Index: 2, Name: "eth0", Down: true},
		"dellink-bridge":      {Kind: LinkChanged, Index: 2, Name: "eth0"},
		"newaddr-peer":        {Kind: AddressChanged, Family: unix.AF_INET, Index: 2, Addr: netip.MustParseAddr("192.0.2.5")},
		"deladdr":             {Kind: AddressChanged, Family: unix.AF_INET, Index: 2, Addr: netip.MustParseAddr("192.0.2.5"), Deleted: true},
		"newaddr6":            {Kind: AddressChanged, Family: unix.AF_INET6, Index: 2, Addr: netip.MustParseAddr("fd00::5")},
		"newrule":             {Kind: RuleChanged, Family: unix.AF_INET, Priority: 10000, Table: 4294967295, Protocol: Protocol},
		"delrule6":            {Kind: RuleChanged, Family: unix.AF_INET6, Priority: 32765, Table: 10000, Deleted: true},
		"newroute":            {Kind: RouteChanged, Family: unix.AF_INET, Table: 10000, Index: 2, Protocol: unix.RTPROT_BOOT},
		"newroute6-expires":   {Kind: RouteChanged, Family: unix.AF_INET6, Table: unix.RT_TABLE_MAIN, Index: 2, Protocol: unix.RTPROT_BOOT},
		"newroute6-multipath": {Kind: RouteChanged, Family: unix.AF_INET6, Table: 10000, Protocol: Protocol},
		"newroute6-encap":     {Kind: RouteChanged, Family: unix.AF_INET6, Table: 10000, Index: 2, Protocol: Protocol},
		"newroute6-from":      {Kind: RouteChanged, Family: unix.AF_INET6, Table: 10000, Index: 2, Protocol: Protocol},
		"newroute-via":        {Kind: RouteChanged, Family: unix.AF_INET, Table: 10000, Index: 2, Protocol: Protocol},
		"newroute-metrics":    {Kind: RouteChanged, Family: unix.AF_INET, Table: 10000, Index: 2, Protocol: Protocol},
		"newroute-nhid":       {Kind: RouteChanged, Family: unix.AF_INET, Table: 10000, Index: 2, Protocol: Protocol},
		"delroute-nexthops":   {Kind: RouteChanged, Family: unix.AF_INET, Table: 10000, Protocol: unix.RTPROT_BOOT, Deleted: true},
	} {
		got := parseEvents(seed(t, name))
		for i := range got {
			if (got[i].Route != nil) != (want.Kind == RouteChanged) {
				t.Errorf("%s: the route is %v", name, got[i].Route)
			}
			got[i] = got[i].bare()
		}
		if !slices.Equal(got, []Event{want}) {
			t.Errorf("%s: %+v, want %+v", name, got, want)
		}
		// Cut anywhere a message is not taken for a shorter one.
		whole := seed(t, name)
		for n := 1; n < len(whole); n++ {
			if got := parseEvents(whole[:n]); !slices.Equal(got, []Event{{Kind: Overrun}}) {
				t.Fatalf("%s, first %d bytes: %+v, want an overrun", name, n, got)
			}
		}
	}
}

// seed reads a file of the fuzz corpus.
func seed(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile("testdata/fuzz/FuzzParseEvents/" + name)
	if err != nil {
		t.Fatal(err)
	}
	quoted, ok := strings.CutPrefix(strings.TrimSpace(string(text)), "go test fuzz v1\n[]byte(")
	s, err := strconv.Unquote(strings.TrimSuffix(quoted, ")"))
	if !ok || err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return []byte(s)
}

// TestWatchHasNews: what happened is news until it was handed over, and the next call found nothing more.
func TestWatchHasNews(t *testing.T) {
	t.Parallel()
	n := nettest.New(t, "host")
	w := watch(t, n, Addresses4)
	if w.HasNews() {
		t.Error("before anything happened")
	}
	n.IP(t, "address add 192.0.2.7/32 dev lo")
	if !w.HasNews() {
		t.Error("not after an address came")
	}
	if _, err := w.Next(); err != nil {
		t.Fatal(err)
	}
	if !w.HasNews() {
		t.Error("not while the event is in hand")
	}
	if err := w.SetDeadline(time.Now().Add(time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if events, err := w.Next(); err == nil {
		t.Fatalf("got %+v", events)
	}
	if w.HasNews() {
		t.Error("after all was handed over")
	}
	w.Close()
	if w.HasNews() {
		t.Error("of a watcher that is closed")
	}
}
