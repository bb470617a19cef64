package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// Ports of the host of TestReplyByUplink.
const (
	wildcardPort  = 5300 // a UDP server on 0.0.0.0 and ::
	boundPort     = 5301 // one UDP server on each address
	publishedPort = 8080 // of a container, TCP and UDP
)

const (
	withoutKey = `{"links":[{"ifname":"wan*","routes":"copy"}]}`
	withKey    = `{"links":[{"ifname":"wan*","routes":"copy"}],"reply_by_uplink":true}`
)

// replier is a host with two uplinks, servers, and a container with a published port.
type replier struct{ *pair }

func newReplier(t *testing.T) *replier {
	r := &replier{newPair(t)}
	box := nettest.New(t, "box")
	nettest.Veth(t, r.ns, "cbr0", box, "eth0")
	r.ns.Batch(t, "address add 172.17.0.1/16 dev cbr0", "address add fd17::1/64 dev cbr0 nodad")
	box.Batch(t, "address add 172.17.0.2/16 dev eth0", "address add fd17::2/64 dev eth0 nodad", "route add default via 172.17.0.1", "route add default via fd17::1")
	for name, value := range map[string]string{"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1",
		"ipv4/conf/all/src_valid_mark": "1", "ipv4/conf/cbr0/rp_filter": "1", "ipv4/conf/wan0/rp_filter": "2", "ipv4/conf/wan1/rp_filter": "2"} {
		r.ns.Sysctl(t, "net/"+name, value)
	}
	r.publish()
	r.ns.Do(func() {
		serveLarge(t, "udp4", net.JoinHostPort("0.0.0.0", strconv.Itoa(wildcardPort)))
		serveLarge(t, "udp6", net.JoinHostPort("::", strconv.Itoa(wildcardPort)))
		for n := range r.isps {
			for _, family := range []int{4, 6} {
				serveLarge(t, "udp", net.JoinHostPort(r.addr(n, family), strconv.Itoa(boundPort)))
			}
		}
	})
	box.Do(func() {
		for _, addr := range []string{"172.17.0.2", "fd17::2"} {
			serveWho(t, net.JoinHostPort(addr, "80"))
		}
	})
	return r
}

// publish publishes the port of the container as docker does.
func (r *replier) publish() {
	r.t.Helper()
	for _, family := range []struct{ table, to, inside string }{{"ip", "172.17.0.2", "172.17.0.0/16"}, {"ip6", "[fd17::2]", "fd17::/64"}} {
		r.ns.Run(r.t, "nft", fmt.Sprintf(`table %[1]s nat {
			chain pre { type nat hook prerouting priority dstnat; fib daddr type local meta l4proto { tcp, udp } th dport %[4]d dnat to %[2]s:80; }
			chain post { type nat hook postrouting priority srcnat; %[1]s saddr %[3]s oifname != "cbr0" masquerade; }
		}`, family.table, family.to, family.inside, publishedPort))
	}
}

// serveLarge answers each datagram with 4,000 bytes, which take several packets.
func serveLarge(t *testing.T, network, addr string) {
	t.Helper()
	c, err := net.ListenPacket(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for buf := make([]byte, 64); ; {
			_, from, err := c.ReadFrom(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				_, _ = c.WriteTo(make([]byte, 4000), from) // who hears nothing reports that
			}
		}
	}()
	t.Cleanup(func() { c.Close(); <-done })
}

// ask asks a port of an address of the host from the internet, by a socket that takes an answer of that address alone.
func (r *replier) ask(network, addr string, port, from int) (err error) {
	r.internet.Do(func() {
		local := internet
		if netip.MustParseAddr(addr).Is6() {
			local = internet6
		}
		var at net.Addr = &net.UDPAddr{IP: net.ParseIP(local), Port: from}
		if network == "tcp" {
			at = &net.TCPAddr{IP: net.ParseIP(local), Port: from}
		}
		d := net.Dialer{LocalAddr: at, Timeout: answers}
		var c net.Conn
		if c, err = d.Dial(network, net.JoinHostPort(addr, strconv.Itoa(port))); err != nil {
			return
		}
		defer c.Close()
		if _, err = c.Write([]byte("x")); err == nil {
			err = c.SetReadDeadline(time.Now().Add(answers))
		}
		if err == nil {
			_, err = c.Read(make([]byte, 5000))
		}
	})
	if err != nil {
		return fmt.Errorf("%s %s %d: %w", network, addr, port, err)
	}
	return nil
}

// servers are what is asked that has no source when the route of its reply is chosen.
var servers = []struct {
	network string
	port    int
}{{"udp", wildcardPort}, {"udp", publishedPort}, {"tcp", publishedPort}}

// waitAnswers waits until servers answer by an uplink, and then fails the test unless all do so, and by no other. It waits without TCP, which
// would answer again much later.
func (r *replier) waitAnswers(n int) {
	r.t.Helper()
	all := func(networks ...string) (err error) {
		for _, s := range servers {
			for _, family := range []int{4, 6} {
				if slices.Contains(networks, s.network) {
					err = errors.Join(err, r.ask(s.network, r.addr(n, family), s.port, 0))
				}
			}
		}
		return err
	}
	eventually(r.t, fmt.Sprintf("answers by uplink %d", n), func() error { return all("udp") })
	r.only(n, func() {
		if err := all("udp", "tcp"); err != nil {
			r.t.Error(err)
		}
	})
}

