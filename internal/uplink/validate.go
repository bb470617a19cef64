package uplink

import (
	"errors"
	"fmt"
	"math"
	"net/netip"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// Validate checks an uplink that a command line describes. Its key has to be canonical.
func (u Uplink) Validate() error {
	if err := wire.CheckTag(u.Tag); err != nil {
		return err
	}
	if u.IsAddress() {
		a := u.Addr()
		if !unicast(a) || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
			return fmt.Errorf("address %s: no host has this address on a link", a)
		}
		if a.Is6() && a.IsLinkLocalUnicast() {
			return fmt.Errorf("address %s: a link-local address needs no table", a)
		}
	}
	return u.validateSettings()
}

// validateSettings checks the settings against the family of the address and the priorities of its rules.
func (u Uplink) validateSettings() error {
	s := u.Settings
	if !u.IsAddress() && (s.PlacesRoutes() || len(s.Nameservers) > 0 || s.Prefix.IsValid()) {
		return errors.New("routes, name servers and a prefix need an address of family inet or inet6")
	}
	foreign := func(a netip.Addr) bool { return a.Is4() != (u.Key.Family == wire.Inet) }
	for _, gateway := range s.Gateways {
		if foreign(gateway) {
			return fmt.Errorf("gateway %s: not of family %s", gateway, u.Key.Family)
		}
	}
	for _, server := range s.Nameservers {
		if foreign(server) {
			return fmt.Errorf("nameserver %s: not of family %s", server, u.Key.Family)
		}
	}
	for _, r := range s.Static {
		if foreign(r.Dst.Addr()) || r.Via.IsValid() && foreign(r.Via) {
			return fmt.Errorf("route %v via %v: not of family %s", r.Dst, r.Via, u.Key.Family)
		}
	}
	if p := s.Prefix; p.IsValid() && (foreign(p.Addr()) || p.Bits() == 0 || p.IsSingleIP()) {
		return fmt.Errorf("prefix %s: not a prefix of family %s that holds several addresses", p, u.Key.Family)
	}
	switch {
	case s.SpecificFirst && u.Priorities.Source < leastMainFirst:
		return errors.New("specific-first: no room for two rules before the priority of the source rule")
	case (s.Prefix.IsValid() || u.Forward) && u.Priorities.Source > math.MaxUint32-behindHosts:
		return errors.New("prefix, forward: no room for rules behind the priority of the source rule")
	case s.OnLoss == Block && !u.CanBlock():
		return errors.New("on-loss block: no room for a rule behind the source rule")
	}
	return s.Validate()
}
