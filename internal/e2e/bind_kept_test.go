package e2e

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// TestBindKept: ways to send that are easy to break leave by the uplink: TCP Fast Open, a socket that is used again, a mark
// that others take off packets, the name server that a router announces.
func TestBindKept(t *testing.T) {
	c := newCrossing(t)
	inet, inet6 := at(1)
	p := c.bound("wan1")
	for _, far := range [][3]string{{"4", far4, inet}, {"6", far6, inet6}} {
		c.only(1, func() {
			for _, kind := range []string{"tcp", "mptcp"} {
				p.want(far[2], "new s %s%s\nfast s %s", kind, far[0], far[1])
				failed := map[string]string{"4": "10.2.0.77:0", "6": "[fd02::77]:0"}[far[0]]
				p.want("EADDRNOTAVAIL", "new s %s%s\nbind s %s", kind, far[0], failed)
				p.want(far[2], "fast s %s", far[1])
			}
			p.want(far[2], "new s udp%[1]s\nconnect s %[2]s\nunconnect s\nask s %[2]s", far[0], far[1])
			p.want(far[2], "connect s %s\nask s", far[1])
			p.want("ok", "new s tcp%s\nconnect s %s\nunconnect s", far[0], far[1])
			p.want(far[2], "connect s %s\nask s", far[1])
		})
	}

	for n, isp := range c.isps {
		isp.ns.IP(t, "address add fe80::53/64 dev lan nodad")
		isp.ns.Do(func() {
			lan, err := net.InterfaceByName("lan")
			if err != nil {
				t.Fatal(err)
			}
			serveWho(t, fmt.Sprintf("[fe80::53%%%d]:53", lan.Index)) // names are cached, whatever the namespace
		})
		if answer := p.do("new s udp6"); answer != "ok" {
			t.Fatal(answer)
		}
		if answer := p.do("ask s [fe80::53%%wan%d]:53", n); (n == 1) == (answer == "EPERM" || answer == "ENETUNREACH") {
			t.Errorf("the name server on wan%d: %s", n, answer)
		}
	}

	// What LARTC and mwan3 do: the packet's mark is that of its connection, which has none.
	const restore = `table inet m {
	chain o {
		type route hook output priority mangle
		meta mark set ct mark
	}
	chain p {
		type filter hook postrouting priority mangle
		ct mark set meta mark
	}
}`
	c.ns.Run(t, "sh", "-c", `echo "$0" | nft -f -`, restore)
	c.leaves(p, 1)
}

// TestBindSecondAddress: the second leased address of a link has a gateway of its own, and what is bound to the link and has
// that address leaves through it.
func TestBindSecondAddress(t *testing.T) {
	c := newCrossingAlone(t)
	c.serve()
	second := nettest.New(t, "second") // another router on the link's network
	bridge := c.isps[1].ns
	nettest.Veth(t, bridge, "side", second, "lan")
	for _, args := range []string{"link add bridge0 type bridge", "link set bridge0 up", "link set lan master bridge0", "link set side master bridge0",
		"address flush dev lan", "address add 10.2.0.1/24 dev bridge0", "address add fd02::1/64 dev bridge0 nodad", "address add 10.22.0.254/24 dev bridge0"} {
		bridge.IP(t, args)
	}
	second.IP(t, "address add 10.22.0.1/24 dev lan")
	second.IP(t, "address add "+internet+"/32 dev lo")
	second.Do(func() { serveWho(t, far4) })
	c.ns.IP(t, "address add 10.22.0.2/24 dev wan1")
	c.address(1)
	inet, _ := at(1)
	c.lease(inet, "wan1", "--routes", "copy")
	c.lease("10.22.0.2", "wan1", "--routes", "copy", "--gateway", "10.22.0.1")
	p := c.bound("wan1")
	heard := sniff(t, second, "lan")
	eventually(t, "the second gateway answers", func() error {
		if answer := p.do("new s udp4"); answer != "ok" {
			return errors.New(answer)
		}
		p.want("ok", "bind s 10.22.0.2:0")
		if answer := p.do("try s %s", far4); answer != "10.22.0.2" {
			return errors.New(answer)
		}
		return nil
	})
	p.want("10.22.0.2", "new s tcp4\nbind s 10.22.0.2:0\nconnect s %s\nask s", far4)
	p.want(inet, "new s udp4\nbind s %s:0\nask s %s", inet, far4)
	for _, line := range heard.stop() {
		if !strings.HasPrefix(line, "10.22.0.2 > "+internet) {
			t.Errorf("the second gateway heard %s", line)
		}
	}
}

// TestBindPathMTU: a bound program hears of a router behind its uplink that takes smaller packets only, and its data arrives.
func TestBindPathMTU(t *testing.T) {
	c := newCrossing(t)
	const send = `
import fcntl, socket, struct, sys, time
six = ":" in sys.argv[1]
s = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_STREAM)
s.connect((sys.argv[1], 7))
s.sendall(b"x" * 20000)
while struct.unpack("i", fcntl.ioctl(s, 0x5411, bytes(4)))[0]: time.sleep(.02) # SIOCOUTQ
print(s.getsockopt(socket.IPPROTO_IPV6, 24) if six else s.getsockopt(socket.IPPROTO_IP, 14))` // IPV6_MTU, IP_MTU
	c.isps[1].ns.IP(t, "link set net mtu 1300")
	for _, far := range []string{internet, internet6} {
		c.only(1, func() {
			cmd := c.here(bin(t, clientBin), "run", "wan1", "python3", "-c", send, far)
			if r := c.run(cmd.Args[0], cmd.Args[1:]...); r.code != 0 || strings.TrimSpace(r.stdout) != "1300" {
				t.Errorf("%s: %+v", far, r)
			}
		})
	}
}
