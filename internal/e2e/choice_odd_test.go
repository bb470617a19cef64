package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// TestChoiceVPN: packets that are lost move nothing, and an uplink that fails again and again is left once, also for the outer
// packets of a VPN that takes all others, those of containers among them.
func TestChoiceVPN(t *testing.T) {
	t.Parallel()
	eachMode(t, func(t *testing.T, links string) {
		c := newChooserHost(t, routed(0), routed(1))
		for n := range c.isps {
			c.address(n)
		}
		v := c.newVPN()
		if links == copyLinks {
			v.up()
		}
		c.watch = c.uplinks.watch("--config", c.watchFile(chooserConfig(links, `"hold": 1000`, `"hold_max": 2000`)))
		if links == moveLinks {
			c.waitUsed("wan0")
			v.up()
		}
		// Rounds may have failed before the links of the providers were there.
		c.waitUsedAfter("wan0")
		leaves := func(n int) {
			t.Helper()
			outer, _ := at(n)
			v.wait(packet{mark: vpnMark}, outer)
			v.wait(packet{}, "10.8.0.2")
			v.waitContainer("10.9.0.2")
		}
		leaves(0)
		before := c.switches()
		c.fault(0, lossy)
		c.waitAsked("wan0", 15)
		if n := c.switches(); n != before {
			t.Errorf("%d switches while packets were lost", n-before)
		}
		leaves(0)
		c.mend(0)
		for range 2 {
			c.fault(0, noInternet)
			c.waitState("wan0", "inet", "dead")
			leaves(1)
			c.mend(0)
			c.waitState("wan0", "inet", "alive")
			leaves(1)
		}
		v.down()
		v.wait(packet{}, "10.2.0.2")
		v.waitContainer("10.2.0.2")
		c.wantOwnOnly()
	})
}

// waitUsedAfter has unbound traffic use a link now, where its hold would keep it from that for very long.
func (c *chooser) waitUsedAfter(ifname string) {
	c.t.Helper()
	for _, wish := range []string{ifname, "auto"} {
		c.use(wish)
		c.waitUsed(ifname)
	}
}

// TestChoiceHijack: a portal whose resolver has its own address for every name, and which answers 511 there, is one while
// targets answer, also where nobody but that resolver is asked. Where the user has paid, the uplink works.
func TestChoiceHijack(t *testing.T) {
	t.Parallel()
	for name, kinds := range map[string]string{"ICMP passes": `"kinds": ["icmp"]`, "DNS alone": `"kinds": ["dns"]`} {
		t.Run(name, func(t *testing.T) {
			c := newChooser(t, copyLinks, kinds, `"portal_url": "http://check.example/204"`, `"portal_every": 0.4`)
			for _, far := range []string{internet, internet6} {
				c.internet.Do(func() {
					serveStatus(t, net.JoinHostPort(far, "80"), http.StatusNoContent)
					serveName(t, net.JoinHostPort(far, "53"))
				})
			}
			c.isps[0].ns.Do(func() {
				serveStatus(t, ":80", http.StatusNetworkAuthenticationRequired)
				serveAnswer(t, ":5353", func(question []byte) []byte { return answerWith(question, "10.1.0.1", "fd01::1") })
			})
			c.waitUsed("wan0")
			c.waitUnbound(0)
			c.fault(0, `chain f { type filter hook forward priority -300; meta l4proto { icmp, ipv6-icmp } accept; drop; }
				chain n { type nat hook prerouting priority dstnat; udp dport 53 redirect to :5353; }`)
			c.waitState("wan0", "inet", "portal")
			c.waitState("wan0", "inet6", "portal")
			c.waitUnbound(1)
			c.mend(0)
			c.waitUnbound(0)
			c.wantOwnOnly()
		})
	}
}

// TestChoiceSlow: an uplink whose answers take longer than the timeout, as by satellite, works.
func TestChoiceSlow(t *testing.T) {
	const trip = time.Second
	c := newChooser(t, copyLinks, `"kinds": ["dns"]`)
	for _, far := range []string{internet, internet6} {
		c.internet.Do(func() { serveLate(t, net.JoinHostPort(far, "53"), trip) })
	}
	c.waitUsed("wan0")
	before := c.switches()
	c.waitAsked("wan0", 20)
	for _, u := range c.report().Uplinks {
		if u.State != "alive" || u.RTT < float64(trip.Milliseconds()) {
			t.Errorf("%+v", u)
		}
	}
	if n := c.switches(); n != before {
		t.Errorf("%d switches", n-before)
	}
	c.wantUnbound(4, 0)
	c.wantOwnOnly()
}

// serveLate answers DNS questions after a time.
func serveLate(t *testing.T, addr string, after time.Duration) {
	t.Helper()
	nettest.ServeDatagrams(t, addr, func(conn net.PacketConn, question []byte, from net.Addr) {
		answer := nameAnswer(question)
		time.AfterFunc(after, func() { _, _ = conn.WriteTo(answer, from) })
	})
}

