package e2e

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// TestRangeOfLink: packets from a range of addresses that table local gives to a link, as agents of clouds do, leave by that link,
// whether the range was there before or comes later.
func TestRangeOfLink(t *testing.T) {
	for how := range holders {
		t.Run(how, func(t *testing.T) {
			p := newPair(t)
			p.isps[1].ns.IP(t, "route add fd02:0:0:5::/64 via fd02::2 dev lan")
			sysctl(t, p.ns, "net/ipv6/ip_nonlocal_bind", "1")
			p.serve()
			stop := p.serveAddresses(how)
			ranges := []struct{ prefix, addr string }{{"10.2.0.16/28", "10.2.0.20"}, {"fd02:0:0:5::/64", "fd02:0:0:5::20"}}
			for _, r := range ranges {
				p.ns.IP(t, "route add local "+r.prefix+" dev wan1 table local proto 66")
			}
			for _, when := range []string{"the range came", "another program deleted the rule", "other processes came"} {
				for _, r := range ranges {
					p.waitSeen(when, packet{source: r.addr}, r.addr)
				}
				switch when {
				case "the range came":
					p.ns.IP(t, "rule del from 10.2.0.16/28")
					p.ns.IP(t, "-6 rule del from fd02:0:0:5::/64")
				case "another program deleted the rule":
					stop(syscall.SIGKILL)
					stop = p.serveAddresses(how)
				}
			}
			for _, r := range ranges {
				p.ns.IP(t, "route del local "+r.prefix+" dev wan1 table local proto 66")
			}
			eventually(t, "the rules go with the ranges", func() error {
				rules := slices.Concat(p.rules(), p.rules6())
				for _, r := range ranges {
					if at := slices.IndexFunc(rules, func(rule string) bool { return strings.Contains(rule, r.prefix) }); at >= 0 {
						return fmt.Errorf("there is %s", rules[at])
					}
				}
				return nil
			})
		})
	}
}
