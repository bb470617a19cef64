package inspect

import "testing"

func TestEndOf(t *testing.T) {
	for _, tt := range []struct {
		name, shown string
		want        int64
	}{
		{"it was stopped", "ActiveState=inactive\nInactiveEnterTimestamp=@1790000000\n", 1790000000},
		{"it failed", "InactiveEnterTimestamp=@1790000000\nActiveState=failed\n", 1790000000},
		{"it starts again", "ActiveState=activating\nInactiveEnterTimestamp=@1790000000\n", 0},
		{"it never ran", "ActiveState=inactive\nInactiveEnterTimestamp=\n", 0},
	} {
		if got := endOf(tt.shown); got != tt.want {
			t.Errorf("%s: got %d, want %d", tt.name, got, tt.want)
		}
	}
}
