package install

import (
	"bytes"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

const movedTable = 10000

// mover is a host whose link wan0 has 192.0.2.5, and clients of that address.
type mover struct {
	*nettest.Namespace
	t      *testing.T
	kernel *route.Conn
	index  int
	uplink uplink.Uplink
	log    bytes.Buffer // warnings
}

// newMover makes one with routes in main, as `ip route` takes them.
func newMover(t *testing.T, routes ...string) *mover {
	t.Helper()
	n := nettest.New(t, "host")
	m := &mover{Namespace: n, t: t}
	far := nettest.New(t, "far")
	nettest.Veth(t, n, "wan0", far, "wan0")
	nettest.Veth(t, n, "wan1", far, "wan1")
	n.IP(t, "address add 192.0.2.5/24 dev wan0")
	n.IP(t, "address add 198.51.100.5/24 dev wan1")
	for _, r := range routes {
		n.IP(t, "route "+r)
	}
	var err error
	n.Do(func() { m.kernel, err = route.Dial() })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.kernel.Close() })
	link, _, err := m.kernel.LinkByName("wan0")
	if err != nil {
		t.Fatal(err)
	}
	m.index = link.Index
	m.uplink = uplink.Uplink{
		Key:        wire.Key{Family: wire.Inet, Ifname: "wan0", Address: "192.0.2.5"},
		Network:    netip.MustParsePrefix("192.0.2.5/24"),
		Priorities: uplink.OriginalPriorities,
		Settings:   uplink.Settings{Routes: uplink.MoveRoutes, OnLoss: uplink.Fallback},
	}
	return m
}

// client is what a process of its own has installed for the address.
func (m *mover) client() *Installation {
	log := slog.New(slog.NewTextHandler(&m.log, &slog.HandlerOptions{Level: slog.LevelWarn}))
	env := &Env{Kernel: m.kernel, Log: log, OtherHolder: func(wire.Key) (bool, error) { return false, nil }}
	i := env.New(m.uplink, env.Log, func(what string, err error) {
		if err != nil {
			m.t.Errorf("%s: %v", what, err)
		}
	})
	i.Index, i.Present, i.Usable = m.index, true, true
	return i
}

// placed is a client that has a lease.
func (m *mover) placed() *Installation {
	m.t.Helper()
	i := m.client()
	m.Do(func() {
		if err := i.Place(movedTable); err != nil {
			m.t.Fatal(err)
		}
	})
	return i
}

func (m *mover) clear(i *Installation) {
	m.t.Helper()
	m.Do(func() {
		if err := i.Clear(); err != nil {
			m.t.Fatal(err)
		}
	})
}

// main is what main has, in the kernel's order.
func (m *mover) main() []string {
	m.t.Helper()
	return strings.Split(strings.TrimSpace(m.IP(m.t, "-d route show")), "\n")
}

