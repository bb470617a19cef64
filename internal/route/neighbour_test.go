package route

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// TestFailedNeighbours: a watcher hears of neighbours that do not answer, and of no others.
func TestFailedNeighbours(t *testing.T) {
	t.Parallel()
	n, c := dial(t)
	peer := nettest.New(t, "peer")
	nettest.Veth(t, n, "eth0", peer, "eth0")
	n.Batch(t, "addr add 192.0.2.1/24 dev eth0", "addr add fd01::1/64 dev eth0 nodad")
	var w *Watcher
	var err error
	n.Do(func() { w, err = WatchFailedNeighbours() })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	eth0, _, err := c.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	n.IP(t, "neigh add 192.0.2.7 lladdr 02:00:00:00:00:07 dev eth0 nud reachable")
	for _, addr := range []string{"192.0.2.9", "fd01::9"} { // which nobody has
		n.IP(t, "neigh add "+addr+" dev eth0 use nud none")
		events := await(t, w, Event{Kind: NeighbourSilent, Index: eth0.Index, Addr: netip.MustParseAddr(addr)})
		if slices.ContainsFunc(events, func(e Event) bool { return e.Addr == netip.MustParseAddr("192.0.2.7") }) {
			t.Errorf("%s: events are %+v", addr, events)
		}
	}
}
