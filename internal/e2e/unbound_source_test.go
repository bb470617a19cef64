package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// TestUnboundSource: traffic that is bound to nothing has the source that it has on a host with main's routes: not that of the address
// which was on the link first, as a virtual one may be. Both where the default route is moved and where a watch chooses an uplink.
func TestUnboundSource(t *testing.T) {
	t.Parallel()
	for _, use := range []bool{false, true} {
		t.Run(fmt.Sprintf("chosen %v", use), func(t *testing.T) {
			h := newHost(t)
			h.link("wan0", "10.77.0.200/32", "10.77.0.2/24")
			h.link("wan1", "10.78.0.2/24")
			h.ns.IP(t, "address add 192.0.2.9/32 dev lo")
			h.ns.IP(t, "route add default via 10.77.0.1 dev wan0 metric 5")
			h.ns.IP(t, "route add default via 10.78.0.1 dev wan1 metric 50")
			h.serve()
			h.watch("--routes", map[bool]string{false: "move", true: "copy"}[use])
			for _, addr := range []string{"10.77.0.200", "10.77.0.2", "10.78.0.2"} {
				h.served(addr)
			}
			if use {
				if r := h.run(bin(t, clientBin), "uplinks", "use", "wan0"); r.code != 0 {
					t.Fatalf("uplinks use: %+v", r)
				}
			}
			want := func(source string) {
				t.Helper()
				eventually(t, "unbound traffic has "+source, func() error {
					if got := h.ns.IP(t, "route get 9.9.9.9"); !strings.Contains(got, "via 10.77.0.1 dev wan0") || !strings.Contains(got, " src "+source+" ") {
						return fmt.Errorf("%s\n%s", got, strings.Join(h.rules(), "\n"))
					}
					return nil
				})
			}
			want("10.77.0.2")
			// As a DHCP server gives another address.
			h.ns.IP(t, "address add 10.77.0.3/24 dev wan0")
			h.ns.IP(t, "address del 10.77.0.2/24 dev wan0")
			h.ns.IP(t, "address replace 10.77.0.3/24 dev wan0")
			h.ns.IP(t, "route replace default via 10.77.0.1 dev wan0 metric 5")
			want("10.77.0.3")
			// As an administrator says.
			h.ns.IP(t, "address add 10.77.0.4/24 dev wan0")
			h.served("10.77.0.4")
			h.ns.IP(t, "route replace default via 10.77.0.1 dev wan0 metric 5 src 10.77.0.4")
			want("10.77.0.4")
			h.ns.IP(t, "route replace default via 10.77.0.1 dev wan0 metric 5 src 192.0.2.9")
			want("192.0.2.9")
			if !use { // move leaves IPv6's in main
				return
			}
			h.ns.Batch(t, "address add 2001:db8:9::9/128 dev lo nodad", "address add 2001:db8:77::2/64 dev wan0 nodad",
				"route add default via 2001:db8:77::1 dev wan0 metric 5 src 2001:db8:9::9")
			h.served("2001:db8:77::2")
			if r := h.run(bin(t, clientBin), "uplinks", "use", "wan0"); r.code != 0 {
				t.Fatalf("uplinks use: %+v", r)
			}
			eventually(t, "the route of the choice has the source of main's", func() error {
				if got := h.ns.IP(t, "-6 route get 2600::9"); !strings.Contains(got, " proto 116 src 2001:db8:9::9 metric 1 ") {
					return fmt.Errorf("%s", got)
				}
				return nil
			})
		})
	}
}
