package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// prefixHost is a host with the uplinks wan0 and wan1, and the link lan0 behind it.
func prefixHost(t *testing.T) *host {
	t.Helper()
	h := newHost(t)
	h.link("wan0", "2001:db8:a::2/64 nodad")
	h.link("wan1", "2001:db8:b::2/64 nodad")
	h.link("lan0", "2001:db8:d0::1/64 nodad")
	h.ns.IP(t, "-6 route add default via 2001:db8:a::1 dev wan0 metric 10")
	h.ns.IP(t, "-6 route add default via 2001:db8:b::1 dev wan1 metric 20")
	h.serve()
	return h
}

// waitPrefixes waits until the rules from prefixes are want: "PREFIX TABLE".
func (h *host) waitPrefixes(want ...string) {
	h.t.Helper()
	eventually(h.t, fmt.Sprintf("the rules of prefixes are %q", want), func() error {
		var got []string
		for _, rule := range h.rules6() {
			if words := strings.Fields(rule); words[1] == "from" && strings.Contains(words[2], "/") && words[4] != "main" {
				got = append(got, words[2]+" "+words[4])
			}
		}
		if diff := unordered(got, want); diff != "" {
			return fmt.Errorf("%s", diff)
		}
		return nil
	})
}

// TestPrefixOfAnotherUplink: what one uplink says of a delegated prefix takes no packet of another uplink, whichever
// comes first. A link behind this host has a part of it.
func TestPrefixOfAnotherUplink(t *testing.T) {
	for _, tt := range []struct{ name, prefix, why string }{
		{"an address of another uplink", "2001:db8:b::/48", "another uplink has 2001:db8:b::2/64"},
		{"a network on the link of another uplink", "2001:db8:b:8::/61", "another uplink has 2001:db8:b:9::/64"},
		{"part of the prefix of another uplink", "2001:db8:ee00::/57", "another uplink has the prefix 2001:db8:ee00::/56"},
		{"the prefix of another uplink", "2001:db8:ee00::/56", "another uplink has the prefix 2001:db8:ee00::/56"},
		{"more than the prefix of another uplink", "2001:db8:ee00::/48", "another uplink has the prefix 2001:db8:ee00::/56"},
		{"shorter than any", "2000::/15", "no host is delegated a prefix shorter than /16"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := prefixHost(t)
			h.ns.IP(t, "-6 route add 2001:db8:b:9::/64 dev wan1")
			second := h.lease6("2001:db8:b::2", "wan1", "--routes", "copy", "--prefix", "2001:db8:ee00::/56")
			h.lease6("2001:db8:a::2", "wan0", "--routes", "copy", "--prefix", tt.prefix)
			h.waitClientLog(1, "option=--prefix value="+tt.prefix)
			h.waitClientLog(1, tt.why)
			h.waitPrefixes("2001:db8:ee00::/56 " + second)
			if row := h.statusRows()[0]; row.Missing != "" {
				t.Errorf("status misses %q", row.Missing)
			}
		})
	}
	t.Run("a watch, and an uplink that comes later and goes", func(t *testing.T) {
		h := prefixHost(t)
		h.ns.IP(t, "link set wan1 down")
		h.watch("--ifname", "*")
		first := h.served("2001:db8:a::2")
		h.served("2001:db8:d0::1") // behind this host
		h.lease6("2001:db8:a::2", "wan0", "--routes", "copy", "--prefix", "2001:db8::/32")
		h.waitPrefixes("2001:db8::/32 " + first)
		h.ns.IP(t, "link set wan1 up")
		h.ns.IP(t, "address replace 2001:db8:b::2/64 dev wan1 nodad")
		h.ns.IP(t, "-6 route add default via 2001:db8:b::1 dev wan1 metric 20")
		h.waitPrefixes()
		h.served("2001:db8:b::2")
		h.ns.IP(t, "address del 2001:db8:b::2/64 dev wan1")
		h.waitPrefixes("2001:db8::/32 " + first)
	})
}

