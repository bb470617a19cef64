package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// TestWatchMovedOrphans: an address goes while its watch, which was killed, has its default route. The next watch gives main
// the route back, which would have outlived the address there.
func TestWatchMovedOrphans(t *testing.T) {
	for _, row := range []struct {
		name     string
		build    []string
		gone     []string
		defaults string // arguments of "route show"
	}{
		{"IPv6", []string{"address add 2001:db8:1::2/64 dev wan0 nodad", "-6 route add default via fe80::1 dev wan0 metric 100"},
			[]string{"address del 2001:db8:1::2/64 dev wan0"}, "-6"},
		{"and the rules", []string{"address add 2001:db8:1::2/64 dev wan0 nodad", "-6 route add default via fe80::1 dev wan0 metric 100"},
			[]string{"address del 2001:db8:1::2/64 dev wan0", "-6 rule flush protocol 116"}, "-6"},
		{"one of two IPv4 addresses", []string{"address add 10.77.0.2/24 dev wan0", "address add 10.78.0.2/24 dev wan0", "route add default via 10.78.0.1 metric 100"},
			[]string{"address del 10.77.0.2/24 dev wan0", "rule flush protocol 116"}, "-4"},
	} {
		t.Run(row.name, func(t *testing.T) {
			h := newHost(t)
			h.link("wan0")
			for _, c := range row.build {
				h.ns.IP(t, c)
			}
			defaults := func() string { return strings.TrimSpace(h.ns.IP(t, row.defaults+" route show default")) }
			before := defaults()
			h.serve()
			w := h.watch("--routes", "move")
			wait := func(want string) {
				t.Helper()
				eventually(t, "main has its default routes", func() error {
					if got := defaults(); got != want {
						return fmt.Errorf("got %q, want %q", got, want)
					}
					return nil
				})
			}
			wait("")
			w.kill()
			for _, c := range row.gone {
				h.ns.IP(t, c)
			}
			w = h.watch("--routes", "move", "--clean")
			if row.defaults == "-6" { // else the other address takes it
				wait(before)
			}
			w.stop()
			if got := defaults(); got != before {
				t.Errorf("main has %q, want %q", got, before)
			}
		})
	}
}
