package hook

import "testing"

func TestPppd(t *testing.T) {
	const (
		base = "IFNAME=ppp0\nIPLOCAL=10.64.64.64\nIPREMOTE=10.112.112.112\n"
		up   = base + "DNSMASQ_SERVERS=\nUSEPEERDNS=1\nDNS1=192.0.2.53\nDNS2=192.0.2.54\n"
		hold = "hold -4 -a 10.64.64.64 -i ppp0 --routes copy -n 32 -t pppd --route 0.0.0.0/0 --metric 30000"
	)
	testCalls(t, "pppd", []told{
		{"a provider", "", up, hold},
		{"without the address of the peer", "", up + "IPREMOTE=", hold},
		{"a peer that dials in", "", base, ""},
		{"left alone", "", up + "LEAVE_ALONE=ppp*", ""},
		{"copied whatever the settings say", "", up + "ROUTES=move", hold},
		{"name servers", "", up + "DNSMASQ_SERVERS=/f", hold + " --dnsmasq-servers /f --nameserver 192.0.2.53 --nameserver 192.0.2.54"},
		{"name servers for resolved", "", up + "RESOLVER=resolved", hold + " --resolver resolved --nameserver 192.0.2.53 --nameserver 192.0.2.54"},
		{"no address", "", up + "IPLOCAL=", `! "ppp0": IPLOCAL "" is left out: this is no address`},
		{"an address of IPv6", "", up + "IPLOCAL=2001:db8::7", ""},
		{"no link", "", up + "IFNAME=", ""},
	})
}
