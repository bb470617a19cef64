package hook

import (
	"strings"
	"testing"
)

func TestDhclient(t *testing.T) {
	const (
		base  = "DNSMASQ_SERVERS=\ninterface=wan0\n"
		bound = base + "new_ip_address=192.0.2.7\nnew_subnet_mask=255.255.255.0\nnew_routers=192.0.2.1\n"
		hold  = "hold -4 -a 192.0.2.7 -i wan0 --routes move -n 24 -t dhclient --gateway 192.0.2.1"
		lose  = "lose -4 -r -a 192.0.2.6 -i wan0\n"
	)
	var tests []told
	for _, reason := range []string{"BOUND", "RENEW", "REBIND", "REBOOT", "TIMEOUT"} {
		tests = append(tests,
			told{reason, "", bound + "reason=" + reason, hold},
			told{reason + ", same address", "", bound + "reason=" + reason + "\nold_ip_address=192.0.2.7", hold},
			told{reason + ", another address", "", bound + "reason=" + reason + "\nold_ip_address=192.0.2.6", lose + hold})
	}
	for _, reason := range []string{"EXPIRE", "RELEASE", "STOP"} {
		tests = append(tests,
			told{reason, "", base + "reason=" + reason + "\nold_ip_address=192.0.2.6", lose},
			told{reason + " without an address", "", base + "reason=" + reason, ""})
	}
	for _, reason := range []string{"", "PREINIT", "MEDIUM", "ARPCHECK", "ARPSEND", "NBI", "FAIL", "V6ONLY", "bound", "BOUND 6"} {
		tests = append(tests, told{"nothing for " + reason, "", bound + "old_ip_address=192.0.2.6\nreason=" + reason, ""})
	}
	testCalls(t, "dhclient", append(tests,
		told{"no link", "", "reason=BOUND\nnew_ip_address=192.0.2.7", ""},
		told{"the loopback", "", "interface=lo\nreason=BOUND\nnew_ip_address=192.0.2.7", ""},
		told{"no netmask", "", base + "reason=BOUND\nnew_ip_address=192.0.2.7", "hold -4 -a 192.0.2.7 -i wan0 --routes move -n 32 -t dhclient"},
		told{"metric of ifupdown", "", bound + "reason=BOUND\nIF_METRIC=50", "hold -4 -a 192.0.2.7 -i wan0 --routes move -n 24 -t dhclient --metric 50 --gateway 192.0.2.1"},
		told{"far router", "", base + "reason=BOUND\nnew_ip_address=192.0.2.7\nnew_subnet_mask=255.255.255.255\nnew_routers=203.0.113.1",
			"hold -4 -a 192.0.2.7 -i wan0 --routes move -n 32 -t dhclient --gateway 203.0.113.1"},
		told{"router none", "", base + "reason=BOUND\nnew_ip_address=192.0.2.7\nnew_subnet_mask=255.255.255.0\nnew_routers=0.0.0.0",
			"hold -4 -a 192.0.2.7 -i wan0 --routes move -n 24 -t dhclient"},
		told{"option 121", "", bound + "reason=BOUND\nnew_rfc3442_classless_static_routes=16 10 99 192 0 2 254 24 203 0 113 0 0 0 0 0 192 0 2 9",
			`hold -4 -a 192.0.2.7 -i wan0 --routes move -n 24 -t dhclient
			--route 10.99.0.0/16,192.0.2.254 --route 203.0.113.0/24 --route 0.0.0.0/0,192.0.2.9`},
		told{"option 121 without a default", "", bound + "reason=BOUND\nnew_rfc3442_classless_static_routes=16 10 99 192 0 2 254",
			`hold -4 -a 192.0.2.7 -i wan0 --routes move -n 24 -t dhclient --route 10.99.0.0/16,192.0.2.254`},
		told{"option 249", "", bound + "reason=BOUND\nnew_ms_classless_static_routes=0 192 0 2 9",
			`hold -4 -a 192.0.2.7 -i wan0 --routes move -n 24 -t dhclient --route 0.0.0.0/0,192.0.2.9`},
		told{"121 before 249", "", bound + "reason=BOUND\nnew_ms_classless_static_routes=0 192 0 2 8\nnew_rfc3442_classless_static_routes=0 192 0 2 9",
			`hold -4 -a 192.0.2.7 -i wan0 --routes move -n 24 -t dhclient --route 0.0.0.0/0,192.0.2.9`},
	))
}

