package peer

import (
	"testing"

	"github.com/table-allocator/table-allocator/internal/wire"
)

func TestTrust(t *testing.T) {
	for _, tt := range []struct {
		name string
		uid  uint32
		more []uint32
		want bool
	}{
		{"root", 0, nil, true},
		{"somebody", 4711, nil, false},
		{"somebody who was named", 4711, []uint32{4711}, true},
		{"everybody of another user namespace", wire.OverflowID(), []uint32{wire.OverflowID()}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := NewTrust(tt.more).Has(tt.uid); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}
