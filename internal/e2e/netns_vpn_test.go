package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

var vpnServers atomic.Int32

// vpnServer starts a WireGuard at the far end of both uplinks, and returns a configuration for its client.
func (c *crossing) vpnServer() (conf string) {
	t := c.t
	t.Helper()
	key := func(args ...string) string {
		cmd := exec.Command("wg", args[0])
		if len(args) > 1 {
			cmd.Stdin = strings.NewReader(args[1])
		}
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("wg %s: %v", args[0], err)
		}
		return strings.TrimSpace(string(out))
	}
	private, client := key("genkey"), key("genkey")
	link := fmt.Sprint("wgs", vpnServers.Add(1)) // whose socket all servers have in one directory
	server := exec.Command("wireguard-go", "--foreground", link)
	server.Stdout, server.Stderr = t.Output(), t.Output()
	if err := c.internet.Start(server); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = server.Process.Kill(), server.Wait() })
	eventually(t, "the VPN server has its link", func() error {
		if _, err := os.Stat("/var/run/wireguard/" + link + ".sock"); err != nil {
			return err
		}
		_, err := c.internet.Output("ip", "link", "show", link)
		return err
	})
	file := filepath.Join(c.dir, "server.key")
	if err := os.WriteFile(file, []byte(private), 0o600); err != nil {
		t.Fatal(err)
	}
	c.internet.Run(t, "wg", "set", link, "listen-port", "51820", "private-key", file, "peer", key("pubkey", client), "allowed-ips", "10.98.0.2/32,fd98::2/128")
	c.internet.IP(t, "address add 10.98.0.1/24 dev "+link)
	c.internet.IP(t, "-6 address add fd98::1/64 nodad dev "+link)
	c.internet.IP(t, "link set "+link+" up mtu 1420")
	return fmt.Sprintf(`[Interface]
PrivateKey = %s
Address = 10.98.0.2/24, fd98::2/64
DNS = 10.98.0.53, example.org # a domain to search
MTU = 1420
PostUp = touch /run/executed

[Peer]
PublicKey = %s
AllowedIPs = 0.0.0.0/0, ::/0
Endpoint = %s:51820
PersistentKeepalive = 1
`, client, key("pubkey", private), internet)
}

// throughVPN waits until all four probes of a program go by the VPN.
func throughVPN(t *testing.T, p *probing, what string) {
	t.Helper()
	farEndSees(t, p, "10.98.0.2", "fd98::2", what)
}

// farEndSees waits until the far end sees these addresses, by TCP and UDP.
func farEndSees(t *testing.T, p *probing, inet, inet6, what string) {
	t.Helper()
	eventually(t, "the far end sees "+inet+" and "+inet6+" "+what, func() error {
		for _, probe := range [][3]string{{"tcp4", far4, inet}, {"tcp6", far6, inet6}, {"udp4", far4, inet}, {"udp6", far6, inet6}} {
			if got := p.do("new s %s", probe[0]); got != "ok" {
				return errors.New(got)
			}
			if strings.HasPrefix(probe[0], "tcp") {
				if got := p.do("start s %s", probe[1]); got != "ok" {
					return fmt.Errorf("%s: %s", probe[0], got)
				}
				if got := p.do("ask s"); got != probe[2] {
					return fmt.Errorf("%s: the far end sees %s", probe[0], got)
				}
			} else if got := p.do("try s %s", probe[1]); got != probe[2] {
				return fmt.Errorf("%s: the far end sees %s", probe[0], got)
			}
		}
		return nil
	})
}