// wantMain fails the test unless main is this.
func (m *mover) wantMain(when string, want []string) {
	m.t.Helper()
	if got := m.main(); !slices.Equal(got, want) {
		m.t.Fatalf("main %s:\n%s\nwant:\n%s", when, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// defaults are the default routes that a table has.
func (m *mover) defaults(table string) []string {
	m.t.Helper()
	out, _ := m.Output("ip", "route", "show", "default", "table", table) // without a table there are none
	return slices.DeleteFunc(strings.Split(out, "\n"), func(line string) bool { return !strings.HasPrefix(line, "default") })
}

// two are routes of which none may be lost: two defaults of wan0 in one place, one with all that `ip route` can say,
// before one of wan1, and others.
var two = []string{
	"add default via 192.0.2.2 metric 5 proto dhcp src 192.0.2.5",
	"append default via 192.0.2.1 metric 5 proto static mtu 1400 advmss 1300 initcwnd 20",
	"append default via 198.51.100.1 metric 5",
	"add 10.9.0.0/16 via 192.0.2.9 proto static",
	"add 0.0.0.0/1 via 192.0.2.1",
}

// TestMovedBack: main gets back what it lost, and where it stood, from the client that took it, from the one after
// that was killed, and from a command that releases what is left.
func TestMovedBack(t *testing.T) {
	for name, end := range map[string]func(*mover, *Installation){
		"the client": (*mover).clear,
		"the next client": func(m *mover, _ *Installation) {
			i := m.placed()
			if got := m.defaults("main"); len(got) != 1 {
				t.Errorf("main has %q with the next client", got)
			}
			if got := m.defaults("10000"); len(got) != 2 {
				t.Errorf("the table has %q with the next client", got)
			}
			m.clear(i)
		},
		"release": func(m *mover, i *Installation) {
			u := m.uplink
			u.Settings = uplink.Settings{} // a command that releases knows none
			m.Do(func() {
				if err := i.env.RemoveLeftovers(u); err != nil {
					t.Error(err)
				}
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMover(t, two...)
			before := m.main()
			i := m.placed()
			if got := m.defaults("main"); len(got) != 1 {
				t.Fatalf("main has %q", got)
			}
			if got := m.defaults("10000"); len(got) != 2 || !strings.Contains(got[0], "192.0.2.2") {
				t.Fatalf("the table has %q", got)
			}
			end(m, i)
			m.wantMain("after "+name, before)
			if rules := m.IP(t, "-d rule show"); strings.Contains(rules, "proto 116") {
				t.Errorf("rules that are left: %s", rules)
			}
		})
	}
}

// TestMovedKilled: the file is written before main loses the routes. A client that is killed in between, or when it has
// deleted one of them, leaves a file of routes that main has, which the next one must not add a second time.
func TestMovedKilled(t *testing.T) {
	for name, deleted := range map[string][]string{
		"before":  nil,
		"between": {"route del default via 192.0.2.2 metric 5"},
		"after":   {"route del default via 192.0.2.2 metric 5", "route del default via 192.0.2.1 metric 5"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMover(t, two...)
			before := m.main()
			m.Do(func() {
				i := m.client()
				v, _ := i.view()
				takes := m.uplink.Takes(v)
				if len(takes) != 2 {
					t.Fatalf("it takes %v", takes)
				}
				if err := i.routes.note(m.uplink, m.index, takes); err != nil {
					t.Fatal(err)
				}
			})
			for _, args := range deleted {
				m.IP(t, args)
			}
			i := m.placed()
			if got := m.defaults("main"); len(got) != 1 {
				t.Errorf("main has %q", got)
			}
			if got := m.defaults("10000"); len(got) != 2 {
				t.Errorf("the table has %q", got)
			}
			m.clear(i)
			m.wantMain("after the next client", before)
		})
	}
}

// TestMovedNotWritten: what cannot be written down, on a full disk say, stays in main until it can.
func TestMovedNotWritten(t *testing.T) {
	m := newMover(t, "add default via 192.0.2.1")
	before := m.main()
	var dir string
	m.Do(func() {
		files, err := movedOn(unix.AF_INET, m.index)
		if dir = string(files.dir); err == nil {
			// The namespace of a test before may have had the number.
			err = errors.Join(os.RemoveAll(dir), os.MkdirAll(filepath.Dir(dir), 0o700), os.WriteFile(dir, nil, 0o600))
		}
		if err != nil {
			t.Fatal(err)
		}
	})
	i := m.client()
	warned := make(map[string]string)
	warn := i.warn
	i.warn = func(what string, err error) {
		if err != nil {
			warned[what] = err.Error()
		}
	}
	m.Do(func() {
		if err := i.Place(movedTable); err != nil {
			t.Fatal(err)
		}
	})
	m.wantMain("without a place for the file", before)
	if text := warned["delete routes from main"]; !strings.HasPrefix(text, "leave them in main: ") {
		t.Errorf("it warned of %q", warned)
	}
	if got := m.defaults("10000"); len(got) != 1 {
		t.Errorf("the table has %q", got)
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	i.warn = warn
	m.Do(func() { i.Follow(movedTable, false) })
	if got := m.defaults("main"); len(got) != 0 {
		t.Errorf("main has %q", got)
	}
	m.clear(i)
	m.wantMain("at the end", before)
}

// TestMovedElsewhere: a file of another network namespace, which had the same number, is not taken for one's own.
func TestMovedElsewhere(t *testing.T) {
	m := newMover(t, "add default via 192.0.2.1")
	before := m.main()
	m.Do(func() {
		files, err := movedOn(unix.AF_INET, m.index)
		if err != nil {
			t.Fatal(err)
		}
		if files.namespace == 0 {
			t.Fatal("the namespace has no cookie: Linux is older than 5.14")
		}
		files.namespace--
		stranger := route.NewRoute(unix.RT_TABLE_MAIN, netip.MustParsePrefix("0.0.0.0/0"), netip.MustParseAddr("192.0.2.77"), m.index)
		stranger.Metric = 77
		if err := files.write(m.uplink, movedRoutes{Routes: []route.Route{stranger}}); err != nil {
			t.Fatal(err)
		}
	})
	i := m.placed()
	if got := m.defaults("10000"); len(got) != 1 {
		t.Errorf("the table has %q", got)
	}
	m.clear(i)
	m.wantMain("after the client", before)
}

// TestMovedByOlder: a version before took networks and static routes, too, and left neither file nor rule to main. The
// next client gives main what it would not take, and the rest at its own end.
func TestMovedByOlder(t *testing.T) {
	m := newMover(t)
	for _, args := range []string{
		"route del 192.0.2.0/24 dev wan0",
		"route add 192.0.2.0/24 dev wan0 src 192.0.2.5 proto 116 table 10000",
		"route add 10.9.0.0/16 via 192.0.2.9 src 192.0.2.5 proto 116 table 10000 onlink dev wan0",
		"route add default via 192.0.2.1 src 192.0.2.5 proto 116 table 10000 metric 7 onlink dev wan0",
		"route add 10.8.0.0/16 via 192.0.2.8 table 10000 onlink dev wan0", // another program's
		"rule add from 192.0.2.5 lookup 10000 pref 10000 proto 116",
		"rule add to 192.0.2.0/24 lookup 10000 pref 20000 proto 116",
		"rule add iif lo lookup 10000 pref 91000 proto 116",
	} {
		m.IP(t, args)
	}
	network := "unicast 192.0.2.0/24 dev wan0 proto kernel scope link src 192.0.2.5 "
	other := "unicast 198.51.100.0/24 dev wan1 proto kernel scope link src 198.51.100.5"
	static := "unicast 10.9.0.0/16 via 192.0.2.9 dev wan0 proto boot scope global src 192.0.2.5 onlink "
	i := m.placed()
	m.wantMain("with the next client", []string{static, network, other})
	m.clear(i)
	m.wantMain("after it", []string{"unicast default via 192.0.2.1 dev wan0 proto boot scope global src 192.0.2.5 metric 7 onlink ", static,
		network, other})
	if out := m.IP(t, "route show table 10000"); !strings.HasPrefix(out, "10.8.0.0/16 ") || strings.Count(out, "\n") != 1 {
		t.Errorf("the table has %q", out)
	}
}

// TestMovedBesideDeadEnd: no rule behind main is reached while main has a default that leads nowhere. Main keeps its
// defaults, and gets them back if that one comes later.
func TestMovedBesideDeadEnd(t *testing.T) {
	m := newMover(t, two...)
	before := m.main()
	i := m.placed()
	m.IP(t, "route add unreachable default metric 4000")
	said := func(want string) {
		t.Helper()
		if text := m.log.String(); strings.Count(text, "\n") != 1 || !strings.Contains(text, want) {
			t.Errorf("the log says %q, not %q", text, want)
		}
		m.log.Reset()
	}
	m.Do(func() { i.Follow(movedTable, false); i.Follow(movedTable, false) })
	said("main keeps its default routes, since it has one that leads nowhere")
	with := m.main()
	if len(with) != len(before)+1 {
		t.Fatalf("main has %q", with)
	}
	next := m.placed() // the next client takes nothing
	said("main keeps its default routes")
	m.wantMain("with the next client", with)
	m.IP(t, "route del unreachable default metric 4000")
	m.Do(func() { next.Follow(movedTable, false) })
	said("loses its other ones again")
	m.clear(next)
	m.wantMain("in the end", before)
}

// TestMovedMeanwhile: what somebody else deletes while it is moved is not given back.
func TestMovedMeanwhile(t *testing.T) {
	m := newMover(t, "add default via 192.0.2.1 metric 5", "add default via 192.0.2.2 metric 6")
	i := m.client()
	m.Do(func() {
		v, _ := i.view()
		m.IP(t, "route del default via 192.0.2.1 metric 5")
		if err := errors.Join(i.routes.place(m.uplink, v, movedTable), i.routes.cleanMain(m.uplink, v)); err != nil {
			t.Fatal(err)
		}
		i.Installed = true
		i.Follow(movedTable, false)
	})
	if got := m.defaults("10000"); len(got) != 1 {
		t.Errorf("the table has %q", got)
	}
	m.clear(i)
	if got := m.defaults("main"); len(got) != 1 || !strings.Contains(got[0], "192.0.2.2") {
		t.Errorf("main has %q", got)
	}
}

// TestMovedRenamed: a link may be renamed while no client runs, or the client for the new name comes before the one for
// the old name ends.
func TestMovedRenamed(t *testing.T) {
	for _, killed := range []bool{true, false} {
		m := newMover(t, two...)
		before := strings.ReplaceAll(strings.Join(m.main(), "\n"), " dev wan0 ", " dev wan7 ")
		old := m.placed()
		m.IP(t, "link set wan0 name wan7")
		m.uplink.Key.Ifname = "wan7"
		i := m.client()
		m.Do(func() {
			if err := i.Place(movedTable + 1); err != nil {
				t.Fatal(err)
			}
		})
		if !killed {
			m.clear(old)
			m.Do(func() { i.Follow(movedTable+1, false) })
		}
		if got := m.defaults("10001"); len(got) != 2 {
			t.Errorf("the table has %q", got)
		}
		if got := m.IP(t, "route show table all"); strings.Contains(got, "table 10000 ") {
			t.Errorf("routes are\n%s", got)
		}
		m.Do(func() {
			if err := i.env.RemoveLeftovers(m.uplink); err != nil { // as if this one was killed, too
				t.Error(err)
			}
		})
		m.wantMain("in the end", strings.Split(before, "\n"))
	}
}

// TestMovedOfAPort: while no client runs, a link loses its IPv6 address. Main gets back what was moved, unless the link was
// down, as when it becomes a port of a bridge.
func TestMovedOfAPort(t *testing.T) {
	for _, tt := range []struct {
		name  string
		while []string
		want  int
	}{
		{"the address is deleted", []string{"address del fd00::5/64 dev wan0"}, 1},
		{"the link is set down", []string{"link set wan0 down", "link set wan0 up"}, 0},
		{"the link is set down, and has another address", []string{"link set wan0 down", "link set wan0 up", "address add fd00::6/64 dev wan0 nodad"}, 0},
		{"another program empties the table", []string{"-6 route flush table 10000"}, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMover(t)
			m.IP(t, "address add fd00::5/64 dev wan0 nodad")
			m.IP(t, "-6 route add default via fe80::1 dev wan0 metric 7")
			m.uplink.Key, m.uplink.Network = wire.Key{Family: wire.Inet6, Ifname: "wan0", Address: "fd00::5"}, netip.MustParsePrefix("fd00::5/64")
			m.placed()
			if got := m.IP(t, "-6 route show default"); got != "" {
				t.Fatalf("main has %q still", got)
			}
			for _, command := range tt.while {
				m.IP(t, command)
			}
			m.Do(func() {
				if err := m.client().env.ReturnRoutes(m.uplink, movedTable); err != nil { // as of another process
					t.Error(err)
				}
			})
			if got := strings.Count(m.IP(t, "-6 route show default"), "fe80::1"); got != tt.want {
				t.Errorf("main has %d default routes, want %d", got, tt.want)
			}
		})
	}
}

// TestMovedBesideAnother: of two addresses each has taken a default of one place, and one gives it back before.
func TestMovedBesideAnother(t *testing.T) {
	m := newMover(t, "add default via 192.0.2.1 metric 5", "append default via 203.0.113.1 metric 5 onlink dev wan0")
	m.IP(t, "address add 203.0.113.5/24 dev wan0")
	before := m.main()
	first := m.placed()
	m.Do(func() { first.Follow(movedTable, false) }) // main still has the other one
	if got := m.defaults("10000"); len(got) != 1 || !strings.Contains(got[0], "192.0.2.1") {
		t.Errorf("the first table has %q", got)
	}
	m.uplink.Key.Address, m.uplink.Network = "203.0.113.5", netip.MustParsePrefix("203.0.113.5/24")
	second := m.client()
	m.Do(func() {
		if err := second.Place(movedTable + 1); err != nil {
			t.Fatal(err)
		}
	})
	if got := m.defaults("main"); len(got) != 0 {
		t.Fatalf("main has %q", got)
	}
	back := first.routes.taken[0]
	m.clear(first)
	m.Do(func() {
		second.routes.fresh = nil
		second.Hear(past(route.Event{Kind: route.RouteChanged, Route: &back}), nil, nil)
		second.Follow(movedTable+1, false)
	})
	if got := m.defaults("10001"); len(got) != 1 || !strings.Contains(got[0], "203.0.113.1") {
		t.Errorf("the table has %q", got)
	}
	m.clear(second)
	m.wantMain("in the end", before)
}

// TestMovedToAnotherTable: a server that has lost its database may lease another table.
func TestMovedToAnotherTable(t *testing.T) {
	m := newMover(t, two...)
	before := m.main()
	i := m.placed()
	m.Do(func() {
		if err := i.Place(movedTable + 1); err != nil {
			t.Fatal(err)
		}
	})
	if got := m.defaults("10001"); len(got) != 2 {
		t.Errorf("the table has %q", got)
	}
	m.clear(i)
	m.wantMain("after the client", before)
}

func withMetric(r route.Route, metric uint32) route.Route {
	r.Metric = metric
	return r
}

// TestMovedReplacedWhileNobodyLooked: what was replaced in main while no client ran, by a route that is not taken, does not
// come back with the client after the next.
func TestMovedReplacedWhileNobodyLooked(t *testing.T) {
	m := newMover(t, "add default via 192.0.2.1 metric 5")
	m.placed() // and killed
	m.IP(t, "route add default metric 5 nexthop via 192.0.2.8 dev wan0 nexthop via 192.0.2.9 dev wan0")
	m.placed() // finds the newer route, and is killed
	m.IP(t, "route del default metric 5")
	before := m.main()
	m.clear(m.placed())
	m.wantMain("after the third client", before)
}
