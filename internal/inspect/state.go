package inspect

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

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
		f := Finding{"not-served", Note, "not served: systemctl enable --now table-allocator-watch",
			"there is no client for the address, and no watch", "systemctl enable --now table-allocator-watch"}
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
		f := Finding{"no-lease", Error, "no lease", held.Error, "journalctl -u table-allocator-server"}
		if stopped := server.finding(""); stopped != nil {
			f.What, f.Cure = "no lease: "+stopped.What, stopped.Cure
		} else if held.Error != "" {
			f.What += ": " + held.Error
		}
		row.Findings = append(row.Findings, f)
		return row
	}
	row.LeaseLeft = max(held.Expires-wire.Seconds(wire.Now()), 0)
	if stopped := server.finding(", lease ends in " + (time.Duration(row.LeaseLeft) * time.Second).String()); stopped != nil {
		row.Findings = append(row.Findings, *stopped)
	}
	if exe, is := outdated(held.PID); is {
		row.Findings = append(row.Findings, Finding{"outdated", Note, "its holder runs a version that is not installed any more",
			fmt.Sprintf("pid %d, %s", held.PID, exe), renewal(held.PID)})
	}
	return row
}

// rowOf is the row of an address.
func (h *host) rowOf(c candidate, held holder, server Server) (Row, error) {
	row := rowOfLease(c.Key, held, server)
	if c.at.DADFailed() && held.absent {
		row.Findings = []Finding{*h.notUsable(c)}
	}
	if held.Table == 0 {
		return row, nil
	}
	routes, _, err := h.kernel.RoutesAtMost(c.Family(), held.Table, mostRoutes)
	if err != nil {
		return row, err
	}
	row.Gateway = gatewayOf(routes)
	found := h.notUsable(c)
	if found == nil {
		if found, err = h.elsewhere(c, held.Table, &row); err != nil {
			return row, err
		}
		if found != nil && found.Name == "no-route" && row.LeavesBy != "" && held.Missing == "" && h.isBranch(c, routes) {
			*found = Finding{"no-default", Note, "no default route (leaves by " + row.LeavesBy + ")",
				fmt.Sprintf("table %d has routes to other networks over %s, and no default route", held.Table, c.link.Name), found.Cure}
		}
	}
	if found != nil {
		row.Findings = append([]Finding{*found}, row.Findings...)
	}
	if held.Missing != "" && (found == nil || found.Name != "waiting-dad") {
		row.Findings = append(row.Findings, Finding{"incomplete", Error, "misses rules or routes", held.Missing,
			"the holder restores what others delete; if this stays: journalctl -u table-allocator-watch"})
	}
	return row, nil
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
func (h *host) elsewhere(c candidate, table uint32, row *Row) (*Finding, error) {
	q := route.Question{Src: c.at.Addr}
	exits, err := h.exits(c.Family(), q)
	if err != nil {
		return nil, err
	}
	var by []int
	for _, e := range exits {
		by = append(by, e.links()...)
	}
	row.LeavesBy = h.linkNames(by)
	for _, e := range exits {
		if e.err == nil && !slices.ContainsFunc(e.links(), func(index int) bool { return index != c.at.Index }) {
			q.Dst = e.to
			if made, err := connect(q); !errors.Is(err, errCannotAsk) && (err != nil || made.err != nil) {
				return &Finding{"no-route", Error, "no route: the kernel refuses sockets", errors.Join(err, made.err).Error(), explain(c.at.Addr, e.to)}, nil
			}
			continue
		}
		q.Dst = e.to
		answer, err := h.walk(c.Family(), q)
		if err != nil && !errors.Is(err, errManyRoutes) { // without the walk no rule is named
			return nil, err
		}
		return h.why(c, table, e, answer), nil
	}
	return nil, nil
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
	switch {
	case decided && rule.Protocol != route.Protocol && ours < 0:
		f.Name, f.What = "shadowed", fmt.Sprintf("shadowed by rule %d (%s)%s", rule.Priority, action(rule), where)
		f.Evidence = fmt.Sprintf("%q comes before the rules of the address", rule)
		f.Cure = fmt.Sprintf("move that rule behind %d, or set a smaller priority in watch.json", c.Priorities.Source)
		return f
	case decided && ours == len(answer.Steps)-1:
		f.Evidence = fmt.Sprintf("table %d has %q", table, h.routeText(answer.Route))
		f.Cure = "ip route delete " + h.routeText(answer.Route)
		return f
	case decided && rule == c.Block(), decided && uplink.IsGuard(rule):
		f.Name, f.What = "blocked", "blocked: no route"
	case e.err != nil && answer.Route.Table != 0:
		f.What = "no route: table " + tableName(answer.Route.Table) + " answers with an error"
		f.Evidence = fmt.Sprintf("rule %d finds %q", rule.Priority, h.routeText(answer.Route))
		f.Cure = "ip route delete " + h.routeText(answer.Route)
		return f
	case e.err != nil:
		f.What = "no route"
	}
	f.Evidence = fmt.Sprintf("table %d has no route to the Internet", table)
	f.Cure = fmt.Sprintf("give main a default route over %s (DHCP, networkd, NetworkManager), or the client --gateway; leave the link out if it leads nowhere", c.link.Name)
	return f
}

// isSource reports whether a rule leads from an address to its table.
func isSource(r route.Rule, addr netip.Addr, table uint32) bool {
	return r.Protocol == route.Protocol && r.Table == table && r.Action == route.Lookup && r.Src == netip.PrefixFrom(addr, addr.BitLen())
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
