package install

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/table-allocator/table-allocator/internal/uplink"
)

// TestMovedBySeveral: each of two addresses of a link has taken one of its defaults, and the watch was killed. The table of
// each gets both again, whichever address is served first.
func TestMovedBySeveral(t *testing.T) {
	for _, order := range [][]int{{0, 1}, {1, 0}} {
		t.Run(fmt.Sprint(order), func(t *testing.T) {
			m := newMover(t, "add default via 192.0.2.1 metric 5")
			m.IP(t, "address add 192.0.2.6/24 dev wan0")
			uplinks := []uplink.Uplink{m.uplink, m.uplink}
			uplinks[1].Key.Address, uplinks[1].Network = "192.0.2.6", netip.MustParsePrefix("192.0.2.6/24")
			place := func(i int) *Installation { // each time in another process
				m.uplink = uplinks[i]
				c := m.client()
				m.Do(func() {
					if err := c.Place(movedTable + uint32(i)); err != nil {
						t.Fatal(err)
					}
				})
				return c
			}
			place(0)
			m.IP(t, "route add default via 192.0.2.2 metric 6")
			place(1)
			if got := m.defaults("main"); len(got) != 0 {
				t.Fatalf("main has %q", got)
			}
			for _, i := range order {
				defer m.clear(place(i)) // a file that is left would be that of a later test's namespace
				if got := m.defaults(fmt.Sprint(movedTable + i)); len(got) != 2 {
					t.Errorf("the table of %s has %q, want both default routes", uplinks[i].Key.Address, got)
				}
			}
		})
	}
}
