package hook

import (
	"net/netip"
	"strings"

	"github.com/table-allocator/table-allocator/internal/uplink"
)

// dhclient reads the variables of dhclient-script(8). The table and its rules are asked for before
// dhclient-script sets the address, so they stand when the first packet leaves; the holder waits
// for the address, and for the default route that dhclient-script then adds.
//
// Reasons without a case concern no address (PREINIT, MEDIUM, NBI ...). FAIL neither: dhclient has
// no lease and names none. An address that an earlier dhclient left on the link has a lifetime, and
// what it holds here goes when that ends. PREINIT6 takes addresses from the link that were there
// before, and their holders see them go; DEPREF6 changes nothing, for an address serves until
// EXPIRE6.
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
			if reason == "EXPIRE6" { // else the name servers are taken back, too
				e.nameservers(&again.Lease, false, e.words("old_dhcp6_name_servers"))
			}
			e.call(again)
		}
	}
}

// lose ends what an address holds that dhclient-script is about to take from the link.
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
	addr, ok := e.parseOwn(variable{"new_ip_address", e.get("new_ip_address")})
	if !ok || !addr.Is4() {
		return
	}
	l := e.lease("dhclient")
	l.Addr, l.Bits = addr, e.netmask("new_subnet_mask")
	own := netip.PrefixFrom(addr, l.Bits)
	l.Gateways = e.gateways(own, e.words("new_routers"))
	l.Metric = e.metric("IF_METRIC", len(l.Gateways))
	if l.Metric == 0 && len(strings.Fields(e.get("new_routers"))) > 1 {
		l.Metric = 1 // as dhclient-script does
	}
	e.classless(&l, own)
	e.nameservers(&l, true, e.words("new_domain_name_servers"))
	l.placed()
	e.call(Hold{Lease: l})
}

// classless reads option 121, or 249 from Microsoft's servers. With it the router option is ignored
// (RFC 3442), unless no default is left of an option that is damaged.
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
	told := len(routes)
	e.static(l, own, name, routes)
	hasDefault := false
	for _, r := range l.Static {
		hasDefault = hasDefault || r.Dst.Bits() == 0
	}
	damaged := err != nil || len(l.Static) < told
	if hasDefault || told > 0 && !damaged {
		l.Gateways = nil
	}
}

// bound6 is a call for one address or one prefix: old and new ones stand side by side. Routes are
// those of router advertisements, which the holder finds in main. A lifetime of 0 says that the
// server takes something back; EXPIRE6 follows.
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
	// A prefix, or with dhclient -S name servers alone.
	if prefix, ok := e.delegated("new_ip6_prefix"); ok {
		e.call(Delegate{Ifname: e.ifname, Prefix: prefix})
	}
	e.call(HoldDynamic{Lease: l, Wait: true})
}
