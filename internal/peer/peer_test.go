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

func TestHolderName(t *testing.T) {
	for _, test := range []struct {
		name, holder string
		standIn      bool
	}{
		{"wan0-192.0.2.2-inet", "wan0-192.0.2.2-inet", false},
		{"wan0-192.0.2.2-inet+812-1f", "wan0-192.0.2.2-inet", true},
		{"wan+1-a-192.0.2.2-inet", "wan+1-a-192.0.2.2-inet", false}, // a link that is called wan+1-a
		{"wan+1-a-192.0.2.2-inet+812-1f", "wan+1-a-192.0.2.2-inet", true},
		{"wan0-192.0.2.2-inet-812-1f", "wan0-192.0.2.2-inet-812-1f", false}, // it asks
		{"wan0+812-", "wan0+812-", false},
		{"wan0+-1f", "wan0+-1f", false},
		{"", "", false},
	} {
		if holder, standIn := holderName(test.name); holder != test.holder || standIn != test.standIn {
			t.Errorf("%q: %q, %v, want %q, %v", test.name, holder, standIn, test.holder, test.standIn)
		}
	}
}
