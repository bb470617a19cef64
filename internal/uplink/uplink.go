// Package uplink says what an address of this host means for the kernel: which rules and routes a lease of
// a table needs, which rules an earlier client left, which rules serve traffic that is bound to its interface, and which
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
	NoUnbound  bool // leave the unbound rules out: unbound traffic never uses this uplink
	Forward    bool // rule for forwarded traffic that comes from the network, too
	Replies    bool // rule for forwarded replies that have the mark of the table, see internal/nat
	Settings   Settings
	Ties       []Tie          // with main first, as main has them now
	Ranges     []netip.Prefix // of addresses that the link has, too, as table local has them now
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
	rules := append(u.mainFirst(table), u.fromAddress(table)...)
	if u.Replies {
		rules = append(rules, u.reply(table))
	}
	rules = append(rules, u.fromNetworks(table)...)
	rules = append(rules, u.toNetwork(table)...)
	return append(rules, u.Unbound(table)...)
}

func lookup(priority, table uint32) route.Rule {
	return route.Rule{Priority: priority, Table: table, Protocol: route.Protocol}
}

// mainFirst are the rules that let main's routes come before the table, but for defaults and halves, and before
// them those for ties.
func (u Uplink) mainFirst(table uint32) []route.Rule {
	if !u.Settings.SpecificFirst {
		return nil
	}
	from := func(priority uint32, to netip.Prefix, table uint32) route.Rule {
		r := lookup(priority, table)
		r.Src, r.Dst = u.Host(), to
		return r
	}
	var rules []route.Rule
	for _, tie := range u.Ties {
		r := from(u.Priorities.Source-3-tie.Level, tie.Prefix, table)
		if tie.Main {
			r.Table, r.MinLength = unix.RT_TABLE_MAIN, uint8(tie.Prefix.Bits())
		}
		rules = append(rules, r)
	}
	r := from(u.Priorities.Source-2, netip.Prefix{}, unix.RT_TABLE_MAIN)
	r.MinLength = minLength(u.Family())
	return append(rules, r)
}

// minLength is for lookups of main in which defaults and halves do not count.
func minLength(family int) uint8 { return uint8(Halves(family) + 1) }

// fromAddress are the rules for what comes from the address.
func (u Uplink) fromAddress(table uint32) []route.Rule {
	host := lookup(u.Priorities.Source, table)
	host.Src = u.Host()
	rules := []route.Rule{host}
	if u.Settings.OnLoss == Block {
		// A rule behind the source rule, and no route in the table: that would stop lookups by the unbound rule, too,
		// before they come to other uplinks.
		rules = append(rules, u.Block())
	}
	return rules
}

// reply is the rule for replies that are sent on by this host, which gives them the address of the uplink only behind all rules.
func (u Uplink) reply(table uint32) route.Rule {
	r := lookup(u.Priorities.Source, table)
	r.Mark, r.Mask = wire.ReplyMark(table), math.MaxUint32
	return r
}

// IsReply reports whether a rule has the form of that for replies, of whatever priority.
func IsReply(r route.Rule) bool {
	u := Uplink{Priorities: Priorities{Source: r.Priority}}
	return r == u.reply(r.Table)
}

// behindHosts is how far behind the source rule the rule from a network or prefix stands. Rules from single addresses
// come first: the network may contain an address of another uplink.
const behindHosts = 3

// fromNetworks are the rules for what comes from the network of the address, from ranges of the link, and from a prefix that
// the network delegates to this host.
func (u Uplink) fromNetworks(table uint32) (rules []route.Rule) {
	networks := slices.DeleteFunc(slices.Clone(u.Ranges), func(r netip.Prefix) bool { return r.Bits() < u.shortestNetwork() })
	if network := u.Network.Masked(); u.Forward && !network.IsSingleIP() && !slices.Contains(networks, network) {
		networks = append(networks, network)
	}
	for _, network := range networks {
		rule := lookup(u.Priorities.Source+behindHosts, table)
		rule.Src = network
		rules = append(rules, rule)
	}
	if u.Settings.Prefix.IsValid() {
		rules = append(rules, u.FromPrefix(u.Settings.Prefix.Masked(), table)...)
	}
	return rules
}

// FromPrefix are the rules for what comes from a delegated prefix, or a part of it. Links behind the host have parts of
// the prefix: what main knows of them comes first.
func (u Uplink) FromPrefix(prefix netip.Prefix, table uint32) []route.Rule {
	rule := lookup(u.Priorities.Source+behindHosts, table)
	rule.Src = prefix
	specific := rule
	specific.Priority--
	specific.Table, specific.MinLength = unix.RT_TABLE_MAIN, minLength(u.Family())
	return []route.Rule{specific, rule}
}

