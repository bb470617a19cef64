package e2e

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
)

const (
	mainNetwork = "10.77.0.0/24 dev wan0 proto kernel scope link src 10.77.0.2"
	ourNetwork  = "10.77.0.0/24 dev wan0 proto 116 scope link src 10.77.0.2"
	ourDefault  = "default via 10.77.0.1 dev wan0 proto 116 src 10.77.0.2"
)

func TestRoutesMove(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0 metric 50 mtu 1400 advmss 1300")
	h.ns.IP(t, "route add 10.99.0.0/16 via 10.77.0.254")
	h.serve()
	h.lease("10.77.0.2", "wan0", "--routes", "move")
	carried := []string{
		ourNetwork,
		"default via 10.77.0.1 dev wan0 proto 116 src 10.77.0.2 metric 50 mtu 1400 advmss 1300",
		"10.99.0.0/16 via 10.77.0.254 dev wan0 proto 116 src 10.77.0.2",
	}
	h.waitRoutes("10000", carried...)
	static := "10.99.0.0/16 via 10.77.0.254 dev wan0"
	h.waitRoutes("main", mainNetwork, static)

	// What comes later is carried over, and replaces what stood in its place.
	h.ns.IP(t, "route add 10.98.0.0/16 via 10.77.0.254 dev wan0")
	h.ns.IP(t, "route add default via 10.77.0.9 dev wan0 metric 50")
	h.waitRoutes("10000", ourNetwork, carried[2],
		"10.98.0.0/16 via 10.77.0.254 dev wan0 proto 116 src 10.77.0.2",
		"default via 10.77.0.9 dev wan0 proto 116 src 10.77.0.2 metric 50")
	h.waitRoutes("main", mainNetwork, static, "10.98.0.0/16 via 10.77.0.254 dev wan0")
	h.wantRules(moveRules("10.77.0.2", "10.77.0.0/24", 10000)...)

	// Nobody is cut off by stopping us.
	for _, pid := range h.pids(clientBin) {
		syscall.Kill(pid, syscall.SIGTERM)
	}
	h.waitClean()
	h.waitRoutes("10000")
	h.waitRoutes("main", mainNetwork, static, "10.98.0.0/16 via 10.77.0.254 dev wan0",
		"default via 10.77.0.9 dev wan0 metric 50")
}

func TestRoutesMoveLinkFlap(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	h.lease("10.77.0.2", "wan0", "--routes", "move", "--gateway", "10.77.0.1")
	h.ns.IP(t, "route add 10.99.0.0/16 via 10.77.0.254 dev wan0")
	carried := []string{ourNetwork, ourDefault, "10.99.0.0/16 via 10.77.0.254 dev wan0 proto 116 src 10.77.0.2"}
	h.waitRoutes("10000", carried...)
	for range 3 {
		h.ns.IP(t, "link set wan0 down")
		h.ns.IP(t, "link set wan0 up")
		h.waitRoutes("10000", carried...)
		h.waitRoutes("main", mainNetwork) // the kernel deleted the static route
	}
	// Slowly, too: the client sees the link down.
	h.ns.IP(t, "link set wan0 down")
	h.waitRoutes("10000")
	h.ns.IP(t, "link set wan0 up")
	h.waitRoutes("10000", carried...)
	h.waitRules(moveRules("10.77.0.2", "10.77.0.0/24", 10000)...)
}

