package hook

import "testing"

func TestUdhcpc(t *testing.T) {
	const (
		base  = "DNSMASQ_SERVERS=\ninterface=wan0\nIF_METRIC=200\n"
		bound = base + "ip=192.0.2.7\nsubnet=255.255.255.0\nmask=24\nrouter=192.0.2.1\nlease=600\n"
		lease = "hold -4 -a 192.0.2.7 -i wan0 --routes copy -n 24 -t udhcpc"
		hold  = lease + " --metric 200 --gateway 192.0.2.1"
		left  = `! "wan0": `
	)
	testCalls(t, "udhcpc", []told{
		{"bound", "bound", bound, hold},
		{"renew", "renew", bound, hold},
		{"deconfig", "deconfig", bound, ""},
		{"nak", "nak", bound, ""},
		{"leasefail", "leasefail", bound, ""},
		{"no action", "", bound, ""},
		{"left alone", "bound", bound + "LEAVE_ALONE=wan*", ""},
		{"copied whatever the settings say", "bound", bound + "ROUTES=move", hold},
		{"name servers", "bound", bound + "DNSMASQ_SERVERS=/f\ndns=192.0.2.53 192.0.2.54",
			hold + " --dnsmasq-servers /f --nameserver 192.0.2.53 --nameserver 192.0.2.54"},
		{"option 121", "bound", bound + "staticroutes=10.99.0.0/16 192.0.2.254 0.0.0.0/0 192.0.2.9",
			lease + " --route 10.99.0.0/16,192.0.2.254 --route 0.0.0.0/0,192.0.2.9 --metric 200"},
		{"option 249", "bound", bound + "msstaticroutes=0.0.0.0/0 192.0.2.9", lease + " --route 0.0.0.0/0,192.0.2.9 --metric 200"},
		{"option 121 in words", "bound", bound + "staticroutes=$(reboot)",
			hold + "\n" + left + `the end of staticroutes "$(reboot)" is left out: these are no networks and routers`},
		{"no address", "bound", base, left + `ip "" is left out: this is no address`},
	})
}
