package hook

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/table-allocator/table-allocator/internal/uplink"
)

// ifupdown reads the variables of interfaces(5). ifup runs its scripts when the link is up, has its
// static addresses, and main has the routes of "up ip route add" lines. IPv6 addresses from routers come
// later, go, and others follow: a watch for the link serves them. ifdown runs its scripts when the
// addresses are gone and their holders end; the hook is for leftovers of holders that were killed.
//
// The hook of dhclient serves the method dhcp. ifupdown2 sets ADDRFAM to several families or to none, and tells one address;
// ifupdown-ng sets METHOD to none and IF_ADDRESSES.
func (e *event) ifupdown() {
	stanza := e.get("IFACE")
	families := strings.FieldsFunc(e.get("ADDRFAM"), func(r rune) bool { return r == ',' || r == ' ' })
	method, mode := e.get("METHOD"), e.get("MODE")
	has := func(family string) bool { return len(families) == 0 || slices.Contains(families, family) }
	if method == "NetworkManager" { // a dispatcher script of NetworkManager runs the scripts of ifupdown
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
			if len(families) != 1 && method != "none" {
				e.rest()
			}
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

// stanza holds the addresses of a stanza.
func (e *event) stanza(label string, families []string, method string, has func(string) bool) {
	for i, v := range e.words("IF_ADDRESS", "IF_ADDRESSES") {
		addr, ok := e.parseOwn(v)
		if !ok || !has(map[bool]string{true: "inet", false: "inet6"}[addr.Is4()]) {
			continue
		}
		if i >= maxAddresses {
			e.cut(v.name, maxAddresses)
			return
		}
		h := Hold{Lease: e.lease("ifupdown")}
		l := &h.Lease
		l.Addr = addr
		own := netip.PrefixFrom(addr, addr.BitLen()) // a gateway may be outside of the network
		if far := e.get("IF_POINTOPOINT"); far != "" {
			e.farEnd(l, own, variable{"IF_POINTOPOINT", far})
		}
		gateways := e.words("IF_GATEWAY", "IF_GATEWAYS")
		l.Gateways = e.gateways(own, gateways)
		l.Metric = e.metric("IF_METRIC", maxGateways)
		e.nameservers(l, addr.Is4(), e.words("IF_DNS_NAMESERVERS", "IF_DNS_NAMESERVER"))
		// Only one of several stanzas has the gateway, and the holder of its address moves it out of main.
		if len(gateways) == 0 && len(families) == 1 && method != "" && method != "none" && l.Routes != uplink.NoRoutes {
			h.GatewayOf = label
		}
		l.placed()
		e.call(h)
	}
}

// rest holds the addresses that ifupdown2 says nothing of: of several in a stanza it tells the first one.
func (e *event) rest() {
	h := HoldStatic{Lease: e.lease("ifupdown")}
	for _, c := range e.calls {
		if hold, ok := c.(Hold); ok {
			h.But = append(h.But, hold.Addr)
		}
	}
	if len(h.But) > 0 { // else the stanza has no address, and those of the link are of others
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

// watch returns the arguments of a watch for all IPv6 addresses of the link.
func (e *event) watch() []string {
	args := []string{"watch", "-6", "--ifname", escape(e.ifname), "--exclude=", "--routes", string(e.settings.routes),
		"-t", "ifupdown", "--clean", "--syslog"}
	return append(args, e.settings.options...)
}

// escape returns the pattern, as an element of a list, that only the name matches.
func escape(name string) string {
	pattern := strings.NewReplacer(`\`, `\\`, "*", `\*`, "?", `\?`, "[", `\[`).Replace(name)
	if strings.ContainsAny(pattern, `,"`) {
		pattern = `"` + strings.ReplaceAll(pattern, `"`, `""`) + `"`
	}
	return pattern
}
