package inspect

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/bind"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// inFront is a rule of another program that takes traffic that is bound to a link.
type inFront struct {
	ifname, family string
	Finding
}

// inFront finds rules of other programs that take traffic before the rules that bind it to a link.
func (h *host) inFront(q Question) (all []inFront, err error) {
	if !slices.ContainsFunc(slices.Concat(h.rules[unix.AF_INET], h.rules[unix.AF_INET6]), uplink.IsGuard) {
		return nil, nil
	}
	bound, err := bind.List(q.Server, q.UIDs)
	if errors.Is(err, unix.EPERM) {
		return nil, nil // only root may ask which mark is whose
	}
	for _, b := range bound {
		if b.Front == (bind.Front{}) {
			continue
		}
		r, link := b.Front.Rule, b.Ifname
		if link == "" {
			link = "a link that is gone"
		}
		f := inFront{b.Ifname, b.Front.Family.String(), Finding{"rule-in-front", Warning,
			fmt.Sprintf("rule %d (%s) takes traffic that is bound to %s", r.Priority, action(r), link),
			fmt.Sprintf("%q comes before the rules of %s at %d%s", r, b.Traffic, b.Priority, b.Front.Fate(b.Traffic, b.OnLoss)), bind.Cure}}
		if !slices.ContainsFunc(all, func(o inFront) bool { return o.ifname == f.ifname && o.What == f.What }) {
			all = append(all, f)
		}
	}
	return all, err
}

// noteFronts tells the addresses of links of rules that take traffic that is bound to the link.
func noteFronts(rows []Row, fronts []inFront) {
	for i := range rows {
		for _, f := range fronts {
			if r := &rows[i]; f.ifname == r.Ifname && f.family == r.Family {
				r.Findings = append(r.Findings, f.Finding)
			}
		}
	}
}

func lookInFront(p *patient) (all []symptom) {
	for _, f := range p.report.fronts {
		all = append(all, symptom{f.What, f.Evidence, f.Cure})
	}
	return all
}
