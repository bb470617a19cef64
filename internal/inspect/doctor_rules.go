package inspect

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// lookRuleBefore asks for the destinations of rules before ours, too, and for what the packet filter marks, for which status
// does not ask.
func lookRuleBefore(p *patient) []symptom {
	all := p.found("shadowed")
	marked := map[int]func(route.Rule) bool{unix.AF_INET: p.marked("ip"), unix.AF_INET6: p.marked("ip6")}
	for _, l := range p.leases {
		if l.link.Index == 0 {
			continue
		}
		on := l.Address + " on " + l.Ifname + ": "
		behind := p.priorityOf(l)
		for _, r := range p.foreign(l.family) {
			all = append(all, p.lookPast(l, r, behind)...)
			if !r.Dst.IsValid() || r.Action != route.Lookup || r.Mask != 0 || r.Flags == 0 && uplink.IsHost(r) { // that one is meant
				continue
			}
			q := route.Question{Src: l.addr, Dst: r.Dst.Addr()}
			a, err := p.walk(l.family, q)
			rule, decided := a.Rule()
			if err != nil || !decided || rule != r || a.Err != 0 || slices.Contains(a.Route.Links(), l.link.Index) {
				continue
			}
			all = append(all, symptom{fmt.Sprintf("%sshadowed by rule %d for %s (leaves by %s)", on, r.Priority, r.Dst, p.linkNames(a.Route.Links())),
				fmt.Sprintf("%q comes before the rules of the address", r), moveRule(r, l.family, behind)})
		}
		parts, _ := p.parts(l.addr, l.link.Index, behind, marked[l.family]) // too many routes to walk through
		for _, part := range parts {
			if f := part.finding(); f.IsFault() {
				all = append(all, symptom{on + f.What, f.Evidence, f.Cure})
			}
		}
	}
	return all
}

// lookRuleMain finds that no rule leads to what the kernel has a rule for from the start: rules that were deleted by others do not come
// back, unless they are ours.
func lookRuleMain(p *patient) (all []symptom) {
	for _, family := range families {
		for _, kernels := range []struct{ priority, table uint32 }{{32766, unix.RT_TABLE_MAIN}, {32767, unix.RT_TABLE_DEFAULT}} {
			if p.leadsTo(family, kernels.table) || len(p.routes(family, kernels.table)) == 0 {
				continue
			}
			name := tableName(kernels.table)
			all = append(all, symptom{fmt.Sprintf("no rule of %s leads to table %s: what has no rule of its own, as forwarded packets, finds none of its routes", map[int]string{unix.AF_INET: "IPv4", unix.AF_INET6: "IPv6"}[family], name),
				fmt.Sprintf("table %s has routes", name), fmt.Sprintf("%s rule add priority %d lookup %s", ipOf(family), kernels.priority, name)})
		}
	}
	return all
}

// leadsTo reports whether a rule leads all packets to a table.
func (h *host) leadsTo(family int, table uint32) bool {
	return slices.ContainsFunc(h.rules[family], func(r route.Rule) bool {
		r.Protocol = 0
		return r == route.Rule{Priority: r.Priority, Action: route.Lookup, Table: table}
	})
}

// priorityOf is the priority of the source rule of a lease.
func (p *patient) priorityOf(l lease) uint32 {
	for _, r := range p.rules[l.family] {
		if isSource(r, l.addr, l.Table) {
			return r.Priority
		}
	}
	return uplink.OriginalPriorities.Source
}

// lookDelegated finds prefixes that were delegated to this host, as the route says that whoever asked for them adds, and that are no
// uplink's: what hosts behind this one send leaves by the first uplink, whose provider drops what is another one's.
func lookDelegated(p *patient) (all []symptom) {
	uplinks := make(map[int]lease) // one of each link, with IPv6
	for _, l := range p.leases {
		if l.family == unix.AF_INET6 && l.link.Index != 0 && !l.IsFault() {
			uplinks[l.link.Index] = l
		}
	}
	if len(uplinks) < 2 {
		return nil
	}
	for _, r := range p.routes(unix.AF_INET6, unix.RT_TABLE_MAIN) {
		const longest = 64 // a network of a link
		if r.Type == unix.RTN_UNICAST || r.Protocol != unix.RTPROT_DHCP || r.Dst.Bits() == 0 || r.Dst.Bits() > longest ||
			slices.ContainsFunc(p.rules[unix.AF_INET6], func(rule route.Rule) bool { return rule.Src == r.Dst }) {
			continue
		}
		var best lease
		for _, l := range uplinks {
			if n, most := common(l.addr, r.Dst.Addr()), common(best.addr, r.Dst.Addr()); n > most || n == most && l.Ifname < best.Ifname {
				best = l
			}
		}
		all = append(all, symptom{fmt.Sprintf("the delegated prefix %s is no uplink's: what hosts behind this one send may leave by another than that of its provider", r.Dst), p.routeText(r),
			fmt.Sprintf("if it is of %[1]s: table-allocator-client -6 -a %[2]s -i %[1]s --routes %[3]s --prefix %[4]s; the watch goes on with that", best.Ifname, best.Address, best.Mode, r.Dst)})
	}
	return all
}

