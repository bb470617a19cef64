package uplink

import (
	"net/netip"
	"testing"
)

// TestSource: which source unbound traffic has, for what main has.
func TestSource(t *testing.T) {
	const network = "192.0.2.0/24 proto 2 src 192.0.2.5\n"
	for _, tt := range []struct{ name, addresses, main, taken, want string }{
		{"the primary address", "192.0.2.5/24 192.0.2.6/24", network + "default via 192.0.2.1", "", "192.0.2.5"},
		{"what the route says", "192.0.2.5/24 192.0.2.6/24", network + "default via 192.0.2.1 src 192.0.2.6", "", "192.0.2.6"},
		{"an address of no link", "192.0.2.5/24", network + "default via 192.0.2.1 src 198.51.100.9", "", "198.51.100.9"},
		{"a virtual address that was there first", "192.0.2.200/32 192.0.2.5/24", network + "default via 192.0.2.1", "", "192.0.2.5"},
		{"a route that move took", "192.0.2.200/32 192.0.2.5/24", network, "default via 192.0.2.1", "192.0.2.5"},
		{"of two gateways that of the better metric", "192.0.2.5/24 203.0.113.5/24", network + "default via 192.0.2.1 metric 20\ndefault via 203.0.113.1 metric 10", "", "203.0.113.5"},
		{"a gateway in no network", "192.0.2.5/32 192.0.2.6/32", "default via 172.31.1.1", "", "192.0.2.5"},
		{"no gateway", "192.0.2.5/32", "default", "", "192.0.2.5"},
		{"no default route", "192.0.2.5/24", network, "", ""},
		{"over another link", "192.0.2.5/24", network + "default via 192.0.2.1 dev 8", "", ""},
		{"IPv6", "2001:db8::5/64 2001:db8::6/64", "default6 via 2001:db8::1", "", ""},
		{"IPv6, what the route says", "2001:db8::5/64 2001:db8::6/64", "default6 via 2001:db8::1 src 2001:db8::6", "", "2001:db8::6"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := mainOf(tt.addresses, tt.main)
			m.Taken = mainOf(tt.addresses, tt.taken).Routes
			var want netip.Addr
			if tt.want != "" {
				want = addr(tt.want)
			}
			if got := uplinkOf(m, Settings{Routes: MoveRoutes}).Source(m); got != want {
				t.Errorf("got %v, want %v", got, want)
			}
		})
	}
}
