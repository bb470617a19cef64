package e2e

import (
	"errors"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// Nothing leaves by another uplink for want of a route, and what main knows better than by its
// default is reached, if that is what the caller wants.
func TestIPv6OnLossAndSpecificFirst(t *testing.T) {
	h := newHome(t, 2)
	const addr, container = "2001:db8:1000::20", "fd00:c::5"
	ns := nettest.New(t, "container")
	nettest.Veth(t, h.ns, "veth0", ns, "eth0")
	h.ns.IP(t, "address add fd00:c::1/64 dev veth0 nodad")
	ns.IP(t, "address add "+container+"/64 dev eth0 nodad")
	ns.IP(t, "route add default via fd00:c::1")
	ns.Do(func() { serveWho(t, net.JoinHostPort(container, "7")) })
	h.ns.IP(t, "address add "+addr+"/64 dev wan0 nodad")
	h.ns.IP(t, "address add 2001:db8:2000::20/64 dev wan1 nodad")
	h.ns.IP(t, "route add default via 2001:db8:2000::1 dev wan1")

	table := h.lease6(addr, "wan0", "--routes", "copy", "--on-loss", "block")
	h.waitRules6("10000: from "+addr+" lookup "+table+" proto 116", "10001: from "+addr+" unreachable proto 116",
		"20000: from all to 2001:db8:1000::/64 lookup "+table+" proto 116", mainFirst("2001:db8:1000::/64"),
		"91000: from all iif lo lookup "+table+" proto 116")
	for _, target := range []string{internet6, container} {
		if err := h.arrives(packet{source: addr, to: target}, addr); !errors.Is(err, syscall.ENETUNREACH) {
			t.Errorf("to %s without a route: %v", target, err)
		}
	}
	h.wantOwnOnly()
	h.advertise(0, routed6(0))
	h.waitServed(0, addr, h.routesOf(0)...)
	if err := h.arrives(packet{source: addr, to: container}, addr); err == nil {
		t.Error("packets to the container find it without --specific-first")
	}

	h.lease6(addr, "wan0", "--routes", "copy", "--on-loss", "block", "--specific-first")
	eventually(t, "packets reach the container", func() error { return h.arrives(packet{source: addr, to: container}, addr) })
	h.waitServed(0, addr, h.routesOf(0)...)
	h.client("-6", "-r", "-a", addr, "-i", "wan0")
	h.waitClean()
	h.waitRules6()
}

// A resolver on the host asks the name server of each uplink through that uplink, although both
// have the same link-local address.
func TestIPv6Dnsmasq(t *testing.T) {
	h := newHookedHome(t, 2)
	var asked [2]*process
	for n := range h.isps {
		asked[n] = h.dnsmasqAt(n, "--log-queries")
		h.ns.IP(t, fmt.Sprintf("address add %s dev %s nodad", strings.Replace(prefix6(n, 0), "::", "::20", 1), h.isps[n].ifname))
	}
	h.ns.IP(t, "address add 192.0.2.1/32 dev lo") // or getent would not ask for addresses of IPv4
	lookup := h.resolver()
	for _, n := range []int{0, 1, 0} {
		isp, addr := h.isps[n], strings.TrimSuffix(prefix6(n, 0), "/64")+"20"
		client := "table-allocator-client -6 -a " + addr + " -i " + isp.ifname
		h.sh(client + " --routes move --gateway " + router6 + "%" + isp.ifname + " --nameserver " + router6)
		h.waitServed(n, addr, h.routesOf(n)...)
		h.waitServers("server=" + router6 + "%" + isp.ifname + "@" + addr)
		var name string
		eventually(t, "names resolve through "+isp.ifname, func() error {
			var got string
			if name, got = lookup(); got != seenAs(n).String() {
				return fmt.Errorf("answer %q", got)
			}
			return nil
		})
		asked[n].waitLog(name + " from " + addr)
		h.sh(client + " -r")
		h.waitServers()
	}
	h.wantOwnOnly()
}

// Without a server of tables main has the routes, and the table once there is one; a process
// that is killed leaves all to the next one, or to -r.
func TestIPv6WithoutServer(t *testing.T) {
	h := newHost(t)
	h.link("wan0")
	const addr = "fd00:db8::2" // unique local addresses are like others
	h.ns.IP(t, "address add "+addr+"/64 dev wan0 nodad")
	call := []string{"--routes", "move", "--gateway", "fe80::1", "--gateway", "fd00:db8::1"}
	if got := h.lease6(addr, "wan0", call...); got != "0" {
		t.Fatalf("table without a server: got %s", got)
	}
	var index int
	fmt.Sscan(h.ns.IP(t, "-o link show wan0"), &index)
	network := "fd00:db8::/64 dev wan0 proto kernel metric 256"
	h.waitRoutes6("main", network, fmt.Sprintf("default via fe80::1 dev wan0 proto 116 src %s metric %d", addr, 1024+index),
		fmt.Sprintf("default via fd00:db8::1 dev wan0 proto 116 src %s metric %d", addr, 1024+index+1))
	h.serve()
	rules := []string{"10000: from " + addr + " lookup 10000 proto 116", "20000: from all to fd00:db8::/64 lookup 10000 proto 116",
		mainFirst("fd00:db8::/64"), "91000: from all iif lo lookup 10000 proto 116", "91001: from all lookup 10000 proto 116"}
	h.waitRules6(rules...)
	ours := " dev wan0 proto 116 src " + addr + " metric "
	want := []string{"fd00:db8::/64" + ours + "256", "default via fe80::1" + ours + "1024", "default via fd00:db8::1" + ours + "1025"}
	h.waitRoutes6("10000", want...)
	h.waitRoutes6("main", network)
	const static = "fd00:9::/32 via fd00:db8::9 dev wan0 metric 1024"
	h.ns.IP(t, "route add fd00:9::/32 via fd00:db8::9 dev wan0")
	want = append(want, "fd00:9::/32 via fd00:db8::9"+ours+"1024")
	h.waitRoutes6("10000", want...)
	h.waitRoutes6("main", network, static)

	h.signalClients(syscall.SIGKILL)
	h.waitNoClient()
	h.lease6(addr, "wan0", call...)
	h.waitRoutes6("10000", want...)
	h.waitRules6(rules...)
	h.signalClients(syscall.SIGKILL)
	h.waitNoClient()
	h.client("-r", "-6", "-a", addr, "-i", "wan0")
	h.waitClean()
	h.waitRules6()
	h.waitRoutes6("10000")
	h.waitRoutes6("main", network, static) // what it had: the gateways were the caller's
}

// A link that goes down takes its IPv6 addresses along, or with the kernel's setting for it
// their routes only. Both find their table again.
func TestIPv6Flap(t *testing.T) {
	h := newHost(t)
	h.link("wan0")
	h.ns.IP(t, "address add 2001:db8::2/64 dev wan0 nodad")
	h.serve()
	h.lease6("2001:db8::2", "wan0", "--routes", "move", "--gateway", "fe80::1")
	want := []string{"2001:db8::/64 dev wan0 proto 116 src 2001:db8::2 metric 256", "default via fe80::1 dev wan0 proto 116 src 2001:db8::2 metric 1024"}
	h.waitRoutes6("10000", want...)
	h.ns.IP(t, "link set wan0 down")
	h.waitRules6()
	h.ns.IP(t, "link set wan0 up")
	h.ns.IP(t, "address add 2001:db8::2/64 dev wan0")
	h.waitRoutes6("10000", want...)
	h.waitRules6(moveRules6Of2...)

	sysctl(t, h.ns, "net/ipv6/conf/wan0/keep_addr_on_down", "1")
	h.ns.IP(t, "route add 2001:db8:9::/48 via 2001:db8::9 dev wan0")
	want = append(want, "2001:db8:9::/48 via 2001:db8::9 dev wan0 proto 116 src 2001:db8::2 metric 1024")
	h.waitRoutes6("10000", want...)
	for range 3 {
		h.ns.IP(t, "link set wan0 down")
		h.ns.IP(t, "link set wan0 up")
		h.waitRoutes6("10000", want...)
	}
	h.ns.IP(t, "link set wan0 down")
	h.waitRoutes6("10000")
	h.ns.IP(t, "link set wan0 up")
	h.waitRoutes6("10000", want...)
	h.waitRules6(moveRules6Of2...)
}

// Names of routers that are no numbers, or lead elsewhere, and prefixes that are none.
func TestIPv6WrongArguments(t *testing.T) {
	h := newHost(t)
	h.link("wan0")
	h.serve()
	for _, args := range []string{"-a fe80::2", "-a fe80::2%wan0", "-a ff02::1", "-a ::1", "-a ::", "-a 2001:db8::2 -n 129",
		"-a 2001:db8::2 --gateway 192.0.2.1 --routes copy", "-a 2001:db8::2 --prefix 192.0.2.0/24",
		"-a 2001:db8::2 --prefix 2001:db8:1::/56 --priority 4294967293,2,3", "-a 2001:db8::2 --nameserver 192.0.2.53"} {
		cmd := exec.Command(bin(t, clientBin), append([]string{"-6", "-i", "wan0"}, strings.Fields(args)...)...)
		r := h.run(cmd.Path, cmd.Args[1:]...)
		if r.code != 1 || r.stdout != "" || strings.Count(r.stderr, "\n") != 1 {
			t.Errorf("%s: got %+v, want exit code 1, one line on stderr, nothing on stdout", args, r)
		}
	}
	h.waitRules6()
	h.wantLeases()
}
