package hook

import (
	"fmt"
	"strings"
	"testing"
)

func TestNetworkManager(t *testing.T) {
	const (
		base = "DNSMASQ_SERVERS=\nDEVICE_IFACE=wan0\nDEVICE_IP_IFACE=wan0\n"
		addr = base + "IP4_NUM_ADDRESSES=1\nIP4_ADDRESS_0=192.0.2.7/24 192.0.2.1\nIP4_GATEWAY=192.0.2.1\n"
		hold = "hold -4 -a 192.0.2.7 -i wan0 --routes copy -n 24 -t NetworkManager"
		gw   = " --metric 30000 --gateway 192.0.2.1"
	)
	var tests []told
	for _, action := range []string{"up", "dhcp4-change"} {
		tests = append(tests, told{action, "wan0 " + action, addr, hold + gw})
	}
	for _, action := range []string{"pre-up", "down", "pre-down", "vpn-down", "vpn-pre-up", "hostname", "connectivity-change", "dhcp6-change", "device-add"} {
		tests = append(tests, told{"nothing for " + action, "wan0 " + action, addr + "VPN_IP_IFACE=wan0", ""})
	}
	testCalls(t, "networkmanager", append(tests,
		told{"no arguments", "", addr, ""},
		told{"no action", "wan0", addr, ""},
		told{"a modem", "cdc-wdm0 up", addr + "DEVICE_IP_IFACE=wwan0", strings.Replace(hold, "wan0", "wwan0", 1) + gw},
		told{"left alone", "wan0 up", addr + "LEAVE_ALONE=wan0", ""},
		told{"no addresses", "wan0 up", base, ""},
		told{"copied whatever the settings say", "wan0 up", addr + "ROUTES=none", hold + gw},
		told{"two addresses, routes and name servers", "wan0 up", addr + `
			DNSMASQ_SERVERS=/f
			IP4_NUM_ADDRESSES=2
			IP4_ADDRESS_1=192.0.2.8/24 192.0.2.1
			IP4_NUM_ROUTES=2
			IP4_ROUTE_0=192.0.2.0/24 0.0.0.0 100
			IP4_ROUTE_1=10.99.0.0/16 192.0.2.254 77
			IP4_NAMESERVERS=192.0.2.53 192.0.2.54`,
			`hold -4 -a 192.0.2.7 -i wan0 --routes copy -n 24 -t NetworkManager --route 192.0.2.0/24 --route 10.99.0.0/16,192.0.2.254
			--metric 30000 --gateway 192.0.2.1 --dnsmasq-servers /f --nameserver 192.0.2.53 --nameserver 192.0.2.54
			hold -4 -a 192.0.2.8 -i wan0 --routes copy -n 24 -t NetworkManager --route 192.0.2.0/24 --route 10.99.0.0/16,192.0.2.254
			--metric 30000 --gateway 192.0.2.1 --dnsmasq-servers /f --nameserver 192.0.2.53 --nameserver 192.0.2.54`},
		told{"never-default", "wan0 up", addr + "IP4_GATEWAY=0.0.0.0\nDHCP4_ROUTERS=192.0.2.9", hold + " --metric 30000 --gateway 192.0.2.9"},
		told{"never-default and option 121", "wan0 up", addr + "IP4_GATEWAY=0.0.0.0\nDHCP4_ROUTERS=192.0.2.9\nDHCP4_RFC3442_CLASSLESS_STATIC_ROUTES=x", hold + " --metric 30000"},
		told{"a VPN", "tun0 vpn-up", addr + `
			VPN_IP_IFACE=tun0
			VPN_IP4_NUM_ADDRESSES=1
			VPN_IP4_ADDRESS_0=10.8.0.6/32 0.0.0.0
			VPN_IP4_GATEWAY=203.0.113.1
			DHCP4_ROUTERS=192.0.2.9`,
			"hold -4 -a 10.8.0.6 -i tun0 --routes copy -n 32 -t NetworkManager --metric 30000 --gateway 203.0.113.1"},
		told{"reapply", "wan0 reapply", addr + "IP4_NUM_ROUTES=1\nIP4_ROUTE_0=10.99.0.0/16 192.0.2.254 77\n",
			"hold present -i wan0 --routes copy -t NetworkManager" + gw},
		told{"odd values", "wan0 up", addr + `
			IP4_GATEWAY=127.0.0.1
			IP4_NUM_ADDRESSES=4
			IP4_ADDRESS_1=192.0.2.8 192.0.2.1
			IP4_ADDRESS_2=fe80::1/64
			IP4_NUM_ROUTES=3
			IP4_ROUTE_0=x
			IP4_ROUTE_1=10.0.0.0/8 x
			IP4_ROUTE_2=10.99.0.0/16 192.0.2.254`,
			hold + ` --route 10.99.0.0/16,192.0.2.254 --metric 30000
			! "wan0": IP4_GATEWAY "127.0.0.1" is left out: no router has this address
			! "wan0": IP4_ROUTE_0 "x" is left out: this is no route
			! "wan0": IP4_ROUTE_1 "10.0.0.0/8 x" is left out: this is no route
			! "wan0": IP4_ADDRESS_1 "192.0.2.8 192.0.2.1" is left out: this is no address with its prefix length
			! "wan0": IP4_ADDRESS_2 "fe80::1/64" is left out: this is no address with its prefix length`},
		told{"no number", "wan0 up", addr + "IP4_NUM_ADDRESSES=-1", `! "wan0": IP4_NUM_ADDRESSES "-1" is left out: this is no number`},
	))
	// An older one runs the scripts of ifupdown.
	testCalls(t, "ifupdown", []told{
		{"for ifupdown", "", addr + "IFACE=wan0\nMODE=start\nADDRFAM=inet\nMETHOD=NetworkManager\nNM_DISPATCHER_ACTION=up", hold + gw},
		{"for ifupdown, no action", "", addr + "IFACE=wan0\nMODE=start\nADDRFAM=inet\nMETHOD=NetworkManager", hold + gw},
		{"for ifupdown, other family", "", addr + "IFACE=wan0\nMODE=start\nADDRFAM=inet6\nMETHOD=NetworkManager", ""},
		{"for ifupdown, down", "", addr + "IFACE=wan0\nMODE=stop\nADDRFAM=inet\nMETHOD=NetworkManager\nNM_DISPATCHER_ACTION=down", ""},
	})
}

