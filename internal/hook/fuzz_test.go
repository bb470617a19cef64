package hook

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/uplink"
)

// FuzzCalls: whatever a network tells, each call is one that the client takes, and with an address
// that can be served there is one. The variables are lines, the first of them has the arguments.
func FuzzCalls(f *testing.F) {
	for _, seed := range []struct{ program, args, env string }{
		{"dhclient", "", "interface=wan0\nreason=BOUND\nnew_ip_address=192.0.2.7\nnew_subnet_mask=255.255.255.0\nnew_routers=192.0.2.1 192.0.2.2\n" +
			"IF_METRIC=5\nnew_domain_name_servers=192.0.2.53\nold_ip_address=192.0.2.6\nnew_rfc3442_classless_static_routes=16 10 99 192 168 1 254 0 192 168 1 1"},
		{"dhclient", "", "interface=wan0\nreason=RENEW\nnew_ip_address=10.0.0.1\nnew_subnet_mask=128.0.0.0\nnew_routers=127.0.0.1\nnew_ms_classless_static_routes=33 1"},
		{"dhclient", "", "interface=wan0\nreason=STOP\nold_ip_address=192.0.2.6"},
		{"dhclient", "", "interface=wan0\nreason=BOUND6\nnew_ip6_address=2001:db8::7\nnew_ip6_prefixlen=64\nnew_max_life=7\nnew_dhcp6_name_servers=fe80::1%wan0 2001:db8::1"},
		{"dhclient", "", "interface=wan0\nreason=REBIND6\nnew_ip6_prefix=2001:db8::/56"},
		{"dhclient", "", "interface=wan0\nreason=EXPIRE6\nold_ip6_prefix=2001:db8::/56\nold_dhcp6_name_servers=::1"},
		{"dhcpcd", "", "interface=wan0\nreason=BOUND\nnew_ip_address=192.0.2.7\nnew_subnet_mask=255.255.255.0\nnew_routers=192.0.2.1\nifmetric=1002\n" +
			"new_classless_static_routes=10.9.0.0/16 192.0.2.254 0.0.0.0/0 192.0.2.1\nnew_domain_name_servers=192.0.2.53"},
		{"dhcpcd", "", "interface=wan0\nreason=ROUTERADVERT\nnd1_addr1=2001:db8::7\nnd1_addr2=2001:db8:1::7\nnew_rdnss=fe80::1%wan0"},
		{"dhcpcd", "", "interface=wan0\nreason=BOUND6\nnew_dhcp6_ia_na1_ia_addr1=2001:db8::7\nnew_dhcp6_ia_pd1_prefix1=2001:db8:1::\nnew_dhcp6_ia_pd1_prefix1_length=56"},
		{"dhcpcd", "", "interface=wan0\nreason=STOP6\nold_dhcp6_ia_pd1_prefix1=2001:db8:1::\nold_dhcp6_ia_pd1_prefix1_length=56"},
		{"ifupdown", "", "IFACE=wan0:1\nMODE=start\nADDRFAM=inet\nMETHOD=static\nIF_ADDRESS=192.0.2.7/24\nIF_POINTOPOINT=192.0.2.1\nIF_METRIC=4294967295\nIF_GATEWAY=192.0.2.1"},
		{"ifupdown", "", "IFACE=wan0\nMODE=start\nADDRFAM=inet,inet6\nMETHOD=\nIF_ADDRESSES=192.0.2.7/24 2001:db8::7/64\nIF_GATEWAYS=fe80::1\nIF_AUTOCONF=1"},
		{"ifupdown", "", "IFACE=wan0\nMODE=stop\nADDRFAM=inet6\nMETHOD=auto"},
		{"ifupdown", "", "IFACE=wan0\nMODE=start\nADDRFAM=inet\nMETHOD=NetworkManager\nIP4_NUM_ADDRESSES=1\nIP4_ADDRESS_0=192.0.2.7/24 192.0.2.1"},
		{"networkmanager", "wan0 up", "IP4_NUM_ADDRESSES=1\nIP4_ADDRESS_0=192.0.2.7/24 192.0.2.1\nIP4_NUM_ROUTES=2\nIP4_ROUTE_0=10.0.0.0/8 192.0.2.1 7\nIP4_GATEWAY=0.0.0.0\nDHCP4_ROUTERS=192.0.2.1"},
		{"networkmanager", "wan0 reapply", "IP4_GATEWAY=192.0.2.1\nIP4_NAMESERVERS=192.0.2.53"},
		{"networkmanager", "tun0 vpn-up", "VPN_IP4_NUM_ADDRESSES=1\nVPN_IP4_ADDRESS_0=192.0.2.7/24 192.0.2.1"},
		{"pppd", "", "IFNAME=ppp0\nIPLOCAL=10.64.64.64\nUSEPEERDNS=1\nDNS1=192.0.2.53\nDNS2=::1"},
		{"udev", "", "INTERFACE=wan0\nLEAVE_ALONE=[ wan*"},
	} {
		f.Add(seed.program, seed.args, seed.env)
	}
	f.Fuzz(func(t *testing.T, program, args, text string) {
		env := ParseEnvironment(strings.Split(text, "\n"))
		calls, warnings, err := Calls(program, strings.Split(args, " "), env)
		if err != nil {
			return
		}
		if len(calls) > 2*maxAddresses+2 || len(warnings) > maxWarnings+1 {
			t.Errorf("%d calls, %d warnings", len(calls), len(warnings))
		}
		for _, c := range calls {
			checkCall(t, c)
		}
		checkServed(t, program, env, calls)
	})
}

