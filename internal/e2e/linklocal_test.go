package e2e

import (
	"strings"
	"testing"
)

// TestLinkLocalUplink: an address of 169.254.0.0/16 that main has a router for is an uplink's like any other, as soon as the route
// is there. One that a host gave itself, beside another address or with a route that names no router, is served by nobody.
func TestLinkLocalUplink(t *testing.T) {
	eachMode(t, func(t *testing.T, links string) {
		cloud := routed(1)
		cloud.network, cloud.customers, cloud.gateway = "169.254.10.0/24", "169.254.10.0/24", "169.254.10.1"
		u := newHost(t).behind(routed(0), cloud, routed(2))
		u.address(0)
		u.ns.Batch(t, "address add 169.254.7.7/16 dev wan0", "address add 169.254.9.9/16 dev wan2", "route add default dev wan2 metric 1005 scope link",
			"address add 169.254.10.2/24 dev wan1")
		u.serve()
		file := u.watchFile(`{"links": [` + links + `]}`)
		p := u.watch("--config", file)
		u.ns.IP(t, "route add default via 169.254.10.1 dev wan1 metric 200")
		for n, addr := range []string{"10.1.0.2", "169.254.10.2"} {
			u.waitStatus(addr, "ok", "") // before that, packets leave by any uplink
			u.waitUplink(n, addr)
		}

		p.kill()
		u.watch("--config", file)
		u.waitHistory("wan1", "169.254.10.2: has table 1000")
		u.ns.IP(t, "address add 10.1.0.3/24 dev wan0") // what comes last is served last
		u.served("10.1.0.3")
		u.waitUplink(1, "169.254.10.2")
		u.notServed("169.254.7.7")
		u.notServed("169.254.9.9")
		u.waitStatus("169.254.9.9", "no-router", "")
		if r := u.run(bin(t, clientBin), "doctor", "-c", file); !strings.Contains(r.stdout, "169.254.9.9 on wan2: not served: main has no router for it") || strings.Contains(r.stdout, "169.254.7.7") {
			t.Errorf("doctor: %+v", r)
		}
	})
}
