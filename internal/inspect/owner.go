package inspect

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// protocols are the rtnetlink protocols of programs that others do not use.
var protocols = map[uint8]string{
	unix.RTPROT_KERNEL: "kernel", unix.RTPROT_BOOT: "", unix.RTPROT_STATIC: "static", unix.RTPROT_RA: "ra", unix.RTPROT_DHCP: "dhcp",
	unix.RTPROT_BIRD: "bird", unix.RTPROT_ZEBRA: "zebra", unix.RTPROT_KEEPALIVED: "keepalived", unix.RTPROT_BABEL: "babel",
	unix.RTPROT_OPENR: "openr", unix.RTPROT_BGP: "bgp", unix.RTPROT_ISIS: "isis", unix.RTPROT_OSPF: "ospf", unix.RTPROT_RIP: "rip",
}

// tables maps the tables of leases to the link of the address that each serves.
func (h *host) tables() map[uint32]string {
	names := make(map[uint32]string)
	for _, family := range families {
		for _, r := range h.rules[family] {
			if r.Protocol != route.Protocol || !uplink.IsHost(r) || uplink.LeavesTable(r) {
				continue
			}
			var links []int
			for _, a := range h.addresses {
				if a.Addr == r.Src.Addr() {
					links = append(links, a.Index)
				}
			}
			if len(links) > 1 { // the table tells
				links = slices.DeleteFunc(links, func(index int) bool { return !h.leadsOver(family, r.Table, index) })
			}
			if len(links) > 0 {
				names[r.Table] = h.linkName(links[0])
			}
		}
	}
	return names
}

// leadsOver reports whether a table has a route of ours over a link.
func (h *host) leadsOver(family int, table uint32, index int) bool {
	w, err := h.world(family)
	return err == nil && slices.ContainsFunc(w.Tables[table], func(r route.Route) bool { return r.Protocol == route.Protocol && r.Index == index })
}

const (
	tailscales = "tailscale, probably"
	wgQuicks   = "wg-quick, probably"
)

// ruleOwner says whose a rule is, as far as it shows; "" for the kernel's own.
func ruleOwner(r route.Rule, tables map[uint32]string) string {
	switch {
	case uplink.IsChoice(r):
		return strings.TrimSuffix("ours, the chosen uplink "+tables[r.Table], " ")
	case r.Protocol == route.Protocol && tables[r.Table] != "":
		return "ours, " + tables[r.Table]
	case r.Protocol == route.Protocol:
		return "ours"
	case isKernels(r):
		return ""
	case r.Protocol == unix.RTPROT_KERNEL:
		return "another program"
	case r.Table == 52, r.Priority >= 5200 && r.Priority < 5300 && r.Mask == 0xff0000:
		return tailscales
	case r.Table == 51820, r.Table == 0xca6c, r.Mark == 0xca6c, r.Mark == 51820:
		return wgQuicks
	case r.Table == 220 && r.Priority == 220:
		return "strongSwan, probably"
	case r.Table == 20053, r.Priority == 20053:
		return "NetworkManager, probably"
	case r.Priority == 105, r.Priority == 110, r.Table == 7120:
		return "netbird, probably"
	case r.Priority > 1000 && r.Priority < 4000 && r.Mask&0xff00 != 0:
		return "mwan3, probably"
	}
	if name := protocols[r.Protocol]; name != "" {
		return name
	}
	if r.Protocol > unix.RTPROT_STATIC {
		return fmt.Sprintf("protocol %d", r.Protocol)
	}
	return "another program"
}

// isKernels reports whether a rule is one of those that every network namespace begins with.
func isKernels(r route.Rule) bool {
	r.Protocol = 0 // of one that was deleted and added again
	table := map[uint32]uint32{0: unix.RT_TABLE_LOCAL, 32766: unix.RT_TABLE_MAIN, 32767: unix.RT_TABLE_DEFAULT}[r.Priority]
	return table != 0 && r == route.Rule{Priority: r.Priority, Action: route.Lookup, Table: table}
}

// routeOwner says whose a route is.
func routeOwner(r route.Route, tables map[uint32]string) string {
	switch {
	case uplink.IsChoiceRoute(r):
		return "ours, the chosen uplink"
	case r.Protocol == route.Protocol && tables[r.Table] != "":
		return "ours, " + tables[r.Table]
	case r.Protocol == route.Protocol:
		return "ours"
	}
	if name, known := protocols[r.Protocol]; known {
		return name
	}
	return fmt.Sprintf("protocol %d", r.Protocol)
}
