package client

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

// glance remembers what links have, for the many addresses of a host that one after the
// other want to know it of the same few links. An event of the kernel that says otherwise
// ends that, and a moment does: of lifetimes that are extended there is no event.
type glance struct {
	kernel *route.Conn
	since  time.Duration
	links  map[routesOf]onLinkOf
}

const glanceLasts = 100 * time.Millisecond

// at returns what a link has; the caller may change that.
func (g *glance) at(family, index int) (onLinkOf, error) {
	if now := wire.Now(); now-g.since > glanceLasts {
		g.since, g.links = now, make(map[routesOf]onLinkOf)
	}
	link := routesOf{family, index}
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

// forget makes at look again.
func (g *glance) forget() {
	if g != nil {
		clear(g.links)
	}
}
