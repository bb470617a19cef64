package install

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestMovedAndFlushed: a program that empties the table while no client runs, as systemd-networkd does, takes nothing from
// main that would be there without us. That the link was down does.
func TestMovedAndFlushed(t *testing.T) {
	for _, name := range []string{"flushed", "down", "down, and the next client was killed at once", "flushed, with another address", "down, with another address"} {
		t.Run(name, func(t *testing.T) {
			m := newMover(t, "add default via 192.0.2.1 metric 5")
			if strings.Contains(name, "another address") {
				m.IP(t, "address add 203.0.113.5/24 dev wan0")
			}
			before := m.main()
			m.waitLinkLocal()
			m.placed() // and killed
			m.IP(t, "route flush table 10000")
			if !strings.HasPrefix(name, "flushed") {
				m.downAndUp()
				before = m.main()
			}
			if strings.Contains(name, "killed at once") {
				p := placer{env: m.client().routes.env}
				m.Do(func() {
					if err := p.adopt(m.uplink, &uplink.Main{Index: m.index}, movedTable); err != nil {
						t.Fatal(err)
					}
				})
			}
			m.clear(m.placed())
			m.wantMain("at the end", before)
		})
	}
}

// waitLinkLocal waits until the link can have routes that need it.
func (m *mover) waitLinkLocal() {
	m.t.Helper()
	for end := time.Now().Add(time.Minute); m.linkLocal() == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			m.t.Fatalf("no link-local address of IPv6:\n%s", m.IP(m.t, "address show dev wan0"))
		}
	}
}

// linkLocal is when the link-local address came, which the kernel tells in hundredths of a second; 0: there is none.
func (m *mover) linkLocal() (created uint32) {
	m.t.Helper()
	addresses, err := m.kernel.AddressesOn(unix.AF_INET6, m.index)
	if err != nil {
		m.t.Fatal(err)
	}
	for _, a := range addresses {
		if a.Addr.IsLinkLocalUnicast() {
			created = max(created, a.Created)
		}
	}
	return created
}

// downAndUp sets the link down and up until its link-local address tells of that.
func (m *mover) downAndUp() {
	m.t.Helper()
	for before := m.linkLocal(); ; {
		m.IP(m.t, "link set wan0 down")
		m.IP(m.t, "link set wan0 up")
		m.waitLinkLocal()
		if m.linkLocal() != before {
			return
		}
	}
}

// TestMovedAfterKilledToAnotherTable: what a client of its own took, after one that was killed, comes back if the server gives another
// table, though nobody knows whether the link was down between the two.
func TestMovedAfterKilledToAnotherTable(t *testing.T) {
	m := newMover(t, "add default via 192.0.2.1 metric 5")
	before := m.main()
	m.placed() // and killed
	m.IP(t, "-6 address flush dev wan0")
	i := m.placed()
	m.Do(func() {
		if err := i.Place(movedTable + 1); err != nil {
			t.Fatal(err)
		}
	})
	m.clear(i)
	m.wantMain("at the end", before)
}

// TestMovedPutBackDeletedAndAdded: a route that somebody deleted, and that comes again, stands behind the others, as in main.
func TestMovedPutBackDeletedAndAdded(t *testing.T) {
	m := newMover(t, "add default via 192.0.2.1", "append default via 198.51.100.1")
	i := m.placed()
	taken := i.routes.taken[0]
	i.routes.fresh = nil
	m.Do(func() {
		i.Hear(past(route.Event{Kind: route.RouteChanged, Route: &taken, Port: 4711, Deleted: true}), nil, nil)
	})
	m.IP(t, "route append default via 192.0.2.1")
	before := m.main()
	m.Do(func() { i.Follow(movedTable, true) })
	m.clear(i)
	m.wantMain("at the end", before)
}

