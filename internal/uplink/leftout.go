package uplink

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// LeftOut is a value that cannot be right, and why. Networks tell such values, and one of them must not keep an address
// from its table.
type LeftOut struct{ Key, Value, Why string }

// TakeValues removes from the settings what the network told and cannot be right, and returns it.
func (u *Uplink) TakeValues() (left []LeftOut) {
	s := &u.Settings
	drop := func(key, value, why string) bool {
		if why != "" {
			left = append(left, LeftOut{key, value, why})
		}
		return why != ""
	}
	s.Gateways = slices.DeleteFunc(s.Gateways, func(a netip.Addr) bool { return drop("gateway", a.String(), u.notRouter(a)) })
	s.Static = slices.DeleteFunc(s.Static, func(r StaticRoute) bool {
		text := r.Dst.String()
		if r.Via.IsValid() {
			text += " via " + r.Via.String()
		}
		return drop("route", text, u.notRoute(r))
	})
	for i, a := range s.Nameservers {
		if a.Zone() == u.Key.Ifname {
			s.Nameservers[i] = a.WithZone("") // Nameservers adds it
		}
	}
	s.Nameservers = slices.DeleteFunc(s.Nameservers, func(a netip.Addr) bool { return drop("nameserver", a.String(), u.notServer(a)) })
	if p := s.Prefix; p.IsValid() && drop("prefix", p.String(), u.notDelegated(p)) {
		s.Prefix = netip.Prefix{}
	}
	shortest := u.shortestNetwork()
	if n := u.Network; u.IsAddress() && n.IsValid() && n.Bits() < shortest {
		drop("netmask", n.String(), fmt.Sprintf("no uplink has a network shorter than /%d: there is no rule to it", shortest))
	}
	return left
}

// strange says why no other host has an address. An address of the other family is a wrong argument, see Validate: no
// network tells one.
func (u *Uplink) strange(a netip.Addr) string {
	switch {
	case a.Is4In6():
		return wire.Mapped(a)
	case a.Is4() && (a.As4()[0] == 0 || a.As4()[0] >= 240), !a.IsValid(), a.IsUnspecified(), a.IsMulticast():
		return "no host has this address"
	case u.IsAddress() && a.WithZone("") == u.Addr():
		return "this is the address itself"
	}
	return ""
}

func (u *Uplink) notRouter(a netip.Addr) string {
	if a.IsLoopback() {
		return "no router has this address"
	}
	return u.strange(a)
}

func (u *Uplink) notServer(a netip.Addr) string {
	switch {
	case a.Zone() != "":
		return "its zone is not the link of the address"
	case a.IsLoopback():
		return ""
	}
	return u.strange(a)
}

func (u *Uplink) notRoute(r StaticRoute) string {
	dst := r.Dst.Addr()
	switch {
	case dst.Is4In6():
		return wire.Mapped(dst)
	case dst.IsLoopback(), dst.IsMulticast(), dst.IsLinkLocalUnicast() && dst.Is6():
		return "packets from the address cannot take this route"
	case r.Via.Zone() != "":
		return "its router has a zone"
	case r.Via.IsValid():
		return u.notRouter(r.Via)
	}
	return ""
}

func (u *Uplink) notDelegated(p netip.Prefix) string {
	if p.Addr().Is4() != (u.Key.Family == wire.Inet) {
		return "" // a wrong argument
	}
	return NotDelegated(p)
}

// shortestDelegated is the shortest prefix that a host can be delegated.
const shortestDelegated = 16

// NotDelegated says why no host is delegated a prefix; empty: one may be.
func NotDelegated(p netip.Prefix) string {
	a := p.Masked().Addr()
	switch {
	case p.Addr().Is4In6():
		return "this is IPv4, written as IPv6"
	case p.Bits() < shortestDelegated || p.IsSingleIP():
		return fmt.Sprintf("no host is delegated a prefix shorter than /%d, or a single address", shortestDelegated)
	case a.IsLoopback(), a.IsMulticast(), a.IsLinkLocalUnicast(), a.IsUnspecified():
		return "no host is delegated this prefix"
	}
	return ""
}
