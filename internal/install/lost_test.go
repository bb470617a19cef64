package install

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
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

// TestLostBefore: what main lost before the link was down does not stay in the table, even if main was read after that
// and the events are heard later.
func TestLostBefore(t *testing.T) {
	const to, other = "10.8.0.0/16 via 192.0.2.1 dev wan0", "10.8.0.0/16 via 192.0.2.9 dev wan0"
	for _, tt := range []struct {
		name, before string
		do           []string
		event        func(m *mover, was route.Route) Past
		want         int
	}{
		{"nothing", "route add " + to, nil, nil, 1},
		{"it was deleted", "route add " + to, []string{"route del " + to}, func(_ *mover, was route.Route) Past {
			return past(route.Event{Kind: route.RouteChanged, Route: &was, Deleted: true, Port: 4711})[0]
		}, 0},
		{"another took its place", "route add " + to, []string{"route replace " + other}, func(_ *mover, was route.Route) Past {
			was.Gateway = netip.MustParseAddr("192.0.2.9")
			return past(route.Event{Kind: route.RouteChanged, Route: &was, Replaced: true, Port: 4711})[0]
		}, 0},
		{"its source was deleted", "route add " + to + " src 192.0.2.6", []string{"address del 192.0.2.6/24 dev wan0"}, func(m *mover, _ route.Route) Past {
			return left(m.index, "192.0.2.6")[0]
		}, 0},
	} {
		for _, read := range []bool{false, true} {
			name := tt.name
			if read {
				name += ", and main was read"
			}
			t.Run(name, func(t *testing.T) {
				m := newMover(t)
				m.uplink.Settings.Routes = uplink.CopyRoutes
				m.IP(t, "address add 192.0.2.6/24 dev wan0")
				m.IP(t, tt.before)
				i := m.placed()
				was := i.routes.last[0]
				for _, command := range append(tt.do, "link set wan0 down", "link set wan0 up") {
					m.IP(t, command)
				}
				m.Do(func() {
					if read {
						i.Follow(movedTable, false)
					}
					events := past(route.Event{Kind: route.LinkChanged, Down: true})
					var gone []Past
					if tt.event != nil {
						e := tt.event(m, was)
						events[0].At = 1
						if e.Kind == route.AddressChanged {
							gone = []Past{e}
						} else {
							events = append([]Past{e}, events...)
						}
					}
					i.Hear(events, gone, nil)
					i.Follow(movedTable, false)
				})
				if got := strings.Count(m.IP(t, "route show table 10000"), "10.8.0.0/16"); got != tt.want {
					t.Errorf("the table has\n%s", m.IP(t, "route show table 10000"))
				}
			})
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
		all = append(all, Past{at, route.Event{Kind: route.AddressChanged, Family: family, Index: index, Addr: addr, Network: netip.PrefixFrom(addr, 24), Deleted: true}})
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
			gone, taken := left(index, tt.source), past(route.Event{Kind: route.RouteChanged, Route: &i.routes.taken[0], Deleted: true, Port: m.kernel.Port()})
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

// TestMovedOfABareLink: what was taken goes with the last IPv4 address of its link, also if the link has another one by the time
// this is heard.
func TestMovedOfABareLink(t *testing.T) {
	for _, ends := range []bool{false, true} {
		m := newMover(t, "add default via 192.0.2.1 dev wan0 metric 5 onlink")
		i := m.placed()
		i.routes.fresh = nil
		m.IP(t, "address flush dev wan0 scope global")
		m.IP(t, "address add 198.51.100.77/24 dev wan0")
		gone := left(m.index, m.uplink.Key.Address)
		gone[0].Bare = true
		if !ends {
			m.IP(t, "address add "+m.uplink.Network.String()+" dev wan0")
		}
		m.Do(func() {
			if !ends {
				i.Follow(movedTable, false) // a look at what the kernel has, which is ahead of the events
			}
			i.Hear(nil, gone, nil)
			i.Follow(movedTable, false)
		})
		m.clear(i)
		if got := m.defaults("main"); len(got) > 0 {
			t.Errorf("ends: %v; main has %q", ends, got)
		}
	}
}

// TestMovedWhoseSourceIsBack: what was taken goes with its source, also if that is there again by the time its deletion is
// heard, and the event of that is still to come. As long as the source was elsewhere, or a route makes it, it stays.
func TestMovedWhoseSourceIsBack(t *testing.T) {
	const source = "192.0.2.7"
	for _, tt := range []struct {
		name      string
		commands  []string // after which the deletion is heard
		elsewhere bool
		routed    bool // a route was deleted, and not the address
		want      int
	}{
		{"with another length", []string{"address del 192.0.2.7/24 dev wan0", "address add 192.0.2.7/25 dev wan0"}, false, false, 0},
		{"as it was", []string{"address del 192.0.2.7/24 dev wan0", "address add 192.0.2.7/24 dev wan0"}, false, false, 0},
		{"with another far end", []string{"address del 192.0.2.7/24 dev wan0", "address add 192.0.2.7 peer 192.0.2.8 dev wan0"}, false, false, 0},
		{"on another link", []string{"address del 192.0.2.7/24 dev wan0", "address add 192.0.2.7/24 dev wan1"}, false, false, 0},
		{"it was there with another length", []string{"address add 192.0.2.7/25 dev wan0", "address del 192.0.2.7/24 dev wan0"}, true, false, 1},
		{"a route makes it", []string{"route append local 192.0.2.7 dev wan1", "address del 192.0.2.7/24 dev wan0"}, false, false, 1},
		{"the route that made it went", nil, false, true, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMover(t)
			m.IP(t, "address add 192.0.2.7/24 dev wan0")
			m.IP(t, "route add default via 192.0.2.1 dev wan0 metric 5 src "+source)
			i := m.placed()
			i.routes.fresh = nil
			for _, command := range tt.commands {
				m.IP(t, command)
			}
			gone := left(m.index, source)
			gone[0].Elsewhere = tt.elsewhere
			if tt.routed {
				gone[0].Network = netip.Prefix{}
			}
			m.Do(func() { i.Hear(nil, gone, nil) })
			m.clear(i)
			if got := m.defaults("main"); len(got) != tt.want {
				t.Errorf("main has %q", got)
			}
		})
	}
}

// TestMovedAndDeletedByKernel: while a link is down the kernel deletes the IPv6 routes over it, with events. They are not
// those of what was taken, which is newer.
func TestMovedAndDeletedByKernel(t *testing.T) {
	m := newMover(t)
	m.IP(t, "address add fd00::5/64 dev wan0 nodad")
	m.IP(t, "-6 route add default via fe80::1 dev wan0 metric 7")
	m.uplink.Key, m.uplink.Network = wire.Key{Family: wire.Inet6, Ifname: "wan0", Address: "fd00::5"}, netip.MustParsePrefix("fd00::5/64")
	i := m.placed()
	m.Do(func() {
		i.Hear(past(route.Event{Kind: route.RouteChanged, Route: &i.routes.taken[0], Deleted: true}, route.Event{Kind: route.LinkChanged, Down: true},
			route.Event{Kind: route.RouteChanged, Route: &i.routes.taken[0], Deleted: true, Port: m.kernel.Port()}), nil, nil)
	})
	m.clear(i)
	if got := m.IP(t, "-6 route show default"); !strings.HasPrefix(got, "default via fe80::1 dev wan0 metric 7 ") {
		t.Errorf("main has %q", got)
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

// TestMovedGone: main does not get back what it would have lost meanwhile.
func TestMovedGone(t *testing.T) {
	const first, second = "default via 192.0.2.1 metric 5", "default via 192.0.2.2 metric 6"
	down := past(route.Event{Kind: route.LinkChanged, Down: true})
	for _, tt := range []struct {
		name    string
		while   func(*mover, *Installation)
		inTable int
		want    []string // defaults of main after the client
	}{
		{"nothing", func(*mover, *Installation) {}, 2, []string{first, second}},
		{"the link was down", func(m *mover, i *Installation) {
			m.IP(m.t, "link set wan0 down")
			m.IP(m.t, "link set wan0 up")
			i.Hear(down, nil, nil)
		}, 2, nil},
		{"and a default was added", func(m *mover, i *Installation) {
			m.IP(m.t, "link set wan0 down")
			m.IP(m.t, "link set wan0 up")
			m.IP(m.t, "route add "+second)
			i.Hear(down, nil, nil)
		}, 1, []string{second}},
		{"the last address was deleted", func(m *mover, i *Installation) {
			m.IP(m.t, "address del 192.0.2.5/24 dev wan0")
			m.IP(m.t, "address add 192.0.2.5/24 dev wan0")
			i.Hear(nil, left(m.index, "192.0.2.5", "192.0.2.6"), nil)
		}, 2, nil},
		{"the last address was deleted, beside one by a route of type local", func(m *mover, i *Installation) {
			m.IP(m.t, "address del 192.0.2.5/24 dev wan0")
			m.IP(m.t, "route add local 198.51.100.9 dev wan0 proto bird table 255")
			m.IP(m.t, "address add 192.0.2.5/24 dev wan0")
			i.Hear(nil, left(m.index, "192.0.2.5", "192.0.2.6"), nil)
		}, 2, nil},
		{"one of two addresses was deleted", func(m *mover, i *Installation) {
			m.IP(m.t, "address add 192.0.2.7/24 dev wan0")
			m.IP(m.t, "address add 192.0.2.6/32 dev wan0")
			m.IP(m.t, "address del 192.0.2.6/32 dev wan0")
			i.Hear(nil, left(m.index, "192.0.2.5", "192.0.2.6"), nil)
		}, 2, []string{first, second}},
		{"the link was down before that was taken", func(_ *mover, i *Installation) { i.routes.fresh = slices.Clone(i.routes.taken); i.Hear(down, nil, nil) }, 2, []string{first, second}},
		{"the link was down before that was taken a second time", func(m *mover, i *Installation) {
			i.routes.fresh = append(slices.Clone(i.routes.taken), i.routes.taken...)
			for _, r := range i.routes.taken {
				i.Hear(past(route.Event{Kind: route.RouteChanged, Route: &r, Deleted: true, Port: m.kernel.Port()}), nil, nil)
			}
			i.Hear(down, nil, nil)
		}, 2, []string{first, second}},
		{"the link was down before that was taken a second time, and seen down", func(m *mover, i *Installation) {
			i.routes.fresh = slices.Clone(i.routes.taken)
			m.IP(m.t, "link set wan0 down")
			i.Follow(movedTable, false)
			m.IP(m.t, "link set wan0 up")
			m.IP(m.t, "route add "+first)
			m.IP(m.t, "route add "+second)
			i.Follow(movedTable, false)
			for _, r := range i.routes.taken {
				i.Hear(past(route.Event{Kind: route.RouteChanged, Route: &r, Deleted: true, Port: m.kernel.Port()}), nil, nil)
			}
			i.Hear(down, nil, nil)
		}, 2, []string{first, second}},
		{"what was put back is deleted again", func(m *mover, i *Installation) {
			m.IP(m.t, "link set wan0 down")
			m.IP(m.t, "link set wan0 up")
			back := i.routes.taken[0]
			i.Hear(past(down[0].Event, route.Event{Kind: route.RouteChanged, Route: &back}, route.Event{Kind: route.RouteChanged, Route: &back, Deleted: true}), nil, nil)
		}, 0, nil},
		{"another came into its place", func(m *mover, i *Installation) { // and the holder of another address took it
			other := i.routes.taken[0]
			other.Gateway = netip.MustParseAddr("192.0.2.9")
			i.Hear(past(route.Event{Kind: route.RouteChanged, Route: &other}), nil, nil)
		}, 1, []string{second}},
		{"another program emptied the table", func(m *mover, _ *Installation) { m.IP(m.t, "route flush table 10000") }, 2, []string{first, second}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMover(t, "add "+first, "add "+second)
			i := m.placed()
			m.Do(func() {
				i.routes.fresh = nil // the events were heard
				tt.while(m, i)
				i.Follow(movedTable, false)
			})
			if got := m.defaults("10000"); len(got) != tt.inTable {
				t.Errorf("the table has %q", got)
			}
			m.clear(i)
			got := m.defaults("main")
			for i := range got {
				got[i] = strings.TrimSpace(strings.Replace(got[i], " dev wan0", "", 1))
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("main has %q, want %q", got, tt.want)
			}
		})
	}
}

// TestMovedSource: with its source an IPv4 route goes, and an IPv6 route stays.
func TestMovedSource(t *testing.T) {
	m := newMover(t, "add default via 192.0.2.1 src 198.51.100.5", "add default via 192.0.2.2 metric 6")
	i := m.placed()
	i.routes.fresh = nil // the events were heard
	m.IP(t, "address add 198.51.100.5/28 dev wan1")
	m.IP(t, "address del 198.51.100.5/28 dev wan1") // it had two lengths for a moment
	shorter := left(m.index+1, "198.51.100.5")
	shorter[0].Elsewhere = true
	i.Hear(nil, shorter, nil)
	if len(i.routes.taken) != 2 {
		t.Errorf("taken is %v", i.routes.taken)
	}
	m.IP(t, "address del 198.51.100.5/24 dev wan1")
	i.Hear(nil, left(m.index+1, "198.51.100.5"), nil)
	m.clear(i)
	if got := m.defaults("main"); len(got) != 1 {
		t.Errorf("main has %q", got)
	}
	for _, killed := range []bool{false, true} {
		m.IP(t, "address replace fd00::5/64 dev wan0 nodad")
		m.IP(t, "address add fd00::6/64 dev wan0 nodad")
		m.IP(t, "-6 route add default via fe80::1 dev wan0 src fd00::6")
		m.uplink.Key, m.uplink.Network = wire.Key{Family: wire.Inet6, Ifname: "wan0", Address: "fd00::5"}, netip.MustParsePrefix("fd00::5/64")
		i = m.placed()
		i.routes.fresh = nil
		m.IP(t, "address del fd00::6/64 dev wan0")
		if killed {
			i = m.placed()
		} else {
			i.Hear(nil, left(m.index, "fd00::6"), nil)
		}
		m.clear(i)
		if got := m.IP(t, "-6 route show default"); !strings.HasPrefix(got, "default via fe80::1 dev wan0 metric 1024 ") {
			t.Errorf("main has %q", got)
		}
		m.IP(t, "-6 route flush dev wan0")
	}
}
