package e2e

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// A dnsServer answers each question for an IPv4 address, and notes who asked what.
type dnsServer struct {
	mu    sync.Mutex
	asked []string // NAME by ADDRESS
}

func (d *dnsServer) serve(conn *net.UDPConn) {
	buf := make([]byte, 1500)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		const header, tail = 12, 4 // bytes before a name, and behind it
		if n < header+tail+1 {
			continue
		}
		var name []string
		at := header
		for at < n && buf[at] != 0 && at+1+int(buf[at]) < n {
			name = append(name, string(buf[at+1:at+1+int(buf[at])]))
			at += 1 + int(buf[at])
		}
		if at+1+tail > n {
			continue
		}
		d.mu.Lock()
		d.asked = append(d.asked, strings.Join(name, ".")+" by "+from.Addr().Unmap().String())
		d.mu.Unlock()
		question := buf[header : at+1+tail]
		reply := append([]byte{}, buf[0], buf[1], 0x81, 0x80, 0, 1, 0, 0, 0, 0, 0, 0)
		reply = append(reply, question...)
		if binary.BigEndian.Uint16(question[len(question)-tail:]) == 1 { // A
			reply[7] = 1
			reply = append(reply, 0xc0, header, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4, 192, 0, 2, 99)
		}
		_, _ = conn.WriteToUDPAddrPort(reply, from) // who asked may be unreachable again
	}
}

// by returns who asked for a name.
func (d *dnsServer) by(name string) (who []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, line := range d.asked {
		if rest, ok := strings.CutPrefix(line, name+" by "); ok {
			who = append(who, rest)
		}
	}
	return who
}

// TestNetnsDNS: names are asked for over the uplink alone, at the namespace's name server, whatever happens to the uplink, to
// the host's resolv.conf, to the watch and to the table of nftables.
func TestNetnsDNS(t *testing.T) {
	c := newNamespaces(t)
	d := new(dnsServer)
	c.internet.Do(func() {
		conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP(internet), Port: 53})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		go d.serve(conn)
	})
	c.sh("echo nameserver " + internet + " >/etc/resolv.conf") // that of the host asks the same one, by wan0
	c.must("netns", "add", "work", "--ifname", "wan1", "--resolv", internet)
	service := c.start(c.here(bin(t, clientBin), "netns", "serve"))
	service.waitLog("serving namespaces")
	inet, _ := at(1)
	for n, event := range []string{
		"true",
		"echo nameserver " + internet + " >/etc/resolv.new; mv /etc/resolv.new /etc/resolv.conf",
		"ln -s /run/elsewhere /etc/resolv.new; echo nameserver 192.0.2.1 >/run/elsewhere; mv /etc/resolv.new /etc/resolv.conf",
		"echo nameserver 192.0.2.2 >/run/other; mv /run/other /run/elsewhere",
		"rm /etc/resolv.conf; echo nameserver 192.0.2.3 >/etc/resolv.conf",
		"mkdir -p /run/systemd/resolve; echo nameserver 192.0.2.4 >/run/systemd/resolve/stub-resolv.conf; ln -sf ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf",
		"rm -r /run/systemd; mkdir -p /run/systemd/resolve; echo nameserver 192.0.2.5 >/run/systemd/resolve/stub-resolv.conf",
		"ip link set wan1 down; ip link set wan1 up; ip route replace default via 10.2.0.1 dev wan1 metric 200",
		"nft flush ruleset",
		"ip rule del priority 9003; ip rule del priority 8990",
	} {
		name := fmt.Sprintf("event%d.test", n)
		before := c.counts()[0]
		c.sh(event)
		eventually(t, "names resolve after "+event, func() error {
			r := c.do("netns", "exec", "work", "getent", "ahosts", name)
			if r.code != 0 || !strings.HasPrefix(r.stdout, "192.0.2.99") {
				return fmt.Errorf("%+v, with %+v", r, c.do("netns", "exec", "work", "sh", "-c", "ls -l /etc/resolv.conf; cat /etc/resolv.conf; grep resolv /proc/self/mountinfo"))
			}
			return nil
		})
		if after := c.counts()[0]; after != before {
			t.Errorf("%s: left by the other uplink: %+v, before %+v", event, after, before)
		}
		for _, who := range d.by(name) {
			if who != inet {
				t.Errorf("%s: %s asked", event, who)
			}
		}
	}
	// Its name server cannot be asked, which is said, and nobody else is asked.
	c.must("netns", "check", "work")
	c.must("netns", "add", "silent", "--ifname", "wan1", "--resolv", "192.0.2.53")
	c.isps[1].ns.Run(t, "nft", "add table inet closed; add chain inet closed pass { type filter hook forward priority 0; }; add rule inet closed pass meta l4proto { tcp, udp } th dport 53 reject")
	before := c.counts()[0]
	for name, want := range map[string]string{"work": "name server " + internet + ": port 53 is refused", "silent": "name server 192.0.2.53: ", "nosuch": "no namespace of this name"} {
		if r := c.do("netns", "check", name); r.code != 1 || !strings.Contains(r.stderr, want) {
			t.Errorf("check of %s: %+v, want %s", name, r, want)
		}
	}
	if r := c.do("netns", "exec", "work", "getent", "ahosts", "closed.test"); r.code == 0 {
		t.Errorf("a name resolves although port 53 is closed: %+v", r)
	}
	if after, who := c.counts()[0], d.by("closed.test"); after != before || len(who) > 0 {
		t.Errorf("left by the other uplink: %+v, before %+v; %s asked", after, before, who)
	}
	// The watch killed, the service killed, and the uplink down: nothing is asked anywhere.
	c.signal("watch", unix.SIGKILL)
	c.signal("serve", unix.SIGKILL)
	c.nothing(func() {
		c.ns.IP(t, "link set wan1 down")
		if r := c.do("netns", "exec", "work", "getent", "ahosts", "never.test"); r.code == 0 {
			t.Errorf("a name resolves without an uplink: %+v", r)
		}
	})
	if who := d.by("never.test"); len(who) > 0 {
		t.Error(errors.New(strings.Join(who, ", ")))
	}
}
