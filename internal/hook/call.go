package hook

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/table-allocator/table-allocator/internal/uplink"
)

// Call is one thing to do at an event.
type Call interface {
	String() string // for tests and messages: the call, and the arguments of the client if it has any
	run(*Runner) error
}

// Lease holds the options with which the client leases a table for an address.
type Lease struct {
	Addr        netip.Addr           `json:"-"` // the zero Addr in a call for several addresses
	Ifname      string               `json:"ifname"`
	Bits        int                  `json:"-"` // length of the netmask; 0: the length that the address has on the link
	Tag         string               `json:"tag"`
	Routes      uplink.RoutesMode    `json:"routes"`
	Gateways    []netip.Addr         `json:"gateways,omitempty"`
	Metric      uint32               `json:"metric,omitempty"`
	Static      []uplink.StaticRoute `json:"static,omitempty"`
	Prefix      netip.Prefix         `json:"-"`
	Nameservers []netip.Addr         `json:"nameservers,omitempty"`
	Resolver    uplink.Resolver      `json:"resolver,omitempty"`
	ServersFile string               `json:"servers_file,omitempty"`
	Options     []string             `json:"options,omitempty"` // of the administrator
}

// Args returns the arguments of the client that holds the lease.
func (l Lease) Args() []string {
	var args []string
	if l.Addr.IsValid() {
		args = append(args, familyFlag(l.Addr), "-a", l.Addr.String())
	}
	args = append(args, "-i", l.Ifname, "--routes", string(l.Routes))
	if l.Bits != 0 {
		args = append(args, "-n", strconv.Itoa(l.Bits))
	}
	args = append(args, "-t", l.Tag)
	for _, r := range l.Static {
		text := r.Dst.String()
		if r.Via.IsValid() {
			text += "," + r.Via.String()
		}
		args = append(args, "--route", text)
	}
	if l.Metric != 0 {
		args = append(args, "--metric", strconv.FormatUint(uint64(l.Metric), 10))
	}
	for _, gateway := range l.Gateways {
		args = append(args, "--gateway", gateway.String())
	}
	if l.Prefix.IsValid() {
		args = append(args, "--prefix", l.Prefix.String())
	}
	switch {
	case len(l.Nameservers) == 0:
	case l.Resolver != "" && l.Resolver != uplink.Dnsmasq:
		args = append(args, "--resolver", string(l.Resolver))
	default:
		args = append(args, "--dnsmasq-servers", l.ServersFile)
	}
	for _, server := range l.Nameservers {
		args = append(args, "--nameserver", server.String())
	}
	return append(args, l.Options...) // the administrator's options come last, so that they count
}

func familyFlag(a netip.Addr) string {
	if a.Is4() {
		return "-4"
	}
	return "-6"
}

func (l Lease) String() string { return strings.Join(l.Args(), " ") }

// Hold leases a table for an address. If the address has a holder, the holder takes over the new options.
type Hold struct {
	Lease
	Delegated bool   // add the prefix that was delegated through the link
	GatewayOf string // add the gateways of other stanzas of this name in interfaces(5); "": do not
}

func (h Hold) String() string {
	text := "hold "
	if h.Delegated {
		text = "hold delegated "
	}
	text += h.Lease.String()
	if h.GatewayOf != "" {
		text += " gateway of " + h.GatewayOf
	}
	return text
}

// HoldPresent is Hold for each IPv4 address that the link has, or gets within some seconds.
type HoldPresent struct{ Lease }

func (h HoldPresent) String() string { return "hold present " + h.Lease.String() }

// HoldStatic is Hold for each address of the link without a lifetime, IPv4 and IPv6, but for those that have had a call.
type HoldStatic struct {
	Lease
	But []netip.Addr
}

func (h HoldStatic) String() string { return fmt.Sprintf("hold static but %v %v", h.But, h.Lease) }

// HoldDynamic is Hold, with the delegated prefix, for each IPv6 address that routers and DHCPv6 gave the
// link, temporary ones excepted.
type HoldDynamic struct {
	Lease
	// Wait: if the link has no such address yet, a process in the background waits a minute for the
	// first one, since a router may answer later than a server of DHCPv6.
	Wait bool
}

func (h HoldDynamic) String() string {
	if h.Wait {
		return "hold dynamic, wait " + h.Lease.String()
	}
	return "hold dynamic " + h.Lease.String()
}

// Release ends the holder of an address, deletes rules and routes and releases the lease, also if the
// holder was killed.
type Release struct {
	Ifname  string
	Addr    netip.Addr
	Options []string
}

func (r Release) String() string {
	return "release " + strings.Join(append(r.args(), r.Options...), " ")
}

func (r Release) args() []string {
	return []string{familyFlag(r.Addr), "-r", "-a", r.Addr.String(), "-i", r.Ifname}
}

// Lose is Release for an address that a program is about to delete from the link. The address is deleted
// before its rules are, so that no packet from it leaves by another uplink in between.
type Lose struct{ Release }

func (l Lose) String() string { return "lose " + strings.TrimPrefix(l.Release.String(), "release ") }

// Delegate remembers the prefix that is delegated through a link. Every address of the link uses it, and
// dhclient reports each address in an event of its own.
type Delegate struct {
	Ifname string
	Prefix netip.Prefix
}

func (d Delegate) String() string { return "delegate " + d.Prefix.String() + " on " + d.Ifname }

// Undelegate drops the delegated prefix.
type Undelegate struct{ Ifname string }

func (u Undelegate) String() string { return "undelegate on " + u.Ifname }

// StartWatch starts a watch for a link, unless the link has one that runs.
type StartWatch struct {
	Ifname string
	Args   []string
}

func (s StartWatch) String() string { return "start " + strings.Join(s.Args, " ") }

// EndWatch ends the watch for a link.
type EndWatch struct {
	Ifname string
	Args   []string
}

func (e EndWatch) String() string { return "end " + strings.Join(e.Args, " ") }

// EndDhclient ends the dhclients of a link, found by the pid files that Debian names.
type EndDhclient struct{ Ifname string }

func (e EndDhclient) String() string { return "end dhclient of " + e.Ifname }

// ReleaseAll is Release for each address that a hook held on a link, and drops the delegated prefix.
type ReleaseAll struct {
	Ifname  string
	Options []string
}

func (r ReleaseAll) String() string { return "release all of " + r.Ifname }
