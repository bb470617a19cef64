package inspect

import (
	"fmt"
	"slices"

	"github.com/table-allocator/table-allocator/internal/route"
)

// policy is the IPsec policy that takes a packet which leaves by a link; nil: none does, or this process may not see it.
func (h *host) policy(q route.Question, link int) *route.Policy {
	if h.exempt(q.Family(), link) {
		return nil
	}
	all, read := h.policies[q.Family()]
	if !read {
		all, _ = route.Policies(q.Family()) // without the right to see them, or without IPsec, there is none
		h.policies[q.Family()] = all
	}
	at := slices.IndexFunc(all, func(p route.Policy) bool {
		return p.Src.Contains(q.Src) && p.Dst.Contains(q.Dst) && (p.Index == 0 || p.Index == link)
	})
	if at < 0 {
		return nil
	}
	return &all[at]
}

// exempt reports whether no policy is for what leaves by a link.
func (h *host) exempt(family, link int) bool {
	const name = "disable_xfrm" // IPv6 has none
	return number(setting(family, h.linkName(link), name))+number(setting(family, "all", name)) != 0
}

// tunnel says by which links the tunnel of a policy leaves; "": nowhere.
func (h *host) tunnel(p *route.Policy) string {
	r, err := h.kernel.Match(route.Question{Dst: p.Far, Src: p.Near})
	if err != nil {
		return ""
	}
	return h.linkNames(r.Links())
}

// tunnelled says that an IPsec policy takes what leaves by the link of an address to a tunnel over another one; nil: none does.
func (h *host) tunnelled(c candidate, exits []exit, row *Row) *Finding {
	for _, e := range exits {
		p := h.policy(route.Question{Src: c.at.Addr, Dst: e.to}, c.at.Index)
		if p == nil || !p.Far.IsValid() {
			continue
		}
		by := h.tunnel(p)
		if by == c.link.Name {
			continue
		}
		where := "blocked"
		if row.LeavesBy = by; by != "" {
			where = "leaves by " + by
		}
		return &Finding{"shadowed", Error, fmt.Sprintf("shadowed by an IPsec policy: tunnel to %s (%s)", p.Far, where),
			fmt.Sprintf("%q takes the packets of the address", p), "give the policy other sources where it is configured, or leave the address out in watch.json: ip xfrm policy"}
	}
	return nil
}

// refuser says what refuses a socket that rules and routes do not refuse.
func (h *host) refuser(q route.Question, link int) string {
	if p := h.policy(q, link); p != nil && p.Block {
		return fmt.Sprintf("the IPsec policy %q blocks the packets", p)
	}
	return "an IPsec policy (ip xfrm policy), or a BPF program of a cgroup"
}
