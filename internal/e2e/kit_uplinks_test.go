package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// A provider is the far end of an uplink. It forwards packets of its customers to the internet, drops
// packets with a source that it has not given out, and counts both.
type provider struct {
	ifname     string   // of the host's link to it
	network    string   // the IPv4 network of that link
	gateway    string   // the IPv4 address of its router on that link
	customers  string   // the IPv4 addresses that it gives out
	customers6 string   // the IPv6 addresses that it gives out
	routers6   []string // the IPv6 addresses of its routers, with the length of their networks
	nat        bool     // the internet sees seenAs instead of the IPv4 addresses of customers
	ns         *nettest.Namespace
}

const (
	internet  = nettest.Far4 // behind all providers
	internet6 = nettest.Far6
	echoPort  = 7
)

// uplinks is a host behind providers. The internet behind the providers answers each packet with the
// source address of the packet.
type uplinks struct {
	*host
	isps     []provider
	internet *nettest.Internet
}

// behind puts a host behind providers. Its links to them are up and have no addresses.
func (h *host) behind(isps ...provider) *uplinks {
	h.t.Helper()
	t, u := h.t, &uplinks{host: h, isps: isps}
	routers := make([]*nettest.Provider, len(isps))
	for n, isp := range isps {
		routers[n] = &nettest.Provider{Ifname: isp.ifname, Routers: []string{isp.gateway + "/24"}}
		if !isp.nat {
			routers[n].Routed = append(routers[n].Routed, isp.customers)
		}
		if len(isp.routers6) > 0 {
			routers[n].Routers = append(routers[n].Routers, isp.routers6...)
			routers[n].Routed = append(routers[n].Routed, isp.customers6)
		}
	}
	u.internet = nettest.NewInternet(t, u.ns, routers...)
	t.Cleanup(h.finish) // before the far ends are closed, which deletes the links
	u.internet.Do(func() {
		serveWho(t, net.JoinHostPort(internet, "7"))
		if len(isps[0].routers6) > 0 {
			serveWho(t, net.JoinHostPort(internet6, "7"))
		}
	})
	for n := range u.isps {
		u.isps[n].ns = routers[n].Namespace
		u.filter(n)
	}
	return u
}

// connect makes the link to provider n again.
func (u *uplinks) connect(n int) {
	u.t.Helper()
	u.internet.Plug(u.t, n)
}

// filter makes provider n drop and count packets. It does not count what a kernel or DHCP client sends
// by itself: DHCP without a source address, neighbour discovery, and TCP acknowledgements.
func (u *uplinks) filter(n int) {
	u.t.Helper()
	isp := u.isps[n]
	text := fmt.Sprintf(`
		table inet provider {
			counter foreign {}
			counter customers {}
			counter customers6 {}
			set strangers { type ipv4_addr . ipv4_addr; flags dynamic; size 1024; counter; }
			set strangers6 { type ipv6_addr . ipv6_addr; flags dynamic; size 1024; counter; }
			chain raw {
				type filter hook prerouting priority raw
				iifname != lan accept
				ip saddr { 0.0.0.0, %[1]s } accept comment "DHCP, and the router's own broadcasts"
				ip6 saddr { ::, fe80::/10 } accept
				ip6 saddr %[3]s icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
				ip saddr %[2]s ip protocol igmp accept comment "the kernel repeats it within 10 s"
				ip saddr %[2]s tcp flags == ack accept comment "may come late"
				ip6 saddr %[3]s tcp flags == ack accept
				ip saddr %[2]s counter name customers accept
				ip6 saddr %[3]s counter name customers6 accept
				counter name foreign
				update @strangers { ip saddr . ip daddr }
				update @strangers6 { ip6 saddr . ip6 daddr }
				drop
			}
		}`, isp.gateway, isp.customers, isp.customers6)
	if isp.nat {
		text += `
		table ip provider {
			chain out {
				type nat hook postrouting priority srcnat
				oifname net masquerade
			}
		}`
	}
	path := filepath.Join(u.dir, isp.ifname+".nft")
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		u.t.Fatal(err)
	}
	isp.ns.Run(u.t, "nft", "-f", path)
}

// routed is provider n without NAT: the internet sees the addresses of its customers.
func routed(n int) provider {
	network, network6 := fmt.Sprintf("10.%d.0.", n+1), fmt.Sprintf("fd0%d::", n+1)
	return provider{
		ifname: fmt.Sprint("wan", n), network: network + "0/24", gateway: network + "1",
		customers: network + "0/24", customers6: network6 + "/48", routers6: []string{network6 + "1/64", router6 + "/64"},
	}
}

// address adds the addresses and default routes of uplink n to the host.
func (u *uplinks) address(n int) {
	u.t.Helper()
	ifname := fmt.Sprintf("wan%d", n)
	inet, inet6 := at(n)
	for _, args := range []string{
		"address replace " + inet + "/24 dev " + ifname,
		"address replace " + inet6 + "/64 dev " + ifname + " nodad",
		fmt.Sprintf("route replace default via 10.%d.0.1 dev %s metric %d", n+1, ifname, 100*(n+1)),
		fmt.Sprintf("-6 route replace default via fd0%d::1 dev %s metric %d", n+1, ifname, 100*(n+1)),
	} {
		u.ns.IP(u.t, args)
	}
}

// at are the addresses of the host on uplink n, by family.
func at(n int) (inet, inet6 string) {
	return fmt.Sprintf("10.%d.0.2", n+1), fmt.Sprintf("fd0%d::2", n+1)
}

// seenAs is the source that the internet sees of packets through provider n with NAT.
func seenAs(n int) netip.Addr { return nettest.Transit(n) }

// serveWho answers each datagram and each piece of a stream with its source address. It listens at addr
// in the namespace of the calling thread.
func serveWho(t *testing.T, addr string) {
	t.Helper()
	streams, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	var conns sync.Map
	who := func(from net.Addr) []byte {
		host, _, err := net.SplitHostPort(from.String())
		if err != nil {
			return []byte(err.Error() + "\n")
		}
		return []byte(host + "\n")
	}
	nettest.ServeDatagrams(t, addr, func(conn net.PacketConn, _ []byte, from net.Addr) { _, _ = conn.WriteTo(who(from), from) })
	all.Go(func() {
		for {
			conn, err := streams.Accept()
			if err != nil {
				return
			}
			conns.Store(conn, nil)
			all.Go(func() {
				defer conn.Close()
				for buf := make([]byte, 64); ; {
					if _, err := conn.Read(buf); err != nil {
						return
					}
					_, _ = conn.Write(who(conn.RemoteAddr())) // as above
				}
			})
		}
	})
	t.Cleanup(func() {
		streams.Close()
		conns.Range(func(conn, _ any) bool { conn.(net.Conn).Close(); return true })
		all.Wait()
	})
}
