package e2e

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
)

// wgQuick calls the real wg-quick, which starts wireguard-go, with a tunnel that takes all traffic of both families.
func (c *crossing) wgQuick(what string) {
	c.t.Helper()
	const script = `export WG_QUICK_USERSPACE_IMPLEMENTATION=wireguard-go
if [ ! -e "$1" ]; then
	umask 077
	key=$(wg genkey) peer=$(wg genkey | wg pubkey)
	printf '%s\n' "[Interface]" "PrivateKey = $key" "Address = 10.99.0.2/32, fd99::2/128" \
		"[Peer]" "PublicKey = $peer" "Endpoint = 10.1.0.1:51820" "AllowedIPs = 0.0.0.0/0, ::/0" >"$1"
fi
exec wg-quick "$0" "$1"`
	cmd := c.here("sh", "-ec", script, what, filepath.Join(c.dir, "wgt0.conf"))
	if r := c.run(cmd.Args[0], cmd.Args[1:]...); r.code != 0 {
		c.t.Fatalf("wg-quick %s: %+v", what, r)
	}
}

// waitFindings waits until status and doctor tell of a rule in front, or of none.
func (c *crossing) waitFindings(rule string) {
	c.t.Helper()
	for _, args := range [][]string{{"status", "--json"}, {"doctor", "--json", "--only", "rule-in-front"}} {
		eventually(c.t, fmt.Sprintf("%s tells of %q", args[0], rule), func() error {
			r := c.do(args...)
			found := strings.Contains(r.stdout, "rule-in-front")
			named := found && strings.Contains(r.stdout, rule) && strings.Contains(r.stdout, "wan1")
			if rule == "" && (found || r.code != 0) || rule != "" && (!named || r.code != 1) {
				return fmt.Errorf("%+v", r)
			}
			return nil
		})
	}
}

// TestLockWgQuick: the real wg-quick, up after the first run, gets nothing of what is bound, and status and doctor name its
// rule; up before the first run, and down again, it changes nothing.
func TestLockWgQuick(t *testing.T) {
	c := newCrossing(t)
	c.waitFindings("")
	p := c.bound("wan1")
	c.leaves(p, 1)
	c.waitFindings("")
	c.wgQuick("up")
	c.waitFindings("not from all fwmark 0xca6c lookup 51820")
	c.nothing(func() {
		for _, far := range [][2]string{{"4", far4}, {"6", far6}} {
			p.want("EPERM", "new s udp%s\nask s %s", far[0], far[1])
			p.want("ok", "new s tcp%s", far[0])
			p.do("start s %s", far[1])
			p.want("ok", "close s")
		}
	})
	c.wgQuick("down")
	c.waitLeaves(p, 1)
	c.waitFindings("")
	p.p.kill()
	c.must("unbind", "--all")

	c.wgQuick("up")
	p = c.bound("wan1")
	c.leaves(p, 1)
	c.wgQuick("down")
	c.leaves(p, 1)
	c.waitFindings("")
}

// TestLockTailscale: the rules of tailscale come before ours. As long as its table has no route to the internet they take
// nothing of what is bound; an exit node takes all, and is named.
func TestLockTailscale(t *testing.T) {
	c := newCrossing(t)
	p := c.bound("wan1")
	c.tailscale()
	c.leaves(p, 1)
	c.waitFindings("")
	c.ns.IP(t, "-4 route add default dev tailscale0 table 52")
	c.ns.IP(t, "-6 route add default dev tailscale0 table 52")
	c.nothing(func() {
		p.want("EPERM", "new s udp4\nask s %s", far4)
		p.want("EPERM", "new s udp6\nask s %s", far6)
	})
	if r := c.do("doctor", "--only", "rule-in-front"); r.code != 1 || !strings.Contains(r.stdout, "5270: from all lookup 52") {
		t.Errorf("doctor: %+v", r)
	}
	c.ns.IP(t, "-4 route del default dev tailscale0 table 52")
	c.ns.IP(t, "-6 route del default dev tailscale0 table 52")
	c.waitLeaves(p, 1)
	c.waitFindings("")
}