// common is how many bits two addresses begin with that are the same; of no address: -1.
func common(a, b netip.Addr) int {
	if !a.IsValid() {
		return -1
	}
	n := 0
	for n < a.BitLen() && netip.PrefixFrom(a, n+1).Contains(b) {
		n++
	}
	return n
}

func lookTableGateway(p *patient) (all []symptom) {
	for _, l := range p.leases {
		routes := p.routes(l.family, l.Table)
		for _, r := range routes {
			if r.Protocol != route.Protocol && l.Mode != string(uplink.NoRoutes) {
				continue // table-shared finds it
			}
			if r.Dst.Bits() != 0 || !r.Gateway.IsValid() || r.Gateway.IsLinkLocalUnicast() || r.Onlink || r.Type != unix.RTN_UNICAST || l.family == unix.AF_INET && r.Gateway.Is6() {
				continue
			}
			if slices.ContainsFunc(routes, func(o route.Route) bool {
				return !o.Gateway.IsValid() && o.Type == unix.RTN_UNICAST && o.Dst.Contains(r.Gateway)
			}) {
				continue
			}
			all = append(all, symptom{fmt.Sprintf("table %d has no route to its gateway: neighbours of %s are sent through the gateway", l.Table, l.Address), p.routeText(r), p.addNetwork(l)})
		}
	}
	return all
}

// addNetwork is the command that adds the route to the network of an address, to main if its holder copies that.
func (p *patient) addNetwork(l lease) string {
	ip, network := ipOf(l.family), "NETWORK"
	if l.at.Addr.IsValid() && !l.at.Network().IsSingleIP() {
		network = l.at.Network().Masked().String()
	}
	if l.Mode == string(uplink.NoRoutes) {
		return fmt.Sprintf("%s route add %s dev %s table %d, or the client with --routes copy", ip, network, l.Ifname, l.Table)
	}
	return fmt.Sprintf("%s route add %s dev %s src %s", ip, network, l.Ifname, l.Address)
}

func lookTableShared(p *patient) (all []symptom) {
	for _, l := range p.leases {
		if l.Mode == string(uplink.NoRoutes) {
			continue // the caller fills the table
		}
		for _, r := range p.routes(l.family, l.Table) {
			if r.Protocol != route.Protocol && len(all) < 10 {
				all = append(all, symptom{fmt.Sprintf("table %d of %s has a route of another program", l.Table, l.Address), p.routeText(r), p.endRoute(r)})
			}
		}
		for _, r := range p.foreign(l.family) {
			if r.Table == l.Table && r.Src.Addr() != l.addr {
				all = append(all, symptom{fmt.Sprintf("a rule of another program leads to table %d of %s", l.Table, l.Address), r.String(), "delete that rule, or " + otherTables})
			}
		}
	}
	return all
}

func lookRuleOrphan(p *patient) (all []symptom) {
	for _, family := range families {
		for _, r := range p.rules[family] {
			if r.Protocol != route.Protocol || !uplink.IsHost(r) || uplink.LeavesTable(r) {
				continue
			}
			if left, cure := p.isLeft(r); left {
				all = append(all, symptom{"rules of " + r.Src.Addr().String() + " are left, and no process holds its lease", r.String(),
					outside.Service("enable --now", "table-allocator-watch") + ", or: " + cure})
				continue
			}
			known := slices.ContainsFunc(p.addresses, func(a route.Address) bool { return a.Addr == r.Src.Addr() }) ||
				slices.ContainsFunc(p.report.Uplinks, func(row Row) bool { return row.Address == r.Src.Addr().String() })
			if !known {
				all = append(all, symptom{"rules are left of " + r.Src.Addr().String() + ", which this host does not have", r.String(),
					"ip rule delete " + ruleText(r) + " # or start a watch, which does that"})
			}
		}
	}
	return all
}

