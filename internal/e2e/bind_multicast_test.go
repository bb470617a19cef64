package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// datagrams shows the datagrams that come in at provider n: lines of tcpdump.
func (c *crossing) datagrams(n int, filter string) *process {
	c.t.Helper()
	p := c.start(exec.Command("nsenter", "--net="+c.isps[n].ns.Path(), "tcpdump", "-l", "-n", "-Q", "in", "-i", "lan", filter))
	p.waitLog("listening on")
	return p
}

// packetsOf are the lines of datagrams that have all the words.
func packetsOf(p *process, words ...string) (found []string) {
	for line := range strings.Lines(p.log.String()) {
		if strings.Contains(line, " > ") && !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
			found = append(found, strings.TrimSpace(line))
		}
	}
	return found
}

func waitPackets(t *testing.T, p *process, words ...string) {
	t.Helper()
	eventually(t, fmt.Sprintf("packets with %q arrive", words), func() error {
		if len(packetsOf(p, words...)) == 0 {
			return errors.New(p.log.String())
		}
		return nil
	})
}

// TestLockMDNS: avahi-daemon under run uses each link of the host. What it sends leaves by its uplink, in both families, and
// by no other.
func TestLockMDNS(t *testing.T) {
	c := newCrossing(t)
	conf := filepath.Join(c.dir, "avahi.conf")
	if err := os.WriteFile(conf, []byte("[server]\nhost-name=bound\nuse-ipv4=yes\nuse-ipv6=yes\nenable-dbus=no\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	other, own := c.datagrams(0, "udp"), c.datagrams(1, "udp")
	cmd := c.here(bin(t, clientBin), "run", "wan1", "avahi-daemon", "--no-drop-root", "--no-chroot", "--no-rlimits", "-f", conf)
	c.start(cmd)
	waitPackets(t, own, "10.2.0.2.5353 > 224.0.0.251.5353", "bound.local")
	waitPackets(t, own, "> ff02::fb.5353", "bound.local")
	if found := packetsOf(other); len(found) > 0 {
		t.Errorf("by the other uplink: %q", found)
	}
}

// TestLockSSDP: searches of a program under run for devices leave by its uplink, and broadcasts by it or not at all.
func TestLockSSDP(t *testing.T) {
	c := newCrossing(t)
	other, own := c.datagrams(0, "udp"), c.datagrams(1, "udp")
	for _, to := range []string{"UDP4-DATAGRAM:239.255.255.250:1900", "UDP6-DATAGRAM:[ff02::c%wan1]:1900", "UDP4-DATAGRAM:10.2.0.255:9,broadcast"} {
		if r := c.do("run", "wan1", "sh", "-c", `echo search | socat - "$0"`, to); r.code != 0 {
			t.Errorf("%s: %+v", to, r)
		}
	}
	for _, to := range []string{"UDP4-DATAGRAM:10.1.0.255:9,broadcast", "UDP6-DATAGRAM:[ff02::c%wan0]:1900"} {
		if r := c.do("run", "wan1", "sh", "-c", `echo search | socat - "$0"`, to); r.code == 0 {
			t.Errorf("%s: %+v", to, r)
		}
	}
	for _, to := range []string{"> 239.255.255.250.1900", "> ff02::c.1900", "> 10.2.0.255.9"} {
		waitPackets(t, own, to)
	}
	if found := packetsOf(other); len(found) > 0 {
		t.Errorf("by the other uplink: %q", found)
	}
}

// TestLockIPTV: a receiver under run that names no link joins its group on its uplink, and gets the stream from there only.
func TestLockIPTV(t *testing.T) {
	c := newCrossing(t)
	const receive6 = `
import socket, struct
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
s.bind(("::", 5001))
s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, socket.inet_pton(socket.AF_INET6, "ff05::77") + struct.pack("@I", 0))
while True: print(s.recv(99).decode(), flush=True)`
	receiver := c.start(c.here(bin(t, clientBin), "run", "wan1", "socat", "-u", "UDP4-RECV:5000,ip-add-membership=239.1.1.77:0.0.0.0", "STDOUT"))
	receiver6 := c.start(c.here(bin(t, clientBin), "run", "wan1", "python3", "-c", receive6))
	for _, group := range []string{"239.1.1.77", "ff05::77"} {
		eventually(t, group+" is joined", func() error {
			if out := c.ns.IP(t, "maddress show dev wan1"); !strings.Contains(out, group) {
				return errors.New(out)
			}
			return nil
		})
		if out := c.ns.IP(t, "maddress show dev wan0"); strings.Contains(out, group) {
			t.Errorf("joined on the other uplink: %s", out)
		}
	}
	const send6 = `
import socket, sys
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, socket.if_nametoindex(sys.argv[1]))
s.sendto(sys.argv[2].encode(), ("ff05::77", 5001))`
	eventually(t, "the streams arrive", func() error {
		for n := range c.isps {
			stream := fmt.Sprint("stream", n)
			c.isps[n].ns.Run(t, "sh", "-c", fmt.Sprintf("echo %s | socat -u - UDP4-DATAGRAM:239.1.1.77:5000,ip-multicast-if=10.%d.0.1", stream, n+1))
			c.isps[n].ns.Run(t, "python3", "-c", send6, "lan", stream)
		}
		if log, log6 := receiver.log.String(), receiver6.log.String(); !strings.Contains(log, "stream1") || !strings.Contains(log6, "stream1") {
			return fmt.Errorf("IPv4: %s, IPv6: %s", log, log6)
		}
		return nil
	})
	for family, r := range map[string]*process{"IPv4": receiver, "IPv6": receiver6} {
		if log := r.log.String(); strings.Contains(log, "stream0") {
			t.Errorf("%s: the stream of the other uplink arrives: %s", family, log)
		}
	}
}
