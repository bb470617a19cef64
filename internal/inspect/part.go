package inspect

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/walk"
)

// part is a part of the packets from an address that a rule of another program leads elsewhere, while all others leave by
// the link of the address.
type part struct {
	rule     route.Rule
	packets  string // "ipproto tcp dport 443"
	exit     string // "leaves by wan1"
	specific bool   // the rule is for some destinations
	meant    bool   // the rule is for some users, and nothing else, or for this address alone
	family   int
	behind   uint32 // the priority of the rules of the address
}

// mostParts are as many as are told of one address.
const mostParts = 3

// parts finds rules in front of those of an address that lead packets of a protocol, a port, a user or a TOS elsewhere.
// marks are what sets marks, which are one more part; nil: nothing is known to.
func (h *host) parts(addr netip.Addr, index int, behind uint32, marks func(route.Rule) bool) (all []part, err error) {
	family, to := familyOf(addr), netip.Addr{}
	for _, r := range h.foreign(family) {
		if len(all) == mostParts || r.Priority > behind {
			break
		}
		if r.Flags == 0 && r.Src.IsValid() && !r.Src.Contains(addr) {
			continue
		}
		q := route.Question{Src: addr, Dst: netip.MustParseAddr(nowhere[family][0][0])}
		asked, is := partOf(r, q, h.links[index], marks)
		if !is {
			continue
		}
		specific := r.Flags == 0 && r.Dst.IsValid()
		if !specific && !to.IsValid() { // no specific route leads there
			exits, err := h.exits(family, route.Question{Src: addr})
			if err != nil {
				return nil, err
			}
			to = exits[0].to
		}
		if q.Dst = to; specific {
			q.Dst = r.Dst.Addr()
		}
		asked.Dst = q.Dst
		exit, err := h.leads(r, asked, q, index)
		if err != nil {
			return nil, err
		}
		if exit == "" {
			continue
		}
		all = append(all, part{rule: r, packets: partText(r), exit: exit, family: family, behind: behind,
			specific: specific && r.Dst.Bits() > uplink.Halves(family),
			meant:    asked == route.Question{Src: q.Src, Dst: q.Dst, UID: asked.UID} || r.Flags == 0 && r.Src == netip.PrefixFrom(addr, addr.BitLen())})
	}
	return all, nil
}

// leads says where a rule leads packets that are asked for, if the usual ones leave by the link; "": it does not decide of
// them, or they leave by that link, too.
func (h *host) leads(r route.Rule, asked, usual route.Question, index int) (string, error) {
	family := usual.Family()
	a, err := h.walk(family, asked)
	if err != nil {
		return "", err
	}
	rule, decided := a.Rule()
	passes := slices.ContainsFunc(a.Steps, func(s walk.Step) bool { return s.Rule == r && !s.Differs && r.Action == route.Goto })
	stays := a.Err == 0 && (a.Route.Type == unix.RTN_LOCAL || slices.Contains(a.Route.Links(), index)) // also: a proxy takes them
	if !decided || rule != r && !passes || rule.Protocol == route.Protocol || stays {
		return "", nil
	}
	u, err := h.walk(family, usual)
	if err != nil || u.Err != 0 || !slices.Equal(u.Route.Links(), []int{index}) {
		return "", err // all packets are led elsewhere
	}
	if a.Err != 0 {
		return "blocked", nil
	}
	if a.OnLink {
		return "leaves by " + h.linkName(asked.Oif) + " without the gateway", nil
	}
	return "leaves by " + h.linkNames(a.Route.Links()), nil
}

// partOf changes a question about packets by a link into one that a rule is for by more than addresses; is reports whether there is one.
func partOf(r route.Rule, q route.Question, link route.Link, marks func(route.Rule) bool) (asked route.Question, is bool) {
	asked = q
	switch {
	case r.Iif != "" && r.Iif != uplink.Loopback:
		return q, false
	case r.Oif != "" && (r.Oif != link.Name || r.Flags != 0):
		return q, false
	case r.Oif != "":
		asked.Oif = link.Index
	}
	if r.Mask != 0 {
		if marks == nil || r.Flags != 0 || !marks(r) {
			return q, false
		}
		asked.Mark = r.Mark & r.Mask
	}
	asked.IPProto = r.IPProto
	if r.Sports != (route.Ports{}) || r.Dports != (route.Ports{}) {
		asked.IPProto = cmp.Or(r.IPProto, unix.IPPROTO_TCP)
		asked.Sport, asked.Dport = r.Sports.First, r.Dports.First
	}
	if r.UIDs.Set {
		asked.UID = r.UIDs.First
	}
	selectors := r.Selectors()
	asked.TOS = selectors.TOS | selectors.DSCP
	if r.Flags == 0 {
		return asked, asked != q
	}
	// "not": packets that differ in one selector.
	other := q
	switch {
	case r.IPProto == unix.IPPROTO_TCP:
		other.IPProto = unix.IPPROTO_UDP
	case r.IPProto != 0:
		other.IPProto = unix.IPPROTO_TCP
	case r.UIDs.Set && r.UIDs.First == 0:
		other.UID = r.UIDs.Last + 1
	default:
		return q, false
	}
	return other, true
}

