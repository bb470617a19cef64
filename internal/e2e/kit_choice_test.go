package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// chooser is a host behind providers whose watch probes two targets on the internet, in short times.
type chooser struct {
	*uplinks
	watch *process
}

// The second targets, beside internet and internet6, in other networks.
const (
	second  = "198.18.0.2"
	second6 = "2001:db8:fffe::2"
)

// chooserConfig is the configuration of a watch with links, and members of "probe" beside those of a test or in their place.
func chooserConfig(links string, members ...string) string {
	probe := []string{
		fmt.Sprintf(`"targets": [%q, %q, %q, %q]`, internet, second, internet6, second6),
		`"kinds": ["icmp", "dns", "tcp:7"]`, `"interval": 0.4`, `"standby": 0.4`, `"metered": 0.4`, `"suspect": 0.2`, `"timeout": 0.8`,
		`"down": 4`, `"up": 3`, `"hold": 1`, `"hold_max": 2`,
	}
	for _, member := range members {
		key, _, _ := strings.Cut(member, ":")
		probe = slices.DeleteFunc(probe, func(other string) bool { return strings.HasPrefix(other, key+":") })
	}
	return fmt.Sprintf(`{"links": [%s], "probe": {%s}}`, links, strings.Join(append(probe, members...), ", "))
}

// newChooser makes a host with an uplink at each provider, of which the first has the best metric.
func newChooser(t *testing.T, links string, members ...string) *chooser {
	t.Helper()
	c := newChooserHost(t, routed(0), routed(1))
	for n := range c.isps {
		c.address(n)
	}
	c.watch = c.uplinks.watch("--config", c.watchFile(chooserConfig(links, members...)))
	return c
}

// newChooserHost makes a host with a server, and without addresses and a watch.
func newChooserHost(t *testing.T, isps ...provider) *chooser {
	t.Helper()
	c := &chooser{uplinks: newHost(t).behind(isps...)}
	c.ns.Sysctl(t, "net/ipv4/ping_group_range", "0 0")
	c.internet.IP(t, "address add "+second+"/32 dev lo")
	if len(isps[0].routers6) > 0 {
		c.internet.IP(t, "address add "+second6+"/128 dev lo nodad")
	}
	c.serve()
	return c
}

// use wishes that unbound traffic uses a link, or "auto". The watch refuses until it serves an address of the link.
func (c *chooser) use(wish string) {
	c.t.Helper()
	eventually(c.t, "uplinks use "+wish, func() error {
		if r := c.run(bin(c.t, clientBin), "uplinks", "use", wish); r.code != 0 {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
}

// unbound sends a packet without a source, and returns an error unless it leaves by uplink n.
func (c *chooser) unbound(family, n int) error {
	c.t.Helper()
	inet, inet6 := at(n)
	want := inet
	if family == 6 {
		want = inet6
	}
	return c.arrives(packet{family: family}, want)
}

// waitUnbound waits until unbound packets of both families leave by uplink n.
func (c *chooser) waitUnbound(n int) {
	c.t.Helper()
	for _, family := range []int{4, 6} {
		c.waitUnboundOf(family, n)
	}
}

func (c *chooser) waitUnboundOf(family, n int) {
	c.t.Helper()
	eventually(c.t, fmt.Sprintf("unbound packets of IPv%d leave by uplink %d", family, n), func() error { return c.unbound(family, n) })
}

// wantUnbound fails the test unless unbound packets of a family leave by uplink n now.
func (c *chooser) wantUnbound(family, n int) {
	c.t.Helper()
	if err := c.unbound(family, n); err != nil {
		c.t.Errorf("an unbound packet of IPv%d, which uplink %d should serve: %v", family, n, err)
	}
}

// fault makes provider n fail by rules of nft in a table of its own. mend ends that.
func (c *chooser) fault(n int, chains string) {
	c.t.Helper()
	family := "inet"
	if strings.Contains(chains, "hook ingress") {
		family = "netdev" // which has ARP, too
	}
	path := filepath.Join(c.dir, fmt.Sprintf("fault%d.nft", n))
	if err := os.WriteFile(path, []byte("table "+family+" fault {\n"+chains+"\n}\n"), 0o644); err != nil {
		c.t.Fatal(err)
	}
	c.isps[n].ns.Run(c.t, "nft", "-f", path)
}

func (c *chooser) mend(n int) {
	c.t.Helper()
	for _, family := range []string{"inet", "netdev"} {
		c.isps[n].ns.Run(c.t, "nft", "add table "+family+" fault; delete table "+family+" fault")
	}
}

// What providers do.
const (
	noGateway = `chain f { type filter hook ingress device "lan" priority 0; drop; }`
	noFirst   = `chain f { type filter hook forward priority -300; ip daddr ` + internet + ` drop; ip6 daddr ` + internet6 + ` drop; }`
	lossy     = `chain f { type filter hook forward priority -300; iifname "lan" numgen random mod 10 < 3 drop; }`
	portal    = `chain f { type filter hook forward priority -300; meta l4proto { icmp, ipv6-icmp } accept; udp dport 53 accept; udp sport 53 accept; drop; }
		chain n { type nat hook prerouting priority dstnat; tcp dport 80 redirect to :8080; }`
	hole        = `chain f { type filter hook forward priority -300; meta length > 1000 drop; }`
	noInternet  = `chain f { type filter hook forward priority -300; drop; }`
	noInternet6 = `chain f { type filter hook forward priority -300; meta nfproto ipv6 drop; }`
	noICMP      = `chain f { type filter hook forward priority -300; meta l4proto { icmp, ipv6-icmp } drop; }`
)

// waitState waits until the log of the watch says that an uplink is in a state.
func (c *chooser) waitState(ifname, family, state string) {
	c.t.Helper()
	eventually(c.t, ifname+" is "+state, func() error {
		last := ""
		for line := range strings.Lines(c.watch.log.String()) {
			if strings.Contains(line, "ifname="+ifname+" ") && strings.Contains(line, "family="+family+" ") && strings.Contains(line, `: uplink is `) {
				last = line
			}
		}
		if !strings.Contains(last, `: uplink is `+state+`, before `) {
			return fmt.Errorf("the last line is %q", last)
		}
		return nil
	})
}

// switches is how often the watch has chosen an uplink.
func (c *chooser) switches() int {
	return strings.Count(c.watch.log.String(), "unbound traffic uses another uplink")
}

// mainRoutes are the default routes of main that are ours.
func (c *chooser) mainRoutes() string {
	c.t.Helper()
	return strings.TrimSpace(c.ns.IP(c.t, "route show default proto 116") + c.ns.IP(c.t, "-6 route show default proto 116"))
}

// choiceRules are the rules of the choice, of both families.
func (c *chooser) choiceRules() string {
	c.t.Helper()
	var rules []string
	for _, family := range []string{"-4", "-6"} {
		for line := range strings.Lines(c.ns.IP(c.t, family+" rule")) {
			if strings.HasPrefix(line, "9000") {
				rules = append(rules, strings.TrimSpace(line))
			}
		}
	}
	return strings.Join(rules, "\n")
}
