package e2e

import (
	"fmt"
	"testing"
)

// TestWatchMacvlan: a virtual address as keepalived has it with use_vmac, on a macvlan of its own without routes, leaves by
// the gateway of the link below: the one that this has now, also where move took its routes. A macvlan with a default route
// of its own, another customer of the provider, keeps that.
func TestWatchMacvlan(t *testing.T) {
	eachMode(t, func(t *testing.T, links string) {
		u := newHost(t).behind(routed(0), routed(1))
		u.serve()
		u.watch("--config", u.watchFile(`{"links": [`+links+`]}`))
		for n := range u.isps {
			u.address(n)
		}
		for n := range u.isps { // the second one first would be the gateway of the first, too
			ifname := fmt.Sprint("vrrp.", n)
			u.ns.Batch(t, fmt.Sprintf("link add link wan%d name %s type macvlan mode private", n, ifname), "link set "+ifname+" up",
				fmt.Sprintf("address add 10.%d.0.200/32 dev %s", n+1, ifname), fmt.Sprintf("address add fd0%d::200/128 dev %s nodad", n+1, ifname))
		}
		pass := func() {
			t.Helper()
			for n := range u.isps {
				for _, addr := range []string{fmt.Sprintf("10.%d.0.200", n+1), fmt.Sprintf("fd0%d::200", n+1)} {
					eventually(t, "packets from "+addr+" pass", func() error { return u.pass(n, addr, answers) })
				}
			}
		}
		for _, addr := range []string{"10.1.0.200", "10.2.0.200", "fd01::200", "fd02::200", "10.2.0.2", "fd02::2"} {
			u.waitStatus(addr, "ok", "") // before that, packets leave by any uplink
		}
		pass()
		if r := u.run(bin(t, clientBin), "doctor", "--only", "overlap,table-empty,rule-missing"); r.code != 0 {
			t.Errorf("doctor: %+v", r)
		}
		u.isps[1].ns.IP(t, "address add 10.2.0.9/24 dev lan")
		u.ns.IP(t, "route replace default via 10.2.0.9 dev wan1 metric 200")
		u.waitFilled("10.2.0.200", "10.2.0.9 dev vrrp.1", "default via 10.2.0.9 dev vrrp.1")
		u.isps[1].ns.IP(t, "address add 10.2.0.8/24 dev lan")
		u.ns.IP(t, "route add default via 10.2.0.8 dev vrrp.1 metric 300 onlink")
		u.waitFilled("10.2.0.200", "default via 10.2.0.8 dev vrrp.1")
		pass()
		u.ns.IP(t, "link delete vrrp.1")
		eventually(t, "nothing is left of 10.2.0.200", func() error { return u.left("10.2.0.200") })
		u.waitUplink(1, "10.2.0.2")
	})
}
