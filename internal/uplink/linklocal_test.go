package uplink

import (
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/route"
)

// TestLeaves: a link-local address of IPv4 leads to other networks if main has a default route for it, and not for another
// address of its link.
func TestLeaves(t *testing.T) {
	for _, tt := range []struct {
		name, address, peer, main string
		want                      bool
	}{
		{"an ordinary address", "192.0.2.5/24", "", "", true},
		{"IPv6", "2001:db8::5/64", "", "", true},
		{"IPv6, link-local", "fe80::5/64", "", "default6 via fe80::1", false},
		{"no route", "169.254.10.2/30", "", "", false},
		{"a router of its network", "169.254.10.2/30", "", "default via 169.254.10.1", true},
		{"a half", "169.254.10.2/30", "", "128.0.0.0/1 via 169.254.10.1", true},
		{"beside an address by DHCP", "169.254.7.7/16", "", "default via 192.0.2.1", false},
		{"no router", "169.254.7.7/16", "", "default", false},
		{"the far end", "169.254.10.2/32", "169.254.10.1", "default", true},
		{"the far end is the router", "169.254.10.2/32", "169.254.10.1", "default via 169.254.10.1", true},
		{"another far end", "169.254.10.2/32", "169.254.10.1", "default via 192.0.2.1", false},
		{"over another link", "169.254.10.2/30", "", "default via 169.254.10.1 dev 8", false},
		{"its own router", "169.254.10.1/30", "", "default via 169.254.10.1", false},
		{"a network", "169.254.10.2/30", "", "10.0.0.0/8 via 169.254.10.1", false},
		{"IPv6 alone", "169.254.7.7/16", "", "default6 via fe80::1", false},
	} {
		p := prefix(tt.address)
		a := route.Address{Index: planLink, Addr: p.Addr(), Bits: p.Bits()}
		if tt.peer != "" {
			a.Peer = addr(tt.peer)
		}
		if got := Leaves(mainOf("", tt.main).Routes, a); got != tt.want {
			t.Errorf("%s: got %v", tt.name, got)
		}
	}
}

// TestWithoutRouter: a link is named that has a default route, and no IPv4 address of which packets can leave.
func TestWithoutRouter(t *testing.T) {
	for _, tt := range []struct {
		name, addresses, main string
		want                  bool
	}{
		{"no router", "169.254.7.7/16", "default", true},
		{"a router of no network", "169.254.7.7/16", "default via 192.0.2.1", true},
		{"no default", "169.254.7.7/16", "", false},
		{"a default of IPv6", "169.254.7.7/16", "default6 via fe80::1", false},
		{"a router", "169.254.10.2/30", "default via 169.254.10.1", false},
		{"beside an address by DHCP", "169.254.7.7/16 192.0.2.5/24", "default via 192.0.2.1", false},
		{"an ordinary address", "192.0.2.5/24", "default", false},
	} {
		var addresses []route.Address
		for text := range strings.FieldsSeq(tt.addresses) {
			p := prefix(text)
			addresses = append(addresses, route.Address{Index: planLink, Addr: p.Addr(), Bits: p.Bits()})
		}
		if got := WithoutRouter(mainOf("", tt.main).Routes, addresses, addresses[0]); got != tt.want {
			t.Errorf("%s: got %v", tt.name, got)
		}
	}
}
