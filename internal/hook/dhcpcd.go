package hook

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/table-allocator/table-allocator/internal/uplink"
)

// dhcpcd reads the variables of dhcpcd-run-hooks(8). dhcpcd runs its hooks when the addresses and the
// routes of an event are in the kernel, and restores routes that others move, so routes are copied. When
// a lease ends, dhcpcd deletes the addresses, and their holders notice.
//
// Other reasons concern no address (PREINIT, CARRIER, FAIL ...), or addresses that go (NAK, EXPIRE ...).
func (e *event) dhcpcd() {
	e.settings.routes = uplink.CopyRoutes
	if !e.link(e.get("interface")) {
		return
	}
	switch e.get("reason") {
	case "BOUND", "RENEW", "REBIND", "REBOOT", "INFORM", "STATIC", "TIMEOUT":
		e.lease4(e.lease("dhcpcd"), names4{"new_ip_address", "new_subnet_mask", "new_routers", "ifmetric", "new_domain_name_servers"},
			func(l *Lease, own netip.Prefix) {
				e.pairs(l, own, "new_classless_static_routes", "new_ms_classless_static_routes")
			})
	case "BOUND6", "RENEW6", "REBIND6", "REBOOT6", "INFORM6", "DELEGATED6":
		l := e.lease("dhcpcd")
		e.nameservers(&l, false, e.words("new_dhcp6_name_servers"))
		prefix, delegated := e.dhcpcdPrefix("new")
		if delegated {
			e.call(Delegate{Ifname: e.ifname, Prefix: prefix})
		}
		e.dhcpcd6(l, "new_dhcp6_ia_na%d_ia_addr%d")
		if delegated { // addresses of router advertisements use the prefix, too
			e.call(HoldDynamic{Lease: l, Wait: true})
		}
	case "ROUTERADVERT":
		l := e.lease("dhcpcd")
		e.nameservers(&l, false, e.words("new_rdnss"))
		e.dhcpcd6(l, "nd%d_addr%d")
	case "EXPIRE6", "RELEASE6", "STOP6":
		if _, ok := e.dhcpcdPrefix("old"); ok {
			e.call(Undelegate{Ifname: e.ifname})
			e.call(HoldDynamic{Lease: e.lease("dhcpcd")})
		}
	}
}

// pairs reads option 121, or 249 where there is none, as dhcpcd and udhcpc write it, from the first variable that has
// a value: "10.9.0.0/16 192.0.2.254 0.0.0.0/0 192.0.2.1".
func (e *event) pairs(l *Lease, own netip.Prefix, names ...string) {
	name := names[0]
	if e.get(name) == "" {
		name = names[len(names)-1]
	}
	if e.get(name) == "" {
		return
	}
	words := strings.Fields(e.get(name))
	var routes []uplink.StaticRoute
	for ; len(words) >= 2; words = words[2:] {
		dst, err := netip.ParsePrefix(words[0])
		via, viaErr := netip.ParseAddr(words[1])
		if err != nil || viaErr != nil {
			break
		}
		if none(via) {
			via = netip.Addr{}
		}
		routes = append(routes, uplink.StaticRoute{Dst: dst.Masked(), Via: via})
	}
	if len(words) > 0 {
		e.leaveOut("the end of "+name, strings.Join(words, " "), "these are no networks and routers")
	}
	e.classlessRoutes(l, own, name, routes, len(words) > 0)
}

// dhcpcd6 holds the addresses in variables that are numbered twice, by router or association and by address.
func (e *event) dhcpcd6(l Lease, format string) {
	for i := 1; i <= maxGateways; i++ {
		for j := 1; j <= maxAddresses; j++ {
			v := variable{name: fmt.Sprintf(format, i, j)}
			if v.value = e.get(v.name); v.value == "" {
				break
			}
			if len(e.calls) > maxAddresses {
				e.leaveOut(v.name, v.value, fmt.Sprintf("there are more than %d", maxAddresses))
				return
			}
			if addr, ok := e.parseOwn(v); ok && addr.Is6() {
				l.Addr = addr
				e.call(Hold{Lease: l, Delegated: true})
			}
		}
	}
}

// dhcpcdPrefix returns the first delegated prefix of the event, and whether there is one.
func (e *event) dhcpcdPrefix(when string) (netip.Prefix, bool) {
	name := when + "_dhcp6_ia_pd1_prefix1"
	text := e.get(name)
	if text == "" {
		return netip.Prefix{}, false
	}
	return e.parseDelegated(variable{name, text + "/" + e.get(name+"_length")})
}