func TestRoutesCopy(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0 proto dhcp metric 100")
	h.serve()
	h.lease("10.77.0.2", "wan0", "--routes", "copy")
	inMain := []string{mainNetwork, "default via 10.77.0.1 dev wan0 proto dhcp metric 100"}
	h.waitRoutes("10000", ourNetwork, ourDefault+" metric 100")
	h.waitRoutes("main", inMain...)
	// It follows: what comes, what changes, what goes.
	h.ns.IP(t, "route add 10.99.0.0/16 via 10.77.0.254")
	h.waitRoutes("10000", ourNetwork, ourDefault+" metric 100", "10.99.0.0/16 via 10.77.0.254 dev wan0 proto 116 src 10.77.0.2")
	h.ns.IP(t, "route del 10.99.0.0/16")
	h.waitRoutes("10000", ourNetwork, ourDefault+" metric 100")
	h.ns.IP(t, "route replace default via 10.77.0.9 dev wan0 proto dhcp metric 100")
	h.waitRoutes("10000", ourNetwork, "default via 10.77.0.9 dev wan0 proto 116 src 10.77.0.2 metric 100")
	h.ns.IP(t, "route del default")
	h.waitRoutes("10000", ourNetwork)
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0 proto dhcp metric 200")
	h.waitRoutes("10000", ourNetwork, ourDefault+" metric 200")
	// A flap takes main's default with it; the table has it again.
	h.ns.IP(t, "link set wan0 down")
	h.ns.IP(t, "link set wan0 up")
	h.waitRoutes("10000", ourNetwork, ourDefault+" metric 200")
	h.waitRoutes("main", mainNetwork)
	h.ns.IP(t, "address del 10.77.0.2/24 dev wan0")
	h.waitRules()
	h.waitRoutes("10000")
}

func TestRoutesBeforeTheAddress(t *testing.T) {
	h := newHost(t)
	h.link("wan0")
	h.serve()
	h.lease("10.77.0.2", "wan0", "-n", "24", "--routes", "move", "--gateway", "10.77.0.1", "--gateway", "10.77.0.3", "--metric", "7",
		"--route", "10.99.0.0/16,via 10.77.0.254", "--route", "10.98.0.0/16")
	// Nothing leaves from the address by another uplink before its table is filled.
	h.waitRules(append(moveRules("10.77.0.2", "10.77.0.0/24", 10000), awaited("10.77.0.2"))...)
	h.ns.IP(t, "address add 10.77.0.2/24 dev wan0")
	want := []string{ourNetwork, ourDefault + " metric 7",
		"default via 10.77.0.3 dev wan0 proto 116 src 10.77.0.2 metric 8",
		"10.99.0.0/16 via 10.77.0.254 dev wan0 proto 116 src 10.77.0.2 metric 7",
		"10.98.0.0/16 dev wan0 proto 116 scope link src 10.77.0.2 metric 7"}
	h.waitRoutes("10000", want...)
	h.waitRules(moveRules("10.77.0.2", "10.77.0.0/24", 10000)...)
	h.waitRoutes("main", mainNetwork)
	// Flushed and put back.
	h.ns.IP(t, "address flush dev wan0")
	h.waitRules()
	h.ns.IP(t, "address add 10.77.0.2/24 dev wan0")
	h.waitRules(moveRules("10.77.0.2", "10.77.0.0/24", 10000)...)
	h.waitRoutes("10000", want...)
	h.waitRoutes("main", mainNetwork)
}

