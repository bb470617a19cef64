package route

import (
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Legs returns the routes of r's next hops over one link, each as a route of its own that names no
// nexthop object; nil if none leads there. In IPv6 the kernel shows routes that share a place as one
// route of several next hops, whatever their links and programs.
func (r Route) Legs(index int) []Route {
	r.NexthopID = 0
	if !r.Multipath {
		if r.Index != index {
			return nil
		}
		return []Route{r}
	}
	leg := r
	leg.Multipath = false
	var rest []byte
	var legs []Route
	// rest was read attribute by attribute, and its nexthops were, too.
	_ = eachAttributeAsIs([]byte(r.rest), func(typ uint16, value []byte) {
		if typ&attributeType != unix.RTA_MULTIPATH {
			rest = appendAttribute(rest, typ, value)
			return
		}
		for len(value) >= unix.SizeofRtNexthop {
			n := int(native.Uint16(value))
			if n < unix.SizeofRtNexthop || n > len(value) {
				return
			}
			if int(int32(native.Uint32(value[4:]))) == index {
				legs = append(legs, leg.hop(value[:n]))
			}
			value = value[min(align(n), len(value)):]
		}
	})
	for i := range legs {
		legs[i].rest = string(rest) + legs[i].rest
	}
	return legs
}

// hops returns the routes of all of r's next hops, as Legs does.
func (r Route) hops() (hops []Route) {
	for _, index := range r.Links() {
		hops = append(hops, r.Legs(index)...)
	}
	return hops
}

// Links returns the ifindexes of the links that r leads to, each once.
func (r Route) Links() []int {
	if !r.Multipath {
		if r.Index == 0 {
			return nil
		}
		return []int{r.Index}
	}
	var links []int
	_ = eachAttribute([]byte(r.rest), func(typ uint16, value []byte) { // as in Legs
		for typ == unix.RTA_MULTIPATH && len(value) >= unix.SizeofRtNexthop {
			n := int(native.Uint16(value))
			if n < unix.SizeofRtNexthop || n > len(value) {
				return
			}
			if index := int(int32(native.Uint32(value[4:]))); !slices.Contains(links, index) {
				links = append(links, index)
			}
			value = value[min(align(n), len(value)):]
		}
	})
	return links
}

// hop returns r with one next hop, a struct rtnexthop and its attributes, and of the other attributes
// only those of the next hop.
func (r Route) hop(b []byte) Route {
	r.Index = int(int32(native.Uint32(b[4:])))
	r.Gateway = netip.Addr{}
	r.Onlink = b[2]&unix.RTNH_F_ONLINK != 0
	var rest []byte
	_ = eachAttributeAsIs(b[unix.SizeofRtNexthop:], func(typ uint16, value []byte) { // as before
		switch typ & attributeType {
		case unix.RTA_GATEWAY:
			r.Gateway, _ = netip.AddrFromSlice(value)
		case unix.RTA_VIA:
			r.Gateway, _ = netip.AddrFromSlice(value[min(2, len(value)):])
		case unix.RTA_ENCAP, unix.RTA_ENCAP_TYPE:
			r.Encap = true
			rest = appendAttribute(rest, typ, value)
		}
	})
	r.rest = string(rest)
	return r
}

// clearNexthopState clears what RTA_MULTIPATH tells of the state of its links, which the kernel refuses to be told. It returns
// which next hops are dead, the first one by the lowest bit, and whether b is whole.
func clearNexthopState(b []byte) (dead uint64, whole bool) {
	for i := 0; len(b) > 0; i++ {
		if len(b) < unix.SizeofRtNexthop {
			return dead, false
		}
		n := int(native.Uint16(b))
		if n < unix.SizeofRtNexthop || n > len(b) {
			return dead, false
		}
		if b[2]&unix.RTNH_F_DEAD != 0 {
			dead |= 1 << i
		}
		b[2] &= flagsNexthop
		b = b[min(align(n), len(b)):]
	}
	return dead, true
}

// Alive returns r, of several next hops, without those whose links were down when it was read: the kernel keeps them for when
// the links come up, and refuses them in a new route.
func (r Route) Alive() Route {
	if r.deadHops == 0 {
		return r
	}
	var hops, last, rest []byte
	n := 0
	_ = eachAttributeAsIs([]byte(r.rest), func(typ uint16, value []byte) { // as in Legs
		if typ&attributeType != unix.RTA_MULTIPATH {
			rest = appendAttribute(rest, typ, value)
			return
		}
		for i := 0; len(value) >= unix.SizeofRtNexthop; i++ {
			size := int(native.Uint16(value))
			if size < unix.SizeofRtNexthop || size > len(value) {
				return
			}
			next := min(align(size), len(value))
			if r.deadHops&(1<<i) == 0 {
				n, last, hops = n+1, value[:size], append(hops, value[:next]...)
			}
			value = value[next:]
		}
	})
	r.deadHops, r.NexthopID = 0, 0
	switch n {
	case 0: // the kernel is about to delete it
	case 1:
		r.Multipath = false
		r = r.hop(last)
		r.rest = string(rest) + r.rest
	default:
		r.rest = string(appendAttribute(rest, unix.RTA_MULTIPATH, hops))
	}
	return r
}

// forceHops returns r, of several next hops, with the gateways on their links by force, or without. Link-local ones are
// there anyway.
func (r Route) forceHops(force bool) Route {
	rest := []byte(r.rest)
	_ = eachAttributeAsIs(rest, func(typ uint16, value []byte) { // as in Legs; value is a part of rest
		for typ&attributeType == unix.RTA_MULTIPATH && len(value) >= unix.SizeofRtNexthop {
			n := int(native.Uint16(value))
			if n < unix.SizeofRtNexthop || n > len(value) {
				return
			}
			value[2] &^= unix.RTNH_F_ONLINK
			if gateway := r.hop(value[:n]).Gateway; force && gateway.IsValid() && !gateway.IsLinkLocalUnicast() {
				value[2] |= unix.RTNH_F_ONLINK
			}
			value = value[min(align(n), len(value)):]
		}
	})
	r.rest = string(rest)
	return r
}
