package e2e

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// TestBoundSoakPrograms: programs that call what they like while links, addresses and routes come and go, and the watch
// dies: not a packet of theirs is seen by the other provider, none with a foreign source by their own, and none that is not
// for it on a local network. Some are attached once they have sockets.
func TestBoundSoakPrograms(t *testing.T) {
	programs, seed := 24, uint64(1)
	if fullSize() {
		programs, seed = 1000, uint64(time.Now().UnixNano())
	}
	c := newCrossingAlone(t)
	c.serve()
	watch := c.watch("--routes", "copy", "--ifname", "wan*")
	c.waitTables(0)
	c.waitTables(1)
	for _, args := range []string{"link add docker0 type bridge", "link set docker0 up", "address add 172.17.0.1/16 dev docker0", "address add fd17::1/64 dev docker0 nodad"} {
		c.ns.IP(t, args)
	}
	lan := nettest.New(t, "lan") // whose router answers for the internet
	nettest.Veth(t, c.ns, "lan0", lan, "eth0")
	for _, args := range []string{"address add 192.168.7.1/24 dev lan0", "address add fd77::1/64 dev lan0 nodad"} {
		c.ns.IP(t, args)
	}
	for _, args := range []string{"address add 192.168.7.2/24 dev eth0", "address add fd77::2/64 dev eth0 nodad", "route add default via 192.168.7.1",
		"-6 route add default via fd77::1", "address add " + internet + "/32 dev lo", "address add " + internet6 + "/128 dev lo"} {
		lan.IP(t, args)
	}
	sysctl(t, lan, "net/ipv4/conf/all/proxy_arp", "1")
	c.must("run", "--ifname", "wan1", "true")
	local := sniff(t, lan, "eth0")
	var sniffers []*sniffer
	for n := range c.isps {
		sniffers = append(sniffers, c.sniff(n))
	}
	t.Logf("seed %d", seed)
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		c.churn(rand.New(rand.NewPCG(seed, 0)), stop, &watch)
	}()
	var running sync.WaitGroup
	turns := make(chan struct{}, 6)
	for n := range programs {
		turns <- struct{}{}
		running.Go(func() {
			defer func() { <-turns }()
			r := rand.New(rand.NewPCG(seed, uint64(n+1)))
			if n%3 == 0 {
				c.randomCalls(r, c.randomAttached(r))
			} else {
				c.randomCalls(r, c.bound("wan1", "--wait", fmt.Sprint(int(patience/time.Second))))
			}
		})
	}
	running.Wait()
	close(stop)
	<-ended
	inet, inet6 := at(1)
	for n, s := range sniffers {
		for _, p := range s.stop() {
			source, rest, _ := strings.Cut(p, " > ")
			to, _, _ := strings.Cut(rest, " ")
			own := source == inet || source == inet6 || source == "0.0.0.0" || strings.HasPrefix(source, "fe80:")
			if n == 0 || !own && to != inet && to != inet6 { // an answer from behind the provider is none of the host's
				t.Errorf("provider %d: %s", n, p)
			}
		}
	}
	other, other6 := at(0)
	for _, p := range local.stop() {
		source, rest, _ := strings.Cut(p, " > ")
		to, _, _ := strings.Cut(rest, " ")
		if source == other || source == other6 || !strings.HasPrefix(to, "192.168.7.") && !strings.HasPrefix(to, "fd77::") {
			t.Errorf("the local network: %s", p)
		}
	}
}

// randomAttached attaches a program that has sockets already to the second uplink.
func (c *crossing) randomAttached(r *rand.Rand) *probing {
	p := c.prober()
	before := map[string]string{"c": randomKind(r), "d": randomKind(r)}
	for name, kind := range before {
		p.want("ok", "new %s %s", name, kind)
	}
	if res := c.do("attach", "--wait", fmt.Sprint(int(patience/time.Second)), "wan1", strconv.Itoa(c.pidOf(p))); res.code != 0 {
		c.t.Errorf("attach: %+v", res)
	}
	for _, name := range []string{"c", "d"} {
		c.randomUse(r, p, name, before[name][len(before[name])-1:])
	}
	return p
}

func randomKind(r *rand.Rand) string {
	return []string{"tcp", "udp", "udp", "raw", "ping", "mptcp"}[r.IntN(6)] + []string{"4", "6"}[r.IntN(2)]
}

