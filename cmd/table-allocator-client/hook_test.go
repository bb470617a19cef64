package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/hook"
)

// FuzzHookArguments: whatever a network tells, the command line of a hook's call is one. The
// variables are lines.
func FuzzHookArguments(f *testing.F) {
	f.Add("dhclient", "interface=wan0\nreason=BOUND\nnew_ip_address=192.0.2.7\nnew_subnet_mask=255.255.255.0\nnew_routers=192.0.2.1 192.0.2.2\n"+
		"IF_METRIC=5\nnew_domain_name_servers=192.0.2.53\nnew_rfc3442_classless_static_routes=16 10 99 192 168 1 254 0 192 168 1 1")
	f.Add("dhclient", "interface=wan0\nreason=RENEW\nnew_ip_address=10.0.0.1\nnew_subnet_mask=255.255.255.255\nnew_routers=127.0.0.1 0.0.0.0\nold_ip_address=10.0.0.2")
	f.Add("dhclient", "interface=-i\nreason=BOUND6\nnew_ip6_address=2001:db8::7\nnew_ip6_prefixlen=64\nnew_dhcp6_name_servers=fe80::1%-i 2001:db8::1 ::ffff:1.2.3.4")
	f.Add("networkmanager", "IP4_NUM_ADDRESSES=1\nIP4_ADDRESS_0=192.0.2.7/24 192.0.2.1\nIP4_NUM_ROUTES=2\nIP4_ROUTE_0=10.0.0.0/8 192.0.2.1 7\nIP4_ROUTE_1=0.0.0.0/0 0.0.0.0\nIP4_GATEWAY=192.0.2.1")
	f.Add("ifupdown", "IFACE=a,\"b*\nMODE=start\nADDRFAM=inet6\nMETHOD=auto")
	f.Fuzz(func(t *testing.T, program, env string) {
		calls, _, err := hook.Calls(program, []string{"wan0", "up"}, hook.ParseEnvironment(slices.DeleteFunc(strings.Split(env, "\n"), ofAdministrator)))
		if err != nil {
			return
		}
		for _, call := range calls {
			switch c := call.(type) {
			case hook.Hold:
				if c.Bits == 0 {
					continue // the host knows the address, or not
				}
				h, err := parseHold(c.Args())
				if err != nil {
					t.Errorf("%s: %v", c, err)
				} else if u := h.config.Uplink; u.Key.Ifname != c.Ifname || u.Key.Address != c.Addr.String() || u.Network.Bits() != c.Bits ||
					len(u.Settings.Static) != len(c.Static) || !slices.Equal(u.Settings.Gateways, c.Gateways) || !slices.Equal(u.Settings.Nameservers, c.Nameservers) {
					t.Errorf("%s is read as %+v", c, u)
				}
			case hook.StartWatch:
				if w, err := parseWatch(c.Args); err != nil || len(w.ifnames) != 1 {
					t.Errorf("%s: %v", c, err)
				}
			}
		}
	})
}

// ofAdministrator reports whether a variable is a setting, which may be wrong.
func ofAdministrator(variable string) bool {
	return slices.ContainsFunc([]string{"ROUTES=", "CLIENT_OPTIONS=", "DNSMASQ_SERVERS="}, func(name string) bool { return strings.HasPrefix(variable, name) })
}
