package e2e

import (
	"syscall"
	"testing"
)

// TestChoiceLinks: links of three uplinks fail one after the other, are renamed, unplugged and get another address, while the watch
// is killed and reads its configuration again.
func TestChoiceLinks(t *testing.T) {
	t.Parallel()
	eachMode(t, func(t *testing.T, links string) {
		c := newChooserHost(t, routed(0), routed(1), routed(2))
		for n := range c.isps {
			c.address(n)
		}
		file := c.watchFile(chooserConfig(links))
		c.watch = c.uplinks.watch("--config", file)
		c.waitUsed("wan0")
		c.fault(0, noInternet)
		c.waitUnbound(1)
		if err := c.watch.cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		c.fault(1, noGateway)
		c.waitUnbound(2)
		c.watch.kill()
		c.wantUnbound(4, 2)
		c.wantUnbound(6, 2)
		c.watch = c.uplinks.watch("--config", file)
		c.waitState("wan1", "inet", "dead")
		c.waitState("wan1", "inet6", "dead")
		c.wantUnbound(4, 2)
		c.wantUnbound(6, 2)
		c.mend(1)
		c.waitUnbound(1)
		c.mend(0)
		c.waitUnbound(0)

		c.ns.IP(t, "link set wan0 down")
		c.ns.IP(t, "link set wan0 name ta0")
		c.waitUnbound(1)
		c.ns.IP(t, "link set ta0 up")
		c.ns.IP(t, "link set ta0 name wan0")
		c.address(0)
		c.waitUnbound(0)
		c.ns.IP(t, "link del wan0")
		c.waitUnbound(1)
		c.connect(0)
		c.address(0)
		c.waitUnbound(0)
		c.ns.Batch(t, "address add 10.1.0.3/24 dev wan0", "address del 10.1.0.2/24 dev wan0", "address add 10.1.0.3/24 dev wan0",
			"route replace default via 10.1.0.1 dev wan0 metric 100")
		eventually(t, "unbound packets come from the new address", func() error { return c.arrives(packet{}, "10.1.0.3") })
		c.fault(0, noInternet)
		c.waitUnbound(1)
		c.wantOwnOnly()
	})
}