// wantAsWithout fails the test if there is anything of replies, or if an answer comes by the second uplink.
func (r *replier) wantAsWithout() {
	r.t.Helper()
	eventually(r.t, "nothing is left", func() error {
		if tables := r.ns.Run(r.t, "nft", "list", "tables"); strings.Contains(tables, "replies") {
			return errors.New(tables)
		}
		if rules := strings.Join(append(r.rules(), r.rules6()...), "\n"); strings.Contains(rules, "fwmark") {
			return errors.New(rules)
		}
		return nil
	})
	for _, s := range servers {
		if err := r.ask(s.network, r.addr(0, 4), s.port, 0); err != nil {
			r.t.Error(err)
		}
	}
	r.wantSilent()
}

// wantSilent fails the test if a server answers by the second uplink. It does not try TCP, which would answer again much later.
func (r *replier) wantSilent() {
	r.t.Helper()
	for _, port := range []int{wildcardPort, publishedPort} {
		if err := r.ask("udp", r.addr(1, 4), port, 0); err == nil {
			r.t.Errorf("port %d of the second uplink answers", port)
		}
	}
}

// waitFound waits until doctor finds just these of what replies are about.
func (r *replier) waitFound(names ...string) {
	r.t.Helper()
	eventually(r.t, fmt.Sprintf("doctor finds %v", names), func() error {
		out := r.run(bin(r.t, clientBin), "doctor", "--only", "udp-any,published-port")
		for _, name := range []string{"udp-any", "published-port"} {
			if strings.Contains(out.stdout, name) != slices.Contains(names, name) {
				return fmt.Errorf("%+v", out)
			}
		}
		return nil
	})
}

// TestReplyByUplink: with the key, UDP servers that are bound to no address and published ports of containers answer by the uplink that
// was asked, and with its address; what has a source, or nobody asked for, goes as without. Without the key nothing of that is there.
func TestReplyByUplink(t *testing.T) {
	r := newReplier(t)
	r.serve()
	w := r.watch("--config", r.watchFile(withoutKey))
	r.waitServed(0, 1)
	r.wantAsWithout()
	r.waitFound("udp-any", "published-port")

	r.watchFile(withKey)
	w.again()
	for n := range r.isps {
		r.waitAnswers(n)
	}
	r.waitFound()
	// Sockets that are bound answer as before, also who asks both uplinks from one port.
	for _, family := range []int{4, 6} {
		for _, n := range []int{1, 0, 1, 0} {
			r.only(n, func() {
				if err := r.ask("udp", r.addr(n, family), boundPort, 4711); err != nil {
					t.Error(err)
				}
			})
		}
	}
	r.only(0, func() { // what nobody asked for
		for _, family := range []int{4, 6} {
			r.wantSeen("unbound", packet{family: family}, r.addr(0, family))
		}
	})
	// What nft lists can be loaded again, and the watch has nothing to say to it.
	text := r.ns.Run(t, "nft", "list", "ruleset")
	if !strings.Contains(text, fmt.Sprintf(". %d ", wildcardPort)) {
		t.Errorf("nobody has asked anything:\n%s", text)
	}
	r.ns.Run(t, "nft", "-j", "list", "ruleset")

	r.ns.Run(t, "nft", "flush", "ruleset")
	r.publish()
	r.waitAnswers(1)

	// An address that goes, and comes again.
	_, inet6 := at(1)
	r.ns.IP(t, "address del "+inet6+"/64 dev wan1")
	eventually(t, "its table knows it no more", func() error {
		if text := r.ns.Run(t, "nft", "list", "table", "ip6", "table-allocator-replies"); strings.Contains(text, inet6) {
			return errors.New(text)
		}
		return nil
	})
	r.address(1)
	r.waitAnswers(1)

	r.watchFile(withoutKey)
	w.again()
	r.wantAsWithout()
}

// TestReplyByUplinkEnds: the tables stay with the rules when a watch is killed, and go with the next one that has no key, with the link
// that is left out, and with release --all.
func TestReplyByUplinkEnds(t *testing.T) {
	r := newReplier(t)
	r.serve()
	start := func(text string) *process {
		w := r.watch("--config", r.watchFile(text))
		r.waitServed(0, 1)
		return w
	}
	w := start(withKey)
	r.waitAnswers(1)
	handles := func() string {
		return r.ns.Run(t, "nft", "-a", "list", "chains")
	}
	before := handles()
	w.kill()
	r.waitAnswers(1)
	w = start(withKey)
	r.waitAnswers(1)
	if after := handles(); after != before {
		t.Errorf("the next watch made the tables anew: they were\n%s\nand are\n%s", before, after)
	}
	w.kill()
	w = start(withoutKey)
	r.wantAsWithout()

	r.watchFile(strings.Replace(withKey, `"links":[`, `"links":[{"ifname":"wan1","routes":"copy","reply_by_uplink":false},`, 1))
	w.again()
	r.waitAnswers(0)
	r.wantSilent()
	r.watchFile(withKey)
	w.again()
	r.waitAnswers(1)
	_ = w.cmd.Process.Signal(syscall.SIGTERM)
	<-w.done
	r.waitAnswers(1)
	if out := r.run(bin(t, clientBin), "release", "--all"); out.code != 0 {
		t.Errorf("%+v", out)
	}
	r.wantAsWithout()
}
