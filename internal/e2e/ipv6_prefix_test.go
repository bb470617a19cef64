package e2e

import (
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// delegated is a prefix that provider 0 delegates, and the networks behind the host that are
// parts of it.
const delegated = "2001:db8:1800::/56"

var behind = []string{"2001:db8:1800::", "2001:db8:1800:1::"}

// router makes the host a router of two networks, each with a host in it, for the prefix that
// provider 0 delegates; its own default is by provider 1.
func (h *home) router() (inside []*home) {
	h.t.Helper()
	sysctl(h.t, h.ns, "net/ipv6/conf/all/forwarding", "1")
	for _, isp := range h.isps {
		sysctl(h.t, h.ns, "net/ipv6/conf/"+isp.ifname+"/accept_ra", "2") // though it is a router
	}
	for n, network := range behind {
		ns := nettest.New(h.t, fmt.Sprintf("inside%d", n))
		nettest.Veth(h.t, h.ns, fmt.Sprintf("lan%d", n), ns, "eth0")
		h.ns.IP(h.t, fmt.Sprintf("address add %s1/64 dev lan%d nodad", network, n))
		ns.IP(h.t, "address add "+network+"5/64 dev eth0 nodad")
		ns.IP(h.t, "route add default via "+network+"1")
		ns.Do(func() { serveWho(h.t, net.JoinHostPort(network+"5", "7")) })
		inside = append(inside, &home{site: &site{uplinks: &uplinks{host: hostIn(h.t, ns)}}})
	}
	// The provider routes the prefix to the address that the host's link always has.
	hw, err := net.ParseMAC(h.mac(0))
	if err != nil {
		h.t.Fatal(err)
	}
	local := fmt.Sprintf("fe80::%02x%02x:%02xff:fe%02x:%02x%02x", hw[0]^2, hw[1], hw[2], hw[3], hw[4], hw[5])
	h.isps[0].ns.IP(h.t, "route add "+delegated+" via "+local+" dev lan")
	return inside
}

// waitDelegated waits until packets of the prefix find their ways: to the internet by provider
// 0, and to the other network directly.
func (h *home) waitDelegated(inside []*home) {
	h.t.Helper()
	for n, here := range inside {
		from, other := behind[n]+"5", behind[1-n]+"5"
		eventually(h.t, "packets from "+from+" pass", func() error { return here.arrives(packet{source: from, to: internet6}, from) })
		eventually(h.t, "packets from "+from+" reach the other network", func() error { return here.arrives(packet{source: from, to: other}, from) })
		// And so does the host, from its address in the network.
		from = behind[n] + "1"
		eventually(h.t, "packets from "+from+" pass", func() error { return h.arrives(packet{source: from, to: internet6}, from) })
		eventually(h.t, "packets from "+from+" reach the other network", func() error { return h.arrives(packet{source: from, to: other}, from) })
	}
	h.wantOwnOnly()
}

var rulesOfDelegated = []string{
	"10002: from 2001:db8:1800::/56 lookup main suppress_prefixlength 6 proto 116",
	"10003: from 2001:db8:1800::/56 lookup TABLE proto 116",
}

// waitRulesOfDelegated waits until the prefix has one rule for main and one for each table.
func (h *home) waitRulesOfDelegated(tables ...string) {
	h.t.Helper()
	want := []string{}
	if len(tables) > 0 {
		want = append(want, rulesOfDelegated[0])
	}
	for _, table := range tables {
		want = append(want, strings.Replace(rulesOfDelegated[1], "TABLE", table, 1))
	}
	eventually(h.t, fmt.Sprintf("the rules of the prefix lead to %q", tables), func() error {
		var rules []string
		for _, rule := range h.rules6() {
			if strings.Contains(rule, delegated) {
				rules = append(rules, rule)
			}
		}
		if diff := unordered(rules, want); diff != "" {
			return fmt.Errorf("%s", diff)
		}
		return nil
	})
}

// A delegated prefix: its networks behind the host use the uplink that it came by, whatever
// main has for a default, and reach each other.
func TestIPv6Prefix(t *testing.T) {
	h := newHome(t, 2)
	inside := h.router()
	h.advertise(0, routed6(0))
	h.ns.IP(t, "address add 2001:db8:1000::20/64 dev wan0 nodad")
	h.ns.IP(t, "address add 2001:db8:1000::21/64 dev wan0 nodad")
	h.ns.IP(t, "address add 2001:db8:2000::20/64 dev wan1 nodad")
	h.ns.IP(t, "route add default via 2001:db8:2000::1 dev wan1 metric 5")
	if out := h.ns.IP(t, "-6 route get "+internet6+" from "+behind[0]+"5 iif lan0"); !strings.Contains(out, "dev wan1") {
		t.Fatalf("the way without us, which shows nothing: %s", out)
	}

	first := h.lease6("2001:db8:1000::20", "wan0", "--routes", "copy", "--prefix", delegated)
	h.waitRulesOfDelegated(first)
	h.waitDelegated(inside)
	// Two addresses of the link may have it, and the last one takes it along.
	second := h.lease6("2001:db8:1000::21", "wan0", "--routes", "copy", "--on-loss", "block", "--prefix", delegated)
	h.waitRulesOfDelegated(first, second)
	h.client("-6", "-r", "-a", "2001:db8:1000::20", "-i", "wan0")
	h.waitRulesOfDelegated(second)
	h.waitDelegated(inside)
	// Told anew without it, and with it.
	h.lease6("2001:db8:1000::21", "wan0", "--routes", "copy")
	h.waitRulesOfDelegated()
	h.lease6("2001:db8:1000::21", "wan0", "--routes", "copy", "--prefix", delegated)
	h.waitRulesOfDelegated(second)
	// Of a client that was killed a watch takes it, and serves the address.
	h.signalClients(syscall.SIGKILL)
	h.waitNoClient()
	h.watched("--ifname", "wan*")
	h.waitRulesOfDelegated()
	h.lease6("2001:db8:1000::21", "wan0", "--routes", "copy", "--prefix", delegated)
	h.waitRulesOfDelegated(h.tableOf("2001:db8:1000::21"))
	h.waitDelegated(inside)
	h.ns.IP(t, "-6 rule del pref 10002 from "+delegated)
	h.waitRulesOfDelegated(h.tableOf("2001:db8:1000::21"))
	h.watch.kill()
	h.client("-6", "-r", "-a", "2001:db8:1000::21", "-i", "wan0")
	h.waitRulesOfDelegated()
}

// dhclient asks for a prefix, with an address of its own and without one.
func TestDhclient6Prefix(t *testing.T) {
	t.Parallel()
	for name, args := range map[string][]string{"and address": {"-N", "-P"}, "alone": {"-P"}} {
		t.Run(name, func(t *testing.T) {
			h := newHookedHome(t, 2)
			h.prepareDhclient()
			inside := h.router()
			h.ns.IP(t, "address add 2001:db8:2000::20/64 dev wan1 nodad")
			h.ns.IP(t, "route add default via 2001:db8:2000::1 dev wan1 metric 5")
			h.dhcpd6At(0, `default-lease-time 600; preferred-lifetime 400; option dhcp-renewal-time 2; option dhcp-rebinding-time 300;
				option dhcp6.name-servers 2001:db8:1000::1;
				subnet6 `+prefix6(0, 0)+` { range6 `+given6(0, 0)+` `+given6(0, 0)+`; prefix6 2001:db8:1800:: 2001:db8:1800:: /56; }`)
			h.dhclient6("wan0", args...)
			h.waitReason("wan0", "BOUND6  "+delegated, 0)
			addrs := []string{}
			if len(args) == 1 {
				h.advertise(0, auto6(0)) // later than the prefix
				addrs = append(addrs, h.waitAddress("wan0", prefix6(0, 0), slaac))
			} else {
				h.advertise(0, routed6(0))
				addrs = append(addrs, given6(0, 0))
			}
			h.waitServed(0, addrs[0], h.routesOf(0)...)
			table := h.tableOf(addrs[0])
			h.waitRulesOfDelegated(table)
			h.waitDelegated(inside)
			h.waitServers("server=2001:db8:1000::1@" + addrs[0])
			h.waitReason("wan0", "RENEW6 "+delegated, 0)
			h.waitReason("wan0", "RENEW6 "+delegated, len(h.reasons("wan0")))
			h.waitRulesOfDelegated(table)
			if leases := h.leases(); len(leases) != 1 {
				t.Errorf("leases: %q", leases)
			}

			h.dhclient6("wan0", append([]string{"-r"}, args...)...)
			h.waitReason("wan0", "RELEASE6 "+delegated, 0)
			h.waitRulesOfDelegated()
			h.waitServers()
			if len(args) == 1 {
				h.waitExactly(addrs...) // the router still gives it
			} else {
				h.waitExactly()
			}
		})
	}
}
