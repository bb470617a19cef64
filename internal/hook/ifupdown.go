package hook

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/table-allocator/table-allocator/internal/uplink"
)

// ifupdown reads the variables of interfaces(5). ifup runs its scripts when a link is up: a static
// address is there by then, and so are the routes of "up ip route add" lines, which the holder finds
// in main. IPv6 addresses that routers give come later, go, and are followed by others: a watch for
// the link serves them. ifdown runs them when the addresses are gone. All that they held goes with
// them, but for what a holder that was killed has left.
//
// What the method dhcp brings is left to the hook of dhclient. ifupdown2 says several families, or
// none; ifupdown-ng the method none, and several addresses.
func (e *event) ifupdown() {
	stanza := e.get("IFACE")
	families := strings.FieldsFunc(e.get("ADDRFAM"), func(r rune) bool { return r == ',' || r == ' ' })
	method, mode := e.get("METHOD"), e.get("MODE")
	has := func(family string) bool { return len(families) == 0 || slices.Contains(families, family) }
	if method == "NetworkManager" { // its dispatcher script for ifupdown
		if mode == "start" && has("inet") {
			action := e.get("NM_DISPATCHER_ACTION")
			if action == "" {
				action = "up"
			}
			e.networkManager(stanza, action)
		}
		return
	}
	ifname, _, _ := strings.Cut(stanza, ":") // wan0:1 is a label of wan0
	if !e.link(ifname) {
		return
	}
	named := slices.Contains([]string{"static", "tunnel", "v4tunnel", "none", ""}, method)
	autoconf := e.get("IF_AUTOCONF")
	watched := len(families) > 0 && has("inet6") &&
		(method == "auto" || method == "dhcp" || method == "static" && autoconf != "" && autoconf != "0")
	switch mode {
	case "start":
		if named {
			e.stanza(stanza, families, method, has)
		}
		if watched {
			e.call(StartWatch{Ifname: ifname, Args: e.watch()})
		}
	case "stop":
		if !named && !(len(families) > 0 && has("inet6")) {
			return
		}
		for _, v := range e.words("IF_ADDRESS", "IF_ADDRESSES") {
			if addr, ok := e.parseOwn(v); ok {
				e.call(e.release(addr))
			}
		}
		e.call(EndWatch{Ifname: ifname, Args: e.watch()})
	}
}

// stanza holds the addresses that it names.
func (e *event) stanza(label string, families []string, method string, has func(string) bool) {
	for i, v := range e.words("IF_ADDRESS", "IF_ADDRESSES") {
		addr, ok := e.parseOwn(v)
		if !ok || !has(map[bool]string{true: "inet", false: "inet6"}[addr.Is4()]) {
			continue
		}
		if i >= maxAddresses {
			e.leaveOut(v.name, v.value, fmt.Sprintf("there are more than %d", maxAddresses))
			return
		}
		h := Hold{Lease: e.lease("ifupdown")}
		l := &h.Lease
		l.Addr = addr
		own := netip.PrefixFrom(addr, addr.BitLen()) // a far end is reached whatever the netmask says
		if far := e.get("IF_POINTOPOINT"); far != "" {
			e.farEnd(l, own, variable{"IF_POINTOPOINT", far})
		}
		gateways := e.words("IF_GATEWAY", "IF_GATEWAYS")
		l.Gateways = e.gateways(own, gateways)
		l.Metric = e.metric("IF_METRIC", maxGateways)
		e.nameservers(l, addr.Is4(), e.words("IF_DNS_NAMESERVERS", "IF_DNS_NAMESERVER"))
		// Of several stanzas one has the gateway, and its holder takes that out of main.
		if len(gateways) == 0 && len(families) == 1 && method != "" && method != "none" && l.Routes != uplink.NoRoutes {
			h.GatewayOf = label
		}
		l.placed()
		e.call(h)
	}
}

func (e *event) farEnd(l *Lease, own netip.Prefix, v variable) {
	text, _, _ := strings.Cut(v.value, "/")
	if far, ok := e.parse(variable{v.name, text}); ok {
		far = far.WithZone("")
		e.static(l, own, v.name, []uplink.StaticRoute{{Dst: netip.PrefixFrom(far, far.BitLen())}})
	}
}

// watch are the arguments that make the client a watch for the IPv6 addresses of the link, whatever
// brings them. It takes back what it has at the end.
func (e *event) watch() []string {
	args := []string{"watch", "-6", "--ifname", escape(e.ifname), "--exclude=", "--routes", string(e.settings.routes),
		"-t", "ifupdown", "--clean", "--syslog"}
	return append(args, e.settings.options...)
}

// escape is the pattern that only the name matches, as an element of a list.
func escape(name string) string {
	pattern := strings.NewReplacer(`\`, `\\`, "*", `\*`, "?", `\?`, "[", `\[`).Replace(name)
	if strings.ContainsAny(pattern, `,"`) {
		pattern = `"` + strings.ReplaceAll(pattern, `"`, `""`) + `"`
	}
	return pattern
}
