package client

import (
	"slices"
	"testing"
)

func TestMisplaced(t *testing.T) {
	for _, tt := range []struct {
		name             string
		order, now, want []uint32
		fixed            []uint32 // cannot be moved
	}{
		{"as it was", []uint32{1, 2, 3}, []uint32{1, 2, 3}, nil, nil},
		{"the first came again", []uint32{1, 2, 3}, []uint32{2, 3, 1}, []uint32{2, 3}, nil},
		{"one in the middle", []uint32{1, 2, 3, 4}, []uint32{1, 3, 4, 2}, []uint32{3, 4}, nil},
		{"the last", []uint32{1, 2, 3}, []uint32{1, 2, 3}, nil, nil},
		{"all the other way round", []uint32{1, 2, 3}, []uint32{3, 2, 1}, []uint32{2, 3}, nil},
		{"one is away", []uint32{1, 2, 3}, []uint32{1, 3}, nil, nil},
		{"one that nobody knows", []uint32{1, 2}, []uint32{9, 1, 2}, nil, nil},
		{"others between", []uint32{1, 9, 2}, []uint32{9, 2, 1}, []uint32{2}, []uint32{9}},
		{"others only", []uint32{8, 9}, []uint32{9, 8}, nil, []uint32{8, 9}},
		{"none", nil, []uint32{1}, nil, nil},
		{"all are away", []uint32{1, 2}, nil, nil, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := slices.Clone(tt.order)
			got := misplaced(tt.order, tt.now, func(table uint32) bool { return !slices.Contains(tt.fixed, table) })
			if len(got)+len(tt.want) > 0 && !slices.Equal(got, tt.want) {
				t.Errorf("got %d, want %d", got, tt.want)
			}
			if !slices.Equal(before, tt.order) {
				t.Errorf("the order was changed to %d", tt.order)
			}
			// Doing it restores the order.
			now := slices.DeleteFunc(slices.Clone(tt.now), func(table uint32) bool { return slices.Contains(got, table) })
			if again := misplaced(tt.order, append(now, got...), func(table uint32) bool { return !slices.Contains(tt.fixed, table) }); len(again) > 0 {
				t.Errorf("after that %d are misplaced", again)
			}
		})
	}
}

func TestBeforeOthers(t *testing.T) {
	for _, tt := range []struct {
		name          string
		order, others []uint32
		table         uint32
		want          []uint32
	}{
		{"before the one of its link", []uint32{1, 2, 3, 4}, []uint32{2, 4}, 4, []uint32{1, 4, 2, 3}},
		{"first of its link", []uint32{1, 2, 3}, []uint32{1, 3}, 1, []uint32{1, 2, 3}},
		{"alone on its link", []uint32{1, 2, 3}, []uint32{3}, 3, []uint32{1, 2, 3}},
		{"not there", []uint32{1, 2}, []uint32{1, 3}, 3, []uint32{1, 2}},
		{"none", nil, nil, 3, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			others := make(map[uint32]bool)
			for _, table := range tt.others {
				others[table] = true
			}
			before := slices.Clone(tt.order)
			got, moved := beforeOthers(tt.order, tt.table, others)
			if !slices.Equal(got, tt.want) || moved != !slices.Equal(before, tt.want) {
				t.Errorf("got %d, moved %v, want %d", got, moved, tt.want)
			}
			if !slices.Equal(before, tt.order) {
				t.Errorf("the order was changed to %d", tt.order)
			}
		})
	}
}
