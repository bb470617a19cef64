package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// TestChoiceGateway: a gateway that is dead moves unbound traffic. One dead target of two, packets that are lost at random, and a
// hole for large packets, of which doctor says, do not.
func TestChoiceGateway(t *testing.T) {
	t.Parallel()
	eachMode(t, func(t *testing.T, links string) {
		c := newChooser(t, links)
		c.waitUsed("wan0")
		c.waitUnbound(0)
		c.fault(0, noGateway)
		c.waitUnbound(1)
		c.mend(0)
		c.waitUsed("wan0")
		c.waitUnbound(0)
		for _, fault := range []string{hole, noFirst, lossy} {
			before := c.switches()
			c.fault(0, fault)
			c.waitAsked("wan0", 15)
			if at, n := c.used(), c.switches(); at != "inet wan0, inet6 wan0" || n != before {
				t.Errorf("%d switches, and unbound traffic uses %q while %s", n-before, at, fault)
			}
			c.mend(0)
		}
		c.waitUnbound(0)
		c.wantOwnOnly()
	})
}

// TestChoiceFlaps: an uplink that fails again and again is not used for its hold, and `uplinks` says so.
func TestChoiceFlaps(t *testing.T) {
	t.Parallel()
	eachMode(t, func(t *testing.T, links string) {
		c := newChooser(t, links, `"hold": 1000`, `"hold_max": 2000`)
		// Rounds may have failed before the links of the providers were there.
		c.use("wan0")
		c.waitUsed("wan0")
		c.use("auto")
		c.fault(0, noInternet)
		c.waitUnbound(1)
		before := c.switches()
		for range 3 {
			c.mend(0)
			c.waitState("wan0", "inet", "alive")
			c.waitState("wan0", "inet6", "alive")
			eventually(t, "it says why wan0 is not used", func() error {
				for _, one := range c.report().Unbound {
					if one.Ifname != "wan1" || !strings.Contains(one.Why, "wan0 works again, and is used in ") {
						return fmt.Errorf("%+v", one)
					}
				}
				return nil
			})
			c.fault(0, noInternet)
			c.waitState("wan0", "inet", "dead")
			c.waitState("wan0", "inet6", "dead")
		}
		if n := c.switches(); n != before {
			t.Errorf("%d switches while wan0 flapped", n-before)
		}
		c.wantUnbound(4, 1)
		c.wantUnbound(6, 1)
		c.wantOwnOnly()
	})
}

// TestChoicePortal: behind a captive portal ICMP and DNS answer, and the page does not.
func TestChoicePortal(t *testing.T) {
	t.Parallel()
	eachMode(t, func(t *testing.T, links string) {
		c := newChooser(t, links, `"portal_url": "http://check.example/204"`, `"portal_every": 0.4`)
		serve := func(ns *nettest.Namespace, at string, status int) {
			ns.Do(func() { serveStatus(t, at, status) })
		}
		for _, far := range []string{internet, internet6} {
			serve(c.internet.Namespace, net.JoinHostPort(far, "80"), http.StatusNoContent)
			c.internet.Do(func() { serveName(t, net.JoinHostPort(far, "53")) })
		}
		status := http.StatusOK
		if links == moveLinks {
			status = http.StatusFound
		}
		serve(c.isps[0].ns, ":8080", status)
		c.waitUsed("wan0")
		c.waitUnbound(0)
		c.fault(0, portal)
		c.waitState("wan0", "inet", "portal")
		c.waitState("wan0", "inet6", "portal")
		c.waitUnbound(1)
		c.mend(0)
		c.waitUnbound(0)
		c.wantOwnOnly()
	})
}

// serveStatus answers HTTP requests with a status.
func serveStatus(t *testing.T, addr string, status int) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(status) })}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
}

// serveName answers DNS questions for addresses by that of the internet.
func serveName(t *testing.T, addr string) { serveAnswer(t, addr, nameAnswer) }

