package install

import (
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
)

// TestReturnedTooLate: what main gets back does not stay there if the link was down before, which the events tell that
// are heard afterwards only.
func TestReturnedTooLate(t *testing.T) {
	const gateway = "default via 192.0.2.1 metric 5"
	for _, tt := range []struct {
		name string
		do   []string
		want bool
	}{
		{"nothing", nil, true},
		{"the link was down", []string{"link set wan0 down", "link set wan0 up"}, false},
		{"somebody put it back", []string{"link set wan0 down", "link set wan0 up", "route add " + gateway, "route del " + gateway}, true},
		{"another link was down", []string{"link set wan1 down", "link set wan1 up"}, true},
		{"its address was deleted and added", []string{"address del 192.0.2.5/24 dev wan0", "address add 192.0.2.5/24 dev wan0"}, false},
		{"another address was deleted", []string{"address del 203.0.113.5/24 dev wan0"}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMover(t, "add "+gateway)
			m.IP(t, "link set wan0 addrgenmode none") // without a link-local address only the events tell
			m.IP(t, "-6 address flush dev wan0")
			m.IP(t, "address add 203.0.113.5/24 dev wan0")
			i := m.placed()
			var watcher *route.Watcher
			var err error
			m.Do(func() { watcher, err = route.Watch(route.Links | route.Addresses4 | route.Routes4) })
			if err != nil {
				t.Fatal(err)
			}
			defer watcher.Close()
			if tt.name == "its address was deleted and added" {
				m.IP(t, "address del 203.0.113.5/24 dev wan0")
			}
			for _, command := range tt.do {
				m.IP(t, command)
			}
			m.clear(i)
			if !i.env.UnheardReturns() {
				t.Fatal("main got nothing back")
			}
			if err := watcher.SetDeadline(time.Now().Add(time.Minute)); err != nil {
				t.Fatal(err)
			}
			for i.env.UnheardReturns() {
				events, err := watcher.Next()
				if err != nil {
					t.Fatal(err)
				}
				m.Do(func() { err = i.env.HearReturned(events) })
				if err != nil {
					t.Fatal(err)
				}
			}
			if got := len(m.defaults("main")) > 0; got != tt.want {
				t.Errorf("main has its default: %v, want %v", got, tt.want)
			}
		})
	}
}

// TestReplacedBefore: a route that another link's replaced was not lost with its link, which was down later.
func TestReplacedBefore(t *testing.T) {
	for name, want := range map[string]int{"by another link's": 0, "by one over the same link": 1, "in another place": 1} {
		t.Run(name, func(t *testing.T) {
			m := newMover(t, "add 10.8.0.0/16 via 192.0.2.1 dev wan0 metric 7")
			i := m.placed()
			at := slices.IndexFunc(i.routes.last, func(r route.Route) bool { return r.Metric == 7 })
			if at < 0 {
				t.Fatalf("the route is not known: %v", i.routes.last)
			}
			place, by := PlaceOf(i.routes.last[at]), m.index+1
			switch name {
			case "by one over the same link":
				by = m.index
			case "in another place":
				place.Metric++
			}
			m.IP(t, "link set wan0 down")
			m.IP(t, "link set wan0 up")
			m.Do(func() {
				i.HearReplaced(Replaced{place: by})
				i.Hear(past(route.Event{Kind: route.LinkChanged, Down: true}), nil, nil)
				i.Follow(movedTable, false)
			})
			routes, err := m.kernel.Routes(unix.AF_INET, movedTable)
			if err != nil {
				t.Fatal(err)
			}
			if got := len(slices.DeleteFunc(routes, func(r route.Route) bool { return r.Metric != 7 })); got != want {
				t.Errorf("the table keeps %d routes of it, want %d", got, want)
			}
		})
	}
}

// TestMovedLinks: a client that comes later knows the links that routes were moved of.
func TestMovedLinks(t *testing.T) {
	m := newMover(t, "add default via 192.0.2.1 metric 5")
	want := func(when string, want bool) {
		t.Helper()
		var links map[int]bool
		var err error
		m.Do(func() { links, err = MovedLinks() })
		if err != nil || links[m.index] != want {
			t.Errorf("%s: %v, %v; want link %d: %v", when, links, err, m.index, want)
		}
	}
	want("before", false)
	i := m.placed()
	want("moved", true)
	m.clear(i)
	want("at the end", false)
}

// TestReplacedAndDeleted: what was moved is gone if another program put a route into its place and deleted that, too, before
// anybody looked at main, which is then as it was before.
func TestReplacedAndDeleted(t *testing.T) {
	m := newMover(t, "add default via 192.0.2.1 dev wan0 metric 5 onlink")
	env := m.client().env
	m.Do(func() { env.Picture = NewPicture(m.kernel, func(int) bool { return false }, 1000) })
	i := env.New(m.uplink, env.Log, func(string, error) {})
	i.Index, i.Present, i.Usable = m.index, true, true
	m.Do(func() {
		if err := i.Place(movedTable); err != nil {
			t.Fatal(err)
		}
		env.Picture.Invalidate()
		i.Follow(movedTable, false)
		env.Picture.Invalidate()
		if i.Stale() {
			t.Error("the table is not as main")
		}
		taken := i.routes.taken[0]
		other := taken
		other.Onlink = false
		i.routes.fresh = nil
		i.Hear(past(route.Event{Kind: route.RouteChanged, Route: &other, Port: 4711}, route.Event{Kind: route.RouteChanged, Route: &other, Port: 4711, Deleted: true}), nil, nil)
		if !i.Stale() {
			t.Error("nobody compares the table")
		}
		i.Follow(movedTable, false)
	})
	if got := m.defaults("10000"); len(got) > 0 {
		t.Errorf("the table has %q", got)
	}
	m.clear(i)
	if got := m.defaults("main"); len(got) > 0 {
		t.Errorf("main has %q", got)
	}
}
