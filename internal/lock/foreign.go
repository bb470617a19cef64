package lock

import (
	"net/netip"
	"slices"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// KeepForeign makes the rules of a family for users and ports that are bound to an interface, and have the address of
// another uplink, equal to the guards of the interface and the leases of the host.
func KeepForeign(kernel *route.Conn, family int, m wire.Marking, ifname string) error {
	ours := func(r route.Rule) bool { return uplink.IsForeign(r) && r.Priority == uplink.ForeignPriority(m) }
	rules, err := kernel.RulesWhere(family, func(r *route.Rule) bool { return r.Protocol == route.Protocol })
	if err != nil {
		return err
	}
	guards := uplink.GuardsOf(m, rules)
	if !slices.ContainsFunc(guards, uplink.HasForeign) && !slices.ContainsFunc(rules, ours) {
		return nil
	}
	own := make(map[netip.Addr]bool)
	link, found, err := kernel.LinkByName(ifname)
	if err != nil {
		return err
	}
	if found {
		addresses, err := kernel.AddressesOn(family, link.Index)
		if err != nil {
			return err
		}
		for _, a := range addresses {
			own[a.Addr] = true
		}
	}
	_, _, err = kernel.SyncRules(family, ours, uplink.ForeignRules(m, rules, func(a netip.Addr) bool { return own[a] }))
	return err
}
