package inspect

import (
	"net/netip"
	"slices"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/walk"
)

// home is the link by which replies from the Internet arrive: that of the source. 0: it is not known, or the packet goes elsewhere.
func (h *host) home(r Result, q route.Question, last walk.Answer) int {
	source, err := netip.ParseAddr(r.Source)
	if q.Iif != 0 || r.Error != "" || err != nil || last.Route.Table == 0 || last.Route.Dst.Bits() > uplink.Halves(q.Family()) {
		return 0
	}
	return h.linkOf(source)
}

// linkOf is the uplink that has an address; 0: none, or several links.
func (h *host) linkOf(addr netip.Addr) (index int) {
	for _, a := range h.addresses {
		if a.Addr != addr {
			continue
		}
		if index != 0 || !h.isUplink(a) {
			return 0
		}
		index = a.Index
	}
	return index
}

// isUplink reports whether the link of an address leads to the Internet: a default route says so, or a rule of ours for the address.
func (h *host) isUplink(a route.Address) bool {
	w, err := h.world(a.Family())
	if err != nil {
		return false
	}
	for _, routes := range w.Tables {
		if slices.ContainsFunc(routes, func(r route.Route) bool {
			return r.Dst.Bits() <= uplink.Halves(a.Family()) && slices.Contains(r.Links(), a.Index)
		}) {
			return true
		}
	}
	return slices.ContainsFunc(w.Rules, func(r route.Rule) bool {
		return r.Protocol == route.Protocol && r.Src.IsValid() && r.Src.IsSingleIP() && r.Src.Addr() == a.Addr
	})
}
