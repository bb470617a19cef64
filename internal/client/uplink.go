// Package client turns a lease into kernel state and takes it back: one pure state
// machine for each address, and the loop that drives a set of them with datagrams,
// kernel events and timers. It hides how a lease is asked for, kept and given back,
// which rules belong to it, and how the processes that hold leases find each other.
package client

import (
	"fmt"
	"math"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Priorities are those of the three rules.
type Priorities struct{ Source, Network, Unbound uint32 }

// OriginalPriorities are the ones that the original has built in, and the default.
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

// isAddress tells whether the key names an address, which comes and goes with its link and
// has rules, or any other identifier.
func (u Uplink) isAddress() bool { return u.Key.Family != wire.Unspec }

func (u Uplink) addr() netip.Addr {
	addr, _ := netip.ParseAddr(u.Key.Address) // Canonical has parsed it; unspec has none
	return addr
}

// nameservers are those to ask from the address. A link-local one is reached through the
// link of the address, which DHCPv6 does not say and a resolver has to know.
func (u Uplink) nameservers() []netip.Addr {
	servers := slices.Clone(u.Settings.Nameservers)
	for i, server := range servers {
		if server.Is6() && server.IsLinkLocalUnicast() && server.Zone() == "" {
			servers[i] = server.WithZone(u.Key.Ifname)
		}
	}
	return servers
}

// host is the source of the source rule.
func (u Uplink) host() netip.Prefix { return netip.PrefixFrom(u.addr(), u.addr().BitLen()) }

// rules are what a lease of table means for the kernel.
func (u Uplink) rules(table uint32) []route.Rule {
	if !u.isAddress() {
		return nil
	}
	rule := func(priority uint32) route.Rule {
		return route.Rule{Priority: priority, Table: table, Protocol: route.Protocol}
	}
	source := rule(u.Priorities.Source)
	source.Src = u.host()
	unbound := rule(u.Priorities.Unbound)
	unbound.Iif = loopback
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
		// Behind the source rule, not in the table: there it would stop the unbound rules
		// of other uplinks, too.
		rules = append(rules, u.block())
	}
	if u.Forward && !u.Network.IsSingleIP() {
		forward := rule(u.Priorities.Source)
		forward.Src = u.Network.Masked()
		rules = append(rules, forward)
	}
	if u.Settings.Prefix.IsValid() {
		// Links behind this host have parts of the prefix: what main knows of them comes first.
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

// blocks tells whether there is a place for block.
func (u Uplink) blocks() bool { return u.Priorities.Source != math.MaxUint32 }

// block is the rule that lets nothing leave from the address by another uplink.
func (u Uplink) block() route.Rule {
	return route.Rule{Priority: u.Priorities.Source + 1, Src: u.host(), Action: route.Unreachable, Protocol: route.Protocol}
}

// guard is that rule for an address that is awaited, if it is wanted.
func (u Uplink) guard() []route.Rule {
	if u.Settings.OnLoss != Block {
		return nil
	}
	return []route.Rule{u.block()}
}

// original tells whether r is one of the three rules that the original program has for
// this very address in one table. It marks nothing, and never removes them.
func (u Uplink) original(r route.Rule, table uint32) bool {
	if r.Protocol != unix.RTPROT_UNSPEC || r.Table != table {
		return false
	}
	plain := route.Rule{Priority: r.Priority, Table: table}
	switch r.Priority {
	case OriginalPriorities.Source:
		plain.Src = u.host()
	case OriginalPriorities.Network:
		if r.Dst.Addr() != u.addr() {
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

// leftovers are the tables that rules from this address look up: rules of a client of
// ours that died, or of the original.
func (u Uplink) leftovers(rules []route.Rule) (ours, originals map[uint32]bool) {
	ours, originals = make(map[uint32]bool), make(map[uint32]bool)
	for _, r := range rules {
		if r.Src != u.host() || beside(r) {
			continue
		}
		if r.Protocol == route.Protocol {
			ours[r.Table] = true
		} else if u.original(r, r.Table) {
			originals[r.Table] = true
		}
	}
	return ours, originals
}

// beside tells whether a rule of ours from an address, or a prefix, leads elsewhere than to
// its table.
func beside(r route.Rule) bool { return r.Action != route.Lookup || r.Table == unix.RT_TABLE_MAIN }

// orphans tells of rules beside those of prefixes whether nobody has the prefix: several
// addresses may, and no table tells whose they are. marked are all of ours, or those that
// are to stay.
func orphans(marked []route.Rule) func(route.Rule) bool {
	had := make(map[netip.Prefix]bool)
	for _, r := range marked {
		if !beside(r) {
			had[r.Src] = true
		}
	}
	return func(r route.Rule) bool {
		return r.Protocol == route.Protocol && r.Src.IsValid() && !isHost(r) && beside(r) && !had[r.Src]
	}
}

// retold is the uplink with what a Replace brings: the newest tag, and settings if there
// are any, since a call that only asks for the table has none.
func (u Uplink) retold(r wire.Request) (Uplink, error) {
	u.Tag = r.Tag
	if r.Settings == "" {
		return u, nil
	}
	settings, err := decodeSettings([]byte(r.Settings))
	u.Settings = settings
	return u, err
}

// family is the number of the address family for rtnetlink.
func (u Uplink) family() int { return int(u.Key.Family) }

func (u Uplink) String() string { return fmt.Sprintf("%s on %s", u.Key.Address, u.Key.Ifname) }
