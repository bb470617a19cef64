package e2e

import (
	"fmt"
	"testing"
)

// TestChoiceHastened: packets that find the gateway silent have its uplink asked at once, long before its next round.
func TestChoiceHastened(t *testing.T) {
	t.Parallel()
	for family, source := range map[string]string{"inet": "10.2.0.2", "inet6": "fd02::2"} {
		t.Run(family, func(t *testing.T) {
			c := newChooser(t, copyLinks, `"interval": 1000`, `"standby": 1000`)
			c.waitUsed("wan0")
			c.fault(1, noGateway)
			eventually(t, "wan1 is dead", func() error {
				_, err := c.seen(packet{source: source}) // it is lost, and has the kernel look for the gateway
				for _, u := range c.report().Uplinks {
					if u.Ifname == "wan1" && u.Family == family && u.State == "dead" {
						return nil
					}
				}
				return fmt.Errorf("wan1 is not dead; a packet: %v", err)
			})
			c.wantUnbound(4, 0)
			c.wantOwnOnly()
		})
	}
}
