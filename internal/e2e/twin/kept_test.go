package twin

import (
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// had is what main of the real host has ever had of other programs than the product, as the kernel told. all says that some
// of that was not heard.
type had struct {
	ways map[way]bool
	all  bool
}

// way is where a route leads.
type way struct {
	dst, from netip.Prefix
	leg       leg
}

// note takes over events of the kernel.
func (h *had) note(b []byte) {
	for len(b) >= unix.SizeofNlMsghdr {
		size := int(native.Uint32(b))
		if native.Uint16(b[4:]) == unix.RTM_NEWROUTE {
			h.add(b[unix.SizeofNlMsghdr:size])
		}
		b = b[min(align(size), len(b)):]
	}
}

func (h *had) add(message []byte) {
	r, ok := parseRoute(message)
	if !ok || r.table != unix.RT_TABLE_MAIN || r.protocol == protocol {
		return
	}
	for _, l := range r.legs {
		h.ways[way{r.dst, r.from, l}] = true
	}
}

// giveUp notes over which links a route is that could not be put back; of a nexthop object those of its group are not known.
func (w *world) giveUp(command string) {
	words := strings.Fields(command)
	if words[1] == "nexthop" || slices.Contains(words, "nhid") {
		w.unrestored[anyLink] = true
	}
	for i, word := range words {
		if word == "dev" && i+1 < len(words) {
			w.unrestored[words[i+1]] = true
		}
	}
}

// anyLink stands for all links.
const anyLink = "*"

// keeps reports whether a table of the real host leads a packet over a link whose routes nobody could put back into main,
// by a route that main has had: over the link of a served address if the packet is from one, and by a default if plain
// leads by one, or by any route if move took that. It is longer than that of twin, if there is one.
func (c *comparison) keeps(q question, over int, plain, twin answer) (bool, error) {
	if len(c.w.unrestored) == 0 {
		return false, nil
	}
	got, err := ask(c.w.real, q, nil)
	if err != nil || got.typ != unix.RTN_UNICAST || got.match.table == unix.RT_TABLE_MAIN {
		return false, err
	}
	if twin.typ != unix.RTN_UNSPEC && got.match.dst.Bits() <= twin.match.dst.Bits() {
		return false, nil
	}
	moved := c.w.host.watch.Routes == "move" && plain.match.isDefault() // main has none, so that tables are asked
	if over == 0 && plain.typ != unix.RTN_UNSPEC && !got.match.isDefault() && !moved {
		return false, nil
	}
	for _, l := range got.legs {
		lost := c.w.unrestored[c.plain.names[l.index]] || c.w.unrestored[anyLink]
		if !lost || over != 0 && l.index != over || !c.w.had.all && !c.w.had.ways[way{got.match.dst, got.match.from, l}] {
			return false, nil
		}
	}
	c.result.answers++
	return true, nil
}
