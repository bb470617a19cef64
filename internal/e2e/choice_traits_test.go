package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// TestChoiceMetered: a metered uplink is probed rarely, and is used only while no other works.
func TestChoiceMetered(t *testing.T) {
	c := newChooser(t, `{"ifname": "wan0", "metered": true}, {"ifname": "wan1"}`, `"metered": 1000`)
	c.waitUsed("wan1")
	c.waitUnbound(1)
	bytes := func() (n int) {
		for _, u := range c.report().Uplinks {
			if u.Ifname == "wan0" {
				n += u.Bytes
			}
		}
		return n
	}
	if bytes() == 0 {
		t.Error("a metered uplink was never asked")
	}
	eventually(t, "the other uplink alone is asked", func() error {
		before := bytes()
		c.waitAsked("wan1", 10)
		if now := bytes(); now != before {
			return fmt.Errorf("%d bytes of probes by wan0, %d before", now, before)
		}
		return nil
	})
	if r := c.run(bin(t, clientBin), "uplinks"); !outputHas(r, ", metered, not used: it is metered, ") || !outputHas(r, " B of probes") {
		t.Errorf("uplinks: %+v", r)
	}
	c.fault(1, noInternet)
	c.waitUnbound(0)
	c.wantOwnOnly()
}

// TestChoiceNoProbe: a link with "probe": false is never asked, and counts as one that works.
func TestChoiceNoProbe(t *testing.T) {
	c := newChooser(t, `{"ifname": "wan0"}, {"ifname": "wan1", "probe": false}`)
	c.waitState("wan0", "inet", "alive")
	c.waitState("wan0", "inet6", "alive")
	c.waitUnbound(0)
	c.fault(0, noInternet)
	c.waitUnbound(1)
	for _, u := range c.report().Uplinks {
		if u.Ifname == "wan1" && (u.State != "off" || u.Reason != "not probed" || u.Bytes != 0) {
			t.Errorf("%+v", u)
		}
	}
	c.mend(0)
	c.waitUnbound(0)
	c.wantOwnOnly()
}

func outputHas(r result, text string) bool { return strings.Contains(r.stdout, text) }