// TestMovedGatewayGone: a route whose gateway is in no network of the link any more comes back as main had it.
func TestMovedGatewayGone(t *testing.T) {
	m := newMover(t)
	m.IP(t, "address add 203.0.113.5/24 dev wan0")
	m.IP(t, "route add default via 203.0.113.1 metric 5")
	i := m.placed()
	m.IP(t, "address del 203.0.113.5/24 dev wan0")
	m.Do(func() { i.Follow(movedTable, false) })
	taken := i.routes.taken[0]
	m.IP(t, "route add 203.0.113.1 dev wan0 proto 116") // as one left it that was killed meanwhile
	m.Do(func() { i.Follow(movedTable, false) })
	m.clear(i)
	m.Do(func() {
		if _, err := m.kernel.RestoreRoute(taken, false); err != nil { // which is there
			t.Error(err)
		}
	})
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
		i.Hear(nil, past(route.Event{Kind: route.AddressChanged, Deleted: true, Index: m.index, Addr: m.uplink.Addr(), Network: m.uplink.Network}), nil)
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

// TestMovedDownUnheard: main gets nothing back that it would have lost with its link, also if the client heard nothing of
// that. That another program empties the table, or deletes the link-local address, takes nothing from main.
func TestMovedDownUnheard(t *testing.T) {
	for name, want := range map[string]bool{"nothing": true, "flushed": true, "no link-local address": true, "down": false} {
		t.Run(name, func(t *testing.T) {
			m := newMover(t, "add default via 192.0.2.1 metric 5")
			m.waitLinkLocal()
			i := m.placed()
			i.routes.fresh = nil // the events of that were heard
			switch name {
			case "flushed":
				m.IP(t, "route flush table 10000")
			case "no link-local address":
				m.IP(t, "-6 address flush dev wan0")
			case "down":
				m.downAndUp()
			}
			m.clear(i)
			if got := len(m.defaults("main")) > 0; got != want {
				t.Errorf("main has its default: %v, want %v", got, want)
			}
		})
	}
}

// TestMovedReplacedInTurns: what replaced a moved route is replaced by that one in turn, after its client was killed.
func TestMovedReplacedInTurns(t *testing.T) {
	m := newMover(t, "add default via 192.0.2.1 metric 5")
	i := m.placed()
	m.IP(t, "route add default via 192.0.2.2 metric 5") // in the place of the first, which is moved
	m.Do(func() { i.Follow(movedTable, false) })
	m.IP(t, "route replace default via 192.0.2.1 metric 5")
	next := m.placed()
	if got := m.defaults("10000"); len(got) != 1 || !strings.Contains(got[0], "via 192.0.2.1 ") {
		t.Errorf("the table has %q", got)
	}
	m.clear(next)
	if got := m.defaults("main"); len(got) != 1 || !strings.Contains(got[0], "via 192.0.2.1 ") {
		t.Errorf("main has %q", got)
	}
}

// TestMovedAppendedAgain: one of two routes in one place that were moved is added to main once more. It stood beside the other
// one, before it or behind, and replaces nothing.
func TestMovedAppendedAgain(t *testing.T) {
	for at := range 2 {
		t.Run(fmt.Sprint(at), func(t *testing.T) {
			m := newMover(t, "add default via 192.0.2.1 metric 5", "append default via 192.0.2.2 metric 5")
			before := m.main()
			i := m.placed()
			i.routes.fresh = nil // the events of that were heard
			again := i.routes.taken[at]
			m.Do(func() { i.Follow(movedTable, false) })
			m.IP(t, "route append default via "+again.Gateway.String()+" metric 5")
			m.Do(func() {
				i.Hear(past(route.Event{Kind: route.RouteChanged, Route: &again, Port: 4711}), nil, nil)
				i.Follow(movedTable, false)
			})
			if got := m.defaults("10000"); len(got) != 2 {
				t.Errorf("the table has %q", got)
			}
			m.clear(i)
			m.wantMain("at the end", before)
		})
	}
}

// TestCopiedAndKilled: an address of full length, as of DHCPv6, has no rule to its network that tells a version before from this
// one. What its killed client had copied, and main has lost since, does not come back.
func TestCopiedAndKilled(t *testing.T) {
	m := newMover(t)
	m.IP(t, "address add fd00::5/128 dev wan0 nodad")
	m.IP(t, "-6 route add default via fe80::1 dev wan0 metric 7")
	m.uplink.Key, m.uplink.Network = wire.Key{Family: wire.Inet6, Ifname: "wan0", Address: "fd00::5"}, netip.MustParsePrefix("fd00::5/128")
	m.uplink.Settings.Routes = uplink.CopyRoutes
	m.placed()
	if got := m.IP(t, "-6 route show default table 10000"); got == "" {
		t.Fatal("the table has no default route")
	}
	m.IP(t, "-6 route del default via fe80::1 dev wan0 metric 7")
	m.Do(func() {
		if err := m.client().env.ReturnRoutes(m.uplink, movedTable); err != nil { // as of another process
			t.Error(err)
		}
	})
	if got := m.IP(t, "-6 route show default"); got != "" {
		t.Errorf("main has %q", got)
	}
}

// TestMovedWithoutAddress: a link that has had no IPv4 address but for one by a route of type local all the time has lost nothing,
// neither what was there at first nor what came later.
func TestMovedWithoutAddress(t *testing.T) {
	m := newMover(t)
	m.IP(t, "address del 192.0.2.5/24 dev wan0")
	m.IP(t, "route add local 192.0.2.5 dev wan0 proto bird table 255")
	m.uplink.Network = netip.MustParsePrefix("192.0.2.5/32")
	m.IP(t, "route add 0.0.0.0/0 via inet6 fe80::77 dev wan0 metric 5")
	i := m.placed()
	m.IP(t, "route add 0.0.0.0/0 via inet6 fe80::77 dev wan0 metric 6")
	m.Do(func() { i.Follow(movedTable, false) })
	i.routes.fresh = nil // the events of that were heard
	if got := m.defaults("10000"); len(got) != 2 {
		t.Errorf("the table has %q", got)
	}
	m.clear(i)
	if got := m.defaults("main"); len(got) != 2 {
		t.Errorf("main has %q", got)
	}
}

// TestMovedBeside: an IPv6 default that is appended, or that another router advertised, stands beside one that was moved.
func TestMovedBeside(t *testing.T) {
	for _, tt := range []struct {
		name, how string
		event     route.Event
		want      int
	}{
		{"appended", "append", route.Event{Appended: true, Port: 4711}, 2},
		{"advertised", "add", route.Event{Protocol: unix.RTPROT_RA}, 2},
		{"added", "add", route.Event{Port: 4711}, 1},
		{"added by a program that hears advertisements", "add", route.Event{Protocol: unix.RTPROT_RA, Port: 4711}, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMover(t)
			m.IP(t, "address add 2001:db8::5/64 dev wan0 nodad")
			m.waitLinkLocal()
			m.IP(t, "-6 route add default via fe80::1 dev wan0 metric 7")
			m.uplink.Key, m.uplink.Network = wire.Key{Family: wire.Inet6, Ifname: "wan0", Address: "2001:db8::5"}, netip.MustParsePrefix("2001:db8::5/64")
			i := m.placed()
			i.routes.fresh = nil // the events of that were heard
			m.IP(t, "-6 route "+tt.how+" default via fe80::2 dev wan0 metric 7")
			second := i.routes.taken[0]
			second.Gateway = netip.MustParseAddr("fe80::2")
			tt.event.Kind, tt.event.Family, tt.event.Route = route.RouteChanged, unix.AF_INET6, &second
			m.Do(func() {
				i.Hear(past(tt.event), nil, nil)
				i.Follow(movedTable, false)
			})
			if got := m.IP(t, "-6 route show default table 10000"); strings.Count(got, "via fe80::") != tt.want {
				t.Errorf("the table has %q", got)
			}
			m.clear(i)
			if got := m.IP(t, "-6 route show default"); strings.Count(got, "via fe80::") != tt.want {
				t.Errorf("main has %q", got)
			}
		})
	}
}
