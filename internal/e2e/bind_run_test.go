package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const mapped4 = "[::ffff:198.51.100.1]:7"

// TestBindSockets: every kind of socket of a bound program leaves by the uplink, with its address,
// though main prefers the other one.
func TestBindSockets(t *testing.T) {
	c := newCrossing(t)
	inet, inet6 := at(1)
	p := c.bound("wan1")
	for _, tt := range []struct{ name, want, commands string }{
		{"TCP", inet, "new s tcp4\nconnect s " + far4 + "\nask s"},
		{"TCP over IPv6", inet6, "new s tcp6\nconnect s " + far6 + "\nask s"},
		{"UDP, sendto", inet, "new s udp4\nask s " + far4},
		{"UDP over IPv6, sendto", inet6, "new s udp6\nask s " + far6},
		{"UDP, connected", inet, "new s udp4\nconnect s " + far4 + "\nask s"},
		{"UDP over IPv6, connected", inet6, "new s udp6\nconnect s " + far6 + "\nask s"},
		{"TCP over IPv4 on an IPv6 socket", inet, "new s tcp6\nconnect s " + mapped4 + "\nask s"},
		{"UDP over IPv4 on an IPv6 socket", inet, "new s udp6\nask s " + mapped4},
		{"ping socket", "reply", "new s ping4\nask s " + far4},
		{"ping socket, IPv6", "reply", "new s ping6\nask s " + far6},
		{"raw", "reply", "new s raw4\nask s " + far4},
		{"raw, IPv6", "reply", "new s raw6\nask s " + far6},
		{"raw, connected", "reply", "new s raw4\nconnect s " + far4 + "\nask s"},
		{"MPTCP", inet, "new s mptcp4\nconnect s " + far4 + "\nask s"},
		{"MPTCP over IPv6", inet6, "new s mptcp6\nconnect s " + far6 + "\nask s"},
		{"a wildcard", inet, "new s udp4\nbind s 0.0.0.0:0\nask s " + far4},
		{"a wildcard, IPv6", inet6, "new s tcp6\nbind s [::]:0\nconnect s " + far6 + "\nask s"},
		{"multicast", "timeout", "new s udp4\nbind s 224.0.0.251:0\ntry s " + far4}, // an answer comes to the address
		{"a mark of its own", inet, "new s tcp4\nsetmark s 0x99\nconnect s " + far4 + "\nask s"},
		{"a mark of its own, IPv6", inet6, "new s udp6\nsetmark s 0x80000\nask s " + far6},
		{"no mark", inet, "new s udp4\nsetmark s 0\nask s " + far4},
		{"a mark with our bits", inet, "new s udp4\nsetmark s 0xffffffff\nask s " + far4},
		{"the router of the other uplink", "ECONNREFUSED", "new s tcp4\nconnect s 10.1.0.1:9"},
	} {
		t.Log(tt.name)
		c.only(1, func() { p.want(tt.want, "%s", tt.commands) })
	}
	p.want(inet, "new s tcp4\nconnect s "+far4+"\nlocal s")
	p.want(inet6, "new s udp6\nconnect s "+far6+"\nlocal s")

	// Nobody else has it.
	other := c.prober()
	inet, inet6 = at(0)
	c.only(0, func() {
		other.want(inet, "new s tcp4\nconnect s "+far4+"\nask s")
		other.want(inet6, "new s udp6\nask s "+far6)
	})
}

// TestBindHost: the host itself is reached as ever, a stub resolver too.
func TestBindHost(t *testing.T) {
	c := newCrossing(t)
	inet0, inet60 := at(0)
	inet1, _ := at(1)
	here := []string{"127.0.0.1:7", "127.0.0.53:53", "[::1]:7", inet0 + ":7", "[" + inet60 + "]:7", inet1 + ":7"}
	c.ns.Do(func() {
		for _, addr := range here {
			serveWho(t, addr)
		}
	})
	p := c.bound("wan1")
	c.nothing(func() {
		for _, addr := range here {
			family := "4"
			host := strings.TrimSuffix(strings.TrimPrefix(addr[:strings.LastIndexByte(addr, ':')], "["), "]")
			if strings.Contains(host, ":") {
				family = "6"
			}
			if strings.HasPrefix(host, "127.") {
				host = "127.0.0.1"
			}
			p.want(host, "new s tcp%s\nconnect s %s\nask s", family, addr)
			p.want(host, "new s udp%s\nask s %s", family, addr)
		}
	})
}

