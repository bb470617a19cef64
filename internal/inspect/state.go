package inspect

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/walk"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// rowOfLease is the row of a key as its holder tells.
func rowOfLease(key wire.Key, held holder, server Server) Row {
	row := Row{Ifname: key.Ifname, Address: key.Address, Family: key.Family.String()}
	switch {
	case held.absent:
		start := outside.Service("enable --now", "table-allocator-watch")
		f := Finding{"not-served", Note, "not served: " + start,
			"there is no client for the address, and no watch", start}
		if err := unservable(key.Ifname); err != nil {
			f.What, f.Evidence, f.Cure = "not served: "+err.Error(), "the server refuses such a name of a link", "rename the link: ip link set dev ... name NAME"
		}
		row.Findings = append(row.Findings, f)
		return row
	case held.silent != nil:
		row.Findings = append(row.Findings, Finding{"silent", Error, "no answer of its holder", *held.silent, "end that process; a watch takes the address over"})
		return row
	}
	row.PID, row.Mode, row.Table = held.PID, held.Mode, held.Table
	if held.Table == 0 {
		f := Finding{"no-lease", Error, "no lease", cmp.Or(held.Error, "its holder asks the server, which has not answered yet"), outside.Journal("table-allocator-server")}
		if stopped := server.finding(""); stopped != nil {
			f.What, f.Cure = "no lease: "+stopped.What, stopped.Cure
		} else if held.Error != "" {
			f.What += ": " + held.Error
		}
		if held.Error == noTableFree {
			f.Cure = moreTables()
		}
		row.Findings = append(row.Findings, f)
		return row
	}
	row.LeaseLeft = held.Left
	if held.Left == 0 { // its holder does not say, as those of versions before
		row.LeaseLeft = max(held.Expires-wire.Seconds(wire.Now()), 0)
	}
	ends := ", lease ran out"
	if row.LeaseLeft > 1 { // a holder never says less
		ends = ", lease ends in " + (time.Duration(row.LeaseLeft) * time.Second).String()
	}
	if stopped := server.finding(ends); stopped != nil {
		row.Findings = append(row.Findings, *stopped)
	}
	if exe, is := outdated(held.PID); is {
		row.Findings = append(row.Findings, Finding{"outdated", Note, "its holder runs a version that is not installed any more",
			fmt.Sprintf("pid %d, %s", held.PID, exe), renewal(held.PID)})
	}
	return row
}

// noTableFree is how the server refuses a lease if its pool is used up.
const noTableFree = "no table is free"

// moreTables says how the server gets more tables.
func moreTables() string {
	return "raise num_tables in server.json, and: " + outside.Service("restart", "table-allocator-server")
}

// rowOf is the row of an address.
func (h *host) rowOf(c candidate, held holder, server Server) (Row, error) {
	row := rowOfLease(c.Key, held, server)
	if c.at.DADFailed() && held.absent {
		row.Findings = []Finding{*h.notUsable(c)}
	}
	if c.withoutRouter && row.PID == 0 {
		row.Findings = []Finding{{"no-router", Note, "not served: main has no router for it", uplink.NoRouter,
			"nothing, if " + c.link.Name + " is no uplink; else: ip route add default via ROUTER dev " + c.link.Name}}
	}
	if held.Table == 0 {
		return row, nil
	}
	found, err := h.notUsable(c), error(nil)
	var exits []exit
	if found == nil {
		found, exits, err = h.elsewhere(c, held.Table, &row)
	} else if found.Name == "no-carrier" || found.Name == "link-down" {
		err = h.byOthers(c, found, &row)
	}
	if err != nil {
		return row, err
	}
	var routes []route.Route
	if found == nil && held.Missing == "" && usesDefault(exits, held.Table) { // the table may have very many routes
		row.Gateway = gatewayOf([]route.Route{exits[0].route})
	} else {
		if routes, _, err = h.kernel.RoutesAtMost(c.Family(), held.Table, mostRoutes); err != nil {
			return row, err
		}
		row.Gateway = gatewayOf(slices.DeleteFunc(slices.Clone(routes), func(r route.Route) bool { return r.From.IsValid() && !r.From.Contains(c.at.Addr) }))
		if found != nil && found.Name == "no-route" && row.LeavesBy != "" && held.Missing == "" && h.isBranch(c, routes) {
			*found = Finding{"no-default", Note, "no default route (leaves by " + row.LeavesBy + ")",
				fmt.Sprintf("table %d has routes to other networks over %s, and no default route", held.Table, c.link.Name), found.Cure}
		}
	}
	if found != nil {
		if found.Name != "shadowed" && strings.Contains(held.Missing, uplink.LostDefault) { // of which the cure is that of the finding
			found.Evidence += ", and " + c.link.Name + " lost " + uplink.LostDefault
			held.Missing = strings.Replace(held.Missing, uplink.LostDefault, "", 1)
		}
		row.Findings = append([]Finding{*found}, row.Findings...)
	} else if row.Findings, err = h.withParts(row.Findings, c); err != nil {
		return row, err
	}
	if found == nil || found.Name != "waiting-dad" {
		row.Findings = append(row.Findings, h.incomplete(held, routes, found)...)
	}
	return row, nil
}

