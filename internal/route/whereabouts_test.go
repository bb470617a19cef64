package route

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// TestWhereabouts: a deleted address is elsewhere if it has another network, or another link has it, as of that event, whatever
// the kernel has by then.
func TestWhereabouts(t *testing.T) {
	t.Parallel()
	n, c := dial(t)
	peer := nettest.New(t, "peer")
	nettest.Veth(t, n, "eth0", peer, "eth0")
	nettest.Veth(t, n, "eth1", peer, "eth1")
	for _, tt := range []struct {
		name     string
		commands []string
		want     []bool // of each deletion
	}{
		{"alone", []string{"del 192.0.2.5/24 dev eth0"}, []bool{false}},
		{"with another length", []string{"add 192.0.2.5/25 dev eth0", "del 192.0.2.5/24 dev eth0", "del 192.0.2.5/25 dev eth0"}, []bool{true, false}},
		{"with another length, later", []string{"del 192.0.2.5/24 dev eth0", "add 192.0.2.5/25 dev eth0"}, []bool{false}},
		{"the same, later", []string{"del 192.0.2.5/24 dev eth0", "add 192.0.2.5/24 dev eth0"}, []bool{false}},
		{"with another far end", []string{"add 192.0.2.5 peer 192.0.2.9 dev eth0", "del 192.0.2.5/24 dev eth0", "del 192.0.2.5 peer 192.0.2.9 dev eth0"}, []bool{true, false}},
		{"on another link", []string{"add 192.0.2.5/24 dev eth1", "del 192.0.2.5/24 dev eth0", "del 192.0.2.5/24 dev eth1"}, []bool{true, false}},
		{"on another link, later", []string{"del 192.0.2.5/24 dev eth0", "add 192.0.2.5/24 dev eth1"}, []bool{false}},
		{"changed before", []string{"change 192.0.2.5/24 dev eth0 valid_lft 3600 preferred_lft 3600", "del 192.0.2.5/24 dev eth0"}, []bool{false}},
		{"IPv6", []string{"del fd00::5/64 dev eth0", "add fd00::5/72 dev eth0 nodad"}, []bool{false}},
		{"IPv6 on another link", []string{"del fd00::6/64 dev eth0"}, []bool{true}},
		{"IPv6 whose far end changes", []string{"add fd00::7 peer fd00::8/128 dev eth0 nodad", "change fd00::7 peer fd00::9/128 dev eth0", "del fd00::7 peer fd00::9/128 dev eth0"}, []bool{false}},
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
			var got []bool
			for last := false; !last; {
				events, err := w.Next()
				if err != nil {
					t.Fatal(err)
				}
				where.Follow(events)
				for _, e := range events {
					if last = e.Addr == netip.MustParseAddr("203.0.113.7") && e.Deleted; !last && e.Deleted && !e.Addr.IsLinkLocalUnicast() {
						got = append(got, e.Elsewhere)
					}
				}
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("elsewhere: %v, want %v", got, tt.want)
			}
		})
	}
}
