package install

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// TestKilledWhileItEnds: a client is killed after each of the rules that it deletes. The command that releases what is left,
// and the next client, find the rest.
func TestKilledWhileItEnds(t *testing.T) {
	m := newMover(t, "add default via 192.0.2.1 metric 5")
	m.uplink.Settings = uplink.Settings{Routes: uplink.CopyRoutes, OnLoss: uplink.Block, Prefix: netip.MustParsePrefix("10.99.0.0/24")}
	rules := func() (found []route.Rule) {
		t.Helper()
		m.Do(func() {
			var err error
			if found, err = m.kernel.RulesWhere(unix.AF_INET, func(r *route.Rule) bool { return r.Protocol == route.Protocol }); err != nil {
				t.Fatal(err)
			}
		})
		return found
	}
	i := m.placed()
	full := deletedBy(t, m, i, rules())
	if len(full) < 7 || len(rules()) > 0 {
		t.Fatalf("an end deleted %q and left %q", full, rules())
	}
	for name, end := range map[string]func(i *Installation){
		"release": func(i *Installation) {
			u := m.uplink
			u.Settings = uplink.Settings{}
			m.Do(func() {
				if err := i.env.RemoveLeftovers(u); err != nil {
					t.Error(err)
				}
			})
		},
		"the next client": func(*Installation) { m.clear(m.placed()) },
	} {
		for n := range len(full) {
			i := m.placed()
			m.Do(func() {
				for _, gone := range full[:n] {
					if _, _, err := m.kernel.SyncRules(unix.AF_INET, func(r route.Rule) bool { return r == gone }, nil); err != nil {
						t.Fatal(err)
					}
				}
			})
			end(i)
			if left := rules(); len(left) > 0 {
				t.Errorf("%s left after %q was deleted: %q", name, full[:n], left)
				m.IP(t, "rule flush protocol 116")
			}
		}
	}
}

// deletedBy ends a client that has these rules and returns them in the order in which it deletes them.
func deletedBy(t *testing.T, m *mover, i *Installation, rules []route.Rule) (deleted []route.Rule) {
	t.Helper()
	var w *route.Watcher
	m.Do(func() {
		var err error
		if w, err = route.Watch(route.Rules4); err != nil {
			t.Fatal(err)
		}
	})
	defer w.Close()
	m.clear(i)
	m.IP(t, "rule add priority 1 lookup 1") // the last news
	defer m.IP(t, "rule del priority 1")
	if err := w.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	for {
		events, err := w.Next()
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range events {
			if !e.Deleted && e.Priority == 1 {
				return deleted
			}
			at := slices.IndexFunc(rules, func(r route.Rule) bool { return r.Priority == e.Priority && r.Table == e.Table })
			if e.Deleted && at >= 0 {
				deleted = append(deleted, rules[at])
				rules = slices.Delete(rules, at, at+1)
			}
		}
	}
}