// TestNetnsVPN: a VPN is the only way out of a namespace, over its uplink, whatever happens to the uplink, to the VPN and to the
// service. In no moment anything leaves in clear, or by the other uplink.
func TestNetnsVPN(t *testing.T) {
	c := newNamespaces(t)
	c.sh("umask 077; cat >/etc/work.conf <<'end'\n" + c.vpnServer() + "end")
	c.sh("cp /etc/work.conf /etc/open.conf; chmod 666 /etc/open.conf")
	if r := c.do("netns", "add", "work", "--ifname", "wan1", "--vpn", "/etc/open.conf"); r.code != 1 || !strings.Contains(r.stderr, "root alone must be able to write it") {
		t.Errorf("a configuration that others can write: %+v", r)
	}
	if r := c.do("netns", "add", "work", "--ifname", "wan1", "--vpn", "/etc/work.conf"); r.code != 0 || !strings.Contains(r.stderr, "its VPN is down") {
		t.Fatalf("add: %+v", r)
	}
	p := c.inNamespace("work")
	c.nothing(func() { t.Log("before the VPN:", startProbes(p)) })
	serve := func() *process { // whose programs keep its standard error open
		return c.start(c.here("sh", "-c", `exec "$@" >>/run/serve.log 2>&1`, "sh", bin(t, clientBin), "netns", "serve"))
	}
	service := serve()
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(c.sh("cat /run/serve.log"))
		}
	})
	none := func(n int, f func()) { // leaves by uplink n
		t.Helper()
		before := c.counts()[n]
		f()
		if after := c.counts()[n]; after != before {
			t.Errorf("left by the other uplink: %+v, before %+v", after, before)
		}
	}
	none(0, func() { throughVPN(t, p, "at first") })
	if text := c.must("netns", "exec", "work", "cat", "/etc/resolv.conf"); text != "nameserver 10.98.0.53\n" {
		t.Errorf("resolv.conf: %q", text)
	}
	if r := c.do("netns", "list", "--json"); !strings.Contains(r.stdout, `"vpn":"up"`) || strings.Contains(r.stdout, `"vpn_handshake":0,`) || r.code != 0 {
		t.Errorf("list: %+v", r)
	}
	if links := c.must("netns", "exec", "work", "ls", "/sys/class/net"); strings.Contains(links, "eth0") {
		t.Errorf("links: %q", links)
	}
	// The uplink flaps, gets another address, and another link takes over.
	none(0, func() {
		c.ns.IP(t, "link set wan1 down")
		t.Log("while the uplink is down:", startProbes(p))
		c.ns.IP(t, "link set wan1 up")
		c.address(1)
		throughVPN(t, p, "after the uplink was down")
		inet, _ := at(1)
		c.ns.IP(t, "address del "+inet+"/24 dev wan1")
		c.ns.IP(t, "address add 10.2.0.9/24 dev wan1")
		c.ns.IP(t, "route replace default via 10.2.0.1 dev wan1 metric 200")
		throughVPN(t, p, "with another address of the uplink")
	})
	vpn := func() int {
		pids := c.pids("wireguard-go")
		if len(pids) != 1 {
			t.Fatalf("wireguard-go: %v", pids)
		}
		return pids[0]
	}
	none(0, func() {
		c.sh(fmt.Sprintf("kill -9 %d", vpn()))
		t.Log("the VPN was killed:", startProbes(p))
		throughVPN(t, p, "after it was killed")
	})
	// Without the service the VPN goes on. Killed too, nothing leaves at all.
	service.kill()
	none(0, func() { throughVPN(t, p, "after the service was killed") })
	before := vpn()
	service = serve()
	eventually(t, "the next service serves", func() error {
		if text := c.sh("cat /run/serve.log"); strings.Count(text, "serving namespaces") < 2 {
			return errors.New(text)
		}
		return nil
	})
	none(0, func() { throughVPN(t, p, "with the next service") })
	if now := vpn(); now != before {
		t.Errorf("the next service runs another VPN: %d, before %d", now, before)
	}
	c.must("netns", "set", "work", "--ifname", "wan0")
	eventually(t, "the VPN is another process", func() error {
		if pids := c.pids("wireguard-go"); len(pids) != 1 || pids[0] == before {
			return fmt.Errorf("%v", pids)
		}
		return nil
	})
	throughVPN(t, p, "over another uplink")
	none(1, func() { throughVPN(t, p, "over another uplink alone") })
	service.kill()
	pid := vpn()
	c.sh(fmt.Sprintf("kill -9 %d", pid))
	eventually(t, "the VPN is gone", func() error {
		if err := unix.Kill(pid, 0); err == nil {
			return errors.New("it is there")
		}
		return nil
	})
	c.nothing(func() { t.Log("without VPN and service:", startProbes(p)) })
	if r := c.do("netns", "list"); r.code != 1 || !strings.Contains(r.stdout, "its VPN") {
		t.Errorf("list without a VPN: %+v", r)
	}
	service = serve()
	throughVPN(t, p, "with another service")
	service.kill()
	c.must("netns", "del", "work", "--kill", "5")
	if pids := c.pids("wireguard-go"); len(pids) != 0 {
		t.Errorf("the VPN runs: %v", pids)
	}
	if left := c.namespaceTraces(); left != "" {
		t.Errorf("left:\n%s", left)
	}
	if text := c.sh("ls /run/executed 2>/dev/null || :"); text != "" {
		t.Error("a command of the configuration was executed")
	}
}
