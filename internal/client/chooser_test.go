package client

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestChooserOff: where nobody wants a choice, no event and no comparison of everything wakes the watch for it.
func TestChooserOff(t *testing.T) {
	all := news{overrun: true, nexthops: true, links: map[int]bool{2: true}, choice: map[int]bool{unix.AF_INET: true}}
	for _, tt := range []struct {
		name   string
		change func(*chooser)
		wakes  bool
	}{
		{"without probes and wishes", func(*chooser) {}, false},
		{"with a wish", func(c *chooser) { c.pinned[unix.AF_INET6] = "wan0" }, true},
		{"with probes", func(c *chooser) { p := DefaultProbes(); c.config.Probes = &p }, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := &chooser{host: &host{}, uplinks: make(map[wire.Key]*probed), pinned: make(map[int]string), placed: make(map[int]bool)}
			tt.change(c)
			c.note(all)
			c.soon()
			if at := c.next(); (at != 0) != tt.wakes {
				t.Errorf("the watch wakes at %v, want that it does: %v", at, tt.wakes)
			}
		})
	}
}
