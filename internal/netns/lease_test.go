package netns

import (
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
	"github.com/table-allocator/table-allocator/internal/route"
)

// TestLeaseRouters: the default routes of leases, also of those whose router is not in the network, and of those without a
// router, which leave the address.
func TestLeaseRouters(t *testing.T) {
	ns, isp := nettest.New(t, "inside"), nettest.New(t, "isp")
	nettest.Veth(t, ns, inner, isp, "lan")
	ns.Do(func() {
		kernel, err := route.Dial()
		if err != nil {
			t.Fatal(err)
		}
		defer kernel.Close()
		link, err := net.InterfaceByName(inner)
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range []struct{ addr, routers, routes, warning string }{
			{"192.0.2.77/25", "192.0.2.1", "default via 192.0.2.1 ", ""},
			{"192.0.2.77/25", "192.0.2.1 192.0.2.2", "default via 192.0.2.1 , default via 192.0.2.2 metric 1 ", ""},
			{"192.0.2.77/32", "192.0.2.1", "default via 192.0.2.1 onlink ", ""},
			{"192.0.2.77/25", "203.0.113.1", "default via 203.0.113.1 onlink ", ""},
			{"192.0.2.77/25", "0.0.0.0 192.0.2.77 192.0.2.1", "default via 192.0.2.1 metric 2 ", ""},
			{"192.0.2.78/25", "", "", "names no router"},
			{"192.0.2.78/25", "127.0.0.1", "", "127.0.0.1"}, // the kernel refuses the route
		} {
			var text strings.Builder
			c := dhcpClient{kernel: kernel, link: link, log: slog.New(slog.NewTextHandler(&text, nil)), lease: dhcpLease{addr: netip.MustParsePrefix(l.addr)}}
			for _, router := range strings.Fields(l.routers) {
				c.lease.routers = append(c.lease.routers, netip.MustParseAddr(router))
			}
			if err := c.install(); err != nil {
				t.Errorf("%+v: %v", l, err)
			}
			var have []string
			for line := range strings.Lines(ns.Run(t, "ip", "-4", "route", "show", "default")) {
				line = strings.ReplaceAll(strings.TrimSpace(line)+" ", "dev "+inner+" ", "")
				have = append(have, strings.ReplaceAll(line, "proto 116 ", ""))
			}
			if got := strings.Join(have, ", "); got != l.routes || !strings.Contains(text.String(), l.warning) ||
				strings.Contains(text.String(), "WARN") != (l.warning != "") {
				t.Errorf("%+v: have %q, said %s", l, got, text.String())
			}
			if got := ns.Run(t, "ip", "-4", "-o", "addr", "show", "dev", inner); strings.Count(got, "inet ") != 1 || !strings.Contains(got, l.addr) {
				t.Errorf("%+v: addresses %s", l, got)
			}
		}
	})
}
