package uplink

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// RoutesMode says what becomes of the routes of an uplink.
type RoutesMode string

// The modes.
const (
	NoRoutes   RoutesMode = "none" // its caller places them
	MoveRoutes RoutesMode = "move" // they leave main for the leased table
	CopyRoutes RoutesMode = "copy" // main keeps its own
)

// OnLoss says what traffic from an address may do when its table has no usable route.
type OnLoss string

// The choices.
const (
	Fallback OnLoss = "fallback" // leave by another uplink
	Block    OnLoss = "block"    // not leave at all
)

// Resolver says who is told the name servers of an uplink.
type Resolver string

// The choices.
const (
	Dnsmasq    Resolver = "dnsmasq" // reads them in a file
	Resolved   Resolver = "resolved"
	NoResolver Resolver = "none"
)

// StaticRoute is a route that the network announced: to a prefix, by a gateway or, with the zero Addr, on the link
// itself.
type StaticRoute struct {
	Dst netip.Prefix `json:"dst"`
	Via netip.Addr   `json:"via,omitzero"`
}

// Settings say what becomes of the routes and resolvers of an address. Those of a newer call replace all of the old
// ones.
type Settings struct {
	Routes        RoutesMode    `json:"routes"`
	Gateways      []netip.Addr  `json:"gateways,omitempty"` // in order, with rising metric
	Metric        uint32        `json:"metric,omitempty"`   // of the first of them
	Static        []StaticRoute `json:"static,omitempty"`
	Prefix        netip.Prefix  `json:"prefix,omitzero"` // of addresses behind this one: a delegated prefix
	OnLoss        OnLoss        `json:"on_loss"`
	SpecificFirst bool          `json:"specific_first,omitempty"`
	OwnLinkOnly   bool          `json:"own_link_only,omitempty"` // no routes of main over links that are no uplinks
	MPTCP         bool          `json:"mptcp,omitempty"`         // the address has an MPTCP endpoint
	Nameservers   []netip.Addr  `json:"nameservers,omitempty"`
	Resolver      Resolver      `json:"resolver,omitempty"`     // empty: Dnsmasq
	ServersFile   string        `json:"servers_file,omitempty"` // of dnsmasq
	PIDFile       string        `json:"pid_file,omitempty"`     // of dnsmasq; empty: where Debian has it
}

// PlacesRoutes reports whether the client, and not its caller, places routes.
func (s Settings) PlacesRoutes() bool { return s.Routes == MoveRoutes || s.Routes == CopyRoutes }

// DefaultServersFile is where resolver lines go. Below /run nothing outlives a boot.
const DefaultServersFile = "/run/table-allocator/dnsmasq.servers"

// Encode is the form in which a Replace carries the settings.
func (s Settings) Encode() ([]byte, error) { return json.Marshal(s) }

// String is what Encode returns, for a log line.
func (s Settings) String() string {
	text, err := s.Encode()
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// DecodeSettings reads settings strictly: a holder must not ignore what it does not know.
func DecodeSettings(data []byte) (Settings, error) {
	var s Settings
	d := json.NewDecoder(strings.NewReader(string(data)))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return s, fmt.Errorf("settings: %w", err)
	}
	return s, s.Validate()
}

// Validate checks what a command line or a datagram brought.
func (s Settings) Validate() error {
	switch s.Routes {
	case NoRoutes, MoveRoutes, CopyRoutes:
	default:
		return fmt.Errorf("routes %q: want none, move or copy", s.Routes)
	}
	switch s.OnLoss {
	case Fallback, Block:
	default:
		return fmt.Errorf("on-loss %q: want fallback or block", s.OnLoss)
	}
	switch s.Resolver {
	case "", Dnsmasq, Resolved, NoResolver:
	default:
		return fmt.Errorf("resolver %q: want dnsmasq, resolved or none", s.Resolver)
	}
	if s.Routes == NoRoutes && len(s.Gateways)+len(s.Static) > 0 {
		return errors.New("gateways and routes are given, but routes is none: say move or copy")
	}
	if uint64(s.Metric)+uint64(len(s.Gateways)) > 1<<32-1 {
		return fmt.Errorf("metric %d: no room for those of the other gateways", s.Metric)
	}
	for _, gateway := range s.Gateways {
		if !unicast(gateway) {
			return fmt.Errorf("gateway %s: not the address of a router", gateway)
		}
	}
	for _, r := range s.Static {
		if !r.Dst.IsValid() || r.Via.IsValid() && !unicast(r.Via) {
			return fmt.Errorf("route %v via %v: not a route", r.Dst, r.Via)
		}
	}
	for _, server := range s.Nameservers {
		if why := wire.Mapped(server); why != "" {
			return fmt.Errorf("nameserver %s: %s", server, why)
		}
		if !unicast(server) && !server.IsLoopback() {
			return fmt.Errorf("nameserver %s: not the address of a server", server)
		}
	}
	return nil
}

