package route

import (
	"cmp"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Policy is an IPsec policy for packets that this host sends, whatever their protocol and ports: see ip-xfrm(8).
type Policy struct {
	Src, Dst netip.Prefix
	Index    int // of the link that the packets leave by; 0: any
	Priority uint32
	Block    bool       // the packets are dropped
	Near     netip.Addr // ends of the tunnel that takes the packets; the zero Addr: none, or any
	Far      netip.Addr
}

// String returns the policy as `ip xfrm policy` begins it.
func (p Policy) String() string {
	return fmt.Sprintf("src %s dst %s dir out priority %d", p.Src, p.Dst, p.Priority)
}

// Policies returns those of a family for packets without a mark, in the order in which the kernel tries them. It needs CAP_NET_ADMIN.
func Policies(family int) (all []Policy, err error) {
	sockets, err := os.ReadFile("/proc/thread-self/net/netlink")
	if err != nil || !takesPolicies(string(sockets)) {
		return nil, err
	}
	req := nl.NewNetlinkRequest(int(nl.XFRM_MSG_GETPOLICY), unix.NLM_F_DUMP)
	msgs, err := req.Execute(unix.NETLINK_XFRM, uint16(nl.XFRM_MSG_NEWPOLICY))
	if err != nil {
		return nil, fmt.Errorf("read IPsec policies: %w", err)
	}
	for _, m := range msgs {
		if len(m) < nl.SizeofXfrmUserpolicyInfo {
			return nil, fmt.Errorf("read IPsec policies: %w", errMalformed)
		}
		p, is := policyOf(nl.DeserializeXfrmUserpolicyInfo(m), family)
		err := eachAttribute(m[nl.SizeofXfrmUserpolicyInfo:], func(typ uint16, value []byte) {
			switch {
			case typ == nl.XFRMA_MARK && len(value) == 8:
				is = is && native.Uint32(value)&native.Uint32(value[4:]) == 0
			case typ == nl.XFRMA_IF_ID && len(value) == 4:
				is = is && native.Uint32(value) == 0
			case typ == nl.XFRMA_TMPL && len(value) >= nl.SizeofXfrmUserTmpl: // the first wraps the packet, and others that
				const tunnel = 1
				if t := nl.DeserializeXfrmUserTmpl(value); t.Mode == tunnel && !p.Far.IsValid() {
					p.Near, p.Far = endOf(t.Saddr, t.Family), endOf(t.XfrmId.Daddr, t.Family)
				}
			}
		})
		if err != nil {
			return nil, fmt.Errorf("read IPsec policies: %w", err)
		}
		if is {
			all = append(all, p)
		}
	}
	slices.Reverse(all) // the kernel tells the newest first, and of one priority the oldest decides
	slices.SortStableFunc(all, func(a, b Policy) int { return cmp.Compare(a.Priority, b.Priority) })
	return all, nil
}

// takesPolicies reports whether the kernel has what takes policies: a netlink socket of its own in each namespace. A request without
// it would have the kernel load the module.
func takesPolicies(sockets string) bool {
	for line := range strings.Lines(sockets) {
		if words := strings.Fields(line); len(words) > 2 && words[1] == strconv.Itoa(unix.NETLINK_XFRM) && words[2] == "0" {
			return true
		}
	}
	return false
}

// policyOf reads a policy; is reports whether it is one of those of Policies.
func policyOf(info *nl.XfrmUserpolicyInfo, family int) (p Policy, is bool) {
	const out, block = 1, 1
	s := info.Sel
	if info.Dir != out || s.Proto != 0 || s.SportMask != 0 || s.DportMask != 0 || s.Family != uint16(family) {
		return p, false
	}
	p = Policy{Index: int(s.Ifindex), Priority: info.Priority, Block: info.Action == block}
	p.Src = netip.PrefixFrom(addressOf(s.Saddr, s.Family), int(s.PrefixlenS))
	p.Dst = netip.PrefixFrom(addressOf(s.Daddr, s.Family), int(s.PrefixlenD))
	return p, p.Src.IsValid() && p.Dst.IsValid()
}

func addressOf(a nl.XfrmAddress, family uint16) netip.Addr {
	if family == unix.AF_INET {
		return netip.AddrFrom4([4]byte(a[:4]))
	}
	return netip.AddrFrom16(a)
}

// endOf is an end of a tunnel; the zero Addr where it is left open.
func endOf(a nl.XfrmAddress, family uint16) netip.Addr {
	if end := addressOf(a, family); !end.IsUnspecified() {
		return end
	}
	return netip.Addr{}
}
