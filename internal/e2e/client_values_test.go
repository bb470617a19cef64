package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// TestOddValues: what the network told and cannot be right is left out with a warning, and the address gets its table.
func TestOddValues(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	call := func(args ...string) {
		t.Helper()
		if got := h.lease("10.77.0.2", "wan0", append([]string{"--routes", "move"}, args...)...); got != 10000 {
			t.Fatalf("%q: table %d", args, got)
		}
	}
	said := func(warning string) {
		t.Helper()
		eventually(t, "there is a warning", func() error {
			if log := h.clientLog(); !strings.Contains(log, warning) {
				return fmt.Errorf("no %q in\n%s", warning, log)
			}
			return nil
		})
	}
	for i, tt := range []struct {
		name, warning string
		args          []string
		want          string // the default route
	}{
		{"a router that is none", "option=--gateway value=127.0.0.1", []string{"--gateway", "10.77.0.1", "--gateway", "127.0.0.1"}, ourDefault},
		{"option 121 cut short", `value="0 10 77 0 1 24 10 0"`, []string{"--classless-routes", "0 10 77 0 1 24 10 0"}, ourDefault},
		{"option 121 without sense", `value="33 x"`, []string{"--classless-routes", "33 x", "--gateway", "10.77.0.1"}, ourDefault},
		{"a multicast router", `option=--route value="10.0.0.0/24 via 224.0.0.1"`, []string{"--route", "10.0.0.0/24,224.0.0.1", "--gateway", "10.77.0.1"}, ourDefault},
		{"a name server for everybody", "option=--nameserver value=255.255.255.255", []string{"--nameserver", "255.255.255.255", "--gateway", "10.77.0.1"}, ourDefault},
	} {
		call(tt.args...)
		h.waitRoutes("10000", ourNetwork, tt.want)
		said(tt.warning)
		another := fmt.Sprintf("224.0.0.%d", i+1) // its warning comes behind those of the call
		call(append(tt.args, "--nameserver", another)...)
		said("value=" + another)
		if log := h.clientLog(); strings.Count(log, tt.warning) != 1 {
			t.Errorf("%s: it was said again:\n%s", tt.name, log)
		}
		h.client("-r", "-4", "-a", "10.77.0.2", "-i", "wan0")
		h.waitClean()
	}
	call("--nameserver", "224.0.0.1") // which the first row had told
	h.waitClientLog(2, "value=224.0.0.1 ")
	if r := h.run(bin(t, clientBin), "release", "wan0"); r.code != 0 {
		t.Errorf("release: %+v", r)
	}
	h.waitClean()
	call("--nameserver", "224.0.0.1")
	h.waitClientLog(3, "value=224.0.0.1 ")
}

// TestAddressOfAnotherLink: a second uplink that gets the address of the first takes nothing from it: neither packets, nor
// rules, nor resolver lines, while it is there and after it went.
func TestAddressOfAnotherLink(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.link("wan1", "10.78.0.2/24")
	h.serve()
	servers := h.dir + "/servers"
	call := func(link, gateway string, server ...string) {
		t.Helper()
		args := []string{"--routes", "copy", "--gateway", gateway, "--dnsmasq-servers", servers}
		for _, s := range server {
			args = append(args, "--nameserver", s)
		}
		h.lease("10.77.0.2", link, args...)
	}
	way := func() {
		t.Helper()
		if got := h.ns.IP(t, "route get 9.9.9.9 from 10.77.0.2"); !strings.Contains(got, "via 10.77.0.1 dev wan0") {
			t.Errorf("packets go %s", got)
		}
	}
	call("wan0", "10.77.0.1", "10.77.0.53", "10.77.0.54")
	rules := h.rules()
	way()
	h.ns.IP(t, "address add 10.77.0.2/24 dev wan1")
	call("wan1", "10.77.0.66", "10.77.0.66", "10.77.0.53")
	way()
	h.waitFile(servers, "server=10.77.0.53@10.77.0.2\nserver=10.77.0.54@10.77.0.2\nserver=10.77.0.66@10.77.0.2\nserver=10.77.0.53@10.77.0.2\n")
	call("wan1", "10.77.0.66", "10.77.0.67")
	h.waitFile(servers, "server=10.77.0.54@10.77.0.2\nserver=10.77.0.53@10.77.0.2\nserver=10.77.0.67@10.77.0.2\n")
	h.client("-r", "-4", "-a", "10.77.0.2", "-i", "wan1", "--dnsmasq-servers", servers)
	h.ns.IP(t, "address del 10.77.0.2/24 dev wan1")
	way()
	h.waitRules(rules...)
	h.waitFile(servers, "server=10.77.0.54@10.77.0.2\nserver=10.77.0.53@10.77.0.2\n")
	h.client("-r", "-4", "-a", "10.77.0.2", "-i", "wan0", "--dnsmasq-servers", servers)
	h.waitClean()
	h.waitFile(servers, "")
}

// TestWideNetwork: the netmask of an uplink, which a server of DHCP chooses, takes no packet from more specific routes of main,
// neither of this host's own nor forwarded ones, and there is no rule to a network shorter than /8.
func TestWideNetwork(t *testing.T) {
	for _, length := range []string{"/8", "/7"} {
		for _, mode := range []string{"none", "copy", "move", "watch"} {
			t.Run(length[1:]+" "+mode, func(t *testing.T) {
				h := newHost(t)
				h.link("wan0", "10.77.0.2"+length)
				h.link("wan1", "10.78.0.2/24")
				h.link("lan0", "10.200.0.1/24")
				h.ns.Sysctl(t, "net/ipv4/ip_forward", "1")
				h.ns.IP(t, "route add 10.201.0.0/16 via 10.78.0.1 dev wan1")
				h.ns.IP(t, "route add default via 10.77.0.1 dev wan0 metric 10")
				ways := func() (all []string) {
					for _, question := range []string{"10.200.0.9", "10.201.0.9", "10.78.0.9", "10.201.0.9 from 10.200.0.9 iif lan0", "10.200.0.9 from 10.201.0.9 iif wan1"} {
						all = append(all, question+": "+strings.Join(strings.Fields(h.ns.IP(t, "route get "+question)), " "))
					}
					return all
				}
				before := ways()
				h.serve()
				if mode == "watch" {
					h.watch("--ifname", "wan*")
				} else {
					h.lease("10.77.0.2", "wan0", "--routes", mode)
				}
				h.served("10.77.0.2")
				h.lease("10.78.0.2", "wan1")
				if diff := unordered(ways(), before); diff != "" {
					t.Errorf("packets leave by other ways:\n%s\n%s", diff, strings.Join(h.rules(), "\n"))
				}
				for _, rule := range h.rules() {
					if strings.HasSuffix(strings.Fields(rule)[4], length) && length != "/8" {
						t.Errorf("a rule to a network that no uplink has: %s", rule)
					}
				}
			})
		}
	}
}
