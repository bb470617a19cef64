package hook

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/table-allocator/table-allocator/internal/uplink"
)

// behindMain is the metric of the gateways in the environment. NetworkManager runs no script when a
// renewal changes a gateway in main; the holder follows main, whose metrics are lower and so count first.
const behindMain = 30000

// networkManager reads the variables of NetworkManager-dispatcher(8). The scripts of ifupdown see them,
// too, if a dispatcher script runs them. Routes are copied, since NetworkManager restores those in main.
func (e *event) networkManager(ifname, action string) {
	e.settings.routes = uplink.CopyRoutes
	prefix := "IP4_"
	switch action {
	case "up", "dhcp4-change", "reapply":
		if name := e.get("DEVICE_IP_IFACE"); name != "" {
			ifname = name // a modem's argument is its serial port
		}
	case "vpn-up":
		prefix = "VPN_IP4_"
		if name := e.get("VPN_IP_IFACE"); name != "" {
			ifname = name
		}
	default: // with down the addresses go, and their holders notice
		return
	}
	if !e.link(ifname) {
		return
	}
	if action == "reapply" {
		// The environment of this event has the old addresses and routes. The kernel has the new ones, or will in a moment.
		l := e.nmLease(netip.PrefixFrom(netip.IPv4Unspecified(), 0), prefix)
		e.call(HoldPresent{Lease: l})
		return
	}
	for _, v := range e.numbered(prefix+"ADDRESS", prefix+"NUM_ADDRESSES", maxAddresses) { // ADDRESS/LENGTH GATEWAY
		text, _, _ := strings.Cut(v.value, " ")
		own, err := netip.ParsePrefix(text)
		if err != nil || !own.Addr().Is4() || own.Bits() == 0 {
			e.leaveOut(v.name, v.value, "this is no address with its prefix length")
			continue
		}
		if addr, ok := e.parseOwn(variable{v.name, text}); ok {
			l := e.nmLease(own, prefix)
			l.Addr, l.Bits = addr, own.Bits()
			for _, r := range e.numbered(prefix+"ROUTE", prefix+"NUM_ROUTES", maxRoutes) {
				e.nmRoute(&l, own, r)
			}
			e.call(Hold{Lease: l})
		}
	}
}

// nmLease returns the options for an address of the link, own.
func (e *event) nmLease(own netip.Prefix, prefix string) Lease {
	l := e.lease("NetworkManager")
	l.Metric = behindMain
	gateways := e.words(prefix + "GATEWAY")
	// With never-default main gets no gateway, but the table of the address may have one.
	if gateway := e.get("IP4_GATEWAY"); prefix == "IP4_" && e.get("DHCP4_RFC3442_CLASSLESS_STATIC_ROUTES") == "" &&
		(gateway == "" || gateway == "0.0.0.0") {
		gateways = e.words("DHCP4_ROUTERS")
	}
	l.Gateways = e.gateways(own, gateways)
	e.nameservers(&l, true, e.words(prefix+"NAMESERVERS"))
	return l
}

// nmRoute parses "NETWORK/LENGTH GATEWAY METRIC"; the gateway 0.0.0.0 means none.
func (e *event) nmRoute(l *Lease, own netip.Prefix, v variable) {
	fields := append(strings.Fields(v.value), "", "")
	dst, err := netip.ParsePrefix(fields[0])
	r := uplink.StaticRoute{Dst: dst.Masked()}
	if via := fields[1]; err == nil && via != "" && via != "0.0.0.0" {
		r.Via, err = netip.ParseAddr(via)
	}
	if err != nil {
		e.leaveOut(v.name, v.value, "this is no route")
		return
	}
	e.static(l, own, v.name, []uplink.StaticRoute{r})
}

// numbered returns the values of name_0, name_1 and so on, as many as the variable count says.
func (e *event) numbered(name, count string, most int) (values []variable) {
	text := e.get(count)
	if text == "" {
		return nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 {
		e.leaveOut(count, text, "this is no number")
		return nil
	}
	if n > most {
		e.cut(count, most)
		n = most
	}
	for i := range n {
		name := fmt.Sprintf("%s_%d", name, i)
		if value := e.get(name); value != "" {
			values = append(values, variable{name, value})
		}
	}
	return values
}