func TestRoutesWithoutServer(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	if got := h.lease("10.77.0.2", "wan0", "--routes", "move", "--gateway", "10.77.0.1"); got != 0 {
		t.Fatalf("table without a server: got %d", got)
	}
	var index int
	fmt.Sscan(h.ns.IP(t, "-o link show wan0"), &index)
	h.waitRoutes("main", mainNetwork, fmt.Sprintf("%s metric %d", ourDefault, index))
	h.wantRules()
	h.serve()
	h.waitRules(moveRules("10.77.0.2", "10.77.0.0/24", 10000)...)
	h.waitRoutes("10000", ourNetwork, ourDefault)
	h.waitRoutes("main", mainNetwork)
	// The process in the background is killed, and another one takes over.
	h.ns.IP(t, "route add 10.99.0.0/16 via 10.77.0.254 dev wan0")
	carried := "10.99.0.0/16 via 10.77.0.254 dev wan0 proto 116 src 10.77.0.2"
	h.waitRoutes("10000", ourNetwork, ourDefault, carried)
	for _, pid := range h.pids(clientBin) {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	eventually(t, "it is gone", func() error {
		if pids := h.pids(clientBin); len(pids) > 0 {
			return fmt.Errorf("%d", pids)
		}
		return nil
	})
	h.lease("10.77.0.2", "wan0", "--routes", "move", "--gateway", "10.77.0.1")
	h.waitRoutes("10000", ourNetwork, ourDefault, carried)
	// Killed again, and taken back by hand.
	for _, pid := range h.pids(clientBin) {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	h.client("-r", "-4", "-a", "10.77.0.2", "-i", "wan0")
	h.waitClean()
	h.waitRoutes("10000")
	// Main has what it had: the gateway was the caller's.
	h.waitRoutes("main", mainNetwork, "10.99.0.0/16 via 10.77.0.254 dev wan0")
}

func TestRoutesToldAnew(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	servers := h.dir + "/run/servers"
	call := func(args ...string) {
		h.lease("10.77.0.2", "wan0", append([]string{"--routes", "move", "--dnsmasq-servers", servers}, args...)...)
	}
	call("--gateway", "10.77.0.1", "--nameserver", "192.0.2.53")
	h.waitRoutes("10000", ourNetwork, ourDefault)
	// As dhclient-script does.
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0")
	h.waitRoutes("main", mainNetwork)
	call("--gateway", "10.77.0.9", "--nameserver", "192.0.2.54")
	h.waitRoutes("10000", ourNetwork, "default via 10.77.0.9 dev wan0 proto 116 src 10.77.0.2")
	h.waitFile(servers, "server=192.0.2.54@10.77.0.2\n")
	if got := h.lease("10.77.0.2", "wan0"); got != 10000 {
		t.Errorf("a bare call: got table %d", got)
	}
	h.waitRoutes("10000", ourNetwork, "default via 10.77.0.9 dev wan0 proto 116 src 10.77.0.2")
	call("--classless-routes", "16 10 99 10 77 0 254 0 10 77 0 4", "--gateway", "10.77.0.1")
	h.waitRoutes("10000", ourNetwork, "default via 10.77.0.4 dev wan0 proto 116 src 10.77.0.2",
		"10.99.0.0/16 via 10.77.0.254 dev wan0 proto 116 src 10.77.0.2")
	h.waitFile(servers, "")
	eventually(t, "one process is left", func() error {
		if pids := h.pids(clientBin); len(pids) != 1 {
			return fmt.Errorf("%d", pids)
		}
		return nil
	})
}

func (h *host) waitFile(path, want string) {
	h.t.Helper()
	eventually(h.t, path+" is right", func() error {
		text, err := os.ReadFile(path)
		if err == nil && string(text) != want {
			err = fmt.Errorf("got %q, want %q", text, want)
		}
		return err
	})
}

func TestOnLossAndSpecificFirst(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.link("wan1", "10.78.0.2/24")
	h.ns.IP(t, "route add default via 10.78.0.1 dev wan1")
	h.serve()
	h.lease("10.77.0.2", "wan0", "--routes", "move", "--on-loss", "block", "--specific-first")
	h.waitRules(append(moveRules("10.77.0.2", "10.77.0.0/24", 10000),
		"9998: from 10.77.0.2 lookup main suppress_prefixlength 7 proto 116", awaited("10.77.0.2"))...)
	// There is no default in the table: nothing leaves by wan1, but main's networks are there.
	if out, err := h.ns.Output("ip", "route", "get", "198.51.100.1", "from", "10.77.0.2"); err == nil || !strings.Contains(out, "No route to host") && !strings.Contains(out, "unreachable") {
		t.Errorf("way out for a table without a route: %v, %s", err, out)
	}
	if out := h.ns.IP(t, "route get 10.78.0.7 from 10.77.0.2"); !strings.Contains(out, "dev wan1") {
		t.Errorf("way to a network of main: %s", out)
	}
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0 metric 9")
	eventually(t, "the default is carried over", func() error {
		out, err := h.ns.Output("ip", "route", "get", "198.51.100.1", "from", "10.77.0.2")
		if err != nil || !strings.Contains(out, "via 10.77.0.1 dev wan0 table 10000") {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	h.client("-r", "-4", "-a", "10.77.0.2", "-i", "wan0")
	h.waitClean()
}

func TestRoutesOfTwoAddresses(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24", "10.77.0.3/24", "10.78.0.2/24")
	h.ns.IP(t, "route add default via 10.78.0.1 dev wan0")
	h.ns.IP(t, "route add 10.99.0.0/16 via 10.77.0.254 dev wan0")
	h.ns.IP(t, "route add 10.98.0.0/16 via 10.77.0.254 dev wan0 src 10.77.0.3")
	h.serve()
	h.lease("10.77.0.2", "wan0", "--routes", "copy")
	h.lease("10.77.0.3", "wan0", "--routes", "copy")
	h.lease("10.78.0.2", "wan0", "--routes", "copy")
	// Of all that the link has, but each with its own source.
	table := func(addr string, static ...string) (want []string) {
		for _, route := range append([]string{"10.77.0.0/24 dev wan0 proto 116 scope link", "10.78.0.0/24 dev wan0 proto 116 scope link",
			"default via 10.78.0.1 dev wan0 proto 116"}, static...) {
			want = append(want, route+" src "+addr)
		}
		return want
	}
	first, second := "10.99.0.0/16 via 10.77.0.254 dev wan0 proto 116", "10.98.0.0/16 via 10.77.0.254 dev wan0 proto 116"
	h.waitRoutes("10000", table("10.77.0.2", first, second)...)
	h.waitRoutes("10001", table("10.77.0.3", first, second)...)
	h.waitRoutes("10002", table("10.78.0.2", first, second)...)
	// One goes, and main's route with its source: its table is emptied, and the others follow main.
	h.ns.IP(t, "address del 10.77.0.3/24 dev wan0")
	h.waitRoutes("10001")
	h.waitRules(append(copyRules("10.77.0.2", "10.77.0.0/24", 10000), copyRules("10.78.0.2", "10.78.0.0/24", 10002)...)...)
	h.waitRoutes("10000", table("10.77.0.2", first)...)
	h.waitRoutes("10002", table("10.78.0.2", first)...)
}

// TestRoutesMoveOfTwoAddresses: main has one default for both, and the first takes it.
func TestRoutesMoveOfTwoAddresses(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24", "10.77.0.3/24")
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0 metric 5")
	h.serve()
	h.lease("10.77.0.2", "wan0", "--routes", "move")
	h.waitRoutes("main", mainNetwork)
	h.lease("10.77.0.3", "wan0", "--routes", "move")
	second := []string{"10.77.0.0/24 dev wan0 proto 116 scope link src 10.77.0.3", "default via 10.77.0.1 dev wan0 proto 116 src 10.77.0.3 metric 5"}
	h.waitRoutes("10000", ourNetwork, ourDefault+" metric 5")
	h.waitRoutes("10001", second...)
	h.client("-r", "-4", "-a", "10.77.0.2", "-i", "wan0")
	h.waitRoutes("10000")
	h.waitRoutes("10001", second...)
	h.client("-r", "-4", "-a", "10.77.0.3", "-i", "wan0")
	h.waitClean()
	h.waitRoutes("main", mainNetwork, "default via 10.77.0.1 dev wan0 metric 5")
}

func TestRoutesOffLink(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/32")
	h.link("wan1", "10.78.0.2/32")
	h.serve()
	h.lease("10.77.0.2", "wan0", "--routes", "move", "--gateway", "192.0.2.1")
	h.waitRoutes("10000", "default via 192.0.2.1 dev wan0 proto 116 src 10.77.0.2 onlink")
	// As some DHCP clients do it: a route to the gateway first.
	h.ns.IP(t, "route add 192.0.2.1 dev wan1 scope link")
	h.ns.IP(t, "route add default via 192.0.2.1 dev wan1 metric 5")
	h.lease("10.78.0.2", "wan1", "--routes", "move")
	h.waitRoutes("10001", "192.0.2.1 dev wan1 proto 116 scope link src 10.78.0.2",
		"default via 192.0.2.1 dev wan1 proto 116 src 10.78.0.2 metric 5")
	h.waitRoutes("main", "192.0.2.1 dev wan1 scope link")
}

func TestRoutesWithoutGateway(t *testing.T) {
	h := newHost(t)
	h.ns.IP(t, "tuntap add mode tun name ppp0")
	h.ns.IP(t, "address add 10.64.64.64 peer 10.112.112.112/32 dev ppp0")
	h.ns.IP(t, "link set ppp0 up")
	h.ns.IP(t, "route add default dev ppp0 scope link")
	h.serve()
	h.lease("10.64.64.64", "ppp0", "-n", "32", "--routes", "move")
	h.waitRoutes("10000", "10.112.112.112 dev ppp0 proto 116 scope link src 10.64.64.64",
		"default dev ppp0 proto 116 scope link src 10.64.64.64")
	h.waitRoutes("main", "10.112.112.112 dev ppp0 proto kernel scope link src 10.64.64.64")
	h.waitRules(moveRules("10.64.64.64", "10.112.112.112", 10000)...) // the network is the peer
	h.ns.IP(t, "link del ppp0")
	h.waitClean()

	h.ns.IP(t, "tuntap add mode tun name wwan0")
	h.ns.IP(t, "address add 10.64.64.65/32 dev wwan0")
	h.ns.IP(t, "link set wwan0 up")
	h.lease("10.64.64.65", "wwan0", "--routes", "move", "--route", "default")
	eventually(t, "the default is there", func() error {
		for _, r := range append(h.routes("10000"), h.routes("10001")...) {
			if r == "default dev wwan0 proto 116 scope link src 10.64.64.65" {
				return nil
			}
		}
		return errors.New("it is not")
	})
}

// TestRoutesOfNextHops: of a route by several links the table has the next hop over its own link, and
// what others have in the table outlives us.
func TestRoutesOfNextHops(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.link("wan1", "10.78.0.2/24")
	h.ns.IP(t, "route add 10.99.0.0/16 nexthop via 10.77.0.254 dev wan0 nexthop via 10.78.0.254 dev wan1")
	h.ns.IP(t, "route add 10.98.0.0/16 encap ip id 7 dst 192.0.2.9 via 10.77.0.254 dev wan0")
	h.ns.IP(t, "nexthop add id 7 via 10.77.0.253 dev wan0")
	h.ns.IP(t, "route add 10.96.0.0/16 nhid 7")
	h.ns.IP(t, "route add default nexthop via 10.77.0.1 dev wan0 nexthop via 10.78.0.1 dev wan1")
	before := h.routes("main")
	h.serve()
	h.lease("10.77.0.2", "wan0", "--routes", "move")
	h.ns.IP(t, "route add table 10000 10.97.0.0/16 dev wan0") // before the lease the table would not be leased
	ours := []string{ourNetwork, ourDefault, "10.99.0.0/16 via 10.77.0.254 dev wan0 proto 116 src 10.77.0.2",
		"10.98.0.0/16 encap ip id 7 src 0.0.0.0 dst 192.0.2.9 ttl 0 tos 0 via 10.77.0.254 dev wan0 proto 116 src 10.77.0.2",
		"10.96.0.0/16 via 10.77.0.253 dev wan0 proto 116 src 10.77.0.2"}
	const theirs = "10.97.0.0/16 dev wan0 scope link"
	h.waitRoutes("10000", append([]string{theirs}, ours...)...)
	h.waitRoutes("main", before...) // a default of several links is nobody's to take
	// With the object goes the route, of which the kernel tells nobody.
	h.ns.IP(t, "nexthop del id 7")
	h.waitRoutes("10000", append([]string{theirs}, ours[:4]...)...)
	// With one of its links an IPv4 route of several goes, of which it tells nobody, either.
	h.ns.IP(t, "link del wan1")
	h.waitRoutes("10000", theirs, ourNetwork, ours[3])
	h.client("-r", "-4", "-a", "10.77.0.2", "-i", "wan0")
	h.waitClean()
	h.waitRoutes("10000", theirs)
}