// churn takes from the second uplink, and sometimes the first one, what it has, and gives it back.
func (c *crossing) churn(r *rand.Rand, stop chan struct{}, watch **process) {
	steps := []func(){
		func() { c.lines("link set wan1 down"); c.pause(r); c.lines("link set wan1 up") },
		func() { c.lines("route del default dev wan1", "-6 route del default dev wan1") },
		func() { c.lines("address flush dev wan1 scope global") },
		func() { c.lines("link del wan1"); c.pause(r); c.connect(1) },
		func() { c.lines("address flush dev wan0 scope global"); c.pause(r) },
		func() { c.lines("route del default dev wan0", "-6 route del default dev wan0"); c.pause(r) },
		func() {
			(*watch).kill()
			c.pause(r)
			*watch = c.watch("--routes", "copy", "--ifname", "wan*")
		},
	}
	for {
		select {
		case <-stop:
			return
		default:
		}
		steps[r.IntN(len(steps))]()
		c.pause(r)
		c.address(0)
		c.address(1)
		c.pause(r)
	}
}

// lines are arguments of `ip`, which may fail.
func (c *crossing) lines(all ...string) {
	for _, line := range all {
		_, _ = c.ns.Output("ip", strings.Fields(line)...) // what is gone already cannot go
	}
}

func (c *crossing) pause(r *rand.Rand) { time.Sleep(time.Duration(r.IntN(300)) * time.Millisecond) }

// randomCalls has a program call at random, and ends it.
func (c *crossing) randomCalls(r *rand.Rand, p *probing) {
	for range 12 {
		name, kind := []string{"a", "b"}[r.IntN(2)], randomKind(r)
		p.do("new %s %s", name, kind)
		c.randomUse(r, p, name, kind[len(kind)-1:])
		p.do("close %s", name)
	}
	p.in.Close()
}

// randomUse has a program do to a socket what it likes.
func (c *crossing) randomUse(r *rand.Rand, p *probing, name, family string) {
	pick := func(list ...string) string { return list[r.IntN(len(list))] }
	to := map[string][]string{
		"4": {far4, far4, far4, "10.1.0.1:9", "10.1.0.255:137", "255.255.255.255:67", "224.0.0.251:5353", "239.255.255.250:1900", "10.2.0.1:9", "172.17.0.9:7", "192.168.7.2:7", "203.0.113.7:53"},
		"6": {far6, far6, far6, mapped4, "[fd01::1]:9", "[ff02::fb]:5353", "[ff05::c]:1900", "[ff0e::c]:1900", "[fd02::1]:9", "[fd17::9]:7", "[fd77::2]:7", "[2001:db8:77::1]:53"},
	}[family]
	from := map[string][]string{
		"4": {"10.1.0.2", "10.2.0.2", "172.17.0.1", "127.0.0.1", "0.0.0.0", "10.2.0.77", "192.168.7.1", "203.0.113.5", "224.0.0.251"},
		"6": {"[fd01::2]", "[fd02::2]", "[fd17::1]", "[::1]", "[::]", "[fd02::77]", "[fd77::1]", "[2001:db8:5::5]", "[::ffff:10.1.0.2]"},
	}[family]
	link, big := r.IntN(9), r.IntN(2) == 0
	for range r.IntN(3) {
		p.do("%s", []string{
			fmt.Sprintf("bind %s %s:0", name, pick(from...)), fmt.Sprintf("bind %s %s:0", name, pick(from...)),
			fmt.Sprintf("device %s %s", name, pick("wan0", "wan1", "docker0", "lan0", "lo")),
			fmt.Sprintf("setmark %s %s", name, pick("0", "0x99", "0x1000000", "0x4000000", "0xffffffff", "0x80000")),
			option(name, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, link, false), option(name, unix.SOL_SOCKET, unix.SO_DONTROUTE, 1, false),
			option(name, unix.SOL_SOCKET, unix.SO_BROADCAST, 1, false), option(name, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1, false),
			option(name, unix.SOL_SOCKET, unix.SO_PRIORITY, 6, false), option(name, unix.SOL_IP, 50, link, true),
			option(name, unix.SOL_IP, unix.IP_FREEBIND, 1, false), option(name, unix.SOL_IP, unix.IP_TRANSPARENT, 1, false),
			option(name, unix.SOL_IP, unix.IP_MULTICAST_IF, 10<<24|1<<16|2, big), option(name, unix.SOL_IP, unix.IP_MULTICAST_TTL, 4, false),
			option(name, unix.SOL_IP, unix.IP_TOS, 0x10, false), option(name, unix.SOL_IP, unix.IP_HDRINCL, 1, false),
			"option " + name + " 0,35,effffffa00000000", "option " + name + " 0,35,effffffa0a010002",
			option(name, unix.SOL_IPV6, unix.IPV6_UNICAST_IF, link, true), option(name, unix.SOL_IPV6, unix.IPV6_MULTICAST_IF, link, false),
			option(name, unix.SOL_IPV6, 75, 1, false), option(name, unix.SOL_IPV6, 78, 1, false), option(name, unix.SOL_IPV6, unix.IPV6_V6ONLY, 0, false),
			option(name, unix.SOL_IPV6, unix.IPV6_MULTICAST_HOPS, 4, false),
			"option " + name + " 41,20,ff0e000000000000000000000000000c00000000", "listen " + name, "local " + name, "port " + name,
			option(name, unix.IPPROTO_TCP, 30, 1, false), option(name, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1, false),
		}[r.IntN(30)])
	}
	for range 1 + r.IntN(3) {
		p.do("%s", []string{
			fmt.Sprintf("start %s %s", name, pick(to...)), fmt.Sprintf("try %s %s", name, pick(to...)), fmt.Sprintf("send %s %s", name, pick(to...)),
			fmt.Sprintf("send %s %s", name, pick(to...)), fmt.Sprintf("try %s", name), fmt.Sprintf("send %s %s", name, pick(to...)),
		}[r.IntN(6)])
	}
}