// missesSome is what status says of an address whose rules or table are not whole; the evidence is what is missing.
const missesSome = "misses rules or routes"

// incomplete says what the rules and the table of an address lack, and which route of another program is in the table.
func (h *host) incomplete(held holder, routes []route.Route, found *Finding) (all []Finding) {
	missing := slices.DeleteFunc(strings.Split(held.Missing, ", "), func(part string) bool { return part == "" || strings.HasPrefix(part, "only ours") })
	at := slices.IndexFunc(routes, func(r route.Route) bool { return r.Protocol != route.Protocol })
	if at >= 0 && held.Missing != "" && held.Mode != string(uplink.NoRoutes) {
		f := Finding{"incomplete", Error, "another program has a route in its table", h.routeText(routes[at]), h.endRoute(routes[at])}
		if found == nil || found.Cure != f.Cure {
			all = append(all, f)
		}
	}
	if len(missing) > 0 {
		all = append(all, Finding{"incomplete", Error, missesSome, strings.Join(missing, ", "),
			"the holder restores what others delete; if this stays: " + outside.Journal("table-allocator-watch")})
	}
	return all
}

// deleteRoute is the command that deletes a route.
func (h *host) deleteRoute(r route.Route) string {
	return ipOf(familyOf(r.Dst.Addr())) + " route delete " + h.routeCommand(r)
}

// otherTables says how tables are no others' any more.
const otherTables = "give the server other tables: table_offset in server.json, such as 20000, then restart server and watch"

// endRoute says what is to be done about a route of another program in a table of ours. One that a person added is deleted. What
// configures the network, or speaks a routing protocol, would add it again.
func (h *host) endRoute(r route.Route) string {
	if r.Protocol > unix.RTPROT_BOOT {
		return otherTables
	}
	return h.deleteRoute(r)
}

// ipOf is the command that changes what is of a family.
func ipOf(family int) string {
	if family == unix.AF_INET6 {
		return "ip -6"
	}
	return "ip"
}

// usesDefault reports whether packets that have no network of this host as destination leave by the default route of a table.
func usesDefault(exits []exit, table uint32) bool {
	return len(exits) > 0 && exits[0].err == nil && exits[0].route.Table == table && exits[0].route.Dst.Bits() == 0 &&
		!exits[0].route.Multipath && exits[0].route.NexthopID == 0
}

// withParts adds what parts of the packets from an address are led elsewhere, whatever their destination.
func (h *host) withParts(findings []Finding, c candidate) ([]Finding, error) {
	parts, err := h.parts(c.at.Addr, c.at.Index, c.Priorities.Source, nil)
	if errors.Is(err, errManyRoutes) {
		return findings, nil // the kernel was asked for the usual packets
	}
	for _, p := range parts {
		if !p.specific {
			findings = append(findings, p.finding())
		}
	}
	return findings, err
}

// byOthers adds to what is wrong with a link by which ones the packets from its address leave instead.
func (h *host) byOthers(c candidate, found *Finding, row *Row) error {
	exits, err := h.exits(c.Family(), route.Question{Src: c.at.Addr})
	if err != nil {
		return err
	}
	var by []int
	for _, e := range exits {
		by = append(by, e.links()...)
	}
	if row.LeavesBy = h.linkNames(by); slices.ContainsFunc(by, func(index int) bool { return index != c.at.Index }) {
		found.What += fmt.Sprintf(" (leaves by %s)", row.LeavesBy)
	}
	return nil
}

// isBranch reports whether routes, those of the table of an address, lead over its link to networks that are not on it,
// and nowhere else: the link is one to a LAN or a VPN and not to the Internet.
func (h *host) isBranch(c candidate, routes []route.Route) bool {
	behind := false
	for _, r := range routes {
		switch {
		case r.Type != unix.RTN_UNICAST || r.Dst.Bits() <= 1:
			return false
		case r.Index == c.at.Index && !r.Dst.IsSingleIP() && !r.Dst.Addr().IsLinkLocalUnicast():
			behind = behind || !slices.ContainsFunc(h.addresses, func(a route.Address) bool {
				on := a.Network()
				return a.Index == c.at.Index && on.Bits() <= r.Dst.Bits() && on.Contains(r.Dst.Addr())
			})
		}
	}
	return behind
}

