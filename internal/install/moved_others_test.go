package install

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/route"
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

// TestMovedAgainByAnother: the client of one address has taken two defaults of one place. One of them is added to main again,
// and the client of another address takes it. Both were killed: neither route has replaced the other.
func TestMovedAgainByAnother(t *testing.T) {
	for _, order := range [][]int{{0, 1}, {1, 0}} {
		for _, looks := range []bool{true, false} { // the first client, before the other one has taken it
			t.Run(fmt.Sprint(order, looks), func(t *testing.T) {
				m := newMover(t, "add default via 192.0.2.1 metric 5", "append default via 192.0.2.2 metric 5")
				m.IP(t, "address add 192.0.2.6/24 dev wan0")
				before := m.main()
				var clients []*Installation
				for i, addr := range []string{"192.0.2.5", "192.0.2.6"} {
					m.uplink.Key.Address, m.uplink.Network = addr, netip.MustParsePrefix(addr+"/24")
					clients = append(clients, m.client())
					m.Do(func() {
						if err := clients[i].Place(movedTable + uint32(i)); err != nil {
							t.Fatal(err)
						}
					})
				}
				first := clients[0]
				first.routes.fresh = nil // the events of that were heard
				again := first.routes.taken[0]
				m.IP(t, "route append default via 192.0.2.1 metric 5")
				m.Do(func() {
					if looks {
						main, _ := first.view()
						if err := first.routes.place(first.Uplink, main, movedTable); err != nil {
							t.Fatal(err)
						}
					}
					clients[1].Follow(movedTable+1, false)
					first.Hear(past(route.Event{Kind: route.RouteChanged, Route: &again, Port: 4711},
						route.Event{Kind: route.RouteChanged, Route: &again, Port: 4712, Deleted: true}), nil, nil)
					first.Follow(movedTable, false)
				})
				for _, i := range order { // in other processes
					m.uplink = clients[i].Uplink
					clients[i] = m.client()
					m.Do(func() {
						if err := clients[i].Place(movedTable + uint32(i)); err != nil {
							t.Fatal(err)
						}
					})
				}
				for i, c := range clients {
					if got := m.defaults(fmt.Sprint(movedTable + i)); len(got) != 2 {
						t.Errorf("table %d has %q, want both default routes", movedTable+i, got)
					}
					defer m.clear(c) // a file that is left would be that of a later test's namespace
				}
				m.clear(clients[0])
				m.clear(clients[1])
				if got := m.main(); len(got) != len(before) {
					t.Errorf("at the end main has %q, want %q", got, before)
				}
			})
		}
	}
}

// TestMovedUnheard: another default comes into the place of those that one address of a watch has taken, and another address has
// taken it before the event is heard. It replaces them, unless it was among them.
func TestMovedUnheard(t *testing.T) {
	for _, tt := range []struct {
		name, added string
		left        int
	}{{"another one", "192.0.2.3", 1}, {"again", "192.0.2.1", 2}} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMover(t, "add default via 192.0.2.1 metric 5", "append default via 192.0.2.2 metric 5")
			m.IP(t, "address add 192.0.2.6/24 dev wan0")
			first := m.placed()
			first.routes.fresh = nil // the events of that were heard
			other := m.uplink
			other.Key.Address, other.Network = "192.0.2.6", netip.MustParsePrefix("192.0.2.6/24")
			second := first.env.New(other, first.log, first.warn)
			second.Index, second.Present, second.Usable = m.index, true, true
			m.IP(t, "route append default via "+tt.added+" metric 5")
			added := first.routes.taken[0]
			added.Gateway = netip.MustParseAddr(tt.added)
			m.Do(func() {
				if err := second.Place(movedTable + 1); err != nil {
					t.Fatal(err)
				}
				first.Follow(movedTable, false)
				events := past(route.Event{Kind: route.RouteChanged, Route: &added, Port: 4711},
					route.Event{Kind: route.RouteChanged, Route: &added, Port: m.kernel.Port(), Deleted: true})
				first.Hear(events, nil, nil)
				second.Hear(events, nil, nil)
				first.Follow(movedTable, false)
				second.Follow(movedTable+1, false)
			})
			for i := range 2 {
				if got := m.defaults(fmt.Sprint(movedTable + i)); len(got) != tt.left || !strings.Contains(fmt.Sprint(got), tt.added) {
					t.Errorf("table %d has %q, want %d default routes", movedTable+i, got, tt.left)
				}
			}
			m.clear(first)
			m.clear(second)
			if got := m.defaults("main"); len(got) != tt.left || !strings.Contains(fmt.Sprint(got), tt.added) {
				t.Errorf("at the end main has %q, want %d default routes", got, tt.left)
			}
		})
	}
}
