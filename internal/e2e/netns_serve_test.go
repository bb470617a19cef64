package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// TestNetnsServe: what other programs delete comes back, and what happens to the uplink is followed. In no moment anything
// leaves by the other uplink.
func TestNetnsServe(t *testing.T) {
	c := newNamespaces(t)
	c.must("netns", "add", "work", "--ifname", "wan1", "--resolv", "192.0.2.53")
	serve := func() *process {
		p := c.start(c.here(bin(t, clientBin), "netns", "serve", "--debug"))
		p.waitLog("serving namespaces")
		return p
	}
	service := serve()
	p := c.inNamespace("work")
	works := func(what string) {
		t.Helper()
		eventually(t, "the namespace works after "+what, func() error {
			for kind, to := range map[string]string{"tcp4": far4, "tcp6": far6} {
				p.do("new s %s", kind)
				if got := p.do("start s %s", to); got != "ok" {
					return fmt.Errorf("%s: %s", kind, got)
				}
			}
			return nil
		})
	}
	none := func(f func()) { // leaves by wan0
		t.Helper()
		before := c.counts()[0]
		f()
		if after := c.counts()[0]; after != before {
			t.Errorf("left by the other uplink: %+v, before %+v", after, before)
		}
	}
	for _, script := range []string{
		"nft flush ruleset",
		"nft delete chain inet table-allocator postrouting",
		"ip rule del priority 9003; ip -6 rule del priority 9003",
		"ip rule del priority 8990; ip -6 rule del priority 8990",
		"echo 0 >/proc/sys/net/ipv4/conf/wan1/forwarding",
		"ip link set tav1 down",
	} {
		none(func() {
			c.sh(script)
			startProbes(p)
			works(script)
		})
	}
	// The link is plugged in again.
	c.ns.IP(t, "link del wan1")
	none(func() {
		eventually(t, "programs get an error at once", func() error {
			p.do("new s udp4")
			if got := p.do("try s %s", far4); got != "EHOSTUNREACH" && got != "ENETUNREACH" {
				return fmt.Errorf("got %s", got)
			}
			return nil
		})
		c.connect(1)
		c.address(1)
		works("the link is plugged in again")
	})
	// The host's resolv.conf is replaced, as managers of networks do it.
	c.sh("echo 'nameserver 10.9.9.9' >/etc/resolv.new && mv /etc/resolv.new /etc/resolv.conf")
	eventually(t, "the namespace has its own name servers again", func() error {
		if text := c.must("netns", "exec", "work", "cat", "/etc/resolv.conf"); text != "nameserver 192.0.2.53\n" {
			return errors.New(text)
		}
		return nil
	})
	service.kill()
	works("the service was killed")
	c.sh("nft flush ruleset")
	none(func() { startProbes(p) })
	serve()
	works("another service has begun")
	c.must("netns", "del", "work", "--kill", "5")
	eventually(t, "nothing is left", func() error {
		if left := c.namespaceTraces(); left != "" {
			return errors.New(left)
		}
		return nil
	})
}

