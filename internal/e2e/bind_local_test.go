package e2e

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// TestLockLocalNetworks: a bound program reaches the networks of a local link, by what the host has there, and nothing else
// behind it: a router there that answers for the internet gets no packet, nor does anybody get the source of another uplink.
func TestLockLocalNetworks(t *testing.T) {
	c := newCrossing(t, "--ifname", "wan*")
	lan, other := nettest.New(t, "lan"), nettest.New(t, "other")
	nettest.Veth(t, c.ns, "lan0", lan, "eth0")
	nettest.Veth(t, c.ns, "lan1", other, "eth0")
	for _, args := range []string{"address add 192.168.7.1/24 dev lan0", "address add fd77::1/64 dev lan0 nodad",
		"address add 192.168.8.1/24 dev lan1", "address add fd78::1/72 dev lan1 nodad"} {
		c.ns.IP(t, args)
	}
	for _, args := range []string{"address add 192.168.7.2/24 dev eth0", "address add 192.168.9.2/24 dev eth0", "address add fd77::2/64 dev eth0 nodad",
		"address add fd77:0:0:1::2/64 dev eth0 nodad", "route add default via 192.168.7.1", "-6 route add default via fd77::1",
		"address add " + internet + "/32 dev lo", "address add " + internet6 + "/128 dev lo"} { // it answers for the internet
		lan.IP(t, args)
	}
	lan.Do(func() {
		for _, addr := range []string{"192.168.7.2:7", "[fd77::2]:7", "192.168.9.2:7", far4} {
			serveWho(t, addr)
		}
	})
	p := c.bound("wan1")
	index := c.ifindex("lan0")
	heard := sniff(t, lan, "eth0")
	c.nothing(func() {
		p.want("EPERM", "new s udp4\ndevice s lan0\nask s %s", far4)
		p.want("EPERM", "new s udp4\n%s\nask s %s", option("s", unix.SOL_IP, 50, index, true), far4) // IP_UNICAST_IF
		p.want("EPERM", "new s udp4\ninfo s %s,%d,0.0.0.0", far4, index)
		p.want("EPERM", "new s udp4\ninfo s %s,%d,192.168.7.1", far4, index)
		p.want("EPERM", "new s raw4\ndevice s lan0\nask s %s", far4)
		p.want("EPERM", "new s ping4\ndevice s lan0\nask s %s", far4)
		p.want("EPERM", "new s udp4\nbind s 192.168.7.1:0\ndevice s lan0\nask s %s", far4)
		p.want("EPERM", "new s udp4\ndevice s lan0\nask s 192.168.9.2:7")
		for _, kind := range []string{"tcp4", "mptcp4"} {
			p.want("ok", "new s %s\ndevice s lan0", kind)
			if answer := p.do("start s %s", far4); answer != "timeout" {
				t.Errorf("%s: %s", kind, answer)
			}
			p.want("ok", "close s")
		}
		for _, s := range []string{"new s udp6\ndevice s lan0\nask s " + far6, fmt.Sprintf("new s udp6\ninfo s %s,%d,::", far6, index)} {
			p.want("ENETUNREACH", "%s", s)
		}
		p.want("EPERM", "new s udp4\n%s\nsend s 239.255.255.250:1900", option("s", unix.SOL_IP, unix.IP_MULTICAST_IF, 192<<24|168<<16|7<<8|1, true))
		p.want("EPERM", "new s udp6\n%s\nsend s [ff02::fb]:5353", option("s", unix.SOL_IPV6, unix.IPV6_MULTICAST_IF, index, false))
		p.want("EPERM", "new s udp4\nbind s 10.1.0.2:0\nask s 192.168.7.2:7")
		p.want("EPERM", "new s udp6\nbind s [fd01::2]:0\nask s [fd77::2]:7")
		p.want("EPERM", "new s udp4\ninfo s 192.168.7.2:7,0,10.1.0.2")
		p.want("EPERM", "new s udp6\ninfo s [fd77::2]:7,0,fd01::2")
	})
	if lines := heard.stop(); len(lines) > 0 {
		t.Errorf("the router heard %q", lines)
	}
	c.nothing(func() {
		p.want("192.168.7.1", "new s tcp4\nconnect s 192.168.7.2:7\nask s")
		p.want("192.168.7.1", "new s udp4\ndevice s lan0\nask s 192.168.7.2:7")
		p.want("fd77::1", "new s tcp6\nconnect s [fd77::2]:7\nask s")
		p.want("fd77::1", "new s udp6\n%s\nask s [fd77::2]:7", option("s", unix.SOL_IPV6, unix.IPV6_UNICAST_IF, index, true))
		p.want("10.2.0.2", "new s udp4\nbind s 10.2.0.2:0\nask s 192.168.7.2:7")
		p.want("fd02::2", "new s udp6\nbind s [fd02::2]:0\nask s [fd77::2]:7")
		p.want("192.168.8.1", "new s udp4\nbind s 192.168.8.1:0\nask s 192.168.7.2:7") // as host-gateway of docker is asked
		p.want("fd78::1", "new s udp6\nbind s [fd78::1]:0\nask s [fd77::2]:7")
		p.want("ok", "new s udp6\nsend s [fd78::ff:0:0:9]:7")
	})
	c.leaves(p, 1)

	c.ns.IP(t, "address add 192.168.9.1/24 dev lan0")
	c.ns.IP(t, "address del 192.168.7.1/24 dev lan0")
	eventually(t, "the lock follows", func() error {
		if rules := c.allRules(); slices.ContainsFunc(rules, func(r string) bool { return strings.Contains(r, "192.168.7.0") }) {
			return fmt.Errorf("%q", rules)
		}
		return nil
	})
	c.nothing(func() {
		p.want("192.168.9.1", "new s udp4\nask s 192.168.9.2:7")
		p.want("EPERM", "new s udp4\ndevice s lan0\nask s 192.168.7.2:7")
	})
}