func checkCall(t *testing.T, c Call) {
	t.Helper()
	ifname := ""
	switch c := c.(type) {
	case Hold:
		ifname = c.Ifname
		checkOwn(t, c.Addr)
		checkLease(t, c.Lease, c.Addr.Is4())
	case HoldPresent:
		ifname = c.Ifname
		checkLease(t, c.Lease, true)
	case HoldStatic:
		ifname = c.Ifname
		checkLease(t, c.Lease, true)
	case HoldDynamic:
		ifname = c.Ifname
		checkLease(t, c.Lease, false)
	case Release:
		ifname = c.Ifname
		checkOwn(t, c.Addr)
	case Lose:
		ifname = c.Ifname
		checkOwn(t, c.Addr)
	case Delegate:
		ifname = c.Ifname
		if !c.Prefix.IsValid() || c.Prefix != c.Prefix.Masked() || c.Prefix.Bits() < largest6 || c.Prefix.IsSingleIP() {
			t.Errorf("prefix %s", c.Prefix)
		}
	case Undelegate:
		ifname = c.Ifname
	case StartWatch:
		ifname = c.Ifname
	case EndWatch:
		ifname = c.Ifname
	case EndDhclient:
		ifname = c.Ifname
	case ReleaseAll:
		ifname = c.Ifname
	}
	if !isLinkName(ifname) {
		t.Errorf("%s: link %q", c, ifname)
	}
}

func checkOwn(t *testing.T, a netip.Addr) {
	t.Helper()
	if !a.IsValid() || a.Zone() != "" || a.Is4In6() || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || a.Is6() && a.IsLinkLocalUnicast() {
		t.Errorf("address %s", a)
	}
}

func checkLease(t *testing.T, l Lease, family4 bool) {
	t.Helper()
	s := uplink.Settings{Routes: l.Routes, OnLoss: uplink.Fallback, Gateways: l.Gateways, Metric: l.Metric, Static: l.Static, Nameservers: l.Nameservers}
	if s.Routes != uplink.NoRoutes {
		s.Routes = uplink.MoveRoutes // the administrator may say anything
	}
	if err := s.Validate(); err != nil {
		t.Errorf("%s: %v", l, err)
	}
	for _, a := range slices.Concat(l.Gateways, l.Nameservers) {
		if a.Is4() != family4 || a.Zone() != "" || a.Is4In6() {
			t.Errorf("%s: address %s", l, a)
		}
	}
	for _, r := range l.Static {
		if again, err := uplink.ParseRoute(strings.TrimSuffix(r.Dst.String()+","+r.Via.String(), ",invalid IP"), family4); err != nil || again != r {
			t.Errorf("%s: route %v is read as %v, %v", l, r, again, err)
		}
	}
	if text, err := s.Encode(); err != nil || len(text) > 32<<10 {
		t.Errorf("settings of %d bytes, %v", len(text), err)
	}
}

// checkServed: an address that can be served is, however odd the rest of what is told.
func checkServed(t *testing.T, program string, env Environment, calls []Call) {
	t.Helper()
	if program != "dhclient" || env["LEAVE_ALONE"] != "" || !isLinkName(env["interface"]) || env["interface"] == "lo" {
		return
	}
	text := ""
	switch env["reason"] {
	case "BOUND", "RENEW", "REBIND", "REBOOT", "TIMEOUT":
		text = env["new_ip_address"]
	case "BOUND6", "RENEW6", "REBIND6":
		if env["new_max_life"] != "0" {
			text = env["new_ip6_address"]
		}
	}
	want, err := netip.ParseAddr(text)
	if err != nil || want.Zone() != "" || want.Is4In6() || !isUnicast(want) || want.Is6() && want.IsLinkLocalUnicast() ||
		want.Is6() != strings.HasSuffix(env["reason"], "6") {
		return
	}
	if !slices.ContainsFunc(calls, func(c Call) bool { h, ok := c.(Hold); return ok && h.Addr == want }) {
		t.Errorf("%s is not served: %v", want, calls)
	}
}
