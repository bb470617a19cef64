package e2e

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// option is the command that sets an option of a socket to a number of four bytes, in network order if big.
func option(name string, level, option, value int, big bool) string {
	b := []byte{byte(value), byte(value >> 8), byte(value >> 16), byte(value >> 24)}
	if big {
		b = []byte{b[3], b[2], b[1], b[0]}
	}
	return fmt.Sprintf("option %s %d,%d,%x", name, level, option, b)
}

func (c *crossing) ifindex(link string) (index int) {
	c.t.Helper()
	if _, err := fmt.Sscanf(c.ns.IP(c.t, "-o link show dev "+link), "%d:", &index); err != nil {
		c.t.Fatal(err)
	}
	return index
}

// TestLockNoUplink: what a program binds to an address that no uplink has, as of a bridge for containers, does not leave,
// whether its own link is up or not. The kernel makes no subflow by another uplink.
func TestLockNoUplink(t *testing.T) {
	c := newCrossing(t)
	for _, args := range []string{
		"link add docker0 type bridge", "link set docker0 up", "address add 172.17.0.1/16 dev docker0", "address add fd17::1/64 dev docker0 nodad",
		"address add 203.0.113.5/32 dev lo", "address add 2001:db8:5::5/128 dev lo",
	} {
		c.ns.IP(t, args)
	}
	p := c.bound("wan1")
	try := func(refusal string) {
		t.Helper()
		c.nothing(func() {
			for _, s := range [][3]string{
				{"4", "172.17.0.1", far4}, {"6", "[fd17::1]", far6}, {"4", "203.0.113.5", far4}, {"6", "[2001:db8:5::5]", far6}, {"6", "[::ffff:172.17.0.1]", mapped4},
			} {
				p.want(refusal, "new u udp%s\nbind u %s:0\nask u %s", s[0], s[1], s[2])
				for _, kind := range []string{"tcp", "mptcp"} {
					p.want("ok", "new s %s%s\nbind s %s:0", kind, s[0], s[1])
					if answer := p.do("start s %s", s[2]); answer != "timeout" && answer != refusal {
						t.Errorf("%s%s from %s: %s", kind, s[0], s[1], answer)
					}
					p.want("ok", "close s")
				}
			}
		})
	}
	try("EPERM")

	for n := range c.isps {
		inet, inet6 := at(n)
		for _, addr := range []string{inet, inet6} {
			c.ns.IP(t, fmt.Sprintf("mptcp endpoint add %s dev wan%d subflow", addr, n))
		}
	}
	for _, far := range [][2]string{{"4", far4}, {"6", far6}} {
		c.only(1, func() {
			p.want("ok", "new s mptcp%s\nconnect s %s", far[0], far[1])
			for range 5 { // subflows come with data
				p.do("ask s")
			}
			p.want("ok", "close s")
		})
	}

	c.ns.IP(t, "link set wan1 down")
	c.blocked(p, "4", "6")
	try("ENETUNREACH")
}

// TestLockOtherLink: IPv4 takes a destination for a neighbour on a link that a socket names. Where somebody answers for
// the whole internet, or the link needs no ARP, nothing leaves all the same.
func TestLockOtherLink(t *testing.T) {
	c := newCrossing(t)
	p := c.bound("wan1")
	other := c.ifindex("wan0")
	try := func() {
		t.Helper()
		c.nothing(func() {
			p.want("EPERM", "new s udp4\ndevice s wan0\nask s %s", far4)
			p.want("EPERM", "new s udp4\n%s\nask s %s", option("s", unix.SOL_IP, 50, other, true), far4) // IP_UNICAST_IF
			p.want("ENETUNREACH", "new s udp6\ndevice s wan0\nask s %s", far6)
			p.want("ENETUNREACH", "new s udp6\n%s\nask s %s", option("s", unix.SOL_IPV6, unix.IPV6_UNICAST_IF, other, true), far6)
			p.want("ok", "new s tcp4\ndevice s wan0")
			if answer := p.do("start s %s", far4); answer != "timeout" {
				t.Errorf("TCP: %s", answer)
			}
			p.want("ok", "close s")
		})
	}
	sysctl(t, c.isps[0].ns, "net/ipv4/conf/all/proxy_arp", "1")
	try()
	c.ns.IP(t, "link set wan0 arp off")
	try()
}

