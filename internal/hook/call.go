package hook

import (
	"net/netip"
	"strconv"
	"strings"

	"github.com/table-allocator/table-allocator/internal/uplink"
)

// Call is one thing that there is to do.
type Call interface {
	String() string // for tests and messages: what, and the arguments of the client if it takes any
	run(*Runner) error
}

// Lease is what the client is told about an address and what the network says of it.
type Lease struct {
	Addr        netip.Addr           `json:"-"` // the zero Addr: each call finds out
	Ifname      string               `json:"ifname"`
	Bits        int                  `json:"-"` // of the netmask; 0: what the address has on the link
	Tag         string               `json:"tag"`
	Routes      uplink.RoutesMode    `json:"routes"`
	Gateways    []netip.Addr         `json:"gateways,omitempty"`
	Metric      uint32               `json:"metric,omitempty"`
	Static      []uplink.StaticRoute `json:"static,omitempty"`
	Prefix      netip.Prefix         `json:"-"`
	Nameservers []netip.Addr         `json:"nameservers,omitempty"`
	ServersFile string               `json:"servers_file,omitempty"`
	Options     []string             `json:"options,omitempty"` // of the administrator
}

// Args are the arguments with which the client holds the lease.
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
	if len(l.Nameservers) > 0 {
		args = append(args, "--dnsmasq-servers", l.ServersFile)
	}
	for _, server := range l.Nameservers {
		args = append(args, "--nameserver", server.String())
	}
	return append(args, l.Options...) // the administrator's come last: they win
}

func familyFlag(a netip.Addr) string {
	if a.Is4() {
		return "-4"
	}
	return "-6"
}

func (l Lease) String() string { return strings.Join(l.Args(), " ") }

// Hold leases a table for an address, or tells its holder what has changed.
type Hold struct {
	Lease
	Delegated bool   // with the prefix that was delegated through the link
	GatewayOf string // with the gateways that another stanza of this name has; "": none
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

// HoldPresent holds all IPv4 addresses that the link has.
type HoldPresent struct{ Lease }

func (h HoldPresent) String() string { return "hold present " + h.Lease.String() }

// HoldDynamic holds all IPv6 addresses that routers and DHCPv6 gave the link, but not those that
// are for a few hours only, with the prefix that was delegated through it.
type HoldDynamic struct {
	Lease
	// Wait: if there is none yet, hold what comes within the minute, behind the caller's back.
	// Routers may answer later than a server of DHCPv6.
	Wait bool
}

func (h HoldDynamic) String() string {
	if h.Wait {
		return "hold dynamic, wait " + h.Lease.String()
	}
	return "hold dynamic " + h.Lease.String()
}

// Release gives back what a Hold got, also for a holder that was killed.
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

// Lose is Release for an address that somebody is about to take from the link. It has to go before
// its rules do, or packets from it would leave by another uplink in between.
type Lose struct{ Release }

func (l Lose) String() string { return "lose " + strings.TrimPrefix(l.Release.String(), "release ") }

// Delegate remembers the prefix that is delegated through a link. It concerns all addresses of the
// link, and each is told by a call of its own.
type Delegate struct {
	Ifname string
	Prefix netip.Prefix
}

func (d Delegate) String() string { return "delegate " + d.Prefix.String() + " on " + d.Ifname }

// Undelegate drops that prefix.
type Undelegate struct{ Ifname string }

func (u Undelegate) String() string { return "undelegate on " + u.Ifname }

// StartWatch starts a watch for a link. One that is there already goes on.
type StartWatch struct {
	Ifname string
	Args   []string
}

func (s StartWatch) String() string { return "start " + strings.Join(s.Args, " ") }

// EndWatch ends it.
type EndWatch struct {
	Ifname string
	Args   []string
}

func (e EndWatch) String() string { return "end " + strings.Join(e.Args, " ") }

// EndDhclient ends those dhclients of a link that wrote their pid where Debian has it.
type EndDhclient struct{ Ifname string }

func (e EndDhclient) String() string { return "end dhclient of " + e.Ifname }

// ReleaseAll releases all addresses that were held on a link.
type ReleaseAll struct {
	Ifname  string
	Options []string
}

func (r ReleaseAll) String() string { return "release all of " + r.Ifname }
