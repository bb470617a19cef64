package hook

import (
	"net/netip"

	"github.com/table-allocator/table-allocator/internal/uplink"
)

// udhcpc reads the variables of udhcpc's script. Its default script adds addresses and routes before, and cannot add a
// default route that main has over another link: the gateway of the table comes from here. When a lease ends, the
// default script deletes the address, and its holder notices.
func (e *event) udhcpc(action string) {
	e.settings.routes = uplink.CopyRoutes
	if action != "bound" && action != "renew" || !e.link(e.get("interface")) {
		return
	}
	e.lease4(e.lease("udhcpc"), names4{"ip", "subnet", "router", "IF_METRIC", "dns"}, func(l *Lease, own netip.Prefix) {
		e.pairs(l, own, "staticroutes", "msstaticroutes")
	})
}
