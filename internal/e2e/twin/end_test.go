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
	// Who was dead when routes of one place came and went does not know their order, nor does a client whether what another
	// one took came anew since.
	if len(r.wrong) > 0 || slices.Contains(w.host.phases, afterKill) || w.host.watch.clients && len(w.host.changes) > 0 {
		return r, nil
	}
	if w.host.watch.clients {
		real.routes, plain.routes = firstOfPlaces(real.routes), firstOfPlaces(plain.routes)
	}
	got, want = slices.DeleteFunc(lines(real), isUnordered), slices.DeleteFunc(lines(plain), isUnordered)
	if !slices.Equal(got, want) {
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

// firstOfPlaces are the routes that the kernel uses, of those that differ by their next hops alone. Clients end one after the
// other, and the kernel adds a route in front of its place or behind: where the first client has its route back, and then the
// third one, that of the second comes behind both.
func firstOfPlaces(routes []route) (first []route) {
	type inTable struct {
		family int
		table  uint32
		place  place
	}
	seen := make(map[inTable]bool)
	for _, r := range routes {
		of := inTable{r.family, r.table, r.place()}
		if !seen[of] {
			first = append(first, r)
		}
		seen[of] = true
	}
	return first
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