// TestBindExplicit: an address of the link, or the link itself, may be chosen. What chooses another uplink does not
// leave.
func TestBindExplicit(t *testing.T) {
	c := newCrossing(t)
	inet0, inet60 := at(0)
	inet1, inet61 := at(1)
	p, soft := c.bound("wan1"), c.bound("wan1", "--on-loss", "fallback")
	chosen := func(p *probing, n int, inet, inet6 string) {
		c.only(n, func() {
			p.want(inet, "new s tcp4\nbind s %s:0\nconnect s %s\nask s", inet, far4)
			p.want(inet, "new s udp4\nbind s %s:0\nask s %s", inet, far4)
			p.want(inet6, "new s tcp6\nbind s [%s]:0\nconnect s %s\nask s", inet6, far6)
			p.want(inet6, "new s udp6\nbind s [%s]:0\nask s %s", inet6, far6)
			p.want(inet, "new s udp6\nbind s [::ffff:%s]:0\nask s %s", inet, mapped4)
			p.want(inet, "new s mptcp4\nbind s %s:0\nconnect s %s\nask s", inet, far4)
		})
	}
	chosen(p, 1, inet1, inet61)
	chosen(soft, 0, inet0, inet60)
	chosen(soft, 1, inet1, inet61)
	c.nothing(func() {
		p.want("EPERM", "new s udp4\nbind s %s:0\nask s %s", inet0, far4)
		p.want("EPERM", "new s udp6\nbind s [%s]:0\nask s %s", inet60, far6)
		p.want("EPERM", "new s udp6\nbind s [::ffff:%s]:0\nask s %s", inet0, mapped4)
		p.want("ok", "new tcp tcp4\nbind tcp %s:0\nnew tcp6 tcp6\nbind tcp6 [%s]:0", inet0, inet60)
		p.do("start tcp %s", far4)
		p.do("start tcp6 %s", far6)
		// The other link is not this one.
		p.want("ENETUNREACH", "new s udp6\ndevice s wan0\nconnect s %s", far6)
		p.want("EPERM", "new s udp4\ndevice s wan0\nask s %s", far4) // the kernel takes it for a neighbour
	})
	c.only(1, func() { p.want(inet61, "new s udp6\ndevice s wan1\nask s %s", far6) })
	c.only(1, func() { p.want(inet1, "new s tcp4\ndevice s wan1\nconnect s %s\nask s", far4) })
}

// TestBindMask: marks and rules are where the server's configuration has them.
func TestBindMask(t *testing.T) {
	c := newCrossingAlone(t)
	c.serve(`"bind_mark_mask":"0x30000"`, `"bind_priority":500`, `"bind_fallback_priority":600`) // room for one
	c.watch("--routes", "copy")
	c.waitTables(0)
	c.waitTables(1)
	inet, inet6 := at(1)
	p, soft := c.bound("wan1"), c.bound("wan1", "--on-loss", "fallback")
	for _, p := range []*probing{p, soft} {
		c.leaves(p, 1)
		c.only(1, func() {
			p.want(inet, "new s udp4\nsetmark s 0xffffffff\nask s %s", far4)
			p.want(inet6, "new s udp6\nsetmark s 0x80000\nask s %s", far6)
		})
	}
	rules := strings.Join(c.rules(), "\n")
	for _, want := range []string{"502: from all fwmark 0x20000/0x30000 lookup 10001", "503: from all fwmark 0x20000/0x30000 unreachable",
		"602: from all fwmark 0x30000/0x30000 lookup 10001"} {
		if !strings.Contains(rules, want) {
			t.Errorf("there is no %q in\n%s", want, rules)
		}
	}
	c.ns.IP(t, "link set wan1 down")
	c.blocked(p, "4", "6")
	c.leaves(soft, 0)
	if r := c.do("run", "--ifname", "wan0", "echo", "it runs"); r.code != 125 || r.stdout != "" || !strings.Contains(r.stderr, "bind_mark_mask") {
		t.Errorf("run without a mark: %+v", r)
	}
}

