package route

import (
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Whereabouts are the links and networks that each address has had as of the events that were heard. The kernel is ahead of
// these: an address that is there may have been deleted and added again, of which only the first is heard.
type Whereabouts struct {
	of map[netip.Addr][]whereabout
	on map[int]int // how many of IPv4 each link has, by ifindex
}

type whereabout struct {
	index   int
	network netip.Prefix
}

// Whereabouts returns those of now. The caller watches already, and gets the events of what changes meanwhile.
func (c *Conn) Whereabouts() (Whereabouts, error) {
	all, err := c.Addresses(unix.AF_UNSPEC)
	if err != nil {
		return Whereabouts{}, err
	}
	w := Whereabouts{of: make(map[netip.Addr][]whereabout, len(all)), on: make(map[int]int)}
	for _, a := range all {
		if a.Created != 0 { // not by a route of type local
			w.add(a.Addr, whereabout{a.Index, a.Network()})
		}
	}
	return w, nil
}

// Follow takes over events, in order, and notes in them which deleted addresses are still somewhere, and were the last of their links.
func (w Whereabouts) Follow(events []Event) {
	for i, e := range events {
		if e.Kind != AddressChanged || !e.Network.IsValid() {
			continue
		}
		at := whereabout{e.Index, e.Network}
		if !e.Deleted {
			w.add(e.Addr, at)
			continue
		}
		left := slices.DeleteFunc(slices.Clone(w.of[e.Addr]), func(o whereabout) bool { return o == at })
		if e.Addr.Is4() && len(left) < len(w.of[e.Addr]) {
			w.on[e.Index]--
		}
		events[i].Elsewhere, events[i].Bare = len(left) > 0, e.Addr.Is4() && w.on[e.Index] == 0
		if w.of[e.Addr] = left; len(left) == 0 {
			delete(w.of, e.Addr)
		}
		if w.on[e.Index] == 0 {
			delete(w.on, e.Index)
		}
	}
}

// add takes over that a link has an address. In IPv6 it has an address once, and its far end may change.
func (w Whereabouts) add(addr netip.Addr, at whereabout) {
	if addr.Is6() {
		w.of[addr] = slices.DeleteFunc(w.of[addr], func(o whereabout) bool { return o.index == at.index })
	}
	if slices.Contains(w.of[addr], at) {
		return
	}
	if w.of[addr] = append(w.of[addr], at); addr.Is4() {
		w.on[at.index]++
	}
}
