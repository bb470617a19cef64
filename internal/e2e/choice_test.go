package e2e

import (
	"strings"
	"testing"
)

const (
	copyLinks = `{"ifname": "*"}`
	moveLinks = `{"ifname": "*", "routes": "move"}`
)

// eachMode calls f for a host whose routes are copied, and for one whose are moved.
func eachMode(t *testing.T, f func(t *testing.T, links string)) {
	t.Helper()
	for name, links := range map[string]string{"copy": copyLinks, "move": moveLinks} {
		t.Run(name, func(t *testing.T) { f(t, links) })
	}
}

// TestChoiceFollows has an uplink fail behind its gateway, and work again.
func TestChoiceFollows(t *testing.T) {
	eachMode(t, func(t *testing.T, links string) {
		c := newChooser(t, links)
		c.waitUnbound(0)
		c.waitState("wan0", "inet", "alive")
		c.fault(0, noInternet)
		c.waitUnbound(1)
		if inMain := c.mainRoutes() != ""; inMain != (links == copyLinks) {
			t.Errorf("main has %q", c.mainRoutes())
		}
		c.mend(0)
		c.waitUnbound(0) // after the hold
		c.wantOwnOnly()
		before := c.switches()
		if code := c.watch.stop(); code != 0 || c.mainRoutes() != "" {
			t.Errorf("exit code %d, main has %q", code, c.mainRoutes())
		}
		if rules := c.choiceRules(); strings.Count(rules, "iif lo lookup") != 2 {
			t.Errorf("the rules of the choice are %q, want one for each family", rules)
		}
		t.Logf("%d switches", before)
	})
}