// However much is told, there is an end to what is called.
func TestLimits(t *testing.T) {
	env := environ("IP4_GATEWAY=192.0.2.1\nIP4_NUM_ADDRESSES=2000000000\nIP4_NUM_ROUTES=2000000000\nIP4_NAMESERVERS=" + strings.Repeat("192.0.2.53 ", 1000))
	for i := range 1000 {
		env[fmt.Sprintf("IP4_ADDRESS_%d", i)] = fmt.Sprintf("10.%d.%d.1/24 192.0.2.1", i/250, i%250)
		env[fmt.Sprintf("IP4_ROUTE_%d", i)] = fmt.Sprintf("172.16.%d.%d/32 192.0.2.1 1", i/250, i%250)
	}
	calls, warnings, err := Calls("networkmanager", []string{"wan0", "up"}, env)
	if err != nil || len(calls) != maxAddresses || len(warnings) > maxWarnings+1 {
		t.Fatalf("%d calls, %d warnings, %v", len(calls), len(warnings), err)
	}
	for _, c := range calls {
		if h := c.(Hold); len(h.Static) != maxRoutes || len(h.Nameservers) != maxServers || len(h.Gateways) != 1 {
			t.Errorf("%d routes, %d name servers, %d gateways", len(h.Static), len(h.Nameservers), len(h.Gateways))
		}
	}
	long := strings.Repeat("1 ", maxValue)
	testCalls(t, "dhclient", []told{{"a long value", "", "interface=wan0\nreason=BOUND\nnew_ip_address=192.0.2.7\nnew_routers=" + long,
		`hold -4 -a 192.0.2.7 -i wan0 --routes move -n 32 -t dhclient
		! "wan0": new_routers "` + long[:shown] + `..." is left out: it is longer than 16384 bytes`}})
}

func TestUdev(t *testing.T) {
	testCalls(t, "udev", []told{
		{"a link", "", "INTERFACE=wan0", "end dhclient of wan0\nrelease all of wan0"},
		{"no link", "", "", ""},
		{"the loopback", "", "INTERFACE=lo", ""},
		{"left alone", "", "INTERFACE=wan0\nLEAVE_ALONE=wan0", ""},
	})
}