// TestTailscaleBehind: with the priorities that are named as the cure, rules of an exit node take neither what is bound nor
// what has an address.
func TestTailscaleBehind(t *testing.T) {
	c := newCrossingAlone(t)
	c.serve(`"bind_priority":5000`)
	c.watch("-c", c.watchFile(`{"links": [{"routes": "copy", "priority": [5100, 20000, 91000]}]}`))
	inet, inet6 := at(1)
	for _, addr := range []string{inet, inet6} {
		eventually(t, addr+" is served", func() error { return c.arrives(packet{source: addr}, addr) })
	}
	p := c.bound("wan1")
	c.tailscale()
	c.ns.IP(t, "-4 route add default dev tailscale0 table 52")
	c.ns.IP(t, "-6 route add default dev tailscale0 table 52")
	c.leaves(p, 1)
	c.waitFindings("")
	for _, addr := range []string{inet, inet6} {
		c.only(1, func() {
			if err := c.arrives(packet{source: addr}, addr); err != nil {
				t.Error(err)
			}
		})
	}
	if text := c.do("status").stdout; strings.Contains(text, "shadowed") {
		t.Errorf("status:\n%s", text)
	}
}

// tailscale makes the link of Tailscale, its rules, and its routes to two peers.
func (c *crossing) tailscale() {
	c.t.Helper()
	t := c.t
	c.ns.IP(t, "tuntap add tailscale0 mode tun")
	c.ns.IP(t, "link set tailscale0 up")
	for _, family := range []string{"-4 ", "-6 "} {
		for _, rule := range []string{"pref 5210 fwmark 0x80000/0xff0000 lookup main", "pref 5230 fwmark 0x80000/0xff0000 lookup default",
			"pref 5250 fwmark 0x80000/0xff0000 unreachable", "pref 5270 lookup 52"} {
			c.ns.IP(t, family+"rule add "+rule)
		}
	}
	c.ns.IP(t, "route add 100.64.0.9/32 dev tailscale0 table 52")
	c.ns.IP(t, "-6 route add fd7a:115c:a1e0::/48 dev tailscale0 table 52")
}

// TestInFrontOfUser: a rule in front of those that bind a user, whom no lock holds, is named, too.
func TestInFrontOfUser(t *testing.T) {
	c := newCrossing(t)
	c.must("bind", "--ifname", "wan1", "--uid", "4711")
	c.waitFindings("")
	c.ns.IP(t, "-6 rule add pref 5000 uidrange 4000-5000 lookup main")
	c.waitFindings("5000: from all uidrange 4000-5000 lookup main")
	r := c.do("doctor", "--only", "rule-in-front")
	if !strings.Contains(r.stdout, "uidrange 4711-4711") || strings.Contains(r.stdout, "drops") {
		t.Errorf("doctor: %+v", r)
	}
	c.ns.IP(t, "-6 rule del pref 5000")
	c.waitFindings("")

	// So is one that passes over them.
	c.ns.IP(t, "rule add pref 5000 uidrange 4000-5000 goto 32766")
	c.waitFindings("5000: from all uidrange 4000-5000 goto 32766")
	c.ns.IP(t, "rule del pref 5000")
	c.ns.IP(t, "rule add pref 5000 goto 5100")
	c.ns.IP(t, "rule add pref 5100 nop")
	c.waitFindings("")

	// One that is for somebody else does not, nor does one whose target is missing.
	c.ns.IP(t, "rule add pref 5200 uidrange 100-200 goto 32766")
	c.ns.IP(t, "-6 rule add pref 5200 goto 40000")
	c.waitFindings("")
	if r := c.do("bind", "--ifname", "wan1", "--uid", "4712"); r.code != 0 || strings.Contains(r.stderr, "5200") {
		t.Errorf("bind: %+v", r)
	}
}