// isLeft reports whether a rule is one that the holder of an address left behind, and what deletes it. The address may be on
// another link, too, where it is served.
func (p *patient) isLeft(r route.Rule) (left bool, cure string) {
	addr := r.Src.Addr().String()
	cure = "table-allocator-client release " + addr
	for _, row := range p.report.Uplinks {
		switch {
		case row.Address != addr || r.Action != route.Lookup:
		case row.PID != 0 && row.Table == r.Table:
			return false, ""
		case row.PID != 0: // release would end its lease
			cure = "ip rule delete " + ruleText(r)
		case row.State == "not-served":
			left = true
		}
	}
	return left, cure
}

func lookRuleDetached(p *patient) (all []symptom) {
	for _, family := range families {
		for _, r := range p.rules[family] {
			for _, name := range []string{r.Iif, r.Oif} {
				if r.Protocol == route.Protocol && name != "" && p.linkNamed(name).Index == 0 {
					all = append(all, symptom{"a rule of ours names the link " + name + ", which does not exist", r.String(), "none is needed if the link comes back"})
				}
			}
		}
	}
	return all
}

func lookRuleUID0(p *patient) (all []symptom) {
	for _, family := range families {
		name := map[int]string{unix.AF_INET: "ipv4/ip_forward", unix.AF_INET6: "ipv6/conf/all/forwarding"}[family]
		if readLine("/proc/sys/net/"+name) != "1" {
			continue
		}
		for _, r := range p.foreign(family) {
			if r.UIDs.Set && r.UIDs.First == 0 && r.Iif != uplink.Loopback {
				all = append(all, symptom{"a rule for user 0 takes forwarded packets, too, which have no owner", r.String(), "add iif lo to the rule"})
			}
		}
	}
	return all
}

func lookRuleSport(p *patient) (all []symptom) {
	for _, family := range families {
		for _, r := range p.foreign(family) {
			if r.Sports != (route.Ports{}) && (r.IPProto == 0 || r.IPProto == unix.IPPROTO_TCP) {
				all = append(all, symptom{"a rule by source port gives TCP connections the source of another uplink: the port is chosen after the source", r.String(),
					"select by destination port, by mark or by user"})
			}
		}
	}
	return all
}

func lookMarks(p *patient) (all []symptom) {
	var mask uint32
	for _, family := range families {
		for _, r := range p.rules[family] {
			if uplink.IsGuard(r) {
				mask |= r.Mask
			}
		}
	}
	for _, family := range families {
		for _, r := range route.Overlapping(p.foreign(family), mask) {
			all = append(all, symptom{fmt.Sprintf("a rule of another program looks at the bits %#x of marks, which bind programs to links", mask), r.String(),
				"set another bind_mark_mask in server.json"})
		}
	}
	return all
}

func lookSrcValidMark(p *patient) (all []symptom) {
	if setting(unix.AF_INET, "all", "src_valid_mark") != "1" {
		return nil
	}
	for _, r := range p.foreign(unix.AF_INET) {
		if r.Mask != 0 && r.Flags == 0 {
			all = append(all, symptom{"rp_filter looks at marks, and a rule of another program selects by mark", r.String(), "sysctl -w net.ipv4.conf.all.src_valid_mark=0 # and 1 for single links"})
		}
	}
	return all
}

func lookRulesMany(p *patient) (all []symptom) {
	const many = 500
	for _, family := range families {
		if n := len(p.rules[family]); n > many {
			all = append(all, symptom{fmt.Sprintf("%d rules, which every lookup goes through", n), "each costs about 17 ns", "delete what nobody needs, as ip rule shows it"})
		}
	}
	return all
}

// lookTableNames compares names of tables with those that are leased.
func lookTableNames(p *patient) (all []symptom) {
	files, _ := filepath.Glob("/etc/iproute2/rt_tables.d/*.conf") // the pattern is right
	for _, file := range append([]string{"/etc/iproute2/rt_tables"}, files...) {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // there is no such file, mostly
		}
		for line := range strings.Lines(string(text)) {
			fields := strings.Fields(line)
			if len(fields) < 2 {
				continue
			}
			number, err := strconv.ParseUint(fields[0], 0, 32)
			if err == nil && p.tables[uint32(number)] != "" && !strings.HasPrefix(fields[1], "ta-") {
				all = append(all, symptom{fmt.Sprintf("table %d of %s has the name %s of another program", number, p.tables[uint32(number)], fields[1]), file, otherTables})
			}
		}
	}
	return all
}

// networkOf is the network of a lease on its link.
func networkOf(l lease) netip.Prefix {
	if !l.at.Addr.IsValid() {
		return netip.Prefix{}
	}
	return l.at.Network().Masked()
}
