package install

import (
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// onLinkOf is what a link has of a family: its addresses, and its routes in main.
type onLinkOf struct {
	addresses []route.Address
	main      []route.Route
}

// readLink reads that from the kernel.
func readLink(kernel *route.Conn, family, index int) (on onLinkOf, err error) {
	if on.addresses, err = kernel.AddressesOn(family, index); err == nil {
		on.main, err = kernel.RoutesOn(family, unix.RT_TABLE_MAIN, index)
	}
	return on, err
}

// Glance is a cache of what links have, for the many addresses of a host that one after the other want to know it
// of the same few links. An entry lasts until an event concerns its link, and for 100 ms at most, since the kernel
// sends no event when a lifetime is extended.
type Glance struct {
	kernel *route.Conn
	since  time.Duration
	links  map[linkOf]onLinkOf
}

type linkOf struct{ family, index int }

// NewGlance returns an empty cache.
func NewGlance(kernel *route.Conn) *Glance { return &Glance{kernel: kernel} }

const glanceLasts = 100 * time.Millisecond

// at returns what a link has, as a copy.
func (g *Glance) at(family, index int) (onLinkOf, error) {
	if now := wire.Now(); now-g.since > glanceLasts {
		g.since, g.links = now, make(map[linkOf]onLinkOf)
	}
	link := linkOf{family, index}
	on, known := g.links[link]
	if !known {
		var err error
		if on, err = readLink(g.kernel, family, index); err != nil {
			return on, err
		}
		g.links[link] = on
	}
	return onLinkOf{slices.Clone(on.addresses), slices.Clone(on.main)}, nil
}

// Invalidate empties the cache. A nil Glance has none.
func (g *Glance) Invalidate() {
	if g != nil {
		clear(g.links)
	}
}
