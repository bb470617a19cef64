package route

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// TestWhereabouts: a deleted address is elsewhere if it has another network, or another link has it, as of that event, whatever
// the kernel has by then; and so it may be the last of IPv4 on its link.
func TestWhereabouts(t *testing.T) {
	t.Parallel()
	n, c := dial(t)
	peer := nettest.New(t, "peer")
	nettest.Veth(t, n, "eth0", peer, "eth0")
	nettest.Veth(t, n, "eth1", peer, "eth1")
	for _, tt := range []struct {
		name     string
		commands []string
		want     []bool // of each deletion: it is elsewhere
		bare     []bool // of each deletion: it was the last one
	}{
		{"alone", []string{"del 192.0.2.5/24 dev eth0"}, []bool{false}, []bool{true}},
		{"with another length", []string{"add 192.0.2.5/25 dev eth0", "del 192.0.2.5/24 dev eth0", "del 192.0.2.5/25 dev eth0"}, []bool{true, false}, []bool{false, true}},
		{"with another length, later", []string{"del 192.0.2.5/24 dev eth0", "add 192.0.2.5/25 dev eth0"}, []bool{false}, []bool{true}},
		{"the same, later", []string{"del 192.0.2.5/24 dev eth0", "add 192.0.2.5/24 dev eth0"}, []bool{false}, []bool{true}},
		{"with another far end", []string{"add 192.0.2.5 peer 192.0.2.9 dev eth0", "del 192.0.2.5/24 dev eth0", "del 192.0.2.5 peer 192.0.2.9 dev eth0"}, []bool{true, false}, []bool{false, true}},
		{"on another link", []string{"add 192.0.2.5/24 dev eth1", "del 192.0.2.5/24 dev eth0", "del 192.0.2.5/24 dev eth1"}, []bool{true, false}, []bool{true, true}},
		{"on another link, later", []string{"del 192.0.2.5/24 dev eth0", "add 192.0.2.5/24 dev eth1"}, []bool{false}, []bool{true}},
		{"changed before", []string{"change 192.0.2.5/24 dev eth0 valid_lft 3600 preferred_lft 3600", "del 192.0.2.5/24 dev eth0"}, []bool{false}, []bool{true}},
		{"besides another", []string{"add 192.0.2.7/24 dev eth0", "del 192.0.2.7/24 dev eth0", "add 192.0.2.8/32 dev eth0", "del 192.0.2.5/24 dev eth0"}, []bool{false, false}, []bool{false, false}},
		{"IPv6", []string{"del fd00::5/64 dev eth0", "add fd00::5/72 dev eth0 nodad"}, []bool{false}, []bool{false}},
		{"IPv6 on another link", []string{"del fd00::6/64 dev eth0"}, []bool{true}, []bool{false}},
		{"IPv6 whose far end changes", []string{"add fd00::7 peer fd00::8/128 dev eth0 nodad", "change fd00::7 peer fd00::9/128 dev eth0", "del fd00::7 peer fd00::9/128 dev eth0"}, []bool{false}, []bool{false}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n.IP(t, "addr flush dev eth0 scope global")
			n.IP(t, "addr flush dev eth1 scope global")
			n.IP(t, "addr add 192.0.2.5/24 dev eth0")
			n.IP(t, "addr add fd00::5/64 dev eth0 nodad")
			n.IP(t, "addr add fd00::6/64 dev eth0 nodad") // of which the kernel tells later than of others
			n.IP(t, "addr add fd00::6/64 dev eth1 nodad")
			w := watch(t, n, Addresses4|Addresses6)
			where, err := c.Whereabouts()
			if err != nil {
				t.Fatal(err)
			}
			for _, command := range append(tt.commands, "add 203.0.113.7/32 dev lo", "del 203.0.113.7/32 dev lo") {
				n.IP(t, "addr "+command)
			}
			var got, bare []bool
			for last := false; !last; {
				events, err := w.Next()
				if err != nil {
					t.Fatal(err)
				}
				where.Follow(events)
				for _, e := range events {
					if last = e.Addr == netip.MustParseAddr("203.0.113.7") && e.Deleted; !last && e.Deleted && !e.Addr.IsLinkLocalUnicast() {
						got, bare = append(got, e.Elsewhere), append(bare, e.Bare)
					}
				}
			}
			if !slices.Equal(got, tt.want) || !slices.Equal(bare, tt.bare) {
				t.Errorf("elsewhere: %v, the last: %v; want %v, %v", got, bare, tt.want, tt.bare)
			}
		})
	}
}