// serveAnswer answers datagrams.
func serveAnswer(t *testing.T, addr string, answer func(question []byte) []byte) {
	t.Helper()
	nettest.ServeDatagrams(t, addr, func(conn net.PacketConn, question []byte, from net.Addr) { _, _ = conn.WriteTo(answer(question), from) })
}

// nameAnswer answers a question with an address of the internet, if the question is for one.
func nameAnswer(question []byte) []byte { return answerWith(question, internet, internet6) }

// answerWith answers a question for an address of either family with one of these.
func answerWith(question []byte, inet, inet6 string) []byte {
	const header, addressA, addressAAAA = 12, 1, 28
	b := append([]byte(nil), question...)
	if len(b) < header+4 {
		return b
	}
	b[2] |= 0x80
	kind, data := b[len(b)-3], []byte(nil)
	switch kind {
	case addressA:
		data = net.ParseIP(inet).To4()
	case addressAAAA:
		data = net.ParseIP(inet6)
	default:
		return b
	}
	b[7] = 1
	b = append(b, 0xc0, header, 0, kind, 0, 1, 0, 0, 0, 60, 0, byte(len(data)))
	return append(b, data...)
}

// TestChoiceSameSubnet: two uplinks with the same network and the same gateway are told apart.
func TestChoiceSameSubnet(t *testing.T) {
	t.Parallel()
	isps := []provider{
		{ifname: "wan0", network: "10.1.0.0/24", gateway: "10.1.0.1", customers: "10.1.0.0/25", customers6: block6(0).String(), nat: true},
		{ifname: "wan1", network: "10.1.0.0/24", gateway: "10.1.0.1", customers: "10.1.0.128/25", customers6: block6(1).String(), nat: true},
	}
	eachMode(t, func(t *testing.T, links string) {
		c := newChooserHost(t, slices.Clone(isps)...)
		c.ns.Batch(t, "address add 10.1.0.2/24 dev wan0", "address add 10.1.0.130/24 dev wan1",
			"route add default via 10.1.0.1 dev wan0 metric 100", "route add default via 10.1.0.1 dev wan1 metric 200")
		for _, setting := range []string{"arp_ignore=1", "arp_announce=2"} { // each address is its link's
			name, value, _ := strings.Cut(setting, "=")
			c.ns.Sysctl(t, "net/ipv4/conf/all/"+name, value)
		}
		c.watch = c.uplinks.watch("--config", c.watchFile(chooserConfig(links)))
		used := func(n int) {
			t.Helper()
			eventually(t, fmt.Sprintf("unbound packets leave by uplink %d", n), func() error {
				return c.arrives(packet{family: 4}, seenAs(n).String())
			})
		}
		used(0)
		c.fault(0, noInternet)
		used(1)
		c.mend(0)
		used(0)
		c.wantOwnOnly()
	})
}

// TestChoiceKilled: the choice of a watch that was killed stands, and where its link fails what main or the other uplinks
// have serves.
func TestChoiceKilled(t *testing.T) {
	t.Parallel()
	eachMode(t, func(t *testing.T, links string) {
		for _, tt := range []struct {
			name string
			end  func(*process)
			fail string
		}{
			{"killed", (*process).kill, "link set wan1 down"},
			{"stopped for good", func(p *process) { p.stop() }, "link set wan1 down"},
			{"stopped for good, and the gateway goes", func(p *process) { p.stop() }, ""},
		} {
			t.Run(tt.name, func(t *testing.T) {
				c := newChooser(t, links)
				c.waitUsed("wan0")
				c.fault(0, noInternet)
				c.waitUnbound(1)
				c.mend(0)
				tt.end(c.watch)
				if tt.fail == "" {
					if links == moveLinks {
						return // main has no other default route
					}
					c.fault(1, noGateway)
				} else {
					c.ns.IP(t, tt.fail)
				}
				c.waitUnbound(0)
				c.wantOwnOnly()
			})
		}
	})
}

