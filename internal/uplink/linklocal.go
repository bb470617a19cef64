package uplink

import (
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
)

// IsLinkLocal4 reports whether an address is of 169.254.0.0/16.
func IsLinkLocal4(a netip.Addr) bool { return a.Is4() && a.IsLinkLocalUnicast() }

// NoRouter says why a link is left out whose only IPv4 addresses are link-local.
const NoRouter = "main has a default route over the link, and no router for the address, which a host gives itself"

// WithoutRouter reports whether that is so of the link of an address: main has a default route over it, or half of one, and
// packets from none of its IPv4 addresses can leave.
func WithoutRouter(main []route.Route, addresses []route.Address, a route.Address) bool {
	if !IsLinkLocal4(a.Addr) {
		return false
	}
	inet := slices.DeleteFunc(slices.Clone(main), func(r route.Route) bool { return r.Family != unix.AF_INET })
	return Defaults(inet)[a.Index] && !slices.ContainsFunc(addresses, func(o route.Address) bool {
		return o.Index == a.Index && o.Addr.Is4() && Leaves(main, o)
	})
}

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
