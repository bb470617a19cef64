package allocator

import (
	"fmt"
	"testing"
)

// TestPairs: an interface has one number in both families where that is possible, whoever asks first.
func TestPairs(t *testing.T) {
	for _, tt := range []struct {
		name string
		ask  []Op
		want []uint32
	}{
		{"two interfaces", []Op{
			{Key: Key{Inet, "wan0", "1"}}, {Key: Key{Inet, "wan1", "2"}}, {Key: Key{Inet6, "wan1", "fd::2"}}, {Key: Key{Inet6, "wan0", "fd::1"}},
		}, []uint32{10000, 10001, 10001, 10000}},
		{"in another order", []Op{
			{Key: Key{Inet, "wan0", "1"}}, {Key: Key{Inet6, "wan1", "fd::2"}}, {Key: Key{Inet, "wan1", "2"}}, {Key: Key{Inet6, "wan0", "fd::1"}},
		}, []uint32{10000, 10001, 10001, 10000}},
		{"several addresses", []Op{
			{Key: Key{Inet6, "wan0", "fd::1"}}, {Key: Key{Inet6, "wan0", "fd::2"}}, {Key: Key{Inet, "wan1", "1"}}, {Key: Key{Inet, "wan0", "2"}},
			{Key: Key{Inet, "wan0", "3"}}, {Key: Key{Inet, "wan0", "4"}},
		}, []uint32{10000, 10001, 10002, 10000, 10001, 10003}},
		{"of another user", []Op{
			{Key: Key{Inet, "wan0", "1"}, UID: 1000}, {Key: Key{Inet6, "wan0", "fd::1"}}, {Key: Key{Inet6, "wan0", "fd::2"}, UID: 1000},
		}, []uint32{10000, 10001, 10000}},
		{"it names another one", []Op{
			{Key: Key{Inet, "wan0", "1"}}, {Key: Key{Inet6, "wan0", "fd::1"}, Want: 10003}, {Key: Key{Inet6, "wan0", "fd::2"}},
		}, []uint32{10000, 10003, 10000}},
		{"identifiers", []Op{
			{Key: Key{Unspec, "wan0", "x"}}, {Key: Key{Unspec, "wan0", "y"}}, {Key: Key{Inet, "wan1", "1"}},
		}, []uint32{10000, 10001, 10000}},
		{"no other is left", []Op{
			{Key: Key{Inet, "wan0", "1"}}, {Key: Key{Inet, "wan0", "2"}}, {Key: Key{Inet, "wan0", "3"}}, {Key: Key{Inet, "wan0", "4"}},
			{Key: Key{Inet, "wan0", "5"}}, {Key: Key{Inet6, "wan1", "fd::1"}},
		}, []uint32{10000, 10001, 10002, 10003, 10004, 10000}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := Pool{First: 10000, Count: 5}
			h := start(t, config(t, map[Family]Pool{Inet: p, Inet6: p, Unspec: p}))
			for i, op := range tt.ask {
				r := h.Decide(h.now, &op)
				if err := h.Commit(h.now); err != nil {
					t.Fatal(err)
				}
				if r.Lease.Table != tt.want[i] {
					t.Errorf("%v of uid %d got %d, want %d", op.Key, op.UID, r.Lease.Table, tt.want[i])
				}
			}
		})
	}
}

// TestPairsOfMany: an interface with very many leases costs no search, and what is counted goes with the leases.
func TestPairsOfMany(t *testing.T) {
	const many = 20 * mostPaired
	p := Pool{First: 10000, Count: many}
	h := start(t, config(t, map[Family]Pool{Inet: p, Inet6: p}))
	decideAll := func(release bool) {
		t.Helper()
		for n := range many {
			for _, family := range []Family{Inet, Inet6} {
				op := Op{Release: release, Key: Key{family, fmt.Sprint("eth", n%3), fmt.Sprint(n)}}
				if r := h.Decide(h.now, &op); r.Outcome == Refused {
					t.Fatal(r.Err)
				}
			}
		}
		if err := h.Commit(h.now); err != nil {
			t.Fatal(err)
		}
	}
	decideAll(false)
	if got := len(h.pairs.byTable); got != 3*mostPaired {
		t.Errorf("%d leases are counted, want %d", got, 3*mostPaired)
	}
	decideAll(true)
	if len(h.pairs.byTable)+len(h.pairs.byIfname) != 0 {
		t.Errorf("without leases %d tables and %d interfaces are counted", len(h.pairs.byTable), len(h.pairs.byIfname))
	}
}