// TestBindFailedBind: a socket that has not got the address that it wanted leaves by the uplink, as if it
// had not asked.
func TestBindFailedBind(t *testing.T) {
	c := newCrossing(t)
	p, soft := c.bound("wan1"), c.bound("wan1", "--on-loss", "fallback")
	for _, tt := range []struct{ family, own, none, far, seen string }{
		{"4", "10.2.0.2", "10.2.0.77", far4, "10.2.0.2"},
		{"6", "[fd02::2]", "[fd02::77]", far6, "fd02::2"},
	} {
		p.want("ok", "new owner udp%s\nbind owner %s:0", tt.family, tt.own)
		for errno, addr := range map[string]string{"EADDRNOTAVAIL": tt.none + ":0", "EADDRINUSE": tt.own + ":" + p.do("port owner")} {
			for _, p := range []*probing{p, soft} { // nothing of it is noticed
				p.want(errno, "new u udp%s\nbind u %s", tt.family, addr)
				c.only(1, func() { p.want(tt.seen, "ask u %s", tt.far) })
				for _, kind := range []string{"udp", "tcp", "mptcp"} {
					if kind != "udp" && errno == "EADDRINUSE" {
						continue // a port of UDP is none of TCP
					}
					p.want(errno, "new s %s%s\nbind s %s", kind, tt.family, addr)
					c.only(1, func() { p.want(tt.seen, "connect s %s\nask s", tt.far) })
				}
			}
		}
		p.want("ok", "close owner")
	}
}

// TestBindServers: what listens answers over its uplink, and over the other one only if it may use that.
func TestBindServers(t *testing.T) {
	c := newCrossing(t)
	p, soft := c.bound("wan1"), c.bound("wan1", "--on-loss", "fallback")
	for _, tt := range []struct {
		p     *probing
		n     int
		heard bool
	}{{p, 1, true}, {soft, 1, true}, {soft, 0, true}, {p, 0, false}} {
		inet, inet6 := at(tt.n)
		for _, kind := range [][3]string{{"tcp4", inet, "0.0.0.0"}, {"tcp6", "[" + inet6 + "]", "[::]"}, {"mptcp4", inet, "0.0.0.0"}} {
			tt.p.want("ok", "new l %s\nbind l %s:0", kind[0], kind[2])
			c.dial(tt.p, tt.n, kind[1], tt.p.do("listen l"), tt.heard)
			tt.p.want("ok", "close l")
		}
	}
	// A server for datagrams answers over any uplink only if it may.
	const ask = `
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(float(sys.argv[3]))
s.connect((sys.argv[1], int(sys.argv[2])))
s.send(b"?")
print(s.recv(100))`
	for _, tt := range []struct {
		p     *probing
		n     int
		heard bool
	}{{p, 1, true}, {soft, 1, true}, {p, 0, false}, {soft, 0, true}} {
		inet, _ := at(tt.n)
		tt.p.want("ok", "new u udp4\nbind u 0.0.0.0:0")
		port := tt.p.do("port u")
		out := make(chan string, 1)
		go func() {
			patience := map[bool]string{true: "10", false: "2"}[tt.heard]
			text, err := c.isps[tt.n].ns.Output("python3", "-c", ask, inet, port, patience)
			if err != nil && strings.Contains(text, "timed out") {
				text = "" // silence is an answer
			}
			out <- text
		}()
		if want := map[bool]string{true: "ok", false: "EPERM"}[tt.heard]; tt.p.do("serve u") != want {
			t.Errorf("datagrams over uplink %d: want %s of the server", tt.n, want)
		}
		tt.p.want("ok", "close u")
		if got := <-out; (got != "") != tt.heard {
			t.Errorf("datagrams over uplink %d: the client got %q", tt.n, got)
		}
	}
}

