// Package uplink says what an address of this host means for the kernel: which rules and routes a lease of
// a table needs, which rules an earlier client left, which rules serve what is bound to its interface, and which
// addresses are served at all. It is pure: it neither reads nor changes anything.
package uplink

import (
	"fmt"
	"math"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Priorities are the priorities of the three rules.
type Priorities struct{ Source, Network, Unbound uint32 }

// OriginalPriorities are those of the original, and the default.
var OriginalPriorities = Priorities{Source: 10000, Network: 20000, Unbound: 91000}

// Uplink is an address and what its caller wants for it.
type Uplink struct {
	Key        wire.Key     // canonical
	Network    netip.Prefix // the address with its prefix length; zero for unspec
	Tag        string
	Want       uint32 // the table to ask for; 0: any
	Priorities Priorities
	NoNetwork  bool // leave the network rule out
	Forward    bool // rule for forwarded traffic that comes from the network, too
	Settings   Settings
}

// IsAddress reports whether the key names an address, which comes and goes with its link and
// has rules, or any other identifier.
func (u Uplink) IsAddress() bool { return u.Key.Family != wire.Unspec }

// Addr is the address, or the zero Addr if the key names something else.
func (u Uplink) Addr() netip.Addr {
	addr, _ := netip.ParseAddr(u.Key.Address) // Canonical has parsed it; unspec has none
	return addr
}

// Nameservers are the name servers to ask from the address. A link-local one gets the link of the address as its zone,
// which DHCPv6 does not give and a resolver needs.
func (u Uplink) Nameservers() []netip.Addr {
	servers := slices.Clone(u.Settings.Nameservers)
	for i, server := range servers {
		if server.Is6() && server.IsLinkLocalUnicast() && server.Zone() == "" {
			servers[i] = server.WithZone(u.Key.Ifname)
		}
	}
	return servers
}

// Host is the source of the source rule.
func (u Uplink) Host() netip.Prefix { return netip.PrefixFrom(u.Addr(), u.Addr().BitLen()) }

// Rules are the rules for a lease of table.
func (u Uplink) Rules(table uint32) []route.Rule {
	if !u.IsAddress() {
		return nil
	}
	rule := func(priority uint32) route.Rule {
		return route.Rule{Priority: priority, Table: table, Protocol: route.Protocol}
	}
	source := rule(u.Priorities.Source)
	source.Src = u.Host()
	unbound := rule(u.Priorities.Unbound)
	unbound.Iif = Loopback
	var rules []route.Rule
	if u.Settings.SpecificFirst {
		// What is more specific than a default, in the table or in main, comes first.
		for i, t := range []uint32{table, unix.RT_TABLE_MAIN} {
			specific := source
			specific.Priority = u.Priorities.Source - 2 + uint32(i)
			specific.Table, specific.MinLength = t, 1
			rules = append(rules, specific)
		}
	}
	rules = append(rules, source)
	if u.Settings.OnLoss == Block {
		// A rule behind the source rule, and no route in the table: that would stop lookups by the unbound rule, too,
		// before they come to other uplinks.
		rules = append(rules, u.Block())
	}
	if u.Forward && !u.Network.IsSingleIP() {
		forward := rule(u.Priorities.Source)
		forward.Src = u.Network.Masked()
		rules = append(rules, forward)
	}
	if u.Settings.Prefix.IsValid() {
		// Links behind this host have parts of the prefix, so the routes to those in main come first.
		delegated := rule(u.Priorities.Source)
		delegated.Src = u.Settings.Prefix.Masked()
		specific := delegated
		specific.Priority--
		specific.Table, specific.MinLength = unix.RT_TABLE_MAIN, 1
		rules = append(rules, specific, delegated)
	}
	// DHCPv6 leases have no network of their own.
	if !u.NoNetwork && !(u.Key.Family == wire.Inet6 && u.Network.IsSingleIP()) {
		network := rule(u.Priorities.Network)
		network.Dst = u.Network.Masked()
		rules = append(rules, network)
	}
	return append(rules, unbound)
}

// CanBlock reports whether there is a priority for Block.
func (u Uplink) CanBlock() bool { return u.Priorities.Source != math.MaxUint32 }

// Block is the rule that lets nothing leave from the address by another uplink.
func (u Uplink) Block() route.Rule {
	return route.Rule{Priority: u.Priorities.Source + 1, Src: u.Host(), Action: route.Unreachable, Protocol: route.Protocol}
}

// BlockOnLoss is that rule, if the settings want it: for an address that may come back.
func (u Uplink) BlockOnLoss() []route.Rule {
	if u.Settings.OnLoss != Block {
		return nil
	}
	return []route.Rule{u.Block()}
}

// Original reports whether r is one of the three rules that the original adds for this address and table. The original
// sets no protocol, and never deletes its rules.
func (u Uplink) Original(r route.Rule, table uint32) bool {
	if r.Protocol != unix.RTPROT_UNSPEC || r.Table != table {
		return false
	}
	plain := route.Rule{Priority: r.Priority, Table: table}
	switch r.Priority {
	case OriginalPriorities.Source:
		plain.Src = u.Host()
	case OriginalPriorities.Network:
		if r.Dst.Addr() != u.Addr() {
			return false
		}
		plain.Dst = r.Dst // with its host bits, as the original gives it
	case OriginalPriorities.Unbound:
		plain.Iif = "lo"
	default:
		return false
	}
	return r == plain
}

// Leftovers are the tables that rules from this address lead to: rules of ours, of a client that died, and rules of the
// original.
func (u Uplink) Leftovers(rules []route.Rule) (ours, originals map[uint32]bool) {
	ours, originals = make(map[uint32]bool), make(map[uint32]bool)
	for _, r := range rules {
		if r.Src != u.Host() || LeavesTable(r) {
			continue
		}
		if r.Protocol == route.Protocol {
			ours[r.Table] = true
		} else if u.Original(r, r.Table) {
			originals[r.Table] = true
		}
	}
	return ours, originals
}

// LeavesTable reports whether a rule of ours from an address, or a prefix, leads elsewhere than to its table.
func LeavesTable(r route.Rule) bool { return r.Action != route.Lookup || r.Table == unix.RT_TABLE_MAIN }

// Orphans returns a function that reports whether a rule of ours from a prefix leads elsewhere than to a table, and no
// rule leads from the prefix to a table any more: several addresses may have one prefix. marked are all rules of ours,
// or those that are to stay.
func Orphans(marked []route.Rule) func(route.Rule) bool {
	had := make(map[netip.Prefix]bool)
	for _, r := range marked {
		if !LeavesTable(r) {
			had[r.Src] = true
		}
	}
	return func(r route.Rule) bool {
		return r.Protocol == route.Protocol && r.Src.IsValid() && !IsHost(r) && LeavesTable(r) && !had[r.Src]
	}
}

// Updated is the uplink with the tag of a Replace, and with its settings if it has any: a call that only asks for the
// table has none.
func (u Uplink) Updated(r wire.Request) (Uplink, error) {
	u.Tag = r.Tag
	if r.Settings == "" {
		return u, nil
	}
	settings, err := DecodeSettings([]byte(r.Settings))
	if err != nil {
		return u, err
	}
	u.Settings = settings
	return u, u.validateSettings()
}

// Family is the number of the address family for rtnetlink.
func (u Uplink) Family() int { return int(u.Key.Family) }

// String is the address and its link, for messages.
func (u Uplink) String() string { return fmt.Sprintf("%s on %s", u.Key.Address, u.Key.Ifname) }
