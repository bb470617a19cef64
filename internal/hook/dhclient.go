package hook

import (
	"net/netip"
	"strings"

	"github.com/table-allocator/table-allocator/internal/uplink"
)

// dhclient reads the variables of dhclient-script(8). The hook runs before dhclient-script adds the
// address, so that the rules stand when the first packet leaves. The holder waits for the address, and
// for the default route that dhclient-script adds then.
//
// Reasons without a case concern no address (PREINIT, MEDIUM, NBI ...). FAIL names none either: if an
// earlier dhclient left an address on the link, the holder ends when the address's lifetime does.
// PREINIT6 deletes old addresses of the link, and their holders notice. DEPREF6 changes nothing, since
// an address is served until EXPIRE6.
func (e *event) dhclient() {
	if !e.link(e.get("interface")) {
		return
	}
	switch reason := e.get("reason"); reason {
	case "BOUND", "RENEW", "REBIND", "REBOOT", "TIMEOUT":
		e.bound4()
	case "EXPIRE", "RELEASE", "STOP":
		e.lose("old_ip_address")
	case "BOUND6", "RENEW6", "REBIND6":
		e.bound6()
	case "EXPIRE6", "RELEASE6", "STOP6":
		if e.get("old_ip6_address") != "" {
			e.lose("old_ip6_address")
		} else if e.get("old_ip6_prefix") != "" {
			e.call(Undelegate{Ifname: e.ifname})
			again := HoldDynamic{Lease: e.lease("dhclient")}
			if reason == "EXPIRE6" { // RELEASE6 and STOP6 end the use of the name servers, too
				e.nameservers(&again.Lease, false, e.words("old_dhcp6_name_servers"))
			}
			e.call(again)
		}
	}
}

// lose is for an address that dhclient-script is about to delete.
func (e *event) lose(name string) {
	if text := e.get(name); text != "" {
		if addr, ok := e.parseOwn(variable{name, text}); ok {
			e.call(Lose{e.release(addr)})
		}
	}
}

func (e *event) bound4() {
	if e.get("old_ip_address") != e.get("new_ip_address") {
		e.lose("old_ip_address")
	}
	e.lease4(e.lease("dhclient"), names4{"new_ip_address", "new_subnet_mask", "new_routers", "IF_METRIC", "new_domain_name_servers"}, e.classless)
}

// names4 are the variables of a DHCP lease.
type names4 struct{ address, netmask, routers, metric, servers string }

// lease4 holds the address of a DHCP lease. classless adds the routes of option 121 or 249, which the DHCP clients write
// differently.
func (e *event) lease4(l Lease, names names4, classless func(l *Lease, own netip.Prefix)) {
	addr, ok := e.parseOwn(variable{names.address, e.get(names.address)})
	if !ok || !addr.Is4() {
		return
	}
	l.Addr, l.Bits = addr, e.netmask(names.netmask)
	own := netip.PrefixFrom(addr, l.Bits)
	l.Gateways = e.gateways(own, e.words(names.routers))
	l.Metric = e.metric(names.metric, len(l.Gateways))
	if l.Metric == 0 && len(strings.Fields(e.get(names.routers))) > 1 {
		l.Metric = 1 // as dhclient-script does
	}
	classless(&l, own)
	e.nameservers(&l, true, e.words(names.servers))
	l.placed()
	e.call(Hold{Lease: l})
}

// classless reads option 121, or 249 of Microsoft's servers. RFC 3442: with it, the router option is
// ignored. If the option is damaged and has no default that can be used, the routers count.
func (e *event) classless(l *Lease, own netip.Prefix) {
	name := "new_rfc3442_classless_static_routes"
	text := e.get(name)
	if text == "" {
		name = "new_ms_classless_static_routes"
		text = e.get(name)
	}
	routes, err := uplink.ParseClasslessRoutes(text)
	if err != nil {
		e.leaveOut("the end of "+name, text, err.Error())
	}
	e.classlessRoutes(l, own, name, routes, err != nil)
}

// classlessRoutes adds the routes of an option to a lease. damaged says that these are not all of its routes.
func (e *event) classlessRoutes(l *Lease, own netip.Prefix, name string, routes []uplink.StaticRoute, damaged bool) {
	e.static(l, own, name, routes)
	hasDefault := false
	for _, r := range l.Static {
		hasDefault = hasDefault || r.Dst.Bits() == 0
	}
	damaged = damaged || len(l.Static) < len(routes)
	if hasDefault || len(routes) > 0 && !damaged {
		l.Gateways = nil
	}
}

// bound6 is for one address or one prefix; old and new ones may be in use at the same time. The holder
// finds the routes of router advertisements in main. With a lifetime of 0 the server ends a lease, and
// EXPIRE6 follows.
func (e *event) bound6() {
	if e.get("new_max_life") == "0" {
		return
	}
	l := e.lease("dhclient")
	e.nameservers(&l, false, e.words("new_dhcp6_name_servers"))
	if text := e.get("new_ip6_address"); text != "" {
		addr, ok := e.parseOwn(variable{"new_ip6_address", text})
		if ok && addr.Is6() {
			l.Addr, l.Bits = addr, e.prefixLength("new_ip6_prefixlen")
			e.call(Hold{Lease: l, Delegated: true})
		}
		return
	}
	// This is a prefix, or, with dhclient -S, name servers alone.
	if prefix, ok := e.delegated("new_ip6_prefix"); ok {
		e.call(Delegate{Ifname: e.ifname, Prefix: prefix})
	}
	e.call(HoldDynamic{Lease: l, Wait: true})
}
