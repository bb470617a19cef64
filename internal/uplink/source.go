package uplink

import (
	"net/netip"

	"github.com/table-allocator/table-allocator/internal/route"
)

// Source is the source that traffic which is bound to nothing has over the link on a host with main's routes, also with
// those that move took: what the best default route says, or in IPv4 the first address whose network has the gateway. The
// zero Addr is any: nothing says so, or the kernel chooses for each destination, as in IPv6.
func (u Uplink) Source(m Main) netip.Addr {
	var legs []route.Route
	for _, r := range m.all() {
		if u.Carries(r) {
			legs = append(legs, r.Legs(m.Index)...)
		}
	}
	best, found := BestDefault(legs)
	if !found || best.Src.IsValid() || !u.Addr().Is4() {
		return best.Src
	}
	for _, a := range m.Addresses {
		if !a.Local && best.Gateway.IsValid() && a.Network.Contains(best.Gateway) {
			return a.Addr
		}
	}
	for _, a := range m.Addresses {
		if !a.Local {
			return a.Addr
		}
	}
	return netip.Addr{}
}