func unicast(a netip.Addr) bool {
	return a.IsValid() && !a.IsUnspecified() && !a.IsMulticast() && !a.IsLoopback()
}

// ParseRoute reads "DST", "DST,GATEWAY" or "DST,via GATEWAY", where DST is a prefix, an
// address or "default".
func ParseRoute(text string, family4 bool) (StaticRoute, error) {
	dst, via, hasVia := strings.Cut(text, ",")
	if !hasVia {
		dst, via, hasVia = strings.Cut(text, " via ")
	}
	var r StaticRoute
	var err error
	if r.Dst, err = parseDst(strings.TrimSpace(dst), family4); err != nil {
		return r, err
	}
	if hasVia {
		via = strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(via), "via "))
		if r.Via, err = netip.ParseAddr(via); err != nil || r.Via.Is4() != family4 {
			return r, fmt.Errorf("%q: not a gateway of this family", via)
		}
	}
	return r, nil
}

func parseDst(text string, family4 bool) (netip.Prefix, error) {
	if text == "default" {
		return defaultPrefix(family4), nil
	}
	if addr, err := netip.ParseAddr(text); err == nil && addr.Is4() == family4 && addr.Zone() == "" {
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	prefix, err := netip.ParsePrefix(text)
	if err != nil || prefix.Addr().Is4() != family4 {
		return prefix, fmt.Errorf("%q: not a destination of this family (want a prefix, an address or default)", text)
	}
	return prefix.Masked(), nil
}

func defaultPrefix(family4 bool) netip.Prefix {
	if family4 {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
}

// ParseClasslessRoutes reads DHCP option 121 (RFC 3442) as dhclient hands it on: decimal
// octets, for each route the prefix length, as many octets of the destination as that
// needs, and the four of the router; 0.0.0.0 is a route on the link. Beside an error it returns
// the routes before what cannot be read.
func ParseClasslessRoutes(text string) ([]StaticRoute, error) {
	var octets []byte
	var unread error
	for _, field := range strings.Fields(text) {
		n, err := strconv.ParseUint(field, 10, 8)
		if err != nil {
			unread = fmt.Errorf("%q: not an octet", field)
			break
		}
		octets = append(octets, byte(n))
	}
	var routes []StaticRoute
	for len(octets) > 0 {
		length := int(octets[0])
		significant := (length + 7) / 8
		if length > 32 || len(octets) < 1+significant+4 {
			return routes, cmp.Or(unread, fmt.Errorf("route %d is cut short or has a prefix length above 32", len(routes)+1))
		}
		var dst, via [4]byte
		copy(dst[:], octets[1:1+significant])
		copy(via[:], octets[1+significant:])
		route := StaticRoute{Dst: netip.PrefixFrom(netip.AddrFrom4(dst), length).Masked()}
		if router := netip.AddrFrom4(via); !router.IsUnspecified() {
			route.Via = router
		}
		routes = append(routes, route)
		octets = octets[1+significant+4:]
	}
	return routes, unread
}

// Under is the settings of a profile with what s says of the network.
func (s Settings) Under(profile Settings) Settings {
	if profile.PlacesRoutes() {
		profile.Gateways, profile.Metric, profile.Static = s.Gateways, s.Metric, s.Static
	}
	profile.Prefix = s.Prefix
	profile.Nameservers = s.Nameservers
	return profile
}
