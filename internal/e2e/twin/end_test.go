package twin

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// compareEnd finds what differs between both hosts once the product has taken all back.
func (w *world) compareEnd() (result, error) {
	var r result
	real, err := w.real.picture()
	if err != nil {
		return r, err
	}
	plain, err := w.plain.picture()
	if err != nil {
		return r, err
	}
	if w.host.watch.Routes == "move" {
		plain.routes = withoutOutlived(plain, real)
	}
	got, want := lines(real), lines(plain)
	r.answers = len(want)
	for _, line := range got {
		if !slices.Contains(want, line) {
			r.add("at the end: too much", "at the end there is %s", line)
		}
	}
	for _, line := range want {
		if !slices.Contains(got, line) {
			r.add("at the end: too little", "at the end there is no %s", line)
		}
	}
	got, want = slices.DeleteFunc(got, isUnordered), slices.DeleteFunc(want, isUnordered)
	// Who was dead when routes of one place came and went does not know their order.
	if len(r.wrong) == 0 && !slices.Contains(w.host.phases, afterKill) && !slices.Equal(got, want) {
		r.add("at the end: order", "at the end the order is\n%s\ninstead of\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	return r, nil
}

// withoutOutlived are the routes of the plain host without next hops that are of no use. Of IPv6 defaults that share the
// traffic the kernel keeps one while its link is down, also if the link is a port of a bridge from then on. Of the real
// host move had taken it, so that it went with the link.
func withoutOutlived(plain, real picture) (kept []route) {
	addressed := make(map[int]bool)
	for _, a := range plain.addresses {
		addressed[a.index] = addressed[a.index] || a.addr.Is6()
	}
	for _, r := range plain.routes {
		if r.family == unix.AF_INET6 && r.isDefault() && r.nexthop == 0 && len(r.legs) > 1 {
			r, _ = r.with(func(_ int, l leg) bool {
				return addressed[l.index] || slices.ContainsFunc(real.routes, func(o route) bool {
					return o.family == r.family && o.table == r.table && o.dst == r.dst && o.from == r.from && o.metric == r.metric && slices.Contains(o.legs, l)
				})
			})
		}
		kept = append(kept, r)
	}
	return kept
}

// lines are all routes and rules of a namespace.
func lines(p picture) (all []string) {
	for _, r := range p.routes {
		if r.typ == unix.RTN_ANYCAST {
			continue // see destinations
		}
		if r.family == unix.AF_INET6 && r.nexthop == 0 && slices.Max(append(r.weights, 0)) == 0 { // whose next hops are routes that share the traffic
			slices.SortFunc(r.legs, func(a, b leg) int { return strings.Compare(a.String(), b.String()) })
		}
		all = append(all, "route "+r.String())
	}
	for _, r := range p.rules {
		all = append(all, fmt.Sprintf("rule %d: %s", r.priority, r.text))
	}
	return all
}

// isUnordered reports whether a line is of a route that the kernel makes when a link comes up,
// which takes its time.
func isUnordered(line string) bool {
	return strings.Contains(line, " fe80::/64 ") || strings.Contains(line, " table 255 ")
}
