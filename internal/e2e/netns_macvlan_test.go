package e2e

import (
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
)

// TestNetnsMacvlan: a namespace that is a host of its own in the network of its uplink: it has addresses by DHCP and router
// advertisements, the internet sees them, and nothing leaves by the other uplink, whatever happens to its own.
func TestNetnsMacvlan(t *testing.T) {
	c := newNamespaces(t)
	for n := range c.isps {
		network := fmt.Sprintf("10.%d.0.", n+1)
		cmd := (&machine{t: t, ns: c.isps[n].ns}).start(exec.Command("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--pid-file=", "--log-facility=-", "--log-dhcp", "--port=0",
			"--interface=lan", "--bind-interfaces", "--dhcp-range="+network+"100,"+network+"150,255.255.255.0,1h", "--dhcp-authoritative", "--no-ping",
			"--enable-ra", fmt.Sprintf("--dhcp-range=fd0%d::,ra-only", n+1), "--ra-param=lan,4,600", "--dhcp-leasefile="+c.dir+fmt.Sprint("/leases", n)))
		cmd.waitLog("DHCP, IP range")
	}
	for _, options := range []string{"--on-loss fallback", "--ipv6 nat", "--vpn /etc/hosts"} {
		if r := c.do(append([]string{"netns", "add", "x", "--ifname", "wan1", "--resolv", "192.0.2.53", "--wiring", "macvlan"}, strings.Fields(options)...)...); r.code != 2 {
			t.Errorf("a macvlan with %s: %+v", options, r)
		}
	}
	if r := c.do("netns", "add", "work", "--ifname", "wan1", "--resolv", "192.0.2.53", "--wiring", "macvlan"); r.code != 0 || !strings.Contains(r.stderr, "no address yet") {
		t.Errorf("add: %+v", r)
	}
	// As on hosts whose sysctl.d filters by source, which new network namespaces take over.
	c.must("netns", "exec", "work", "--", "sh", "-ec", "for c in all default eth0; do echo 2 >/proc/sys/net/ipv4/conf/$c/rp_filter; done")
	// What it runs has its standard error, too, and outlives it.
	p := c.start(c.here("sh", "-c", `exec "$0" netns serve --debug 2>/run/serve.log`, bin(t, clientBin)))
	t.Cleanup(func() { c.do("netns", "del", "--all", "--kill", "5") })
	probe := c.inNamespace("work")
	// works waits until the internet sees addresses of uplink n that are the namespace's own.
	works := func(n int) {
		t.Helper()
		eventually(t, "it has addresses", func() error {
			rows := c.namespaces()
			if len(rows) != 1 || rows[0].Missing != "" || rows[0].Wiring != "macvlan" {
				return fmt.Errorf("%+v", rows)
			}
			for kind, far := range map[string]string{"udp4": far4, "udp6": far6} {
				probe.do("new s %s", kind)
				seen := probe.do("try s %s", far)
				addr, err := netip.ParseAddr(seen)
				inet, inet6 := at(n)
				if err != nil || !strings.Contains(strings.Join(rows[0].Addresses, " ")+" ", seen+" ") || seen == inet || seen == inet6 ||
					!netip.MustParsePrefix(c.isps[n].network).Contains(addr) && !netip.MustParsePrefix(c.isps[n].customers6).Contains(addr) {
					return fmt.Errorf("%s: the internet sees %s, and it has %s", kind, seen, rows[0].Addresses)
				}
				if strings.HasSuffix(kind, "6") {
					continue
				}
				probe.do("new s tcp4")
				if got := probe.do("start s %s", far); got != "ok" {
					return fmt.Errorf("TCP: %s", got)
				}
			}
			return nil
		})
	}
	c.only(1, func() { works(1) })
	// Neither does it reach this host, nor do rules and filters of this host reach it.
	c.ns.Do(func() { serveWho(t, "0.0.0.0:7") })
	inet, _ := at(1)
	probe.do("new s tcp4")
	if got := probe.do("start s %s:7", inet); got == "ok" {
		t.Error("the namespace reaches this host")
	}
	c.sh("nft 'table inet other { chain f { type filter hook forward priority 0; policy drop; }; }'; ip rule add priority 5 unreachable")
	c.only(1, func() { works(1) })
	c.sh("nft delete table inet other; ip rule del priority 5 unreachable")
	c.ns.IP(t, "link set wan1 down")
	c.nothing(func() { startProbes(probe) })
	c.ns.IP(t, "link set wan1 up")
	c.address(1)
	c.waitTables(1)
	before := c.counts()[0]
	works(1)
	c.ns.IP(t, "link del wan1") // it is unplugged, and plugged in again
	startProbes(probe)
	c.connect(1)
	if after := c.counts()[0]; after != before {
		t.Errorf("it left by the other uplink: %+v, before %+v", after, before)
	}
	works(1)
	if log := c.sh("cat /run/serve.log"); strings.Contains(log, "a program of a namespace has ended") {
		t.Errorf("who asks for addresses did not wait for the link:\n%s", log)
	}
	c.must("netns", "set", "work", "--ifname", "wan0")
	c.only(0, func() { works(0) })
	// It is on the link of the name, whichever that is.
	c.sh("ip link set wan0 down; ip link set wan0 name old0; ip link set old0 up")
	eventually(t, "it has no link", func() error {
		if rows := c.namespaces(); len(rows) != 1 || rows[0].Missing != "its link on wan0" {
			return fmt.Errorf("%+v", rows)
		}
		if links := c.sh(`"` + bin(t, clientBin) + `" netns exec work -- ls /sys/class/net`); strings.Contains(links, "eth0") {
			return fmt.Errorf("it has links %s", links)
		}
		return nil
	})
	c.sh("ip link set wan1 down; ip link set wan1 name wan0; ip link set wan0 up")
	c.only(1, func() { works(1) })
	p.kill()
	c.only(1, func() { works(1) })
	if r := c.do("netns", "del", "work"); r.code != 1 || !strings.Contains(r.stderr, "programs run in it") {
		t.Errorf("del with a program in it: %+v", r)
	}
	c.must("netns", "stop", "work", fmt.Sprint(probe.p.cmd.Process.Pid))
	c.must("netns", "del", "work") // who asks for its address is no program of a user
	if left := c.namespaceTraces(); left != "" {
		t.Errorf("left:\n%s", left)
	}
}

// TestNetnsMacvlanRun: programs of the configuration outlive the uplink of their namespace.
func TestNetnsMacvlanRun(t *testing.T) {
	v := newVisited(t)
	v.reload(`{"group": "leasers", "namespaces": [{"name": "hosted", "ifname": "wan1", "resolv": "192.0.2.53", "wiring": "macvlan",
		"run": [["/bin/sh", "-c", "exec sleep 4721 >/dev/null 2>&1"]]}]}`)
	program := func() (pid int) {
		for _, row := range v.namespaces() {
			for _, p := range row.Programs {
				if row.Name == "hosted" && strings.Contains(p.Command, "sleep 4721") {
					pid = p.PID
				}
			}
		}
		return pid
	}
	eventually(t, "its program runs", func() error {
		if program() == 0 {
			return fmt.Errorf("%+v", v.namespaces())
		}
		return nil
	})
	before := program()
	v.must("netns", "set", "hosted", "--ifname", "wan0")
	if now := program(); now != before {
		t.Errorf("it runs as %d, and before the change as %d", now, before)
	}
}
