package e2e

import "testing"

// TestChoiceAddress: the address of the choice goes, and the network of the gateway with it. Another address of the link
// leads unbound traffic by the same gateway.
func TestChoiceAddress(t *testing.T) {
	eachMode(t, func(t *testing.T, links string) {
		c := newChooserHost(t, routed(0), routed(1))
		for n := range c.isps {
			c.address(n)
		}
		c.watch = c.uplinks.watch("--config", c.watchFile(`{"links": [`+links+`]}`))
		c.served("10.2.0.2")
		c.ns.IP(t, "address add 10.2.0.77/32 dev wan1")
		c.served("10.2.0.77")
		c.use("wan1")
		c.waitUnbound(1)
		c.ns.IP(t, "address del 10.2.0.2/24 dev wan1")
		eventually(t, "unbound packets come from the other address", func() error { return c.arrives(packet{}, "10.2.0.77") })
		c.wantOwnOnly()
	})
}
