package install

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
)

// TestLostWithObject: the table keeps what the link lost of a nexthop object until somebody deletes the object.
func TestLostWithObject(t *testing.T) {
	m := newMover(t)
	m.IP(t, "nexthop add id 7 via 192.0.2.1 dev wan0")
	m.IP(t, "route add default nhid 7 metric 5")
	i := m.placed()
	for _, step := range []struct {
		name string
		do   func()
		want int
	}{
		{"at first", func() {}, 1},
		{"the link was down", func() {
			m.IP(t, "link set wan0 down")
			m.IP(t, "link set wan0 up")
			i.Hear(past(route.Event{Kind: route.LinkChanged, Down: true}), nil, nil)
		}, 1},
		{"another object was deleted", func() { i.ForgetObjects(map[uint32]bool{8: true}) }, 1},
		{"the object was deleted", func() { i.ForgetObjects(map[uint32]bool{7: true}) }, 0},
	} {
		m.Do(func() {
			step.do()
			i.Follow(movedTable, false)
		})
		if got := m.defaults("10000"); len(got) != step.want {
			t.Errorf("%s: the table has %q", step.name, got)
		}
	}
}

// past are events that are heard at once.
func past(events ...route.Event) (all []Past) {
	for at, e := range events {
		all = append(all, Past{at, e})
	}
	return all
}

// left are deletions of addresses from a link.
func left(index int, addrs ...string) (all []Past) {
	for at, a := range addrs {
		addr := netip.MustParseAddr(a)
		family := unix.AF_INET
		if addr.Is6() {
			family = unix.AF_INET6
		}
		all = append(all, Past{at, route.Event{Kind: route.AddressChanged, Family: family, Index: index, Addr: addr, Deleted: true}})
	}
	return all
}

// TestMovedAfterItsSource: a route was taken whose source had been deleted, and was there again. The events come later,
// with that of the taking itself, and then their order tells what main lost.
func TestMovedAfterItsSource(t *testing.T) {
	for _, tt := range []struct {
		name, source string
		onOther      bool // link
		after        bool // the source was deleted after the route was taken
		want         int
	}{
		{"before", "192.0.2.5", false, false, 1},
		{"after", "192.0.2.5", false, true, 0},
		{"before, on another link", "198.51.100.5", true, false, 1},
		{"after, on another link", "198.51.100.5", true, true, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMover(t, "add default via 192.0.2.1 metric 5 src "+tt.source)
			i := m.placed()
			if len(i.routes.fresh) != 1 {
				t.Fatalf("fresh are %v", i.routes.fresh)
			}
			index := m.index
			if tt.onOther {
				index++
			}
			gone, taken := left(index, tt.source), past(route.Event{Kind: route.RouteChanged, Route: &i.routes.taken[0], Deleted: true})
			if tt.after {
				gone[0].At++
			} else {
				taken[0].At++
			}
			m.Do(func() { i.Hear(taken, gone, []netip.Addr{gone[0].Addr}) })
			m.clear(i)
			if got := m.defaults("main"); len(got) != tt.want {
				t.Errorf("main has %q", got)
			}
		})
	}
}

// TestMovedToAnotherName: the installation for the next name of a link goes on with what the one before took. Events from
// before that are heard by both, and what comes later only one takes.
func TestMovedToAnotherName(t *testing.T) {
	m := newMover(t, "add default via 192.0.2.1 metric 5")
	first := m.placed()
	m.uplink.Key.Ifname = "wan9"
	next := m.client()
	next.env, next.routes.env = first.env, first.env
	m.Do(func() {
		if err := next.Place(movedTable + 1); err != nil {
			t.Fatal(err)
		}
		for _, i := range []*Installation{first, next} {
			i.Hear(past(route.Event{Kind: route.LinkChanged, Down: true}), nil, nil)
		}
	})
	m.IP(t, "route add default via 192.0.2.2 metric 6")
	m.Do(func() {
		first.Follow(movedTable, false)
		next.Follow(movedTable+1, false)
		first.Hear(past(route.Event{Kind: route.LinkChanged, Down: true}), nil, nil)
	})
	m.clear(first)
	if got := m.defaults("10001"); len(got) != 2 {
		t.Errorf("the table has %q", got)
	}
	m.clear(next)
	if got := m.defaults("main"); len(got) != 2 {
		t.Errorf("main has %q", got)
	}
}
