// Package probe asks targets whether an uplink leads to them: by ICMP, DNS and TCP, and by HTTP whether a captive portal
// answers in their place. It hides the sockets, which are bound to the address and to the link of the uplink, so that
// no probe leaves by another one, whatever the rules and routes of the host are; and the bytes on the wire. It keeps no
// state and starts nothing that outlives a call.
package probe

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// Uplink is where probes leave.
type Uplink struct {
	Ifname      string
	Address     netip.Addr
	Nameservers []netip.Addr // of its network
	Gateway     netip.Addr   // of its default route; the zero Addr: none
}

// Kind is a way to ask a target.
type Kind struct {
	Name string // icmp, dns or tcp
	Port uint16 // of tcp
}

// The kinds of names.
const (
	icmp = "icmp"
	dns  = "dns"
	tcp  = "tcp"

	gateway = "gateway" // no kind of a configuration: what is left to ask where nobody else is named
)

// DefaultKinds is what a round asks by, without a configuration.
var DefaultKinds = []Kind{{Name: icmp}, {Name: dns}, {tcp, 443}}

// ParseKind reads "icmp", "dns" or "tcp:PORT".
func ParseKind(text string) (Kind, error) {
	name, port, has := strings.Cut(text, ":")
	switch {
	case !has && (name == icmp || name == dns):
		return Kind{Name: name}, nil
	case has && name == tcp:
		if n, err := strconv.ParseUint(port, 10, 16); err == nil && n > 0 {
			return Kind{tcp, uint16(n)}, nil
		}
	}
	return Kind{}, fmt.Errorf("%q is no kind of probe (there are icmp, dns and tcp:PORT)", text)
}

func (k Kind) String() string {
	if k.Name == tcp {
		return fmt.Sprintf("%s:%d", k.Name, k.Port)
	}
	return k.Name
}

// Page is what an HTTP server answers with status 204, unless a captive portal answers in its place.
type Page struct {
	Host string // a name or an address
	Port uint16
	Path string
}

// ParsePage reads an URL like http://check.example/204.
func ParsePage(url string) (Page, error) {
	rest, ok := strings.CutPrefix(url, "http://")
	if !ok {
		return Page{}, errors.New("want an URL that begins with http://, since a portal cannot answer for another scheme")
	}
	host, path, _ := strings.Cut(rest, "/")
	p := Page{Host: host, Port: 80, Path: "/" + path}
	if addr, err := netip.ParseAddrPort(host); err == nil {
		p.Host, p.Port = addr.Addr().String(), addr.Port()
	} else if name, port, has := strings.Cut(host, ":"); has && !strings.HasPrefix(host, "[") {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return Page{}, fmt.Errorf("%q is no port", port)
		}
		p.Host, p.Port = name, uint16(n)
	}
	p.Host = strings.TrimSuffix(strings.TrimPrefix(p.Host, "["), "]")
	if _, err := netip.ParseAddr(p.Host); err != nil && !isName(p.Host) {
		return Page{}, fmt.Errorf("%q is no name of a host, and no address", p.Host)
	}
	if strings.ContainsFunc(p.Path, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return Page{}, errors.New("the path has a character that an URL has to escape")
	}
	return p, nil
}

// isName reports whether text is a name that DNS can be asked for.
func isName(text string) bool {
	if len(text) == 0 || len(text) > 253 {
		return false
	}
	for label := range strings.SplitSeq(strings.TrimSuffix(text, "."), ".") {
		if len(label) == 0 || len(label) > 63 || strings.ContainsFunc(label, func(r rune) bool {
			return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '_'
		}) {
			return false
		}
	}
	return true
}

// Plan is what rounds ask.
type Plan struct {
	Targets []netip.Addr // of both families
	Kinds   []Kind
	Page    *Page // nil: no question for a portal
}

// most is how many targets a round asks.
const most = 2

// Of is the plan for one uplink: with the targets of its family, or where there are none, DNS to the name servers of
// its network, or else the gateway on the link.
func (p Plan) Of(u Uplink) Plan {
	family := func(addrs []netip.Addr) (of []netip.Addr) {
		for _, a := range addrs {
			if a.Is4() == u.Address.Is4() && len(of) < most {
				of = append(of, a)
			}
		}
		return of
	}
	targets := family(p.Targets)
	servers := family(u.Nameservers)
	if len(targets)+len(servers) == 0 && u.Gateway.IsValid() {
		return Plan{[]netip.Addr{u.Gateway}, []Kind{{Name: gateway}}, p.Page}
	}
	if len(targets) == 0 {
		return Plan{servers, []Kind{{Name: dns}}, p.Page}
	}
	return Plan{targets, p.Kinds, p.Page}
}

// Asks reports whether there is anything to ask.
func (p Plan) Asks() bool { return len(p.Targets) > 0 && len(p.Kinds) > 0 }

// GatewayAlone reports whether nobody beyond the gateway is asked.
func (p Plan) GatewayAlone() bool {
	return len(p.Kinds) == 1 && p.Kinds[0].Name == gateway && p.Page == nil
}

// text names the kinds.
func (p Plan) text() string {
	names := make([]string, len(p.Kinds))
	for i, k := range p.Kinds {
		names[i] = k.String()
	}
	return strings.Join(names, ", ")
}

// Answer is what one probe brought.
type Answer struct {
	Kind   Kind
	Target netip.Addr
	RTT    time.Duration
	Bytes  int   // sent and received, with the headers of IP
	Err    error // nil: the target answered
}