// Values that cannot be right are left out, and the rest counts.
func TestDhclientOddValues(t *testing.T) {
	const (
		bound = "interface=wan0\nreason=BOUND\nnew_ip_address=192.0.2.7\n"
		mask  = bound + "new_subnet_mask=255.255.255.0\n"
		hold  = "hold -4 -a 192.0.2.7 -i wan0 --routes move -n 24 -t dhclient"
		plain = "hold -4 -a 192.0.2.7 -i wan0 --routes move -n 32 -t dhclient"
	)
	left := func(what, why string) string { return "\n! \"wan0\": " + what + " is left out: " + why }
	tests := []told{
		{"a loopback router", "", mask + "new_routers=192.0.2.1 127.0.0.1",
			hold + " --metric 1 --gateway 192.0.2.1" + left(`new_routers "127.0.0.1"`, "no router has this address")},
		{"a multicast router", "", mask + "new_routers=224.0.0.1", hold + left(`new_routers "224.0.0.1"`, "no router has this address")},
		{"itself as router", "", mask + "new_routers=192.0.2.7", hold + left(`new_routers "192.0.2.7"`, "no router has this address")},
		{"all hosts as router", "", mask + "new_routers=192.0.2.255 192.0.2.0 255.255.255.255", hold + " --metric 1" +
			left(`new_routers "192.0.2.255"`, "no router has this address") + left(`new_routers "192.0.2.0"`, "no router has this address") +
			left(`new_routers "255.255.255.255"`, "no router has this address")},
		{"words for routers", "", mask + "new_routers=--release $(reboot)", hold + " --metric 1" +
			left(`new_routers "--release"`, "this is no address") + left(`new_routers "$(reboot)"`, "this is no address")},
		{"an IPv6 router", "", mask + "new_routers=fe80::1", hold},
		{"name servers", "", mask + "new_domain_name_servers=224.0.0.251 255.255.255.255 192.0.2.53 0.0.0.0",
			hold + " --dnsmasq-servers /run/table-allocator/dnsmasq.servers --nameserver 192.0.2.53" +
				left(`new_domain_name_servers "224.0.0.251"`, "no name server has this address") +
				left(`new_domain_name_servers "255.255.255.255"`, "no name server has this address")},
		{"more name servers than a lease takes", "", mask + "new_domain_name_servers=" + strings.Repeat("192.0.2.53 ", maxServers) + "192.0.2.54 192.0.2.55 192.0.2.56",
			hold + " --dnsmasq-servers /run/table-allocator/dnsmasq.servers" + strings.Repeat(" --nameserver 192.0.2.53", maxServers) +
				"\n! \"wan0\": new_domain_name_servers: only the first 16 count"},
		{"more routers than a lease takes", "", mask + "new_routers=" + strings.Repeat("192.0.2.1 ", maxGateways) + "192.0.2.3 192.0.2.4 192.0.2.5",
			hold + " --metric 1" + strings.Repeat(" --gateway 192.0.2.1", maxGateways) + "\n! \"wan0\": new_routers: only the first 16 count"},
		{"netmask with a hole", "", bound + "new_subnet_mask=255.0.255.0", plain + left(`new_subnet_mask "255.0.255.0"`, "no uplink has this netmask")},
		{"netmask of half of the Internet", "", bound + "new_subnet_mask=128.0.0.0", plain + left(`new_subnet_mask "128.0.0.0"`, "no uplink has this netmask")},
		{"netmask of everything", "", bound + "new_subnet_mask=0.0.0.0", plain + left(`new_subnet_mask "0.0.0.0"`, "no uplink has this netmask")},
		{"netmask of IPv6", "", bound + "new_subnet_mask=ffff::", plain + left(`new_subnet_mask "ffff::"`, "no uplink has this netmask")},
		{"the largest network", "", bound + "new_subnet_mask=255.0.0.0", "hold -4 -a 192.0.2.7 -i wan0 --routes move -n 8 -t dhclient"},
		{"no metric", "", mask + "new_routers=192.0.2.1\nIF_METRIC=4294967295", hold + " --gateway 192.0.2.1" + left(`IF_METRIC "4294967295"`, "this is no metric")},
		{"option 121 cut short", "", mask + "new_routers=192.0.2.1\nnew_rfc3442_classless_static_routes=16 10 99 192 0 2 254 0 192 0",
			hold + " --route 10.99.0.0/16,192.0.2.254 --gateway 192.0.2.1" +
				left(`the end of new_rfc3442_classless_static_routes "16 10 99 192 0 2 254 0 192 0"`, "route 2 is cut short or has a prefix length above 32")},
		{"option 121 with a default, cut short", "", mask + "new_routers=192.0.2.1\nnew_rfc3442_classless_static_routes=0 192 0 2 9 33 1",
			hold + " --route 0.0.0.0/0,192.0.2.9" +
				left(`the end of new_rfc3442_classless_static_routes "0 192 0 2 9 33 1"`, "route 2 is cut short or has a prefix length above 32")},
		{"option 121 by a loopback router", "", mask + "new_routers=192.0.2.1\nnew_rfc3442_classless_static_routes=0 127 0 0 1 8 127 192 0 2 1",
			hold + " --gateway 192.0.2.1" +
				left(`new_rfc3442_classless_static_routes "0.0.0.0/0 via 127.0.0.1"`, "packets from the address cannot take this route") +
				left(`new_rfc3442_classless_static_routes "127.0.0.0/8 via 192.0.2.1"`, "packets from the address cannot take this route")},
		{"the old address", "", mask + "old_ip_address=-r", hold + left(`old_ip_address "-r"`, "this is no address")},
	}
	for _, addr := range []string{"127.0.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "0.1.2.3"} {
		tests = append(tests, told{"address " + addr, "", "interface=wan0\nreason=BOUND\nnew_ip_address=" + addr,
			left(`new_ip_address "`+addr+`"`, "no table is leased for such an address")[1:]})
	}
	tests = append(tests, told{"no address", "", "interface=wan0\nreason=BOUND", left(`new_ip_address ""`, "this is no address")[1:]})
	testCalls(t, "dhclient", tests)
}