// TestChoiceForeignRule: a rule of another program in the place of that of the choice, and before it, is said.
func TestChoiceForeignRule(t *testing.T) {
	c := newChooserHost(t, routed(0), routed(1))
	for n := range c.isps {
		c.address(n)
	}
	c.ns.Batch(t, "rule add pref 90000 lookup 500", "route add default via 10.2.0.1 dev wan1 table 500")
	c.watch = c.uplinks.watch("--config", c.watchFile(chooserConfig(moveLinks)))
	c.waitUsed("wan0")
	says := func(want string) {
		t.Helper()
		eventually(t, fmt.Sprintf("what stands against the choice is %q", want), func() error {
			for _, one := range c.report().Unbound {
				if one.Family == "inet" && one.Warn != want || one.Family == "inet6" && one.Warn != "" {
					return fmt.Errorf("%+v", one)
				}
			}
			return nil
		})
	}
	says(`the rule "90000: from all lookup 500" of another program stands before that of the choice`)
	c.wantUnbound(4, 1)
	c.wantUnbound(6, 0)
	c.waitDiagnosis("", "choice-shadowed")
	c.ns.IP(t, "rule del pref 90000 lookup 500")
	says("")
	c.waitUnbound(0)
	c.wantOwnOnly()
}

// waitChosen waits until nothing in the kernel leads unbound traffic to the uplink that was chosen before ifname: packets leave by the new
// one before that.
func (c *chooser) waitChosen(ifname string) {
	c.t.Helper()
	eventually(c.t, "the choice of "+ifname+" is whole", func() error {
		for _, family := range []string{"-4", "-6"} {
			for _, r := range c.routeLines(family, "main") {
				if strings.HasPrefix(r, "default ") && strings.Contains(r, " proto 116") && !strings.Contains(r, " dev "+ifname+" ") {
					return errors.New(r)
				}
			}
			if rules := c.ns.IP(c.t, family+" rule show priority 90000"); strings.Count(rules, "lookup") > 1 {
				return errors.New(rules)
			}
		}
		return nil
	})
}

// TestChoiceHeld: a watch that is started while an uplink that failed is about to be used again does not cut its hold short.
func TestChoiceHeld(t *testing.T) {
	t.Parallel()
	eachMode(t, func(t *testing.T, links string) {
		c := newChooser(t, links, `"hold": 1000`, `"hold_max": 2000`)
		c.waitUsedAfter("wan0")
		c.fault(0, noInternet)
		c.waitUnbound(1)
		c.waitChosen("wan1")
		c.watch.kill()
		c.mend(0)
		c.watch = c.uplinks.watch("--config", c.watchFile(chooserConfig(links, `"hold": 1000`, `"hold_max": 2000`)))
		eventually(t, "wan0 works, and waits", func() error {
			for _, one := range c.report().Unbound {
				if one.Ifname != "wan1" || !strings.Contains(one.Why, "wan0 works again, and is used in ") {
					return fmt.Errorf("%+v", one)
				}
			}
			return nil
		})
		c.wantUnbound(4, 1)
		c.wantUnbound(6, 1)
		c.wantOwnOnly()
	})
}

// TestChoiceAddressBack: an address that was gone for a moment is no link without a carrier, and has unbound traffic again at once, as
// on a host without us: it waits for no hold beside a virtual address of the same link.
func TestChoiceAddressBack(t *testing.T) {
	c := newChooser(t, copyLinks, `"hold": 1000`, `"hold_max": 2000`)
	c.waitUnbound(0)
	c.ns.IP(t, "address add 10.1.0.77/32 dev wan0")
	c.served("10.1.0.77")
	c.waitState("wan0", "inet", "alive")
	c.ns.IP(t, "address del 10.1.0.2/24 dev wan0")
	eventually(t, "the address is out of service", func() error {
		if text := c.run(bin(t, clientBin), "history", "10.1.0.2").stdout; !strings.Contains(text, "uplink is unknown, before alive: its address was out of service") {
			return fmt.Errorf("%s", text)
		}
		return nil
	})
	c.address(0)
	c.waitUnbound(0)
	c.wantOwnOnly()
}

// TestChoiceNoCarrier: while no uplink works, as where the targets are down, unbound traffic leaves one that loses its carrier.
func TestChoiceNoCarrier(t *testing.T) {
	t.Parallel()
	eachMode(t, func(t *testing.T, links string) {
		c := newChooser(t, links, `"targets": ["198.18.0.9", "2001:db8:fffe::9"]`) // which nobody has
		dead := func(ifname string) {
			t.Helper()
			c.waitState(ifname, "inet", "dead")
			c.waitState(ifname, "inet6", "dead")
		}
		dead("wan0")
		dead("wan1")
		for _, wish := range []string{"wan0", "auto"} {
			c.use(wish)
			c.waitUnbound(0)
		}
		c.isps[0].ns.IP(t, "link set lan down")
		c.waitUnbound(1)
		c.isps[0].ns.IP(t, "link set lan up")
		dead("wan0")
		c.wantUnbound(4, 1)
		c.wantUnbound(6, 1)
		c.wantOwnOnly()
	})
}