// TestLockLone: clients without a watch make the lock follow networks of the host, too.
func TestLockLone(t *testing.T) {
	c := newCrossingAlone(t)
	c.serve()
	inet, inet6 := at(1)
	for _, addr := range []string{inet, inet6} {
		c.must("-i", "wan1", "-a", addr, "--routes", "copy")
	}
	p := c.bound("wan1")
	ct := nettest.New(t, "ct")
	nettest.Veth(t, c.ns, "ct0", ct, "eth0")
	for _, addr := range []string{"172.17.0.2/16", "fd17::2/64"} {
		ct.IP(t, "address add "+addr+" dev eth0 nodad")
	}
	ct.Do(func() {
		serveWho(t, "172.17.0.2:7")
		serveWho(t, "[fd17::2]:7")
	})
	c.ns.IP(t, "address add 172.17.0.1/16 dev ct0")
	c.ns.IP(t, "address add fd17::1/64 dev ct0 nodad")
	for to, want := range map[string]string{"4 172.17.0.2:7": "172.17.0.1", "6 [fd17::2]:7": "fd17::1"} {
		family, addr, _ := strings.Cut(to, " ")
		eventually(t, to+" is reached", func() error {
			p.want("ok", "new s udp%s", family)
			if answer := p.do("try s %s", addr); answer != want {
				return errors.New(answer)
			}
			return nil
		})
	}
	c.ns.IP(t, "link del ct0")
	local := func(what string, want bool) {
		t.Helper()
		eventually(t, what, func() error {
			if rules := c.allRules(); slices.ContainsFunc(rules, func(r string) bool { return strings.HasPrefix(r, "8990:") }) != want {
				return fmt.Errorf("%q", rules)
			}
			return nil
		})
	}
	local("no rule leads to the network", false)
	c.leaves(p, 1)

	// An uplink that nobody serves is one as soon as a default route leads over it, in any table.
	for n, lines := range [][]string{
		{"route add default via 10.9.0.2 dev usb0 metric 900"},
		{"route add default via 10.9.0.2 dev usb1 table 300", "rule add fwmark 0x77 lookup 300 priority 700"},
	} {
		name := fmt.Sprint("usb", n)
		nettest.Veth(t, c.ns, name, ct, name)
		c.ns.IP(t, "address add 10.9.0.1/24 dev "+name)
		local("a rule leads to the network of "+name, true)
		for _, line := range lines {
			c.ns.IP(t, line)
		}
		local("no rule leads to the network of an uplink", false)
		c.ns.IP(t, "link del "+name)
	}
}

// TestLockNewUplink: the network of a link that the watch serves is none of the host's, also before the link has its lease.
func TestLockNewUplink(t *testing.T) {
	c := newCrossing(t, "--ifname", "wan*")
	p := c.bound("wan1")
	isp := nettest.New(t, "isp")
	for n := range 3 {
		name := fmt.Sprint("wan", n+2)
		nettest.Veth(t, c.ns, name, isp, name)
		isp.IP(t, "address add 10.9.0.1/24 dev "+name)
		isp.IP(t, "address add fd09::1/64 dev "+name+" nodad")
		heard := sniff(t, isp, name)
		c.ns.IP(t, "address add 10.9.0.2/24 dev "+name)
		c.ns.IP(t, "address add fd09::2/64 dev "+name+" nodad")
		for range 200 {
			for _, line := range []string{"new s udp4", "send s 10.9.0.1:53", "new s udp6", "send s [fd09::1]:53"} {
				p.do("%s", line)
			}
		}
		if lines := heard.stop(); len(lines) > 0 {
			t.Errorf("heard: %q", lines)
		}
		c.ns.IP(t, "link del "+name)
	}
	c.leaves(p, 1)
}
