package server

import (
	"slices"
	"testing"

	"github.com/table-allocator/table-allocator/internal/allocator"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

func TestMarking(t *testing.T) {
	for _, tt := range []struct {
		name    string
		marking marking
		index   uint32
		want    wire.Marking
		last    uint32
		skipped []uint32
	}{
		{"default", defaultMarking, 1, wire.Marking{Mark: 0x02000000, Mask: 0xff000000, Block: 9002, Fallback: 15002}, 127, []uint32{15, 54}},
		{"the last of them", defaultMarking, 127, wire.Marking{Mark: 0xfe000000, Mask: 0xff000000, Block: 9254, Fallback: 15254}, 127, []uint32{15, 54}},
		{"two bits", marking{0x6, 9994, 32762}, 1, wire.Marking{Mark: 4, Mask: 6, Block: 9996, Fallback: 32764}, 1, nil},
		{"the first two", marking{0x3, 1, 6}, 1, wire.Marking{Mark: 2, Mask: 3, Block: 3, Fallback: 8}, 1, nil},
		{"more than priorities", marking{0xffffffff, 9000, 15000}, 498, wire.Marking{Mark: 996, Mask: 0xffffffff, Block: 9996, Fallback: 15996}, 498, nil},
		{"close together", marking{0xffff, 100, 200}, 50, wire.Marking{Mark: 100, Mask: 0xffff, Block: 200, Fallback: 300}, 50, nil},
		{"wg-quick's bits", marking{0xff00, 1, 5000}, 1, wire.Marking{Mark: 0x200, Mask: 0xff00, Block: 3, Fallback: 5002}, 127, []uint32{2, 54, 101}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.marking.validate(); err != nil {
				t.Fatal(err)
			}
			if got := tt.marking.of(tt.index); got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
			marks := tt.marking.marks()
			if marks.Last != tt.last {
				t.Errorf("the last is %d, want %d", marks.Last, tt.last)
			}
			var skipped []uint32
			seen := make(map[uint32]bool) // priorities
			for i := uint32(1); i <= marks.Last; i++ {
				if marks.Skip(i) {
					skipped = append(skipped, i)
				}
				m := tt.marking.of(i)
				for _, p := range []uint32{m.Block, m.Block + 1, m.Fallback, m.Fallback + 1} {
					if seen[p] {
						t.Fatalf("two marks have priority %d", p)
					}
					seen[p] = true
				}
				if m.Block+1 >= leaseRules || m.Fallback+1 >= mainRule {
					t.Fatalf("%+v: out of place", m)
				}
				if back, err := wire.ParseReply(wire.Reply{Marking: m}.Append(nil)); err != nil || back.Marking != m {
					t.Fatalf("%+v: does not go over the wire: %v", m, err)
				}
			}
			if !slices.Equal(skipped, tt.skipped) {
				t.Errorf("skipped are %d, want %d", skipped, tt.skipped)
			}
		})
	}
}

func TestUsing(t *testing.T) {
	ours := uint8(route.Protocol)
	mark := func(mark, mask uint32) route.Rule { return route.Rule{Traffic: route.Traffic{Mark: mark, Mask: mask}} }
	for _, tt := range []struct {
		name string
		rule route.Rule
		want []uint32
	}{
		{"lookup", route.Rule{Priority: 9004, Table: 10000, Protocol: ours}, []uint32{2}},
		{"guard", route.Rule{Priority: 9005, Action: route.Unreachable, Protocol: ours}, []uint32{2}},
		{"fallback", route.Rule{Priority: 15006, Table: 10000, Protocol: ours}, []uint32{3}},
		{"note of it", route.Rule{Priority: 15007, Action: route.Nop, Protocol: ours}, []uint32{3}},
		{"another program's at the priority", route.Rule{Priority: 9004}, nil},
		{"of a lease", route.Rule{Priority: 10000, Table: 10000, Protocol: ours}, nil},
		{"the mark", mark(0x04000000, 0xff000000), []uint32{2}},
		{"its variant", mark(0x05000000, 0xff000000), []uint32{2}},
		{"some of its bits", mark(0x80000000, 0xf0000000), []uint32{64, 65, 66, 67, 68, 69, 70, 71}},
		{"the lowest bit alone", mark(0x01000000, 0x01000000), all(127)},
		{"not marked", mark(0, 0xff000000), nil},
		{"other bits", mark(0x80000, 0xff0000), nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := &rulesInUse{tables: map[allocator.Family]map[uint32][]route.Rule{allocator.Inet6: {tt.rule.Table: {tt.rule}}}}
			using := r.usedBy(defaultMarking)
			var got []uint32
			for i := range uint32(128) {
				if i > 0 && using(i) {
					got = append(got, i)
				}
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("in use are %d, want %d", got, tt.want)
			}
		})
	}
}

func all(last uint32) (indexes []uint32) {
	for i := uint32(1); i <= last; i++ {
		indexes = append(indexes, i)
	}
	return indexes
}
