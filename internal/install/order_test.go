package install

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
)

func via(last byte) route.Route {
	gateway := netip.AddrFrom4([4]byte{192, 0, 2, last})
	return route.NewRoute(unix.RT_TABLE_MAIN, netip.MustParsePrefix("0.0.0.0/0"), gateway, 2)
}

func TestOrder(t *testing.T) {
	some := func(last ...byte) (routes []route.Route) {
		for _, l := range last {
			routes = append(routes, via(l))
		}
		return routes
	}
	for _, tt := range []struct {
		name  string
		notes [][]byte // what main had, one after the other
		want  []byte
	}{
		{"once", [][]byte{{3, 1, 2}}, []byte{3, 1, 2}},
		{"in front", [][]byte{{2, 3}, {1, 2, 3}}, []byte{1, 2, 3}},
		{"between", [][]byte{{1, 3}, {1, 2, 3}}, []byte{1, 2, 3}},
		{"behind", [][]byte{{1, 2}, {1, 2, 3}}, []byte{1, 2, 3}},
		{"beside what main lost", [][]byte{{1, 2}, {3}, {4, 3}}, []byte{1, 2, 4, 3}},
	} {
		var o order
		for _, n := range tt.notes {
			o.note(some(n...))
		}
		if got := o.of(some(tt.want[0])); !slices.EqualFunc(got, some(tt.want...), route.Route.Equal) {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
	var o order
	o.note(some(1, 2, 3))
	o.note([]route.Route{withMetric(via(9), 7)})
	o.forget([]route.Route{via(1), withMetric(via(9), 7)})
	o.note(some(1))
	if got := o.of(some(2)); !slices.EqualFunc(got, some(2, 3, 1), route.Route.Equal) || len(o.places) != 1 {
		t.Errorf("again: %v", o.places)
	}
	o = order{}
	o.note(some(1, 2, 3))
	for _, tt := range []struct {
		now  []byte
		want bool
	}{{nil, false}, {[]byte{1}, false}, {[]byte{3}, true}, {[]byte{1, 3}, false}, {[]byte{9}, true}, {[]byte{8, 9}, false}} {
		o.before = some(8) // of another client

		if got := o.inFront(via(2), some(tt.now...)); got != tt.want {
			t.Errorf("in front of %v: %v", tt.now, got)
		}
	}
	o = order{}
	o.note(some(1, 2, 3, 4))
	for _, tt := range []struct{ now, back, front, behind []byte }{
		{nil, []byte{2, 3}, nil, []byte{2, 3}},
		{[]byte{1}, []byte{2, 3}, nil, []byte{2, 3}}, // one uplink has its default back, and the next one gets its two
		{[]byte{1}, []byte{3, 2}, nil, []byte{2, 3}},
		{[]byte{4}, []byte{2, 3}, []byte{2, 3}, nil},
		{[]byte{3}, []byte{1, 4, 2}, []byte{1, 2}, []byte{4}},
		{[]byte{1, 4}, []byte{2, 3}, nil, []byte{2, 3}},
		{[]byte{9}, []byte{2, 3}, []byte{2, 3}, nil}, // it came later
	} {
		front, behind := o.around(some(tt.now...), some(tt.back...))
		if !slices.EqualFunc(front, some(tt.front...), route.Route.Equal) || !slices.EqualFunc(behind, some(tt.behind...), route.Route.Equal) {
			t.Errorf("%v beside %v: %v in front and %v behind", tt.back, tt.now, front, behind)
		}
	}
}

// TestMovedAgainBehind: main lost what was taken with its link, and got it again, behind another link's route. It was taken again
// before anybody heard of the loss, and comes back behind the other one.
func TestMovedAgainBehind(t *testing.T) {
	const moved = "default via 192.0.2.1 dev wan0 metric 5"
	m := newMover(t, "add "+moved)
	m.IP(t, "route append default via 198.51.100.1 dev wan1 metric 5")
	i := m.placed()
	i.routes.fresh = nil // the events were heard
	for _, command := range []string{"link set wan0 down", "link set wan0 up", "route append " + moved} {
		m.IP(t, command)
	}
	m.Do(func() {
		i.Follow(movedTable, false)
		i.Hear(past(route.Event{Kind: route.LinkChanged, Down: true}), nil, nil)
	})
	m.clear(i)
	if got := m.defaults("main"); len(got) != 2 || !strings.Contains(got[1], "wan0") {
		t.Errorf("main has %q", got)
	}
}

// TestMovedByClientsOfTwoLinks: each client gives its default back where it stood, whichever ends first.
func TestMovedByClientsOfTwoLinks(t *testing.T) {
	for _, tt := range []struct {
		name  string
		ended func(first, second *Installation) []*Installation
	}{
		{"the first client ends first", func(first, second *Installation) []*Installation { return []*Installation{first, second} }},
		{"the second client ends first", func(first, second *Installation) []*Installation { return []*Installation{second, first} }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMover(t, "add default via 192.0.2.1 metric 5")
			first := m.placed()
			m.IP(t, "route append default via 198.51.100.1 dev wan1 metric 5")
			link, _, err := m.kernel.LinkByName("wan1")
			if err != nil {
				t.Fatal(err)
			}
			m.index = link.Index
			m.uplink.Key.Ifname, m.uplink.Key.Address, m.uplink.Network = "wan1", "198.51.100.5", netip.MustParsePrefix("198.51.100.5/24")
			second := m.client()
			m.Do(func() {
				if err := second.Place(movedTable + 1); err != nil {
					t.Fatal(err)
				}
			})
			if got := m.defaults("main"); len(got) != 0 {
				t.Fatalf("main has %q", got)
			}
			for _, i := range tt.ended(first, second) {
				m.clear(i)
			}
			if got := m.defaults("main"); len(got) != 2 || !strings.Contains(got[0], "wan0") {
				t.Errorf("main has %q", got)
			}
		})
	}
}

// TestStood: at the end of all, addresses give their routes back in the order in which main had them.
func TestStood(t *testing.T) {
	a, b, c := via(1), via(2), via(3)
	env := &Env{}
	env.order.note([]route.Route{a, b, c})
	for _, tt := range []struct {
		taken []route.Route
		want  int
	}{{nil, -1}, {[]route.Route{c, b}, 2}, {[]route.Route{a}, 0}, {[]route.Route{c}, 2}} {
		i := &Installation{env: env, routes: placer{env: env, taken: tt.taken}}
		if got := i.Stood(); got != tt.want {
			t.Errorf("%v stood at %d, want %d", tt.taken, got, tt.want)
		}
	}
}