// TestChoiceTraffic: what containers send uses the chosen uplink, and so do the outer packets of a VPN, whether it came before
// the watch or after it. What the VPN wants for itself it gets.
func TestChoiceTraffic(t *testing.T) {
	t.Parallel()
	for name, links := range map[string]string{"copy": copyLinks, "move": moveLinks} {
		for _, first := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, VPN first %v", name, first), func(t *testing.T) {
				c := newChooserHost(t, routed(0), routed(1))
				for n := range c.isps {
					c.address(n)
				}
				v := c.newVPN()
				if first {
					v.up()
				}
				c.watch = c.uplinks.watch("--config", c.watchFile(chooserConfig(links)))
				if !first {
					c.waitUsed("wan0")
					v.wait(packet{}, "10.1.0.2")
					v.waitContainer("10.1.0.2")
					v.up()
				}
				fault := noInternet // each of two, with the VPN first and second and in both modes
				if first == (links == moveLinks) {
					fault = noGateway
				}
				for n := range 2 {
					if n == 1 {
						c.fault(0, fault)
					}
					outer, _ := at(n)
					v.wait(packet{mark: vpnMark}, outer)
					v.wait(packet{}, "10.8.0.2")
					v.waitContainer("10.9.0.2") // within the tunnel
				}
				v.down()
				v.wait(packet{}, "10.2.0.2")
				v.waitContainer("10.2.0.2")
				c.mend(0)
				v.wait(packet{}, "10.1.0.2")
				v.waitContainer("10.1.0.2")
				c.wantOwnOnly()
			})
		}
	}
}

// vpn is a tunnel of the host that takes all traffic without its mark, and a container behind the host.
type vpn struct {
	*chooser
	container *nettest.Namespace
}

const vpnMark = 51820

// vpnRules are as wg-quick adds them.
var vpnRules = []string{"not fwmark 51820 lookup 51820", "lookup main suppress_prefixlength 0"}

func (c *chooser) newVPN() vpn {
	c.t.Helper()
	v := vpn{c, nettest.New(c.t, "container")}
	far := nettest.New(c.t, "vpn")
	nettest.Veth(c.t, c.ns, "vpn0", far, "vpn0")
	nettest.Veth(c.t, c.ns, "docker0", v.container, "eth0")
	far.Batch(c.t, "address add 10.8.0.1/24 dev vpn0", "address add "+internet+"/32 dev lo", "route add 10.9.0.0/24 via 10.8.0.2")
	far.Do(func() { serveWho(c.t, net.JoinHostPort(internet, "7")) })
	v.container.Batch(c.t, "address add 10.9.0.2/24 dev eth0", "route add default via 10.9.0.1")
	c.ns.Batch(c.t, "address add 10.8.0.2/24 dev vpn0", "address add 10.9.0.1/24 dev docker0", "route add default dev vpn0 via 10.8.0.1 table 51820")
	c.ns.Sysctl(c.t, "net/ipv4/ip_forward", "1")
	c.ns.Run(c.t, "nft", `table ip docker { chain p { type nat hook postrouting priority 100; ip saddr 10.9.0.0/24 oifname "wan*" masquerade; }; }`)
	return v
}

func (v vpn) up() {
	v.t.Helper()
	for _, rule := range vpnRules {
		v.ns.IP(v.t, "rule add "+rule)
	}
}

func (v vpn) down() {
	v.t.Helper()
	for _, rule := range vpnRules {
		v.ns.IP(v.t, "rule del "+rule)
	}
}

func (v vpn) wait(p packet, from string) {
	v.t.Helper()
	eventually(v.t, fmt.Sprintf("%+v comes from %s", p, from), func() error { return v.arrives(p, from) })
}

func (v vpn) waitContainer(from string) {
	v.t.Helper()
	eventually(v.t, "the container's packets come from "+from, func() (err error) {
		var seen string
		v.container.Do(func() { seen, err = packet{}.send() })
		if err == nil && seen != from {
			err = fmt.Errorf("the receiver saw %s", seen)
		}
		return err
	})
}