func TestDhclient6(t *testing.T) {
	const (
		base    = "interface=wan0\n"
		servers = "new_dhcp6_name_servers=2001:db8::53 fe80::1 192.0.2.53\n"
		options = " --dnsmasq-servers /run/table-allocator/dnsmasq.servers --nameserver 2001:db8::53 --nameserver fe80::1"
		addr    = base + "new_ip6_address=2001:db8::7\nnew_ip6_prefixlen=64\nnew_max_life=600\n"
		hold    = "hold delegated -6 -a 2001:db8::7 -i wan0 --routes move -n 64 -t dhclient"
		dynamic = "hold dynamic, wait -i wan0 --routes move -t dhclient"
		left    = `! "wan0": `
	)
	var tests []told
	for _, reason := range []string{"BOUND6", "RENEW6", "REBIND6"} {
		reason := "reason=" + reason + "\n"
		tests = append(tests,
			told{reason, "", addr + servers + reason, hold + options},
			told{reason + "without a length", "", base + reason + "new_ip6_address=2001:db8::7",
				"hold delegated -6 -a 2001:db8::7 -i wan0 --routes move -n 128 -t dhclient"},
			told{reason + "takes back", "", base + servers + reason + "new_ip6_address=2001:db8::7\nnew_max_life=0", ""},
			told{reason + "prefix", "", base + servers + reason + "new_ip6_prefix=2001:db8:1::/56", "delegate 2001:db8:1::/56 on wan0\n" + dynamic + options},
			told{reason + "stateless", "", base + servers + reason, dynamic + options},
			told{reason + "prefix taken back", "", base + servers + reason + "new_ip6_prefix=2001:db8:1::/56\nnew_max_life=0", ""})
	}
	for _, reason := range []string{"RELEASE6", "STOP6", "EXPIRE6"} {
		again := "hold dynamic -i wan0 --routes move -t dhclient"
		if reason == "EXPIRE6" {
			again += " --dnsmasq-servers /run/table-allocator/dnsmasq.servers --nameserver 2001:db8::53"
		}
		reason := base + "old_dhcp6_name_servers=2001:db8::53\nreason=" + reason + "\n"
		tests = append(tests,
			told{reason, "", reason + "old_ip6_address=2001:db8::7", "lose -6 -r -a 2001:db8::7 -i wan0"},
			told{reason + "prefix", "", reason + "old_ip6_prefix=2001:db8:1::/56", "undelegate on wan0\n" + again},
			told{reason + "nothing", "", reason, ""})
	}
	for _, reason := range []string{"PREINIT6", "DEPREF6"} {
		tests = append(tests, told{reason, "", addr + servers + "cur_ip6_address=2001:db8::7\nreason=" + reason, ""})
	}
	const short, never, none = "no host is delegated a prefix shorter than /16, or a single address", "no host is delegated this prefix", "this is no IPv6 prefix"
	for prefix, why := range map[string]string{"2000::/3": short, "2001::/15": short, "2001:db8::1/128": short, "fe80::/64": never, "ff02::/64": never,
		"::/64": never, "::1.2.3.4/64": never, "::ffff:192.0.2.0/120": "this is IPv4, written as IPv6", "192.0.2.0/24": none, "x": none} {
		tests = append(tests, told{"prefix " + prefix, "", base + "reason=BOUND6\nnew_ip6_prefix=" + prefix,
			dynamic + "\n" + left + `new_ip6_prefix "` + prefix + `" is left out: ` + why})
	}
	testCalls(t, "dhclient", append(tests,
		told{"the shortest prefix", "", base + "reason=BOUND6\nnew_ip6_prefix=2400::/16", "delegate 2400::/16 on wan0\n" + dynamic},
		told{"host bits of a prefix", "", base + "reason=BOUND6\nnew_ip6_prefix=2001:db8:1:2::/48", "delegate 2001:db8:1::/48 on wan0\n" + dynamic},
		told{"zones", "", addr + "reason=BOUND6\nnew_dhcp6_name_servers=fe80::1%wan0 fe80::2%wan1 2001:db8::1%wan0 ::ffff:192.0.2.1 :: ff02::1",
			hold + " --dnsmasq-servers /run/table-allocator/dnsmasq.servers --nameserver fe80::1\n" +
				left + `new_dhcp6_name_servers "fe80::2%wan1" is left out: no name server has this address` + "\n" +
				left + `new_dhcp6_name_servers "2001:db8::1%wan0" is left out: no name server has this address` + "\n" +
				left + `new_dhcp6_name_servers "::ffff:192.0.2.1" is left out: this is IPv4, written as IPv6: want 192.0.2.1` + "\n" +
				left + `new_dhcp6_name_servers "ff02::1" is left out: no name server has this address`},
		told{"a length that is none", "", base + "reason=BOUND6\nnew_ip6_address=2001:db8::7\nnew_ip6_prefixlen=3",
			"hold delegated -6 -a 2001:db8::7 -i wan0 --routes move -n 128 -t dhclient\n" +
				left + `new_ip6_prefixlen "3" is left out: no uplink has this prefix length`},
		told{"link-local address", "", base + "reason=BOUND6\nnew_ip6_address=fe80::7",
			left + `new_ip6_address "fe80::7" is left out: no table is leased for such an address`},
	))
}
