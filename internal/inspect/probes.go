package inspect

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/uplinks"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// noteProbes adds what a watch knows of the uplinks by probes, and which it chose. Without a watch that answers there is
// nothing to add.
func (r *Report) noteProbes() {
	watch, err := uplinks.Ask(uplinks.Request{})
	if err != nil {
		return
	}
	r.watch = &watch
	for i := range r.Uplinks {
		row := &r.Uplinks[i]
		for _, u := range watch.Uplinks {
			if watch.Probing && u.Ifname == row.Ifname && u.Address == row.Address {
				row.Probe = &Probe{State: u.State, RTT: u.RTT, Loss: u.Loss, Since: u.Since, Used: u.Used}
			}
		}
	}
	for i := range r.Unbound {
		for _, c := range watch.Unbound {
			if c.Family == r.Unbound[i].Family {
				r.Unbound[i].Chosen, r.Unbound[i].Why = c.Ifname, c.Why
			}
		}
	}
}

// lookUplinkDead finds uplinks that probes say do not work, though all is well on this host.
func lookUplinkDead(p *patient) (all []symptom) {
	for _, row := range p.probed() {
		if row.State == "dead" || row.State == "portal" {
			all = append(all, symptom{fmt.Sprintf("%s on %s does not reach the Internet: %s", row.Address, row.Ifname, row.State), row.Reason,
				"table-allocator-client uplinks probe " + row.Ifname})
		}
	}
	return all
}

// probed are the uplinks that a watch probes.
func (p *patient) probed() []uplinks.Uplink {
	if p.report.watch == nil || !p.report.watch.Probing {
		return nil
	}
	return p.report.watch.Uplinks
}

// lookShadowed finds choices that unbound traffic cannot follow.
func lookShadowed(p *patient) (all []symptom) {
	if p.report.watch == nil {
		return nil
	}
	for _, c := range p.report.watch.Unbound {
		if c.Warn != "" {
			all = append(all, symptom{fmt.Sprintf("unbound traffic of %s may not use the chosen uplink %s", c.Family, c.Ifname), c.Warn, c.Cure})
		}
	}
	return all
}

// lookUnprobed finds wishes of a user that stand whether the link works or not, since nobody probes.
func lookUnprobed(p *patient) (all []symptom) {
	if p.report.watch == nil || p.report.watch.Probing {
		return nil
	}
	for _, c := range p.report.watch.Unbound {
		if c.Pinned {
			all = append(all, symptom{fmt.Sprintf("unbound traffic of %s uses %s, whether it works or not", c.Family, c.Ifname),
				`uplinks use was called, and the configuration of the watch has no "probe"`, "table-allocator-client uplinks use auto"})
		}
	}
	return all
}

// lookProbes finds a watch that is to ping and may not.
func lookProbes(p *patient) []symptom {
	pid := uplinks.Watch()
	if p.report.watch == nil || !p.report.watch.Probing || pid == 0 {
		return nil
	}
	if !slices.Contains(p.report.watch.Kinds, "icmp") {
		return p.unasked()
	}
	for _, family := range families {
		if one := oneNetwork(family, p.report.watch.Targets); one != "" {
			return append(p.unasked(), symptom{fmt.Sprintf("all targets of probes in %s are in %s: when it fails, every uplink is called dead", wire.Family(family), one), strings.Join(p.report.watch.Targets, " "),
				`add a target of another operator to "targets" of "probe"`})
		}
	}
	var first, last uint32
	if _, err := fmt.Sscan(readLine("/proc/sys/net/ipv4/ping_group_range"), &first, &last); err != nil {
		p.unseen = fmt.Errorf("net.ipv4.ping_group_range: %w", err)
		return nil
	}
	groups := groupsOf(pid)
	if len(groups) == 0 || slices.ContainsFunc(groups, func(g uint32) bool { return first <= g && g <= last }) {
		return p.unasked()
	}
	return []symptom{{"the watch may not ping, so probes by icmp fail", fmt.Sprintf("net.ipv4.ping_group_range is %d %d, pid %d has the groups %v", first, last, pid, groups),
		"sysctl -w net.ipv4.ping_group_range='0 2147483647', or leave icmp out of the kinds of probe"}}
}

// operators are networks that are one for who asks them, though their addresses are not near each other.
var operators = map[string][]string{
	"the network of Cloudflare": {"1.1.1.0/24", "1.0.0.0/24", "2606:4700:4700::/48"},
	"the network of Google":     {"8.8.8.0/24", "8.8.4.0/24", "2001:4860:4860::/48"},
	"the network of Quad9":      {"9.9.9.0/24", "149.112.112.0/24", "2620:fe::/48"},
	"the network of OpenDNS":    {"208.67.222.0/24", "208.67.220.0/24", "2620:119:35::/48", "2620:119:53::/48"},
}

// oneNetwork is the network that all targets of a family are in, or the operator whose they all are; "" if they differ, or are
// fewer than two: who names one has decided.
func oneNetwork(family int, targets []string) (name string) {
	count := 0
	for _, text := range targets {
		addr, err := netip.ParseAddr(text)
		if err != nil || familyOf(addr) != family {
			continue
		}
		count++
		of := networkName(addr)
		if name != "" && of != name {
			return ""
		}
		name = of
	}
	if count < 2 {
		return ""
	}
	return name
}

// networkName is the operator of an address that many ask, or else the smallest network that is routed by itself.
func networkName(addr netip.Addr) string {
	for name, networks := range operators {
		for _, n := range networks {
			if netip.MustParsePrefix(n).Contains(addr) {
				return name
			}
		}
	}
	bits := 24
	if addr.Is6() {
		bits = 48
	}
	network, _ := addr.Prefix(bits) // cannot fail for an address that was parsed
	return network.String()
}

// unasked finds uplinks that the watch cannot ask for another reason.
func (p *patient) unasked() (all []symptom) {
	for _, row := range p.probed() {
		if reason, found := strings.CutPrefix(row.Reason, "not probed: "); found {
			all = append(all, symptom{fmt.Sprintf("%s on %s is not probed", row.Address, row.Ifname), reason, outside.Journal("table-allocator-watch")})
		}
	}
	return all
}

// groupsOf are the groups of a process; none if it has gone.
func groupsOf(pid int) (groups []uint32) {
	for line := range strings.Lines(readText(fmt.Sprintf("/proc/%d/status", pid))) {
		name, numbers, _ := strings.Cut(line, ":")
		if name != "Gid" && name != "Groups" {
			continue
		}
		for _, word := range strings.Fields(numbers) {
			if n, err := strconv.ParseUint(word, 10, 32); err == nil {
				groups = append(groups, uint32(n))
			}
		}
	}
	return groups
}
