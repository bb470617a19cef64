package inspect

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/walk"
)

// fillToMany is fill for multicast and broadcast: the rules are asked only for sockets that have not chosen a link.
func (h *host) fillToMany(e *Explanation, q route.Question, w *walk.World) error {
	resolved, err := h.kernel.Resolve(q)
	if !isExit(err) {
		return err
	}
	last := walk.Answer{Route: resolved, Err: errnoOf(err)}
	if q.Oif == 0 {
		e.Steps = h.steps(w.Walk(walk.Packet{Question: q}), q.Family())
	}
	if q.Oif == 0 && q.Iif == 0 {
		e.Warnings = append(e.Warnings, "a socket may choose another link for multicast and broadcast, and no rule is asked then")
	}
	e.Kernel = Kernel{Socket: "not asked", GetRoute: h.answerText(resolved, err), Agrees: true}
	e.Result = h.result(q, last, resolved, err, resolved.Src)
	return nil
}

// askable reports whether RTM_GETROUTE of a family answers for a protocol.
func askable(family int, protocol uint8) bool {
	icmp := uint8(unix.IPPROTO_ICMP)
	if family == unix.AF_INET6 {
		icmp = unix.IPPROTO_ICMPV6
	}
	return slices.Contains([]uint8{0, unix.IPPROTO_TCP, unix.IPPROTO_UDP, icmp}, protocol)
}

// isLocal reports whether the host takes packets to the source for its own: a socket can have it.
func (h *host) isLocal(q route.Question) bool {
	if slices.ContainsFunc(h.addresses, func(own route.Address) bool { return own.Addr == q.Src.WithZone("") }) {
		return true
	}
	if q.Src.IsLinkLocalUnicast() || q.Src.IsMulticast() {
		return false
	}
	r, err := h.kernel.Match(route.Question{Dst: q.Src, Oif: q.Oif})
	return err == nil && r.Type == unix.RTN_LOCAL
}

// bindsForeign reports whether a socket can have any source.
func bindsForeign(family int) bool {
	return readLine(map[int]string{unix.AF_INET: "/proc/sys/net/ipv4/ip_nonlocal_bind", unix.AF_INET6: "/proc/sys/net/ipv6/ip_nonlocal_bind"}[family]) == "1"
}

// fillFromWalk is fill for what the kernel cannot be asked for.
func (h *host) fillFromWalk(e *Explanation, q route.Question, w *walk.World) {
	p := walk.Packet{Question: q, Bound: q.Oif != 0}
	last := w.Walk(p)
	e.Steps = h.steps(last, q.Family())
	e.Kernel = Kernel{Socket: "not asked", GetRoute: "not asked", Agrees: true}
	foreign := q.Iif == 0 && q.Src.IsValid() && !h.isLocal(q)
	if foreign && !bindsForeign(q.Family()) {
		e.Result.Error = fmt.Sprintf("%s is no address of this host (if the packet is forwarded: --iif LINK)", q.Src)
		return
	}
	chosen := q.Src
	if links := last.Route.Links(); !chosen.IsValid() && last.Err == 0 && len(links) > 0 {
		chosen = last.Route.Src
		at := slices.IndexFunc(h.addresses, func(a route.Address) bool {
			return a.Index == links[0] && a.Family() == q.Family() && a.Addr.IsGlobalUnicast()
		})
		if !chosen.IsValid() && at >= 0 {
			chosen = h.addresses[at].Addr
		}
		if p.Src = chosen; q.Dst.Is4() && chosen.IsValid() {
			last = w.Walk(p)
			e.Second = h.steps(last, q.Family())
		}
	}
	what := fmt.Sprintf("protocol %d", q.IPProto)
	if foreign {
		what = "a source that is no address of this host"
	}
	e.Warnings = append(e.Warnings, "the kernel cannot be asked for "+what+": this is what its rules and routes say")
	e.Result = h.result(q, last, route.Route{}, errNotAsked, chosen)
	e.Without = h.without(w, p, last)
}

var errNotAsked = errors.New("not asked")