// TestLockMulticast: the routes of table local come before all rules. What they lead to another link does not leave.
func TestLockMulticast(t *testing.T) {
	c := newCrossing(t)
	p := c.bound("wan1")
	own, other := c.ifindex("wan1"), c.ifindex("wan0")
	try := func(n int) {
		t.Helper()
		c.nothing(func() {
			for _, to := range []string{"[ff02::fb]:5353", "[ff05::c]:1900", "[ff0e::c]:1900"} {
				p.do("new s udp6")
				p.want("ok", "%s", option("s", unix.SOL_IPV6, unix.IPV6_MULTICAST_IF, other, false))
				if answer := p.do("send s %s", to); answer == "ok" {
					t.Errorf("%s by the other link", to)
				}
				p.want("ok", "close s")
			}
			for _, to := range []string{"10.1.0.255:137", "255.255.255.255:67"} {
				p.want("ok", "new s udp4\n%s\n%s", option("s", unix.SOL_SOCKET, unix.SO_BROADCAST, 1, false), option("s", unix.SOL_IP, 50, other, true))
				if answer := p.do("send s %s", to); answer == "ok" {
					t.Errorf("%s by the other link", to)
				}
				p.want("ok", "close s")
			}
			p.want("ok", "new s udp4\n%s", option("s", unix.SOL_IP, unix.IP_MULTICAST_IF, 10<<24|1<<16|2, true))
			if answer := p.do("send s 239.255.255.250:1900"); answer == "ok" {
				t.Error("multicast by the address of the other link")
			}
		})
		if n < 0 {
			return
		}
		c.only(n, func() {
			p.want("ok", "new s udp4\nsend s 239.255.255.250:1900")
			p.want("ok", "new s udp6\n%s\nsend s [ff02::fb]:5353", option("s", unix.SOL_IPV6, unix.IPV6_MULTICAST_IF, own, false))
		})
	}
	try(1)
	c.ns.IP(t, "link set wan1 down")
	c.blocked(p, "4", "6")
	try(-1)
}

// TestLockAttached: sockets from before attach belong to the cgroup that the process was in. What they send by another link,
// or with another source, does not leave either, until nothing of that cgroup is bound any more.
func TestLockAttached(t *testing.T) {
	c := newCrossing(t)
	inet0, inet60 := at(0)
	inet1, inet61 := at(1)
	p, neighbour := c.prober(), c.prober()
	sysctl(t, c.isps[0].ns, "net/ipv4/conf/all/proxy_arp", "1")
	sockets := []string{"plain4", "plain6", "link4", "link6", "address4", "address6", "front4", "front6", "mark4", "mark6", "join4", "join6"}
	for _, s := range sockets {
		p.want("ok", "new %s udp%s", s, s[len(s)-1:])
	}
	c.must("attach", "wan1", strconv.Itoa(c.pidOf(p)))
	other := c.ifindex("wan0")
	c.nothing(func() {
		p.want("ok", "%s", option("plain6", unix.SOL_IPV6, unix.IPV6_MULTICAST_IF, other, false))
		p.want("EPERM", "send plain6 [ff02::fb]:5353")
		p.want("ok", "%s", option("link4", unix.SOL_IP, unix.IP_UNICAST_IF, other, true))
		p.want("EPERM", "send link4 %s", far4)
		p.want("ok", "%s", option("link6", unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, other, false))
		if answer := p.do("send link6 %s", far6); answer == "ok" {
			t.Error("it left by the other link")
		}
		p.want("ok", "bind address4 %s:0\nbind address6 [%s]:0", inet0, inet60)
		p.want("EPERM", "send address4 %s", far4)
		p.want("EPERM", "send address6 %s", far6)
	})
	c.only(1, func() { p.want(inet61, "ask plain6 %s", far6) })
	c.only(1, func() { // a mark of the program's own takes nothing off, and a group is joined on the link
		p.want(inet1, "setmark mark4 0\nask mark4 %s", far4)
		p.want(inet61, "setmark mark6 0x99\nask mark6 %s", far6)
		p.want("ok", "option join4 %d,%d,ef01020300000000", unix.SOL_IP, unix.IP_ADD_MEMBERSHIP)
		p.want("ok", "option join6 %d,%d,ff05%028x00000000", unix.SOL_IPV6, unix.IPV6_JOIN_GROUP, 0x1234)
	})
	for link, want := range map[string]bool{"wan0": false, "wan1": true} {
		joined := c.ns.IP(t, "maddress show dev "+link)
		for _, group := range []string{"239.1.2.3", "ff05::1234"} {
			if strings.Contains(joined, group) != want {
				t.Errorf("%s on %s: %v", group, link, !want)
			}
		}
	}
	for _, args := range []string{"-4 rule add not fwmark 51820 table main", "-6 rule add not fwmark 51820 table main"} {
		c.ns.IP(t, args)
	}
	c.nothing(func() {
		p.want("EPERM", "send front4 %s", far4)
		p.want("EPERM", "send front6 %s", far6)
	})
	c.only(0, func() { // nobody else in that cgroup is concerned
		neighbour.want(inet0, "new s udp4\nask s %s", far4)
		neighbour.want(inet60, "new s6 udp6\nask s6 %s", far6)
	})
	c.must("detach", strconv.Itoa(c.pidOf(p)))
	c.only(0, func() { p.want(inet0, "ask front4 %s", far4) })
}

