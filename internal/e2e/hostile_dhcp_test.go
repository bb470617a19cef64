package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// hostileDHCP starts servers at provider 1 that give addresses of it and, beside them, what cannot be right.
func (h *home) hostileDHCP(prefix string) {
	h.t.Helper()
	h.dhcpd6At(1, `default-lease-time 600; preferred-lifetime 400; option dhcp-renewal-time 2; option dhcp-rebinding-time 300;
		option dhcp6.name-servers ff02::1, ::ffff:192.0.2.1, 2001:db8:2000::1;
		option dhcp6.domain-search "x$(touch /run/bad).test";
		subnet6 `+prefix6(1, 0)+` { }
		host customer { hardware ethernet `+h.mac(1)+`; fixed-address6 `+given6(1, 0)+`; fixed-prefix6 `+prefix+`; }`)
	h.dhcp(1, dhcpLease{addr: given[1], mask: "254.0.0.0", router: "127.0.0.1", seconds: 600, renew: 300})
}

// TestHostileDHCP: what servers of DHCPv6 and DHCP at one uplink tell by dhclient, and cannot be right, is said once however often it is
// renewed. The addresses get their tables and rules, and packets of the other uplink and of links behind this host keep their ways.
func TestHostileDHCP(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, prefix, why string
		watch             []string // its options; else there are hooks
		settings          []string // of hooks
	}{
		{name: "hooks, none", settings: []string{"ROUTES=none"}, prefix: "2000::/12", why: "shorter than /16"},
		{name: "hooks, copy", settings: []string{"ROUTES=copy"}, prefix: "2001:db8::/32", why: "another uplink has "},
		{name: "hooks, move", settings: []string{"ROUTES=move"}, prefix: delegated, why: "another uplink has "},
		{name: "hooks, block", settings: []string{"ROUTES=move", `CLIENT_OPTIONS="$CLIENT_OPTIONS --on-loss block"`}, prefix: "::/16", why: "no host is delegated this prefix"},
		{name: "watch, none", watch: []string{"--routes", "none"}, prefix: "2000::/12"},
		{name: "watch, copy", watch: []string{"--routes", "copy"}, prefix: "2001:db8::/32"},
		{name: "watch, move", watch: []string{"--routes", "move"}, prefix: delegated},
		{name: "watch, block", watch: []string{"--routes", "move", "--on-loss", "block"}, prefix: "2000::/12"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var h *home
			if hooks := tt.watch == nil; hooks {
				h = newHookedHome(t, 2, tt.settings...)
			} else {
				h = newHome(t, 2)
				h.watched(append(tt.watch, "--ifname", "wan*")...)
			}
			h.prepareDhclient()
			inside := h.router()
			h.advertise(0, "AdvDefaultPreference high; "+routed6(0))
			h.dnsmasqAt(0)
			h.dhcpd6At(0, `default-lease-time 600; preferred-lifetime 400; option dhcp-renewal-time 2; option dhcp-rebinding-time 300;
				subnet6 `+prefix6(0, 0)+` { range6 `+given6(0, 0)+` `+given6(0, 0)+`; prefix6 2001:db8:1800:: 2001:db8:1800:: /56; }`)
			h.dhclient("wan0")
			h.dhclient6("wan0", "-N", "-P")
			first, first6 := h.served(given[0]), h.served(given6(0, 0))
			if tt.watch == nil {
				h.waitRulesOfDelegated(first6)
			}
			works := func() {
				t.Helper()
				for _, addr := range []string{given[0], given6(0, 0)} {
					eventually(t, "packets from "+addr+" pass", func() error { return h.pass(0, addr, answers) })
				}
				h.waitDelegated(inside)
			}
			works()

			h.hostileDHCP(tt.prefix)
			h.advertise(1, routed6(1))
			h.dhclient6("wan1", "-N", "-P")
			h.dhclient("wan1")
			h.served(given[1])
			h.served(given6(1, 0))
			for _, reason := range []string{"RENEW6 " + given6(1, 0), "RENEW6 " + tt.prefix, "RENEW6 " + tt.prefix} {
				h.waitReason("wan1", reason, len(h.reasons("wan1")))
			}
			works()
			if h.tableOf(given[0]) != first || h.tableOf(given6(0, 0)) != first6 {
				t.Errorf("tables of the other uplink: %q", h.allRules())
			}
			if tt.watch == nil {
				h.waitRulesOfDelegated(first6)
				for _, said := range []string{tt.why, `new_subnet_mask "254.0.0.0" is left out`, `new_routers "127.0.0.1" is left out`} {
					h.saidOnce(said)
				}
			}
			for _, rule := range h.allRules() {
				if strings.Contains(rule, "/12 ") || strings.Contains(rule, " to 192.0.0.0/7") || strings.Contains(rule, "from 2001:db8::/32") {
					t.Errorf("a rule of what cannot be right: %s", rule)
				}
			}
			h.sh("[ ! -e /run/bad ]")
		})
	}
}

// saidOnce waits until the log of hooks and clients has a text, and fails if it has it more often.
func (h *home) saidOnce(text string) {
	h.t.Helper()
	eventually(h.t, "the log has "+text, func() error {
		if log := h.clientLog(); !strings.Contains(log, text) && !strings.Contains(log, strings.ReplaceAll(text, `"`, `\"`)) {
			return fmt.Errorf("no %q in\n%s", text, log)
		}
		return nil
	})
	if log := strings.ReplaceAll(h.clientLog(), `\"`, `"`); strings.Count(log, text) != 1 {
		h.t.Errorf("%q %d times in\n%s", text, strings.Count(log, text), log)
	}
}