// A sniffer notes what a provider hears from the host, without what kernels say by themselves: neighbours, groups, errors,
// and resets and acknowledgements of connections that nobody has any more.
type sniffer struct {
	fd    int
	mu    sync.Mutex
	heard map[string]bool
	ended atomic.Bool
	done  chan struct{}
}

func (c *crossing) sniff(n int) *sniffer {
	c.t.Helper()
	if n == 0 {
		return sniff(c.t, c.isps[n].ns, "lan") // the link stays, so that what comes to the provider from the internet does not count
	}
	return sniff(c.t, c.isps[n].ns, "")
}

// sniff notes what comes in by a link of a namespace; "": by any.
func sniff(t *testing.T, ns *nettest.Namespace, link string) *sniffer {
	t.Helper()
	s := &sniffer{heard: make(map[string]bool), done: make(chan struct{})}
	var err error
	ns.Do(func() {
		const all = 3 << 8 // ETH_P_ALL, in network order
		if s.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, all); err != nil {
			return
		}
		lookUp := unix.Timeval{Usec: 100_000} // whether it has been stopped
		if err = unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &lookUp); err != nil || link == "" {
			return
		}
		var lan *net.Interface
		if lan, err = net.InterfaceByName(link); err == nil {
			err = unix.Bind(s.fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: lan.Index})
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	go s.read()
	return s
}

func (s *sniffer) read() {
	defer close(s.done)
	buf := make([]byte, 65536)
	for {
		size, from, err := unix.Recvfrom(s.fd, buf, 0)
		switch {
		case s.ended.Load():
			return
		case err == unix.EAGAIN || err == unix.EINTR || err == unix.ENETDOWN:
			continue
		case err != nil:
			return
		}
		if to, ok := from.(*unix.SockaddrLinklayer); !ok || to.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		if line := packetLine(buf[:size]); line != "" {
			s.mu.Lock()
			s.heard[line] = true
			s.mu.Unlock()
		}
	}
}

func (s *sniffer) stop() (lines []string) {
	s.ended.Store(true)
	<-s.done // the descriptor's number may be used again as soon as it is closed
	unix.Close(s.fd)
	s.mu.Lock()
	defer s.mu.Unlock()
	for line := range s.heard {
		lines = append(lines, line)
	}
	return lines
}

// packetLine is "source > destination protocol" of a packet of IP, or empty.
func packetLine(p []byte) string {
	var src, dst netip.Addr
	var protocol byte
	var rest []byte
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		src, dst, protocol, rest = netip.AddrFrom4([4]byte(p[12:])), netip.AddrFrom4([4]byte(p[16:])), p[9], p[min(len(p), int(p[0]&15)*4):]
	case len(p) >= 40 && p[0]>>4 == 6:
		src, dst, protocol, rest = netip.AddrFrom16([16]byte(p[8:])), netip.AddrFrom16([16]byte(p[24:])), p[6], p[40:]
	default:
		return ""
	}
	const hopByHop, reset, ack, unreachable4, unreachable6 = 0, 4, 16, 3, 1
	switch {
	case src.String() == internet, src.String() == internet6: // from the other side
		return ""
	case protocol == unix.IPPROTO_ICMP && len(rest) > 0 && rest[0] == unreachable4, protocol == unix.IPPROTO_ICMPV6 && len(rest) > 0 && rest[0] == unreachable6:
		return ""
	case protocol == unix.IPPROTO_IGMP, protocol == hopByHop && src.Is6(), src.Is6() && src.IsUnspecified():
		return ""
	case protocol == unix.IPPROTO_ICMPV6 && len(rest) > 0 && rest[0] >= 130 && rest[0] <= 143:
		return ""
	case protocol == unix.IPPROTO_TCP && len(rest) > 13 && (rest[13]&reset != 0 || rest[13] == ack):
		return ""
	}
	port := uint16(0)
	if len(rest) > 3 {
		port = binary.BigEndian.Uint16(rest[2:])
	}
	return fmt.Sprintf("%s > %s protocol %d port %d", src, dst, protocol, port)
}
