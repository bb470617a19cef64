package install

import (
	"strings"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/route"
)

// TestMovedAndFlushed: a program that empties the table while no client runs, as systemd-networkd does, takes nothing from
// main that would be there without us. That the link was down does.
func TestMovedAndFlushed(t *testing.T) {
	for name, down := range map[string]bool{"flushed": false, "down": true} {
		t.Run(name, func(t *testing.T) {
			m := newMover(t, "add default via 192.0.2.1 metric 5")
			before := m.main()
			m.waitLinkLocal()
			m.placed() // and killed
			m.IP(t, "route flush table 10000")
			if down {
				m.IP(t, "link set wan0 down")
				m.IP(t, "link set wan0 up")
				m.waitLinkLocal()
				before = m.main()
			}
			m.clear(m.placed())
			m.wantMain("at the end", before)
		})
	}
}

// waitLinkLocal waits until the link can have routes that need it.
func (m *mover) waitLinkLocal() {
	m.t.Helper()
	for !strings.Contains(m.IP(m.t, "-6 address show dev wan0 scope link"), "fe80::") {
		time.Sleep(time.Millisecond)
	}
}

// TestMovedGatewayGone: a route whose gateway is in no network of the link any more comes back as main had it.
func TestMovedGatewayGone(t *testing.T) {
	m := newMover(t)
	m.IP(t, "address add 203.0.113.5/24 dev wan0")
	m.IP(t, "route add default via 203.0.113.1 metric 5")
	i := m.placed()
	m.IP(t, "address del 203.0.113.5/24 dev wan0")
	m.Do(func() { i.Follow(movedTable, false) })
	m.clear(i)
	m.wantMain("at the end", []string{
		"unicast default via 203.0.113.1 dev wan0 proto boot scope global metric 5 ",
		"unicast 192.0.2.0/24 dev wan0 proto kernel scope link src 192.0.2.5 ",
		"unicast 198.51.100.0/24 dev wan1 proto kernel scope link src 198.51.100.5",
	})
}

// TestMovedAddedAgain: a route that went with its address, and was added again, stands behind the others, as in main.
func TestMovedAddedAgain(t *testing.T) {
	m := newMover(t, "add default via 192.0.2.1", "append default via 198.51.100.1")
	i := m.placed()
	m.IP(t, "address del 192.0.2.5/24 dev wan0")
	i.routes.fresh = nil
	m.Do(func() {
		i.Hear(nil, past(route.Event{Kind: route.AddressChanged, Deleted: true, Index: m.index, Addr: m.uplink.Addr()}), nil)
	})
	m.clear(i)
	m.IP(t, "address add 192.0.2.5/24 dev wan0")
	m.IP(t, "route append default via 192.0.2.1")
	before := m.main()
	next := m.client()
	next.routes.env.order = i.routes.env.order // of the same watch
	m.Do(func() {
		if err := next.Place(movedTable); err != nil {
			t.Fatal(err)
		}
	})
	m.clear(next)
	m.wantMain("at the end", before)
}

// TestMovedPutBackAndDeleted: a route that was taken, and that somebody put back and deleted before it was taken again, is
// main's no more.
func TestMovedPutBackAndDeleted(t *testing.T) {
	m := newMover(t, "add default via 192.0.2.1 metric 5")
	i := m.placed()
	taken := i.routes.taken[0]
	i.routes.fresh = nil
	before := m.main()
	const somebody = 4711
	m.Do(func() {
		i.Hear(past(route.Event{Kind: route.RouteChanged, Route: &taken, Port: somebody},
			route.Event{Kind: route.RouteChanged, Route: &taken, Port: somebody, Deleted: true}), nil, nil)
	})
	m.clear(i)
	m.wantMain("at the end", before)
}
