package install

import (
	"slices"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// takers are, of each address on a link, the placer that takes routes out of main for it. There are several placers
// of one address while a link changes its name, once or more often, since each has one of the names.
type takers map[taker]*placer

type taker struct {
	address string
	index   int // of the link
}

// another reports whether another placer than p takes routes for the address.
func (t takers) another(p *placer, u uplink.Uplink, index int) bool {
	now := t[taker{u.Key.Address, index}]
	return now != nil && now != p
}

// succeed makes p the one that takes, from now on. Events that are still to come may be from before the one before it
// took its routes.
func (t *takers) succeed(p *placer, u uplink.Uplink, index int) {
	if *t == nil {
		*t = make(takers)
	}
	of := taker{u.Key.Address, index}
	if before := (*t)[of]; before != nil && before != p {
		p.fresh, p.spent = slices.Clone(before.fresh), slices.Clone(before.spent)
		p.newer, p.went = slices.Clone(before.newer), slices.Clone(before.went)
		before.taken, before.fresh, before.newer = nil, nil, nil
	}
	(*t)[of] = p
}

func (t takers) end(p *placer, u uplink.Uplink, index int) {
	if of := (taker{u.Key.Address, index}); t[of] == p {
		delete(t, of)
	}
}

// fresh reports whether one of them has taken a route after the last event that was heard.
func (t takers) fresh(r route.Route) bool {
	for _, p := range t {
		if p.isFresh(r) {
			return true
		}
	}
	return false
}
