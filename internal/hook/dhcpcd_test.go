package hook

import "testing"

func TestDhcpcd(t *testing.T) {
	const (
		base  = "DNSMASQ_SERVERS=\ninterface=wan0\nifmetric=1002\n"
		bound = base + "new_ip_address=192.0.2.7\nnew_subnet_mask=255.255.255.0\nnew_routers=192.0.2.1\n"
		lease = "hold -4 -a 192.0.2.7 -i wan0 --routes copy -n 24 -t dhcpcd"
		hold  = lease + " --metric 1002 --gateway 192.0.2.1"
		left  = `! "wan0": `
	)
	var tests []told
	for _, reason := range []string{"BOUND", "RENEW", "REBIND", "REBOOT", "INFORM", "STATIC", "TIMEOUT"} {
		tests = append(tests, told{reason, "", bound + "reason=" + reason + "\nold_ip_address=192.0.2.6", hold})
	}
	for _, reason := range []string{"", "PREINIT", "CARRIER", "NOCARRIER", "NAK", "EXPIRE", "RELEASE", "STOP", "STOPPED", "FAIL", "IPV4LL", "BOUND 6"} {
		tests = append(tests, told{"nothing for " + reason, "", bound + "old_ip_address=192.0.2.6\nreason=" + reason, ""})
	}
	testCalls(t, "dhcpcd", append(tests,
		told{"left alone", "", bound + "reason=BOUND\nLEAVE_ALONE=wan*", ""},
		told{"copied whatever the settings say", "", bound + "reason=BOUND\nROUTES=move", hold},
		told{"name servers", "", bound + "reason=BOUND\nDNSMASQ_SERVERS=/f\nnew_domain_name_servers=192.0.2.53 fe80::1",
			hold + " --dnsmasq-servers /f --nameserver 192.0.2.53"},
		told{"option 121", "", bound + "reason=BOUND\nnew_classless_static_routes=10.99.0.0/16 192.0.2.254 203.0.113.0/24 0.0.0.0 0.0.0.0/0 192.0.2.9",
			lease + " --route 10.99.0.0/16,192.0.2.254 --route 203.0.113.0/24 --route 0.0.0.0/0,192.0.2.9 --metric 1002"},
		told{"option 121 without a default", "", bound + "reason=BOUND\nnew_classless_static_routes=10.99.0.0/16 192.0.2.254",
			lease + " --route 10.99.0.0/16,192.0.2.254 --metric 1002"},
		told{"option 121 before 249", "", bound + "reason=BOUND\nnew_classless_static_routes=0.0.0.0/0 192.0.2.9\nnew_ms_classless_static_routes=0.0.0.0/0 192.0.2.8",
			lease + " --route 0.0.0.0/0,192.0.2.9 --metric 1002"},
		told{"option 121 cut short", "", bound + "reason=BOUND\nnew_classless_static_routes=10.99.0.0/16 192.0.2.254 10.98.0.0/16",
			lease + " --route 10.99.0.0/16,192.0.2.254 --metric 1002 --gateway 192.0.2.1\n" +
				left + `the end of new_classless_static_routes "10.98.0.0/16" is left out: these are no networks and routers`},
		told{"option 121 in words", "", bound + "reason=BOUND\nnew_classless_static_routes=-r $(reboot)",
			hold + "\n" + left + `the end of new_classless_static_routes "-r $(reboot)" is left out: these are no networks and routers`},
		told{"no address", "", base + "reason=BOUND", left + `new_ip_address "" is left out: this is no address`},
	))
}

func TestDhcpcd6(t *testing.T) {
	const (
		base   = "DNSMASQ_SERVERS=\ninterface=wan0\n"
		option = "-i wan0 --routes copy -t dhcpcd"
		na     = "new_dhcp6_ia_na1_ia_addr1=2001:db8::7\nnew_dhcp6_ia_na1_ia_addr2=2001:db8::8\nnew_dhcp6_ia_na2_ia_addr1=2001:db8::9\n"
		pd     = "new_dhcp6_ia_pd1_prefix1=2001:db8:1::\nnew_dhcp6_ia_pd1_prefix1_length=56\n"
		old    = "old_dhcp6_ia_pd1_prefix1=2001:db8:1::\nold_dhcp6_ia_pd1_prefix1_length=56\n"
	)
	var tests []told
	for _, reason := range []string{"BOUND6", "RENEW6", "REBIND6", "REBOOT6", "INFORM6", "DELEGATED6"} {
		tests = append(tests,
			told{reason, "", base + na + "reason=" + reason, `
				hold delegated -6 -a 2001:db8::7 ` + option + `
				hold delegated -6 -a 2001:db8::8 ` + option + `
				hold delegated -6 -a 2001:db8::9 ` + option},
			told{reason + " with a prefix", "", base + pd + "reason=" + reason, `
				delegate 2001:db8:1::/56 on wan0
				hold dynamic, wait ` + option})
	}
	for _, reason := range []string{"EXPIRE6", "RELEASE6", "STOP6"} {
		tests = append(tests,
			told{reason, "", base + na + "reason=" + reason, ""},
			told{reason + " of a prefix", "", base + old + "reason=" + reason, "undelegate on wan0\nhold dynamic " + option})
	}
	testCalls(t, "dhcpcd", append(tests,
		told{"routers", "", base + "reason=ROUTERADVERT\nnd1_from=fe80::1\nnd2_addr1=2001:db8::7\nnd2_addr2=2001:db8:2::7\nDNSMASQ_SERVERS=/f\nnew_rdnss=fe80::1%wan0 2001:db8::53", `
			hold delegated -6 -a 2001:db8::7 ` + option + ` --dnsmasq-servers /f --nameserver fe80::1 --nameserver 2001:db8::53
			hold delegated -6 -a 2001:db8:2::7 ` + option + ` --dnsmasq-servers /f --nameserver fe80::1 --nameserver 2001:db8::53`},
		told{"a prefix that cannot be", "", base + "reason=BOUND6\nnew_dhcp6_ia_pd1_prefix1=::\nnew_dhcp6_ia_pd1_prefix1_length=0",
			`! "wan0": new_dhcp6_ia_pd1_prefix1 "::/0" is left out: no host is delegated a prefix shorter than /16, or a single address`},
		told{"a link-local address", "", base + "reason=BOUND6\nnew_dhcp6_ia_na1_ia_addr1=fe80::7",
			`! "wan0": new_dhcp6_ia_na1_ia_addr1 "fe80::7" is left out: no table is leased for such an address`},
	))
}