// toNetwork are the rules for what goes to the network of the address: what main knows at the length of the
// network or longer goes as if this program was not there, the rest by the table. DHCPv6 leases have no
// network of their own, and one that is shorter than any that is allotted would take other uplinks' traffic.
func (u Uplink) toNetwork(table uint32) []route.Rule {
	if u.NoNetwork || u.Network.Bits() < u.shortestNetwork() || u.Key.Family == wire.Inet6 && u.Network.IsSingleIP() {
		return nil
	}
	rule := lookup(u.Priorities.Network, table)
	rule.Dst = u.Network.Masked()
	if !u.Settings.PlacesRoutes() || rule.Priority == 0 {
		return []route.Rule{rule}
	}
	known := lookup(u.Priorities.Network-1, unix.RT_TABLE_MAIN)
	known.Dst, known.MinLength = rule.Dst, uint8(rule.Dst.Bits())
	return []route.Rule{known, rule}
}

// shortestNetwork is the length of the largest network that one provider has.
func (u Uplink) shortestNetwork() int {
	if u.Key.Family == wire.Inet6 {
		return 32
	}
	return 8
}

// LeadsPastMain reports whether rules of ours lead to a table by a network, and none to main first, as toNetwork has it. A
// version before this one had such rules. An address of full length has none, as of DHCPv6, whoever made them.
func LeadsPastMain(rules []route.Rule, table uint32) bool {
	leads := false
	for _, r := range rules {
		if r.Table != table || !r.Dst.IsValid() || r.Src.IsValid() {
			continue
		}
		leads = true
		if slices.ContainsFunc(rules, func(known route.Rule) bool {
			return known.Table == unix.RT_TABLE_MAIN && known.Dst == r.Dst && known.Priority+1 == r.Priority
		}) {
			return false
		}
	}
	return leads
}

// Unbound are the rules for unbound traffic, where main has no route. With move main has lost its
// defaults, so that forwarded packets need a rule, too, and iif lo is for what this host sends.
func (u Uplink) Unbound(table uint32) []route.Rule {
	if u.NoUnbound {
		return nil
	}
	own := lookup(u.Priorities.Unbound, table)
	own.Iif = Loopback
	if u.Settings.Routes != MoveRoutes || u.Priorities.Unbound == math.MaxUint32 {
		return []route.Rule{own}
	}
	return []route.Rule{own, lookup(u.Priorities.Unbound+1, table)}
}

// IsUnbound reports whether a rule has the form of those that Unbound returns, of whatever priority.
func IsUnbound(r route.Rule) bool {
	plain := lookup(r.Priority, r.Table)
	plain.Iif = r.Iif
	return r == plain && (r.Iif == Loopback || r.Iif == "") && r.Table != unix.RT_TABLE_MAIN && !IsChoice(r)
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

// Orphans returns a function that reports whether a rule of ours for a prefix or network leads elsewhere than to a
// table, and right behind it no rule leads from the prefix, or to the network, to a table any more: several addresses
// may have one of these. marked are all rules of ours, or those that are to stay.
func Orphans(marked []route.Rule) func(route.Rule) bool {
	type pair struct {
		src, dst netip.Prefix
		priority uint32
	}
	had := make(map[pair]bool)
	for _, r := range marked {
		if !LeavesTable(r) {
			had[pair{r.Src, r.Dst, r.Priority}] = true
		}
	}
	return func(r route.Rule) bool {
		return r.Protocol == route.Protocol && IsShared(r) && !had[pair{r.Src, r.Dst, r.Priority + 1}]
	}
}

// IsShared reports whether a rule may be of several addresses at once: it leaves the table for a prefix
// or for a network.
func IsShared(r route.Rule) bool {
	return LeavesTable(r) && !IsHost(r) && !IsNamespace(r) && (r.Src.IsValid() || r.Dst.IsValid() && r.Traffic == (route.Traffic{}))
}

// Updated is the uplink with the tag of a Replace, and with its settings if it has any: a call that only asks for the
// table has none, and one without routes says a prefix and name servers alone. The files stay those of the uplink: no
// datagram may say what is written where. So does the resolver if the call names none.
func (u Uplink) Updated(r wire.Request) (Uplink, error) {
	u.Tag = r.Tag
	if r.Settings == "" {
		return u, nil
	}
	settings, err := DecodeSettings([]byte(r.Settings))
	if err != nil {
		return u, err
	}
	if settings.Routes == NoRoutes { // somebody else's: the call says nothing of them
		told := settings
		settings = u.Settings
		settings.Prefix, settings.Nameservers, settings.Resolver = told.Prefix, told.Nameservers, told.Resolver
	}
	settings.ServersFile, settings.PIDFile = u.Settings.ServersFile, u.Settings.PIDFile
	if settings.Resolver == "" {
		settings.Resolver = u.Settings.Resolver
	}
	u.Settings = settings
	return u, u.validateSettings()
}

// Family is the number of the address family for rtnetlink.
func (u Uplink) Family() int { return int(u.Key.Family) }

// String is the address and its link, for messages.
func (u Uplink) String() string { return fmt.Sprintf("%s on %s", u.Key.Address, u.Key.Ifname) }
