package route

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestTogether: of very many routes and rules in a few sends each that the kernel refuses is named, with the reason, and
// all others get their place.
func TestTogether(t *testing.T) {
	t.Parallel()
	const many = 1000
	n, c, eth0, _ := uplink(t)
	n.IP(t, "route add 10.0.9.0/24 dev eth0 table 10000 proto static")
	want := []Route{NewRoute(10000, prefix("192.0.2.0/24"), netip.Addr{}, eth0)}
	for i := range many {
		r := NewRoute(10000, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24), addr("192.0.2.1"), eth0)
		if i%100 == 50 {
			r = r.In(10000, addr("192.0.2.7")) // is no address of the host
		}
		want = append(want, r)
	}
	added, deleted, err := c.SyncRoutes(unix.AF_INET, 10000, want)
	if len(added) != many+1-11 || len(deleted) != 0 || !errors.Is(err, unix.EEXIST) || !errors.Is(err, unix.EINVAL) {
		t.Fatalf("added %d, deleted %d, %v", len(added), len(deleted), err)
	}
	for i := range many {
		named := strings.Count(err.Error(), fmt.Sprintf("%q: invalid argument: Invalid prefsrc address", want[i+1].normal()))
		if is := i%100 == 50; named != map[bool]int{true: 1}[is] {
			t.Errorf("route %d is named %d times", i, named)
		}
	}
	if !strings.Contains(err.Error(), `add route "10.0.9.0/24 via 192.0.2.1 dev #2 table 10000 proto 116": "10.0.9.0/24 dev`) {
		t.Errorf("error is %v", err)
	}
	// Deletes match partially: the one with metric 0 may mean those behind it.
	for _, metric := range []string{"", " metric 5", " metric 6"} {
		n.IP(t, "route append 10.9.0.0/16 dev eth0 table 10000 proto 116"+metric)
	}
	if _, _, err := c.SyncRoutes(unix.AF_INET, 10000, []Route{want[0]}); err != nil {
		t.Fatal(err)
	}
	checkRoutes(t, n, unix.AF_INET, "10000", "10.0.9.0/24 dev #2 table 10000 proto 4 scope link\n192.0.2.0/24 dev #2 table 10000 proto 116 scope link\n")

	var rules []Rule
	for i := range uint32(many) {
		rules = append(rules, Rule{Priority: 10000, Src: prefix("192.0.2.5/32"), Table: 10000 + i, Protocol: Protocol})
	}
	n.IP(t, "rule add priority 10000 from 192.0.2.5 lookup 10500 protocol 116")
	mustSync(t, c, unix.AF_INET, ours, slices.Clone(rules), many-1, 0)
	mustSync(t, c, unix.AF_INET, ours, rules[:1], 0, many-1)
}

// TestTogetherLost: where answers of the kernel are lost, each message is sent again alone.
func TestTogetherLost(t *testing.T) {
	t.Parallel()
	n, c, eth0, _ := uplink(t)
	if err := unix.SetsockoptInt(c.changing.GetFd(), unix.SOL_SOCKET, unix.SO_RCVBUF, 1); err != nil {
		t.Fatal(err)
	}
	var want []Route
	for i := range 100 { // refused, so that each has an answer
		want = append(want, NewRoute(10000, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(i), 0}), 24), netip.Addr{}, eth0).In(10000, addr("192.0.2.7")))
	}
	want = append(want, NewRoute(10000, prefix("192.0.2.0/24"), netip.Addr{}, eth0))
	var added []Route
	var err error
	n.Do(func() { added, _, err = c.SyncRoutes(unix.AF_INET, 10000, want) })
	if len(added) != 1 || err == nil || strings.Count(err.Error(), "Invalid prefsrc address") != 100 {
		t.Errorf("added %d, %v", len(added), err)
	}
}
