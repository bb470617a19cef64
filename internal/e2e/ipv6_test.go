package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// copyRules6Of2 and moveRules6Of2 are the rules of 2001:db8::2 with table 10000.
var (
	copyRules6Of2 = copyRules("2001:db8::2", "2001:db8::/64", 10000)
	moveRules6Of2 = moveRules("2001:db8::2", "2001:db8::/64", 10000)
)

func TestIPv6(t *testing.T) {
	h := newHost(t)
	h.link("wan0")
	h.ns.IP(t, "address add 2001:db8::2/64 dev wan0 nodad")
	h.ns.IP(t, "route add 2001:db8:9::/48 via 2001:db8::9 dev wan0")
	h.serve()
	if got := h.lease6("2001:db8:0::02", "wan0", "--routes", "move", "--gateway", "fe80::1", "--prefix", "2001:db8:1::/56"); got != "10000" {
		t.Fatalf("table: got %s", got)
	}
	rules := append(moveRules6Of2, "10002: from 2001:db8:1::/56 lookup main suppress_prefixlength 6 proto 116", "10003: from 2001:db8:1::/56 lookup 10000 proto 116")
	h.waitRules6(rules...)
	want := []string{
		"2001:db8::/64 dev wan0 proto 116 src 2001:db8::2 metric 256",
		"2001:db8:9::/48 via 2001:db8::9 dev wan0 proto 116 src 2001:db8::2 metric 1024",
		"default via fe80::1 dev wan0 proto 116 src 2001:db8::2 metric 1024",
	}
	h.waitRoutes6("10000", want...)
	h.wantRules() // of IPv4
	h.ns.IP(t, "address del 2001:db8::2/64 dev wan0")
	h.waitRules6()
	h.waitRoutes6("10000")
	// Put back within a minute, it is served again.
	h.ns.IP(t, "address add 2001:db8::2/64 dev wan0 nodad")
	h.waitRules6(rules...)
	h.client("-r", "-6", "-a", "2001:db8::2", "-i", "wan0")
	h.waitRules6()
	h.waitClean()
	for _, route := range h.routes6("10000") {
		t.Errorf("left in the table: %s", route)
	}
}

// TestIPv6Tentative: the table at once, rules and routes when the address is usable.
func TestIPv6Tentative(t *testing.T) {
	h := newHost(t)
	h.link("wan0")
	// On a link that never had a carrier the kernel does not even begin to look for duplicates.
	h.isp.IP(t, "link set wan0 down")
	h.ns.Batch(t, "link set wan0 down", "link set wan0 up")
	h.ns.IP(t, "address add 2001:db8::2/64 dev wan0")
	h.serve()
	if got := h.lease6("2001:db8::2", "wan0", "--routes", "copy"); got != "10000" {
		t.Fatalf("table: got %s", got)
	}
	if out := h.ns.IP(t, "-6 address show dev wan0"); !strings.Contains(out, "tentative") {
		t.Errorf("the address is usable already, so this shows nothing: %s", out)
	}
	if rules := h.rules6(); len(rules) > 0 {
		t.Errorf("rules of a tentative address: %q", rules)
	}
	h.isp.IP(t, "link set wan0 up")
	h.waitRules6(copyRules6Of2...)
	h.waitRoutes6("10000", "2001:db8::/64 dev wan0 proto 116 src 2001:db8::2 metric 256")
}

func TestIPv6Duplicate(t *testing.T) {
	h := newHost(t)
	h.link("wan0")
	h.isp.IP(t, "address add 2001:db8::2/64 dev wan0 nodad")
	h.serve()
	h.ns.IP(t, "address add 2001:db8::2/64 dev wan0")
	h.lease6("2001:db8::2", "wan0", "--routes", "copy")
	h.waitClean()
	h.waitRules6()
	if log := h.clientLog(); !strings.Contains(log, "duplicate address detection failed") {
		t.Errorf("the log does not say why:\n%s", log)
	}
}

// TestIPv6DHCP: a /128 address has no routes of its own, and uses those of its link, which
// are another router's advertisements.
func TestIPv6DHCP(t *testing.T) {
	h := newHost(t)
	h.link("wan0")
	h.ns.IP(t, "address add 2001:db8::2/128 dev wan0 nodad")
	h.ns.IP(t, "address add 2001:db8::5054/64 dev wan0 nodad noprefixroute")
	h.ns.IP(t, "route add 2001:db8::/64 dev wan0 proto ra metric 256 expires 60")
	h.ns.IP(t, "route add default via fe80::1 dev wan0 proto ra metric 1024 expires 60 pref high")
	h.ns.IP(t, "route add default via fe80::2 dev wan0 proto ra metric 1025 expires 60")
	h.serve()
	h.lease6("2001:db8::2", "wan0", "--routes", "move")
	h.waitRules6(moveRules6Of2[0], moveRules6Of2[2], moveRules6Of2[4]) // it has no network
	want := []string{
		"2001:db8::/64 dev wan0 proto 116 src 2001:db8::2 metric 256",
		"default via fe80::1 dev wan0 proto 116 src 2001:db8::2 metric 1024 pref high",
		"default via fe80::2 dev wan0 proto 116 src 2001:db8::2 metric 1025",
	}
	h.waitRoutes6("10000", want...)
	for _, route := range []string{"2001:db8::/64 dev wan0 proto ra metric 256", "default via fe80::1 dev wan0 proto ra metric 1024 pref high"} {
		if !strings.Contains(strings.Join(h.routes6("main"), "\n"), route) {
			t.Errorf("main lost %s: %q", route, h.routes6("main"))
		}
	}
	// A lifetime that grows, as with each advertisement, grows in the table, too.
	h.ns.IP(t, "route replace default via fe80::2 dev wan0 proto ra metric 1025 expires 9000")
	eventually(t, "the lifetime is refreshed", func() error {
		out := h.ns.IP(t, "-6 route show table 10000 default via fe80::2")
		var expires int
		if _, rest, ok := strings.Cut(out, "expires "); ok {
			fmt.Sscan(strings.TrimSuffix(strings.Fields(rest)[0], "sec"), &expires)
		}
		if expires < 8000 {
			return errors.New(out)
		}
		return nil
	})
	h.ns.IP(t, "route del default via fe80::1 dev wan0")
	h.waitRoutes6("10000", want[0], want[2])
}