// notUsable says why packets from an address can leave by no link.
func (h *host) notUsable(c candidate) *Finding {
	name := c.link.Name
	switch {
	case c.at.DADFailed():
		return &Finding{"duplicate", Error, "duplicate address: another host has it", "the kernel has marked it dadfailed", "ip address delete " + c.at.Network().String() + " dev " + name}
	case !c.link.Up:
		return &Finding{"link-down", Error, "link down", name + " is down", "ip link set " + name + " up"}
	case !c.link.Carrier:
		return &Finding{"no-carrier", Error, "no carrier", name + " is up and has no carrier", "check the cable, the modem or the radio"}
	case c.at.Tentative():
		return &Finding{"waiting-dad", Note, "waiting for duplicate address detection", "the kernel has marked it tentative", ""}
	}
	return nil
}

// elsewhere asks the kernel where packets from an address leave, and says why that is not its link; nil if it is.
func (h *host) elsewhere(c candidate, table uint32, row *Row) (*Finding, []exit, error) {
	q := route.Question{Src: c.at.Addr}
	exits, err := h.exits(c.Family(), q)
	if err != nil {
		return nil, nil, err
	}
	var by []int
	for _, e := range exits {
		by = append(by, e.links()...)
	}
	row.LeavesBy = h.linkNames(by)
	for _, e := range exits {
		if e.err == nil && !slices.ContainsFunc(e.links(), func(index int) bool { return index != c.at.Index }) {
			q.Dst = e.to
			made, err := connect(q)
			if errors.Is(errors.Join(err, made.err), unix.EADDRNOTAVAIL) && h.links[c.link.Master].Kind != "vrf" { // whose table has it
				return &Finding{"no-route", Error, "no route: the address is not in table local", fmt.Sprintf("the kernel refuses sockets from %s: %v", c.at.Addr, unix.EADDRNOTAVAIL),
					fmt.Sprintf("%s route add local %s dev %s table local", ipOf(c.Family()), c.at.Addr, c.link.Name)}, exits, nil
			}
			if !errors.Is(err, errCannotAsk) && (err != nil || made.err != nil) {
				return &Finding{"no-route", Error, "no route: the kernel refuses sockets", errors.Join(err, made.err).Error() + ": " + h.refuser(q, c.at.Index), explain(c.at.Addr, e.to)}, exits, nil
			}
			continue
		}
		q.Dst = e.to
		answer, err := h.walk(c.Family(), q)
		if err != nil && !errors.Is(err, errManyRoutes) { // without the walk no rule is named
			return nil, nil, err
		}
		return h.why(c, table, e, answer), exits, nil
	}
	return h.tunnelled(c, exits, row), exits, nil
}

// explain is the command line that says more.
func explain(from, to netip.Addr) string {
	return fmt.Sprintf("table-allocator-client explain %s --from %s", to, from)
}

// why says which rule or route makes packets leave elsewhere than by the link of their address.
func (h *host) why(c candidate, table uint32, e exit, answer walk.Answer) *Finding {
	rule, decided := answer.Rule()
	where := " (blocked)"
	if e.err == nil {
		where = fmt.Sprintf(" (leaves by %s)", h.linkNames(e.links()))
	}
	ours := slices.IndexFunc(answer.Steps, func(s walk.Step) bool { return isSource(s.Rule, c.at.Addr, table) })
	f := &Finding{"no-route", Error, "no route" + where, "", explain(c.at.Addr, e.to)}
	twin := "" // the link with the same address whose rule comes first
	if decided && ours < 0 && isSource(rule, c.at.Addr, rule.Table) {
		twin = h.tables()[rule.Table] // main's is none
	}
	switch {
	case twin != "":
		f.Name, f.What = "shadowed", fmt.Sprintf("shadowed by the same address on %s%s", twin, where)
		f.Evidence = fmt.Sprintf("%q comes before the rule to table %d", rule, table)
		f.Cure = fmt.Sprintf("give one of the links another address, or bind programs to the link: table-allocator-client run %s COMMAND", c.link.Name)
		return f
	case decided && rule.Protocol != route.Protocol && ours < 0:
		if led, past := ledPast(answer.Steps, c.Priorities.Source); past {
			rule = led
		}
		if ruleOwner(rule, nil) == "" || rule.Priority > c.Priorities.Source {
			f.Evidence = fmt.Sprintf("the rule from %s to table %d is missing", c.at.Addr, table)
			f.Cure = "its holder restores it; if this stays: " + outside.Journal("table-allocator-watch")
			return f
		}
		f.Name, f.What = "shadowed", fmt.Sprintf("shadowed by rule %d (%s)%s", rule.Priority, action(rule), where)
		f.Evidence = fmt.Sprintf("%q %s", rule, beforeAddress)
		f.Cure = moveRule(rule, c.Family(), c.Priorities.Source)
		return f
	case decided && ours == len(answer.Steps)-1:
		f.Evidence = fmt.Sprintf("table %d has %q", table, h.routeText(answer.Route))
		f.Cure = h.deleteRoute(answer.Route)
		return f
	case decided && rule == c.Block(), decided && uplink.IsGuard(rule):
		f.Name, f.What = "blocked", "blocked: no route"
	case e.err != nil && answer.Route.Table != 0:
		f.What = "no route: table " + tableName(answer.Route.Table) + " answers with an error"
		f.Evidence = fmt.Sprintf("rule %d finds %q", rule.Priority, h.routeText(answer.Route))
		f.Cure = h.deleteRoute(answer.Route)
		return f
	case e.err != nil:
		f.What = "no route"
	}
	f.Evidence = fmt.Sprintf("table %d has no route to the Internet", table)
	if w, err := h.world(c.Family()); err == nil { // with too many routes, none is named
		for _, r := range w.Tables[table] {
			if r.Type == unix.RTN_THROW && r.Protocol != route.Protocol && r.Dst.Contains(e.to) {
				f.Evidence, f.Cure = fmt.Sprintf("table %d has %q", table, h.routeText(r)), h.deleteRoute(r)
				return f
			}
		}
	}
	f.Cure = giveDefault(c.link, h.needsOnlink(c))
	if master, ok := isPort(h.links, c.link); ok {
		if f.Name == "no-route" {
			f.What = fmt.Sprintf("no route: a port of %s%s", master.Name, where)
		}
		f.Evidence, f.Cure = f.Evidence+", and "+portEvidence(c.link, master), leavePort(c.link, master)
	}
	return f
}