// TestLockInFront: rules that somebody puts before all others, as wg-quick does, get nothing of what is bound.
func TestLockInFront(t *testing.T) {
	c := newCrossing(t)
	p := c.bound("wan1")
	c.leaves(p, 1)
	for _, args := range []string{
		"tuntap add wg0 mode tun", "link set wg0 up", "address add 10.99.0.2/32 dev wg0", "address add fd99::2/128 dev wg0 nodad",
		"route add default via 10.1.0.1 table 51820", "-6 route add default via fd01::1 dev wan0 table 51820",
		"-4 rule add not fwmark 51820 table 51820", "-6 rule add not fwmark 51820 table 51820",
	} {
		c.ns.IP(t, args)
	}
	c.nothing(func() {
		for _, far := range [][2]string{{"4", far4}, {"6", far6}} {
			p.want("EPERM", "new s udp%s\nask s %s", far[0], far[1])
			p.want("EPERM", "new s raw%s\nask s %s", far[0], far[1])
			p.want("ok", "new s tcp%s", far[0])
			p.do("start s %s", far[1])
			p.want("ok", "close s")
		}
	})
	const named = "not from all fwmark 0xca6c lookup 51820"
	bound := func(words ...string) { // that bound says, in whatever lines
		t.Helper()
		r := c.do("bound")
		text := strings.Join(strings.Fields(r.stdout), " ")
		for _, want := range words {
			if r.code != 1 || !strings.Contains(text, want) {
				t.Errorf("bound: %+v, want %q", r, want)
			}
		}
	}
	bound(named, "Table = off")
	if r := c.do("run", "--ifname", "wan1", "true"); r.code != 0 || !strings.Contains(r.stderr, named) {
		t.Errorf("run: %+v", r)
	}
	c.ns.IP(t, "-4 rule del not fwmark 51820 table 51820")
	bound(named, "inet6")
	c.ns.IP(t, "-6 rule del not fwmark 51820 table 51820")
	// Rules that take nothing of it are not blamed: of a tunnel without a default, of other marks, of main's networks.
	for _, args := range []string{
		"route add 100.64.0.0/10 dev wg0 table 52", "rule add pref 5270 lookup 52", "rule add pref 5210 fwmark 0x80000/0xff0000 lookup main",
		"rule add pref 5300 table main suppress_prefixlength 0", "rule add pref 5310 from 192.0.2.0/24 lookup main", "rule add pref 5320 iif wan0 lookup main",
	} {
		c.ns.IP(t, args)
	}
	if r := c.do("bound"); r.code != 0 {
		t.Errorf("bound, and nothing is in front: %+v", r)
	}
	c.waitLeaves(p, 1)
	// An exit node takes all, and so does who lets nothing out.
	c.ns.IP(t, "route add default dev wg0 table 52")
	bound("5270: from all lookup 52")
	c.ns.IP(t, "route del default dev wg0 table 52")
	c.ns.IP(t, "-6 rule add pref 5400 prohibit")
	bound("5400: from all prohibit")
}

// TestLockReplug: a link that is removed and added again has another ifindex. While nobody follows it nothing leaves by
// the link, or another one; and the next command, or watch, opens it.
func TestLockReplug(t *testing.T) {
	c := newCrossingAlone(t)
	c.serve()
	watch := c.watch("--routes", "copy")
	c.waitTables(0)
	c.waitTables(1)
	p := c.bound("wan1")
	c.leaves(p, 1)

	replug := func() {
		c.ns.IP(t, "link del wan1")
		c.connect(1)
		c.address(1)
	}
	before := c.ifindex("wan1")
	began := time.Now()
	replug()
	if c.ifindex("wan1") == before {
		t.Fatal("the link has the same ifindex")
	}
	c.waitLeaves(p, 1)
	t.Logf("open again after %v", time.Since(began).Round(time.Millisecond))

	watch.kill()
	replug()
	for _, rule := range c.allRules() { // what a watch would do but for the lock
		f := strings.Fields(rule)
		if f[0] == "9002:" {
			table := f[len(f)-3]
			_, err4 := c.ns.Output("ip", "route", "replace", "default", "via", "10.2.0.1", "dev", "wan1", "table", table)
			_, err6 := c.ns.Output("ip", "-6", "route", "replace", "default", "via", "fd02::1", "dev", "wan1", "table", table)
			if err := errors.Join(err4, err6); err != nil {
				t.Fatal(err)
			}
		}
	}
	c.nothing(func() {
		for _, far := range [][2]string{{"4", far4}, {"6", far6}} {
			p.want("EPERM", "new s udp%s\nask s %s", far[0], far[1])
		}
	})
	r := c.do("run", "--ifname", "wan1", "true")
	if r.code != 0 || !strings.Contains(r.stderr, "plugged in again") {
		t.Errorf("run beside no holder: %+v", r)
	}
	c.leaves(p, 1)
	replug()
	c.watch("--routes", "copy")
	c.waitLeaves(p, 1)
}