// TestPrefixInForce: an address that one uplink gives this host takes no delegated prefix in force from another uplink, as
// far as links behind this host have parts of it, and does not let the first uplink have these parts.
func TestPrefixInForce(t *testing.T) {
	const prefix, lan, address = "2001:db8:ee00::/56", "2001:db8:ee00:1::1/64", "2001:db8:ee00:5::5/128"
	for _, watch := range []bool{false, true} {
		t.Run(fmt.Sprintf("watch=%v", watch), func(t *testing.T) {
			h := prefixHost(t)
			sysctl(t, h.ns, "net/ipv6/conf/all/forwarding", "1")
			h.ns.IP(t, "address add "+lan+" dev lan0 nodad")
			h.ns.IP(t, "-6 route add 2001:db8:ee00:8::/61 via 2001:db8:ee00:1::9 dev lan0")
			if watch {
				h.watch("--ifname", "wan*")
			}
			second := h.lease6("2001:db8:b::2", "wan1", "--routes", "copy", "--prefix", prefix)
			h.lease6("2001:db8:a::2", "wan0", "--routes", "copy")
			h.waitPrefixes(prefix + " " + second)
			leaves := func() {
				t.Helper()
				for _, from := range []string{"2001:db8:ee00:1::77", "2001:db8:ee00:8::77"} {
					if out := h.ns.IP(t, "-6 route get 2001:db8:ffff::1 from "+from+" iif lan0"); !strings.Contains(out, "dev wan1") {
						t.Errorf("packets from %s leave by: %s", from, out)
					}
				}
			}
			leaves()
			parts := []string{"2001:db8:ee00:1::/64 " + second, "2001:db8:ee00:8::/61 " + second}
			h.ns.IP(t, "address add "+address+" dev wan0 nodad")
			h.waitPrefixes(parts...)
			leaves()
			for _, theirs := range []string{"2001:db8:ee00::/57", "2001:db8:ee00:1::/64", prefix} {
				h.lease6("2001:db8:a::2", "wan0", "--routes", "copy", "--prefix", theirs)
				if !watch {
					h.waitClientLog(1, "option=--prefix value="+theirs)
				}
				h.waitPrefixes(parts...)
				leaves()
			}
			h.ns.IP(t, "link set lan0 down")
			h.lease6("2001:db8:a::2", "wan0", "--routes", "copy", "--prefix", "2001:db8:ee00::/60")
			h.ns.IP(t, "link set lan0 up")
			h.ns.IP(t, "address replace "+lan+" dev lan0 nodad")
			h.ns.IP(t, "-6 route replace 2001:db8:ee00:8::/61 via 2001:db8:ee00:1::9 dev lan0")
			h.waitPrefixes(parts...)
			leaves()
			h.ns.IP(t, "address del "+address+" dev wan0")
			h.waitPrefixes(prefix + " " + second)
		})
	}
}

// TestPrefixBehindHosts: rules from single addresses come before those from prefixes and networks, in whatever order they
// were added, and an address behind this host leaves by the uplink of its prefix, though it may not leave by others.
func TestPrefixBehindHosts(t *testing.T) {
	h := prefixHost(t)
	first := h.lease6("2001:db8:a::2", "wan0", "--routes", "copy", "--prefix", "2001:db8:d0::/44")
	h.waitPrefixes("2001:db8:d0::/44 " + first)
	h.lease6("2001:db8:d0::1", "lan0", "--routes", "copy")
	var order []string
	for _, rule := range h.rules6() {
		if words := strings.Fields(rule); words[2] == "2001:db8:d0::1" || words[2] == "2001:db8:d0::/44" {
			order = append(order, words[2])
		}
	}
	if want := []string{"2001:db8:d0::1", "2001:db8:d0::/44", "2001:db8:d0::/44"}; !slices.Equal(order, want) {
		t.Errorf("rules from %q", order)
	}
	h.client("-6", "-r", "-a", "2001:db8:d0::1", "-i", "lan0")
	h.client("-6", "-r", "-a", "2001:db8:a::2", "-i", "wan0")
	h.waitPrefixes()
	h.waitNoClient()
	h.watch("--ifname", "*", "--on-loss", "block")
	first = h.served("2001:db8:a::2")
	h.served("2001:db8:d0::1")
	h.lease6("2001:db8:a::2", "wan0", "--routes", "copy", "--on-loss", "block", "--prefix", "2001:db8:d0::/44")
	h.waitPrefixes("2001:db8:d0::/44 " + first)
	eventually(t, "packets from the address behind this host leave by wan0", func() error {
		out, err := h.ns.Output("ip", "-6", "route", "get", "2001:db8:ffff::1", "from", "2001:db8:d0::1")
		if err != nil || !strings.Contains(out, "dev wan0") {
			return fmt.Errorf("%s: %v\n%s", out, err, strings.Join(h.rules6(), "\n"))
		}
		return nil
	})
}

// TestForwardBehindHosts: two uplinks in one network, one of which forwards for that.
func TestForwardBehindHosts(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.link("wan1", "10.77.0.3/24")
	h.serve()
	for i, link := range []string{"wan0", "wan1"} {
		h.lease(fmt.Sprintf("10.77.0.%d", 2+i), link, "--routes", "copy", "--forward", "--gateway", fmt.Sprintf("10.77.0.%d", 100+i))
	}
	for i, link := range []string{"wan0", "wan1"} {
		want := fmt.Sprintf("via 10.77.0.%d dev %s", 100+i, link)
		if out := h.ns.IP(t, fmt.Sprintf("route get 9.9.9.9 from 10.77.0.%d", 2+i)); !strings.Contains(out, want) {
			t.Errorf("%s: %s", want, out)
		}
	}
}
