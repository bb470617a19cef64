package hook

import (
	"net/netip"

	"github.com/table-allocator/table-allocator/internal/uplink"
)

// pppd reads the variables of pppd(8), which runs its script when the link has its IPv4 address. pppd adds no default
// route where main has one already, and says so in its log alone: the table has the link as its gateway from here. Name
// servers are those of usepeerdns, which is for a provider. Without them the peer may be one that dials in, and a
// table is not leased for each of those. When the link goes down its address goes, and its holder notices.
func (e *event) pppd() {
	e.settings.routes = uplink.CopyRoutes
	if !e.link(e.get("IFNAME")) || e.get("USEPEERDNS") == "" {
		return
	}
	addr, ok := e.parseOwn(variable{"IPLOCAL", e.get("IPLOCAL")})
	if !ok || !addr.Is4() {
		return
	}
	l := e.lease("pppd")
	l.Addr, l.Bits = addr, addr.BitLen()
	l.Static = []uplink.StaticRoute{{Dst: netip.PrefixFrom(netip.IPv4Unspecified(), 0)}}
	l.Metric = behindMain
	e.nameservers(&l, true, e.words("DNS1", "DNS2"))
	e.call(Hold{Lease: l})
}