// TestNetnsMasks: resolvers of the host that begin after a namespace was made are not reached from it, whatever becomes of
// their directories.
func TestNetnsMasks(t *testing.T) {
	c := newNamespaces(t)
	c.must("netns", "add", "work", "--ifname", "wan1", "--resolv", "192.0.2.53")
	for _, dir := range []string{"/run/nscd", "/run/systemd/resolve", "/run/avahi-daemon"} {
		c.sh("mkdir -p " + dir + "; : >" + dir + "/socket")
		if seen := c.must("netns", "exec", "work", "ls", dir); strings.Contains(seen, "socket") { // that of systemd-resolved has places for a mount
			t.Errorf("a namespace has %s of the host: %s", dir, seen)
		}
	}
	// A mask as versions before made it, without a place for what /etc/resolv.conf may become a link to.
	c.sh("nsenter --mount=$(ls -d /run/table-allocator/netns/*/.mnt/work) mount -t tmpfs table-allocator /run/systemd/resolve")
	c.must("netns", "set", "work", "--ifname", "wan1")
	if seen := c.must("netns", "exec", "work", "ls", "/run/systemd/resolve"); seen != "resolv.conf\nstub-resolv.conf\n" {
		t.Errorf("a mask of a version before stays: %s", seen)
	}
	p := c.start(c.here(bin(t, clientBin), "netns", "serve", "--debug"))
	p.waitLog("serving namespaces")
	c.sh("rm -r /run/nscd; mkdir -p /run/nscd; : >/run/nscd/socket") // as a restart of the service does it
	eventually(t, "the directory is masked again", func() error {
		if r := c.do("netns", "exec", "work", "ls", "/run/nscd"); r.code != 0 || r.stdout != "" {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	c.must("netns", "del", "work")
	if left := c.sh("ls /run/nscd; ls -d /run/avahi-daemon"); left != "socket\n/run/avahi-daemon\n" {
		t.Errorf("directories of services: %s", left)
	}
	c.sh("rm -r /run/nscd /run/avahi-daemon /run/systemd/resolve")
	c.must("netns", "add", "work", "--ifname", "wan1", "--resolv", "192.0.2.53")
	c.must("netns", "del", "work")
	if left := c.sh("ls -d /run/nscd /run/avahi-daemon /run/systemd/resolve 2>/dev/null || :"); left != "" {
		t.Errorf("directories that nobody needs: %s", left)
	}
}

// TestNetnsSet: a set that fails changes nothing, and name servers of one uplink are never asked over another one.
func TestNetnsSet(t *testing.T) {
	c := newNamespaces(t)
	c.sh("mkdir -p /etc/netns/work && echo nameserver 192.0.2.53 >/etc/netns/work/resolv.conf")
	c.must("netns", "add", "work", "--ifname", "wan1")
	c.sh("rm -r /etc/netns/work")
	p := c.inNamespace("work")
	if r := c.do("netns", "set", "work", "--ifname", "wan0"); r.code != 1 || !strings.Contains(r.stderr, "name servers of wan0") {
		t.Errorf("a link with a lease whose name servers nobody knows: %+v", r)
	}
	if rows := c.namespaces(); len(rows) != 1 || rows[0].Ifname != "wan1" {
		t.Errorf("a set that failed: %+v", rows)
	}
	c.only(1, func() { fourProbes(p, 1) })
	if text := c.must("netns", "exec", "work", "cat", "/etc/resolv.conf"); text != "nameserver 192.0.2.53\n" {
		t.Errorf("name servers after a set that failed: %q", text)
	}
	if r := c.do("netns", "set", "work", "--ifname", "wwan7"); r.code != 0 || !strings.Contains(r.stderr, "no name resolves") {
		t.Errorf("a link that may come: %+v", r)
	}
	if text := c.must("netns", "exec", "work", "cat", "/etc/resolv.conf"); strings.Contains(text, "192.0.2.53") {
		t.Errorf("it has the name servers of the uplink before: %q", text)
	}
}

// TestNetnsRepairs: what cannot be repaired, and a server that is silent, keep nothing else from being repaired.
func TestNetnsRepairs(t *testing.T) {
	c := newNamespaces(t)
	c.sh("echo nameserver 192.0.2.53 >/run/servers")
	c.must("netns", "add", "work", "--ifname", "wan1", "--resolv", "/run/servers")
	p := c.start(c.here(bin(t, clientBin), "netns", "serve", "--debug"))
	p.waitLog("serving namespaces")
	repairs := func(what string) {
		t.Helper()
		c.sh("ip rule del priority 9003; ip -6 rule del priority 9003; ip rule del priority 8990")
		eventually(t, "rules come back "+what, func() error {
			rules, rules6 := c.ns.IP(t, "rule"), c.ns.IP(t, "-6 rule")
			if !strings.Contains(rules, "9003:") || !strings.Contains(rules, "8990:") || !strings.Contains(rules6, "9003:") {
				return errors.New(rules + rules6)
			}
			return nil
		})
	}
	c.sh("chmod 666 /run/servers")
	repairs("while its name servers cannot be read")
	if text := c.must("netns", "exec", "work", "cat", "/etc/resolv.conf"); text != "nameserver 192.0.2.53\n" {
		t.Errorf("its resolv.conf: %q", text)
	}
	for _, pid := range c.pids(serverBin) {
		c.sh(fmt.Sprintf("kill -STOP %d", pid))
		defer c.sh(fmt.Sprintf("kill -CONT %d", pid))
	}
	repairs("while the server is silent")
}
