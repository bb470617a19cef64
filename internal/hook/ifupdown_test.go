package hook

import "testing"

func TestIfupdown(t *testing.T) {
	const (
		up     = "DNSMASQ_SERVERS=\nIFACE=wan0\nLOGICAL=wan0\nMODE=start\nPHASE=post-up\n"
		down   = "DNSMASQ_SERVERS=\nIFACE=wan0\nLOGICAL=wan0\nMODE=stop\nPHASE=post-down\n"
		addr   = "IF_ADDRESS=192.0.2.7\nIF_NETMASK=255.255.255.0\nIF_GATEWAY=192.0.2.1\n"
		addr6  = "IF_ADDRESS=2001:db8::7\nIF_NETMASK=64\nIF_GATEWAY=fe80::1\n"
		hold   = "hold -4 -a 192.0.2.7 -i wan0 --routes move -t ifupdown"
		hold6  = "hold -6 -a 2001:db8::7 -i wan0 --routes move -t ifupdown"
		watch  = "watch -6 --ifname wan0 --exclude= --routes move -t ifupdown --clean --syslog"
		static = up + "ADDRFAM=inet\nMETHOD=static\n"
	)
	var tests []told
	for _, family := range []string{"inet", "inet6"} {
		for _, method := range []string{"loopback", "manual", "ppp", "wvdial", "ipv4ll", "6to4", "else"} {
			stop := ""
			if family == "inet6" { // whatever the method, there may be a watch
				stop = "end " + watch
			}
			stanza := "ADDRFAM=" + family + "\nMETHOD=" + method + "\n"
			tests = append(tests, told{"start " + family + " " + method, "", up + stanza, ""}, told{"stop " + family + " " + method, "", down + stanza, stop})
		}
	}
	for _, method := range []string{"static", "tunnel"} {
		stanza := "ADDRFAM=inet\nMETHOD=" + method + "\n" + addr
		tests = append(tests, told{"start inet " + method, "", up + stanza, hold + " --gateway 192.0.2.1"},
			told{"stop inet " + method, "", down + stanza, "release -4 -r -a 192.0.2.7 -i wan0\nend " + watch})
	}
	for _, method := range []string{"static", "v4tunnel"} {
		stanza := "ADDRFAM=inet6\nMETHOD=" + method + "\n" + addr6
		tests = append(tests, told{"start inet6 " + method, "", up + stanza, hold6 + " --gateway fe80::1"},
			told{"stop inet6 " + method, "", down + stanza, "release -6 -r -a 2001:db8::7 -i wan0\nend " + watch})
	}
	for _, method := range []string{"auto", "dhcp"} {
		stanza := "ADDRFAM=inet6\nMETHOD=" + method + "\n"
		tests = append(tests, told{"start inet6 " + method, "", up + stanza, "start " + watch}, told{"stop inet6 " + method, "", down + stanza, "end " + watch})
	}
	testCalls(t, "ifupdown", append(tests,
		told{"start inet dhcp", "", up + "ADDRFAM=inet\nMETHOD=dhcp", ""},
		told{"stop inet dhcp", "", down + "ADDRFAM=inet\nMETHOD=dhcp", ""},
		told{"no mode", "", "IFACE=wan0\nADDRFAM=inet\nMETHOD=static\n" + addr, ""},
		told{"left alone", "", static + addr + "LEAVE_ALONE=wan*", ""},
		told{"the loopback", "", "IFACE=lo\nMODE=start\nADDRFAM=inet\nMETHOD=static\nIF_ADDRESS=192.0.2.7", ""},
		told{"a label", "", static + addr + "IFACE=wan0:1", hold + " --gateway 192.0.2.1"},
		told{"autoconf", "", up + "ADDRFAM=inet6\nMETHOD=static\nIF_AUTOCONF=1\n" + addr6, hold6 + " --gateway fe80::1\nstart " + watch},
		told{"no autoconf", "", up + "ADDRFAM=inet6\nMETHOD=static\nIF_AUTOCONF=0\n" + addr6, hold6 + " --gateway fe80::1"},
		told{"all that a stanza says", "", static + addr + "DNSMASQ_SERVERS=/f\nIF_METRIC=7\nIF_POINTOPOINT=192.0.2.1\n" +
			"IF_DNS_NAMESERVERS=192.0.2.53 2001:db8::53\nIF_DNS_NAMESERVER=192.0.2.54",
			hold + " --route 192.0.2.1/32 --metric 7 --gateway 192.0.2.1 --dnsmasq-servers /f --nameserver 192.0.2.53 --nameserver 192.0.2.54"},
		told{"routes of others", "", static + addr + "ROUTES=none\nIF_METRIC=7\nIF_POINTOPOINT=192.0.2.1",
			"hold -4 -a 192.0.2.7 -i wan0 --routes none -t ifupdown"},
		told{"gateway of another stanza", "", static + "IF_ADDRESS=192.0.2.7/24", hold + " gateway of wan0"},
		told{"gateway of another stanza of a label", "", static + "IF_ADDRESS=192.0.2.7/24\nIFACE=wan0:1", hold + " gateway of wan0:1"},
		told{"that is not asked for", "", static + "IF_ADDRESS=192.0.2.7/24\nROUTES=none", "hold -4 -a 192.0.2.7 -i wan0 --routes none -t ifupdown"},
		told{"no address", "", static, ""},
		told{"options", "", up + "ADDRFAM=inet6\nMETHOD=auto\nROUTES=copy\nCLIENT_OPTIONS=--debug",
			"start watch -6 --ifname wan0 --exclude= --routes copy -t ifupdown --clean --syslog --debug"},
		told{"options at the end", "", down + "ADDRFAM=inet\nMETHOD=static\nIF_ADDRESS=192.0.2.7\nCLIENT_OPTIONS=-d sock",
			"release -4 -r -a 192.0.2.7 -i wan0 -d sock\nend " + watch + " -d sock"},
		told{"a name like a pattern", "", "IFACE=w*,[?]\nMODE=start\nADDRFAM=inet6\nMETHOD=auto",
			`start watch -6 --ifname "w\*,\[\?]" --exclude= --routes move -t ifupdown --clean --syslog`},
		told{"odd values", "", static + "IF_ADDRESS=-a\nIF_GATEWAY=192.0.2.1", `! "wan0": IF_ADDRESS "-a" is left out: this is no address`},
		told{"odd gateway", "", static + "IF_ADDRESS=192.0.2.7\nIF_GATEWAY=127.0.0.1 192.0.2.1\nIF_POINTOPOINT=x\nIF_METRIC=-1",
			hold + " --gateway 192.0.2.1\n" +
				`! "wan0": IF_POINTOPOINT "x" is left out: this is no address` + "\n" +
				`! "wan0": IF_GATEWAY "127.0.0.1" is left out: no router has this address` + "\n" +
				`! "wan0": IF_METRIC "-1" is left out: this is no metric`},
	))
}

