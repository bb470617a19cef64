package uplink

import (
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
)

// IsLinkLocal4 reports whether an address is of 169.254.0.0/16.
func IsLinkLocal4(a netip.Addr) bool { return a.Is4() && a.IsLinkLocalUnicast() }

// Leaves reports whether packets from an address can reach other networks, by what main says. Those from a link-local address
// of IPv4 do where main has a default route over its link, or half of one, by a router of its own network or by its far end, as on
// tunnels between clouds. Other ones are what a host gives itself, often beside an address by DHCP, and no router knows them.
func Leaves(main []route.Route, a route.Address) bool {
	if !IsLinkLocal4(a.Addr) {
		return a.Addr.IsGlobalUnicast()
	}
	for _, r := range main {
		if r.Family != unix.AF_INET || r.Dst.Bits() > Halves(r.Family) || r.Dst.Addr().IsMulticast() || IsChoiceRoute(r) {
			continue
		}
		for _, leg := range r.Legs(a.Index) {
			switch {
			case leg.Type != unix.RTN_UNICAST:
			case !leg.Gateway.IsValid():
				if a.Peer.IsValid() {
					return true
				}
			case leg.Gateway != a.Addr && a.Network().Masked().Contains(leg.Gateway):
				return true
			}
		}
	}
	return false
}