// dial connects to a listener of a program, l, from behind uplink n, and fails the test unless that is as wanted.
func (c *crossing) dial(p *probing, n int, addr, port string, heard bool) {
	c.t.Helper()
	if !heard {
		c.nothing(func() {
			if text, err := c.isps[n].ns.Output("socat", "-T2", "-u", "TCP:"+addr+":"+port+",connect-timeout=1", "-"); err == nil {
				c.t.Errorf("%s over uplink %d answers: %q", addr, n, text)
			}
		})
		return
	}
	c.only(n, func() {
		out := make(chan string, 1)
		go func() {
			text, err := c.isps[n].ns.Output("socat", "-T5", "-u", "TCP:"+addr+":"+port, "-")
			out <- fmt.Sprint(text, err)
		}()
		from := p.do("accept l conn")
		p.want("ok", "close conn")
		if got, want := <-out, from+"\n<nil>"; got != want {
			c.t.Errorf("%s over uplink %d: the client got %q, want %q", addr, n, got, want)
		}
	})
}

// TestBindTwo: two programs on two uplinks at once, one inside of the other, and what they start.
func TestBindTwo(t *testing.T) {
	c := newCrossing(t)
	client := bin(t, clientBin)
	inet0, inet60 := at(0)
	inet1, inet61 := at(1)
	first, second := c.bound("wan0"), c.bound("wan1")
	inner := c.prober(client, "run", "--ifname=wan1", client, "run", "--ifname=wan0", "--on-loss=block", "--")
	children := c.prober(client, "run", "--ifname", "wan1", "sh", "-c", `sh -c '"$0"; exit' "$0"; exit`)
	for _, tt := range []struct {
		p           *probing
		n           int
		inet, inet6 string
	}{{first, 0, inet0, inet60}, {second, 1, inet1, inet61}, {children, 1, inet1, inet61}, {inner, 0, inet0, inet60}} {
		c.only(tt.n, func() {
			tt.p.want(tt.inet, "new s tcp4\nconnect s %s\nask s", far4)
			tt.p.want(tt.inet6, "new s udp6\nask s %s", far6)
		})
	}
	c.only(0, func() { inner.want(inet0, "new s mptcp4\nconnect s %s\nask s", far4) })
}

// TestBindPrograms: programs of the C library and of others, as they are.
func TestBindPrograms(t *testing.T) {
	c := newCrossing(t)
	inet, inet6 := at(1)
	suid := filepath.Join(t.TempDir(), "socat")
	for dir := filepath.Dir(suid); dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("sh", "-c", `cp "$(command -v socat)" "$0" && chmod 4755 "$0"`, suid).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	const python = `
import socket, sys
s = socket.create_connection((sys.argv[1], 7), 10)
s.send(b"?")
print(s.recv(100).decode().strip())`
	for _, tt := range []struct {
		name, want string
		command    []string
	}{
		{"python", inet + "\n", []string{"python3", "-c", python, internet}},
		{"python, IPv6", inet6 + "\n", []string{"python3", "-c", python, "2001:db8:ffff::1"}},
		{"ping", "1 received", []string{"ping", "-n", "-c1", "-W10", internet}},
		{"ping, IPv6", "1 received", []string{"ping", "-n", "-c1", "-W10", "2001:db8:ffff::1"}},
		{"a shell and its children", inet + "\n" + inet6 + "\n", []string{"sh", "-c",
			"(echo ? | socat -t5 - UDP4:" + far4 + "); echo ? | socat -t5 - TCP6:" + far6}},
		{"another user", inet + "\n", []string{"setpriv", "--reuid=4711", "--regid=4711", "--clear-groups", "sh", "-c", "echo ? | socat -t5 - TCP4:" + far4}},
		{"setuid", inet6 + "\n", []string{"setpriv", "--reuid=4711", "--regid=4711", "--clear-groups", "sh", "-c", "echo ? | " + suid + " -t5 - TCP6:" + far6}},
	} {
		t.Log(tt.name)
		c.only(1, func() {
			r := c.do(append([]string{"run", "--ifname", "wan1", "--"}, tt.command...)...)
			if !strings.Contains(r.stdout, tt.want) || r.code != 0 {
				t.Errorf("%s: got %+v, want %q", tt.name, r, tt.want)
			}
		})
	}
}

