package cgroup

import (
	"net/netip"
	"slices"
)

// What a mark has in its lock for its local links: see lockKey.
const (
	localSources = -loopbackIndex
	localLengths = 4 // of networks of a link, in each family
)

// A Local is a link to networks of the host itself, as a bridge for containers.
type Local struct {
	Index    int
	Networks []netip.Prefix
	Addrs    []netip.Addr // of the link
}

// entries adds to those of the map for a mark.
func (l Local) entries(mark uint32, entries map[lockKey]uint32) {
	entries[keyOf(mark, l.Index, netip.Addr{})] = hostSource
	for _, addr := range l.Addrs {
		entries[keyOf(mark, localSources, addr)] = ownSource
	}
	lengths := make(map[netip.Addr][]int)
	for _, network := range l.Networks {
		all, length := netip.IPv6Unspecified(), network.Bits()
		if network.Addr().Is4() {
			all, length = netip.IPv4Unspecified(), 96+network.Bits()
		}
		have := lengths[all]
		at := slices.Index(have, length)
		if at < 0 {
			if len(have) == localLengths {
				continue // closed, as is what nobody has written
			}
			at, lengths[all] = len(have), append(have, length)
		}
		entries[keyOf(mark, -l.Index, all)] |= uint32(length) << (8 * at)
		entries[keyOf(mark, -l.Index, network.Masked().Addr())] = ownSource
	}
}
