package route

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

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
	if err != nil || !ok || !reflect.DeepEqual(eth0, Link{Index: eth0.Index, Name: "eth0", Up: true, Carrier: true, Changes: eth0.Changes, Kind: "veth", Outside: eth0.Outside, MTU: 1500}) || eth0.Index < 2 || eth0.Outside == 0 {
		t.Fatalf("eth0 is %+v, %v, %v", eth0, ok, err)
	}
	wan, ok, err := c.LinkByName("uplink0")
	if err != nil || !ok || !reflect.DeepEqual(wan, Link{Index: wan.Index, Name: "wan", Other: []string{"uplink0"}, Up: true, Changes: wan.Changes, Kind: "veth", Outside: wan.Outside, MTU: 1500}) || wan.Outside == 0 || wan.Changes <= eth0.Changes {
		t.Fatalf("uplink0 is %+v, %v, %v", wan, ok, err)
	}
	if again, ok, err := c.LinkByIndex(wan.Index); err != nil || !ok || !reflect.DeepEqual(again, wan) {
		t.Errorf("link %d is %+v, %v, %v", wan.Index, again, ok, err)
	}
	links, err := c.Links()
	for _, want := range []Link{eth0, wan, {Index: 1, Name: "lo", Up: true, Carrier: true, MTU: 65536}} {
		if err != nil || !slices.ContainsFunc(links, func(l Link) bool { return reflect.DeepEqual(l, want) }) {
			t.Errorf("links are %v, %v, without %v", links, err, want)
		}
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