// What its successors say of one link, in one go.
func TestIfupdownSuccessors(t *testing.T) {
	const (
		up    = "DNSMASQ_SERVERS=\nIFACE=wan0\nMODE=start\nPHASE=post-up\n"
		addr  = "IF_ADDRESS=192.0.2.7/24\nIF_GATEWAY=192.0.2.1\n"
		hold  = "hold -4 -a 192.0.2.7 -i wan0 --routes move -t ifupdown"
		hold6 = "hold -6 -a 2001:db8::7 -i wan0 --routes move -t ifupdown"
		rest  = "\nhold static but [192.0.2.7] -i wan0 --routes move -t ifupdown" // what ifupdown2 does not tell
		watch = "watch -6 --ifname wan0 --exclude= --routes move -t ifupdown --clean --syslog"
	)
	testCalls(t, "ifupdown", []told{
		{"ifupdown2, both families", "", up + addr + "ADDRFAM=inet,inet6\nMETHOD=static", hold + " --gateway 192.0.2.1" + rest},
		{"ifupdown2, no family", "", up + addr + "ADDRFAM=\nMETHOD=", hold + " --gateway 192.0.2.1" + rest},
		{"two addresses", "", up + "ADDRFAM=inet,inet6\nMETHOD=static\nIF_ADDRESS=192.0.2.7/24 2001:db8::7/64\nIF_GATEWAY=192.0.2.1 fe80::1",
			hold + " --gateway 192.0.2.1\n" + hold6 + " --gateway fe80::1\nhold static but [192.0.2.7 2001:db8::7] -i wan0 --routes move -t ifupdown"},
		{"two addresses of one family", "", up + "ADDRFAM=inet6\nMETHOD=static\nIF_ADDRESS=192.0.2.7/24 2001:db8::7/64\nIF_GATEWAY=192.0.2.1 fe80::1",
			hold6 + " --gateway fe80::1"},
		{"no gateway", "", up + "ADDRFAM=inet,inet6\nMETHOD=static\nIF_ADDRESS=192.0.2.7/24", hold + rest},
		{"DHCP of both families", "", up + "ADDRFAM=inet,inet6\nMETHOD=dhcp", "start " + watch},
		{"ifupdown-ng", "", up + "METHOD=none\nIF_USE=static\nIF_ADDRESSES=192.0.2.7/24 2001:db8::7/64\nIF_GATEWAYS=192.0.2.1",
			hold + " --gateway 192.0.2.1\n" + hold6},
		{"ifupdown-ng, DHCP", "", up + "METHOD=none\nIF_USE=dhcp", ""},
		{"down", "", "IFACE=wan0\nMODE=stop\nADDRFAM=inet,inet6\nMETHOD=static\nIF_ADDRESS=192.0.2.7/24 2001:db8::7/64",
			"release -4 -r -a 192.0.2.7 -i wan0\nrelease -6 -r -a 2001:db8::7 -i wan0\nend " + watch},
		{"ifupdown-ng, down", "", "IFACE=wan0\nMODE=stop\nMETHOD=none\nIF_ADDRESSES=192.0.2.7/24", "release -4 -r -a 192.0.2.7 -i wan0\nend " + watch},
		{"ifupdown-ng, DHCP down", "", "IFACE=wan0\nMODE=stop\nMETHOD=none", "end " + watch},
	})
}