// TestLockLocal: containers and published ports are reached from a bound program, networks of uplinks and tunnels are
// not, and no multicast leaves there.
func TestLockLocal(t *testing.T) {
	c := newCrossing(t, "--ifname", "wan*")
	ct := nettest.New(t, "ct")
	nettest.Veth(t, c.ns, "ct0", ct, "eth0")
	for _, args := range []string{"address add 172.17.0.1/16 dev ct0", "address add fd17::1/64 dev ct0 nodad", "tuntap add tun0 mode tun",
		"link set tun0 up", "address add 10.9.0.1/24 dev tun0"} {
		c.ns.IP(t, args)
	}
	for _, args := range []string{"address add 172.17.0.2/16 dev eth0", "address add fd17::2/64 dev eth0 nodad", "route add default via 172.17.0.1",
		"-6 route add default via fd17::1"} {
		ct.IP(t, args)
	}
	ct.Do(func() {
		serveWho(t, "172.17.0.2:7")
		serveWho(t, "[fd17::2]:7")
	})
	sysctl(t, c.ns, "net/ipv4/ip_forward", "1")
	sysctl(t, c.ns, "net/ipv4/conf/all/route_localnet", "1")
	const nat = `table inet engine {
	chain out {
		type nat hook output priority -100
		ip daddr { 127.0.0.1, 10.1.0.2 } tcp dport 8080 dnat ip to 172.17.0.2:7
		ip6 daddr fd01::2 tcp dport 8080 dnat ip6 to [fd17::2]:7
	}
	chain post {
		type nat hook postrouting priority 100
		ip saddr 127.0.0.0/8 oifname ct0 masquerade
	}
}`
	r := c.run("sh", "-c", `echo "$0" | nft -f -`, nat)
	if r.code != 0 {
		t.Fatalf("nft: %+v", r)
	}
	local := func() (rules []string) {
		for _, rule := range c.allRules() {
			if strings.HasPrefix(rule, "8990:") {
				rules = append(rules, rule)
			}
		}
		return rules
	}
	want := func(want ...string) {
		t.Helper()
		for i, to := range want {
			want[i] = "8990: from all to " + to + " fwmark 0x2000000/0xff000000 lookup main proto 116"
		}
		eventually(t, "rules lead to local networks", func() error {
			if diff := unordered(local(), want); diff != "" {
				return errors.New(diff)
			}
			return nil
		})
	}
	p := c.bound("wan1")
	want("172.17.0.0/16", "fd17::/64")
	c.nothing(func() {
		p.want("172.17.0.1", "new s tcp4\nconnect s 172.17.0.2:7\nask s")
		p.want("fd17::1", "new s udp6\nask s [fd17::2]:7")
		p.want("172.17.0.1", "new s tcp4\nconnect s 127.0.0.1:8080\nask s")
		p.want("10.1.0.2", "new s tcp4\nconnect s 10.1.0.2:8080\nask s")
		p.want("fd01::2", "new s tcp6\nconnect s [fd01::2]:8080\nask s")
		p.want("10.2.0.2", "new s udp4\nbind s 10.2.0.2:0\nask s 172.17.0.2:7")
		p.want("EPERM", "new s udp4\ndevice s ct0\nsend s 239.255.255.250:1900")
	})
	c.leaves(p, 1)

	// A network that comes later; one that is an uplink's, also before that has its lease.
	br := nettest.New(t, "br")
	nettest.Veth(t, c.ns, "br0", br, "eth0")
	c.ns.IP(t, "address add 172.18.0.1/16 dev br0")
	want("172.17.0.0/16", "fd17::/64", "172.18.0.0/16")
	for range 3 {
		c.ns.IP(t, "address flush dev wan0 scope global")
		c.ns.IP(t, "address add 10.1.0.2/24 dev wan0")
		p.want("ECONNREFUSED", "new s tcp4\nconnect s 10.1.0.1:9") // by wan1
		if rules := strings.Join(local(), "\n"); strings.Contains(rules, "10.1.0.0/24") {
			t.Errorf("the network of an uplink is local:\n%s", rules)
		}
		c.address(0)
		c.waitTables(0)
	}
	c.ns.IP(t, "link del br0")
	want("172.17.0.0/16", "fd17::/64")

	c.must("run", "--ifname", "wan1", "--local=false", "true")
	want()
	c.nothing(func() { p.want("EPERM", "new s udp4\ndevice s ct0\nask s 172.17.0.2:7") })
	c.must("run", "--ifname", "wan1", "true")
	want("172.17.0.0/16", "fd17::/64")
	c.must("unbind", "--all")
	want()
}