// partText is the part of packets that a rule is for, as `ip rule` writes it.
func partText(r route.Rule) string {
	r.Iif = ""
	s := r.Selectors()
	masked := func(name string, ports *route.Ports, mask uint16) string {
		if mask == 0 {
			return ""
		}
		text := fmt.Sprintf(" %s %#x/%#x", name, ports.First, mask)
		*ports = route.Ports{}
		return text
	}
	text := masked("sport", &r.Sports, s.SportMask) + masked("dport", &r.Dports, s.DportMask)
	text = r.Traffic.String() + text
	if r.Oif != "" {
		text += " oif " + r.Oif
	}
	if s.TOS != 0 {
		text += fmt.Sprintf(" tos %#x", s.TOS)
	}
	if s.DSCPMask != 0 {
		text += fmt.Sprintf(" dscp %d", s.DSCP>>2)
	}
	text = strings.TrimSpace(text)
	if r.Flags != 0 {
		text = "all but " + text
	}
	return text
}

// beforeAddress follows the quoted rule in the evidence of a part.
const beforeAddress = "comes before the rules of the address"

// finding is what status says of a part.
func (p part) finding() Finding {
	f := Finding{"shadowed-part", Warning, fmt.Sprintf("partly shadowed by rule %d (%s): %s (%s)", p.rule.Priority, action(p.rule), p.packets, p.exit),
		fmt.Sprintf("%q %s", p.rule, beforeAddress), moveRule(p.rule, p.family, p.behind)}
	if p.meant {
		f.Severity = Note // somebody wants these packets elsewhere
	}
	return f
}

// marked reports of rules whether the packet filter sets a mark that they are for, of packets that this host sends, before
// they are routed. Marks of single sockets are their program's own wish, and those of a user, a cgroup or a source address
// somebody's. A mark that is not known, as that of a connection, is none. family is "ip" or "ip6".
func (p *patient) marked(family string) func(route.Rule) bool {
	var marks []uint32
	for _, c := range p.reached("type route hook output") {
		if c.family != family && c.family != "inet" {
			continue
		}
		for line := range strings.Lines(c.body) {
			before, text, found := strings.Cut(line, "meta mark set ")
			meant := slices.ContainsFunc([]string{"skuid", "skgid", "cgroup", "saddr"}, func(word string) bool { return strings.Contains(before, word) })
			if !found || meant {
				continue
			}
			if mark, known := markOf(text); known {
				marks = append(marks, mark)
			}
		}
	}
	return func(r route.Rule) bool {
		return slices.ContainsFunc(marks, func(m uint32) bool { return m&r.Mask == r.Mark&r.Mask })
	}
}

// markOf is the mark that a packet gets which had none, from what nftables writes behind "mark set ".
func markOf(text string) (mark uint32, known bool) {
	words := strings.Fields(strings.NewReplacer("(", "", ")", "", "meta ", "").Replace(text))
	is := func(at int, operators ...string) bool {
		return at < len(words) && slices.Contains(operators, words[at])
	}
	at := 0
	if is(0, "mark") { // bits are taken, then given
		if at = 1; is(at, "&", "and") {
			at += 2
		}
		if !is(at, "|", "or", "^", "xor") {
			return 0, false
		}
		at++
	}
	if at >= len(words) || is(at+1, "&", "and", "|", "or", "^", "xor", "<<", ">>") {
		return 0, false
	}
	n, err := strconv.ParseUint(words[at], 0, 32)
	return uint32(n), err == nil
}

// moveRule are commands that give a rule of another program a priority behind the rules of an address. A program that runs
// would add its rule again.
func moveRule(r route.Rule, family int, behind uint32) string {
	const block = 2                  // the next priority is that of the block rule
	if r.Mask != 0 && r.Flags == 0 { // behind the rules of addresses it would take nothing of what this host sends
		return fmt.Sprintf("if these packets are not to leave elsewhere, delete rule %d, or what sets the mark", r.Priority)
	}
	if owner := ruleOwner(r, nil); owner == protocols[unix.RTPROT_STATIC] { // as systemd-networkd has it, and people
		return fmt.Sprintf("move rule %d behind %d where it is configured, or set a smaller priority in watch.json", r.Priority, behind)
	} else if owner == tailscales { // which has no setting for it
		return fmt.Sprintf("set a priority before those of tailscale in watch.json, such as \"priority\": [5100, 20000, 91000]; rule %d stays where it is", r.Priority)
	} else if owner == wgQuicks { // which gives no priority, so that the kernel puts the rule before the second of all
		return fmt.Sprintf("set Table = off where wg-quick is configured, and add its routes and rules in PostUp, rule %d with a priority behind %d; without one it is first again at each start", r.Priority, behind+block)
	} else if owner != "another program" {
		return fmt.Sprintf("move rule %d behind %d where %s is configured, or set a smaller priority in watch.json", r.Priority, behind, strings.TrimSuffix(owner, ", probably"))
	}
	ip, moved := ipOf(family), r
	moved.Protocol, moved.Other = 0, ""
	text := ruleText(moved)
	if tos := r.Selectors().TOS; tos != 0 && !strings.Contains(r.Other, " ") {
		text = fmt.Sprintf("tos %#x %s", tos, text)
	} else if r.Other != "" {
		return fmt.Sprintf("give rule %d a priority behind %d, or delete it: %s rule", r.Priority, behind, ip)
	}
	return fmt.Sprintf("%s rule add priority %d %s && %s rule delete priority %d %s", ip, behind+block, text, ip, r.Priority, text)
}
