package e2e

import (
	"strings"
	"testing"
)

// TestOddValues: what the network told and cannot be right is left out with a warning, and the address gets its table.
func TestOddValues(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	for _, tt := range []struct {
		name, warning string
		args          []string
		want          string // the default route
	}{
		{"a router that is none", "option=--gateway value=127.0.0.1", []string{"--gateway", "10.77.0.1", "--gateway", "127.0.0.1"}, ourDefault},
		{"option 121 cut short", "option=--classless-routes", []string{"--classless-routes", "0 10 77 0 1 24 10 0"}, ourDefault},
		{"option 121 without sense", "option=--classless-routes", []string{"--classless-routes", "33 x", "--gateway", "10.77.0.1"}, ourDefault},
		{"a multicast router", `option=--route value="10.0.0.0/24 via 224.0.0.1"`, []string{"--route", "10.0.0.0/24,224.0.0.1", "--gateway", "10.77.0.1"}, ourDefault},
		{"a name server for everybody", "option=--nameserver value=255.255.255.255", []string{"--nameserver", "255.255.255.255", "--gateway", "10.77.0.1"}, ourDefault},
	} {
		if got := h.lease("10.77.0.2", "wan0", append([]string{"--routes", "move"}, tt.args...)...); got != 10000 {
			t.Fatalf("%s: table %d", tt.name, got)
		}
		h.waitRoutes("10000", ourNetwork, tt.want)
		if log := h.clientLog(); !strings.Contains(log, tt.warning) {
			t.Errorf("%s: no warning %q in\n%s", tt.name, tt.warning, log)
		}
		h.client("-r", "-4", "-a", "10.77.0.2", "-i", "wan0")
		h.waitClean()
	}
}