// needsOnlink reports whether the kernel adds no route by a gateway over the link of an address, since main has no network there.
func (h *host) needsOnlink(c candidate) bool {
	w, err := h.world(c.Family())
	return err == nil && c.Family() == unix.AF_INET && !c.link.PointToPoint && !slices.ContainsFunc(w.Tables[unix.RT_TABLE_MAIN], func(r route.Route) bool {
		return !r.Gateway.IsValid() && r.Type == unix.RTN_UNICAST && slices.Contains(r.Links(), c.at.Index)
	})
}

// giveDefault says how a table gets a default route over a link. onlink says that no network has its gateway.
func giveDefault(l route.Link, onlink bool) string {
	if l.Kind == "ppp" { // pppd adds none where main has one, and says so in its log alone
		return "have pppd add a default route over " + l.Name + ": defaultroute-metric 1000, or usepeerdns for its hook; leave the link out if it leads nowhere"
	}
	by := "DHCP, networkd, NetworkManager"
	if onlink {
		by = fmt.Sprintf("with onlink, since main has no network there: ip route add default via ADDR dev %s onlink metric 1000", l.Name)
	}
	return fmt.Sprintf("give main a default route over %s (%s), or call the client with --routes copy --gateway ADDR; leave the link out if it leads nowhere", l.Name, by)
}

// ledPast is the rule that led past a priority.
func ledPast(steps []walk.Step, priority uint32) (route.Rule, bool) {
	for i, s := range steps[:max(len(steps)-1, 0)] {
		taken := s.Rule.Action == route.Goto && !s.Differs && steps[i+1].Rule.Priority == s.Rule.Goto
		if taken && s.Rule.Priority <= priority && s.Rule.Goto > priority && s.Rule.Protocol != route.Protocol {
			return s.Rule, true
		}
	}
	return route.Rule{}, false
}

// isSource reports whether a rule leads from an address to its table, whatever the mark.
func isSource(r route.Rule, addr netip.Addr, table uint32) bool {
	return r.Mask == 0 && r.Protocol == route.Protocol && r.Table == table && r.Action == route.Lookup && r.Src == netip.PrefixFrom(addr, addr.BitLen())
}

// action is what a rule does, as `ip rule` says it.
func action(r route.Rule) string {
	switch r.Action {
	case route.Unreachable:
		return "unreachable"
	case route.Prohibit:
		return "prohibit"
	case route.Blackhole:
		return "blackhole"
	case route.Goto:
		return fmt.Sprintf("goto %d", r.Goto)
	}
	return "lookup " + tableName(r.Table)
}

func tableName(table uint32) string {
	if table == unix.RT_TABLE_MAIN {
		return "main"
	}
	return fmt.Sprint(table)
}

// gatewayOf is where the first default route leads: an address, or "link".
func gatewayOf(routes []route.Route) string {
	best := route.Route{}
	found := false
	for _, r := range routes {
		if r.Dst.Bits() == 0 && r.Type == unix.RTN_UNICAST && (!found || r.Metric < best.Metric) {
			best, found = r, true
		}
	}
	switch {
	case !found:
		return ""
	case best.Gateway == netip.Addr{}:
		return "link"
	}
	return best.Gateway.String()
}
