package twin

import (
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// question asks where a packet goes.
type question struct {
	kind     string // "bound", "unbound", "forwarded" or "on the link"
	dst      netip.Addr
	src      netip.Addr // zero: the kernel chooses it
	iif, oif int        // 0: none
	tos      uint8
}

// get is the `ip route get` that asks it.
func (q question) get(names map[int]string) string {
	text := fmt.Sprintf("ip route get %s", q.dst)
	if q.src.IsValid() {
		text += fmt.Sprintf(" from %s", q.src)
	}
	if q.iif != 0 {
		text += " iif " + names[q.iif]
	}
	if q.oif != 0 {
		text += " oif " + names[q.oif]
	}
	if q.tos != 0 {
		text += fmt.Sprintf(" tos %#x", q.tos)
	}
	return text
}

func (q question) message(flags uint32) []byte {
	bits := byte(q.dst.BitLen())
	b := []byte{byte(familyOf(q.dst)), bits, 0, q.tos, 0, 0, 0, 0}
	b = native.AppendUint32(b, flags)
	b = attribute(b, unix.RTA_DST, q.dst.AsSlice())
	if q.src.IsValid() {
		b[2] = bits
		b = attribute(b, unix.RTA_SRC, q.src.AsSlice())
	}
	if q.iif != 0 {
		b = attribute32(b, unix.RTA_IIF, uint32(q.iif))
	}
	if q.oif != 0 {
		b = attribute32(b, unix.RTA_OIF, uint32(q.oif))
	}
	return b
}

// fibMatch makes the kernel tell the route that it found, with all its legs.
const fibMatch = 0x2000

// way asks the kernel for the route of a packet, and reports whether there is one that leads
// anywhere.
func (s *socket) way(q question) (route, bool, error) {
	m, err := s.ask(unix.RTM_GETROUTE, q.message(fibMatch|unix.RTM_F_LOOKUP_TABLE))
	if errno, ok := err.(unix.Errno); ok {
		switch errno {
		case unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EINVAL:
			return route{}, false, nil
		}
	}
	if err != nil {
		return route{}, false, fmt.Errorf("%s: %w", q.get(nil), err)
	}
	r, _ := parseRoute(m.body)
	if r.isError() {
		return route{}, false, nil
	}
	if r.typ == unix.RTN_UNICAST {
		r, _ = r.alive(func(int) bool { return true })
	}
	return r, true, nil
}

// source asks the kernel which source address it chooses.
func (s *socket) source(q question) (source netip.Addr, err error) {
	m, err := s.ask(unix.RTM_GETROUTE, q.message(0))
	if err != nil {
		return source, fmt.Errorf("%s: %w", q.get(nil), err)
	}
	attributes(m.body[12:], func(typ uint16, value []byte) {
		if typ == unix.RTA_PREFSRC {
			source = addrOf(value)
		}
	})
	return source, nil
}

// nowhere are addresses that no network of a host has.
var nowhere = []string{"9.9.9.9", "150.1.2.3", "223.255.1.1", "100.127.3.4", "62.0.0.1",
	"2600::9", "2a00:1450::1", "3fff:1::1", "fd99::1", "fc55:1::1"}

// destinations are the addresses of a family to ask for: of each network of a route or address the
// first, the ninth, the middle, the last, and those right before and behind it; each gateway; and
// some of nowhere. Networks that the real host has alone are among them: it must not.
func destinations(p picture, more []route, family int) []netip.Addr {
	seen := make(map[netip.Addr]bool)
	var all []netip.Addr
	add := func(a netip.Addr) {
		if !a.IsValid() || familyOf(a) != family || seen[a] || a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() ||
			a.IsLinkLocalUnicast() || a.Is4() && (a.As4()[0] == 0 || a.As4()[0] >= 240) {
			return
		}
		seen[a] = true
		all = append(all, a)
	}
	network := func(n netip.Prefix) {
		first, last := n.Masked().Addr(), lastOf(n)
		ninth := first
		for range 9 {
			ninth = ninth.Next()
		}
		if n.Contains(ninth) {
			add(ninth)
		}
		for _, a := range []netip.Addr{first, first.Next(), middleOf(n), last, first.Prev(), last.Next()} {
			// The first of an IPv6 network is anycast, which the kernel adds and deletes beside all
			// else, and does not always delete when an address goes as soon as it came.
			if a.Is4() || a != first || n.IsSingleIP() {
				add(a)
			}
		}
	}
	for _, r := range slices.Concat(p.routes, more) {
		if r.family == family && r.table != unix.RT_TABLE_LOCAL && r.dst.Bits() > 0 {
			network(r.dst)
		}
		for _, l := range r.legs {
			add(l.gateway)
		}
	}
	for _, a := range p.addresses {
		if familyOf(a.addr) == family {
			network(a.network)
			add(a.addr)
		}
	}
	for _, text := range nowhere {
		add(netip.MustParseAddr(text))
	}
	return all
}

// lastOf is the highest address of a network.
func lastOf(n netip.Prefix) netip.Addr { return setBits(n, n.Bits()) }

// middleOf is the one in its middle.
func middleOf(n netip.Prefix) netip.Addr {
	b := n.Masked().Addr().AsSlice()
	if bit := n.Bits(); bit < len(b)*8 {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	addr, _ := netip.AddrFromSlice(b) // of the same length
	return addr
}

func setBits(n netip.Prefix, from int) netip.Addr {
	b := n.Masked().Addr().AsSlice()
	for bit := from; bit < len(b)*8; bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	addr, _ := netip.AddrFromSlice(b) // of the same length
	return addr
}

// strangers are sources of packets that come in by a link and go on: a neighbour there, and
// somebody from far away.
func strangers(p picture, family, index int) (all []netip.Addr) {
	for _, a := range p.addresses {
		if a.index != index || familyOf(a.addr) != family || a.addr.IsLinkLocalUnicast() {
			continue
		}
		neighbour := a.network.Addr()
		for range 9 {
			neighbour = neighbour.Next()
		}
		local := slices.ContainsFunc(p.addresses, func(b address) bool { return b.addr == neighbour })
		if a.network.Contains(neighbour) && neighbour != lastOf(a.network) && !local {
			all = append(all, neighbour)
			break
		}
	}
	if family == unix.AF_INET {
		return append(all, netip.MustParseAddr("145.3.4.5"))
	}
	return append(all, netip.MustParseAddr("2a02:9::5"))
}

// toses are the types of service that routes ask for, besides none.
func toses(p picture, family int) []uint8 {
	all := []uint8{0}
	for _, r := range p.routes {
		if r.family == family && !slices.Contains(all, r.tos) {
			all = append(all, r.tos)
		}
	}
	return all
}
