package inspect

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/walk"
)

// lookPorts finds uplinks that are ports of a bridge or a bond: what arrives there is that link's.
func lookPorts(p *patient) (all []symptom) {
	for _, l := range p.leases {
		master, ok := isPort(p.links, l.link)
		if !ok || l.at.Addr != l.addr {
			continue
		}
		all = append(all, symptom{fmt.Sprintf("%s is a port of %s, so nothing that arrives reaches %s", l.Ifname, master.Name, l.Address),
			portEvidence(l.link, master), leavePort(l.link, master)})
	}
	return all
}

// isPort reports whether a link is a port of another one, which has its traffic and should have its addresses.
func isPort(links map[int]route.Link, l route.Link) (master route.Link, ok bool) {
	master = links[l.Master]
	return master, slices.Contains([]string{"bridge", "bond", "team", "openvswitch"}, master.Kind)
}

func portEvidence(l, master route.Link) string {
	return fmt.Sprintf("ip link: %s master %s, a %s", l.Name, master.Name, master.Kind)
}

func leavePort(l, master route.Link) string {
	return fmt.Sprintf("ip link set %s nomaster # or give %s the address and delete it from %[1]s", l.Name, master.Name)
}

// lookLocal finds addresses whose packets table local does not get, since rules come before it or it has no route for them.
func lookLocal(p *patient) (all []symptom) {
	for _, l := range p.leases {
		if l.at.Addr != l.addr || !l.link.Carrier || l.at.Flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) != 0 {
			continue
		}
		w, err := p.world(l.family)
		if err != nil {
			p.unseen = err
			continue
		}
		peer := netip.MustParseAddr(nowhere[l.family][0][0])
		a := w.Walk(walk.Packet{Question: route.Question{Src: peer, Dst: l.addr, Iif: l.link.Index}})
		if a.Err == 0 && a.Route.Type == unix.RTN_LOCAL {
			continue
		}
		ip, evidence := ipOf(l.family), "no route for it in table local"
		cure := fmt.Sprintf("%s route add local %s dev %s table local", ip, l.Address, l.Ifname)
		first := slices.IndexFunc(p.rules[l.family], func(r route.Rule) bool { return r.Action == route.Lookup && r.Table == unix.RT_TABLE_LOCAL })
		if rule, decided := a.Rule(); first < 0 || decided && rule.Priority <= p.rules[l.family][first].Priority {
			evidence = "no rule leads to table local"
			if decided {
				evidence = fmt.Sprintf("%q comes before the rule that leads to table local", rule)
			}
			cure = ip + " rule add priority 0 lookup local"
		}
		all = append(all, symptom{"packets to " + l.Address + " do not reach this host", evidence, cure})
	}
	return all
}

const (
	lately = time.Minute             // somebody wants to send
	answer = 1500 * time.Millisecond // a gateway answers within milliseconds
)

// lookGateways finds gateways that are asked for and do not answer on the link.
func lookGateways(p *patient) (all []symptom) {
	type neighbour struct {
		index   int
		gateway netip.Addr
	}
	asked, until := make(map[neighbour]bool), time.Now().Add(answer)
	for _, l := range p.leases {
		gateway, err := netip.ParseAddr(l.Gateway)
		at := neighbour{l.link.Index, gateway}
		if err != nil || !l.link.Carrier || asked[at] {
			continue
		}
		asked[at] = true
		silent, err := p.isSilent(l.link.Index, gateway, until)
		if err != nil {
			p.unseen = err
			return all
		}
		if silent {
			all = append(all, symptom{fmt.Sprintf("the gateway %s of %s does not answer on %s", gateway, l.Address, l.Ifname),
				fmt.Sprintf("packets are to be sent, and ip neighbour show %s dev %s has no link-layer address", gateway, l.Ifname),
				fmt.Sprintf("ip neighbour delete %s dev %s; the kernel asks again: is the address of the gateway right, and its link up?", gateway, l.Ifname)})
		}
	}
	return all
}

// isSilent reports whether a neighbour that packets are to be sent to does not answer. One that is asked just now has time
// to answer.
func (h *host) isSilent(index int, addr netip.Addr, until time.Time) (bool, error) {
	const every = 100 * time.Millisecond
	for ; ; time.Sleep(every) {
		neighbours, err := h.kernel.Neighbours(familyOf(addr))
		if err != nil {
			return false, err
		}
		at := slices.IndexFunc(neighbours, func(n route.Neighbour) bool { return n.Index == index && n.Addr == addr.WithZone("") })
		switch {
		case at < 0 || neighbours[at].Used > lately || neighbours[at].State&(route.NeighbourFailed|route.NeighbourIncomplete) == 0:
			return false, nil
		case neighbours[at].State&route.NeighbourFailed != 0 || time.Now().After(until):
			return true, nil
		}
	}
}

// lookPast finds routes by the gateway of another uplink in tables that rules before ours lead to. A table without a default
// route takes its destinations alone, as main does behind "suppress_prefixlength 0".
func (p *patient) lookPast(l lease, r route.Rule, behind uint32) (all []symptom) {
	if r.Priority > behind || r.Action != route.Lookup || r.Mask != 0 || r.Dst.IsValid() || r.Flags != 0 || r.Src.IsValid() {
		return nil
	}
	for _, to := range p.routes(l.family, r.Table) {
		other := slices.IndexFunc(p.leases, func(o lease) bool { return slices.Contains(to.Links(), o.link.Index) })
		if to.Dst.Bits() <= uplink.Halves(l.family) || !to.Gateway.IsValid() || other < 0 || slices.Contains(to.Links(), l.link.Index) {
			continue
		}
		a, err := p.walk(l.family, route.Question{Src: l.addr, Dst: to.Dst.Addr()})
		rule, decided := a.Rule()
		if err != nil || !decided || rule != r || a.Err != 0 || slices.Contains(a.Route.Links(), l.link.Index) {
			continue
		}
		return []symptom{{fmt.Sprintf("%s on %s: shadowed by rule %d for %s (leaves by %s)", l.Address, l.Ifname, r.Priority, to.Dst, p.linkNames(a.Route.Links())),
			fmt.Sprintf("%q comes before the rules of the address, and its table has %q", r, p.routeText(to)), moveRule(r, l.family, behind)}}
	}
	return nil
}