// TestBindReversePath: strict or loose, answers come in.
func TestBindReversePath(t *testing.T) {
	c := newCrossing(t)
	inet, _ := at(1)
	p := c.bound("wan1")
	for _, filter := range []string{"0", "1", "2"} {
		for _, mark := range []string{"0", "1"} {
			for _, conf := range []string{"all", "wan0", "wan1"} {
				sysctl(t, c.ns, "net/ipv4/conf/"+conf+"/rp_filter", filter)
				sysctl(t, c.ns, "net/ipv4/conf/"+conf+"/src_valid_mark", mark)
			}
			c.only(1, func() {
				p.want(inet, "new s tcp4\nconnect s %s\nask s", far4)
				p.want(inet, "new s udp4\nask s %s", far4)
				p.want("reply", "new s ping4\nask s %s", far4)
			})
		}
	}
}

// TestBindVPN: a tunnel that owns the whole internet gets everything but what is bound.
func TestBindVPN(t *testing.T) {
	c := newCrossing(t)
	c.ns.IP(t, "tuntap add tun0 mode tun")
	for _, args := range []string{"address add 10.9.0.2/24 dev tun0", "address add fd09::2/64 dev tun0 nodad", "link set tun0 up"} {
		c.ns.IP(t, args)
	}
	for _, dst := range []string{"0.0.0.0/1", "128.0.0.0/1"} {
		c.ns.IP(t, "route add "+dst+" dev tun0")
	}
	for _, dst := range []string{"::/1", "8000::/1"} {
		c.ns.IP(t, "-6 route add "+dst+" dev tun0")
	}
	var tun *os.File
	c.ns.Do(func() { tun = openTun(t, "tun0") })
	inet, inet6 := at(1)
	p, other := c.bound("wan1"), c.prober()
	c.only(1, func() {
		p.want(inet, "new s tcp4\nconnect s %s\nask s", far4)
		p.want(inet6, "new s tcp6\nconnect s %s\nask s", far6)
		p.want(inet, "new s udp4\nask s %s", far4)
		p.want(inet6, "new s udp6\nask s %s", far6)
		p.want("reply", "new s ping6\nask s %s", far6)
	})
	c.nothing(func() {
		for _, s := range [][2]string{{"udp4", far4}, {"udp6", far6}} {
			other.want("timeout", "new s %s\ntry s %s", s[0], s[1])
		}
	})
	if err := tun.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	want := map[netip.Addr]bool{netip.MustParseAddr(internet): true, netip.MustParseAddr("2001:db8:ffff::1"): true}
	for buf := make([]byte, 1500); len(want) > 0; {
		n, err := tun.Read(buf)
		if err != nil {
			t.Fatalf("the tunnel got nothing for %v: %v", want, err)
		}
		switch {
		case n >= 20 && buf[0]>>4 == 4:
			delete(want, netip.AddrFrom4([4]byte(buf[16:])))
		case n >= 40:
			delete(want, netip.AddrFrom16([16]byte(buf[24:])))
		}
	}
}

// openTun opens the end of a tunnel that a program has.
func openTun(t *testing.T, name string) *os.File {
	t.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	req, err := unix.NewIfreq(name)
	if err != nil {
		t.Fatal(err)
	}
	req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), name)
	t.Cleanup(func() { file.Close() })
	return file
}
