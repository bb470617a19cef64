package e2e

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
)

// streams answers each datagram at port 99 with many, and tells how many it has sent.
const streams = `import socket, sys, threading, time
def serve(family, addr):
    s = socket.socket(family, socket.SOCK_DGRAM)
    s.bind((addr, 99))
    while True:
        who = s.recvfrom(99)[1]
        threading.Thread(target=send, args=(s, who)).start()
def send(s, who):
    while True:
        for _ in range(20):
            try:
                s.sendto(b"x", who)
            except OSError:
                pass # an error of ICMP for what it sent before
            time.sleep(0.002)
        print("sent to", who[0], flush=True)
for family, addr in (socket.AF_INET, sys.argv[1]), (socket.AF_INET6, sys.argv[2]):
    threading.Thread(target=serve, args=(family, addr)).start()
print("serving", flush=True)
`

// TestNetnsReplies: on a host that forwards for all links, what still comes for a namespace whose link is down, or which is deleted,
// leaves by no other link, and neither does what this host says of it, nor an answer to a source that is not the namespace's.
func TestNetnsReplies(t *testing.T) {
	c := newNamespaces(t)
	sysctl(t, c.ns, "net/ipv4/ip_forward", "1")
	sysctl(t, c.ns, "net/ipv6/conf/all/forwarding", "1")
	for n := range c.isps { // routes of router advertisements are gone
		c.address(n)
		c.waitTables(n)
	}
	far := c.start(exec.Command("nsenter", "--net="+c.internet.Path(), "/usr/bin/python3", "-c", streams, internet, internet6))
	far.waitLog("serving")
	// arrive waits until much has come from the far end for uplink 1.
	arrive := func() {
		t.Helper()
		inet, inet6 := at(1)
		for _, to := range []string{inet, inet6} {
			before := strings.Count(far.log.String(), "sent to "+to)
			eventually(t, "replies to "+to, func() error {
				if now := strings.Count(far.log.String(), "sent to "+to); now < before+5 {
					return fmt.Errorf("%d times, before %d", now, before)
				}
				return nil
			})
		}
	}
	none := func(what string, f func()) { // leaves by wan0, or with a foreign source
		t.Helper()
		before := c.counts()
		f()
		if after := c.counts(); after[0] != before[0] || after[1].Foreign != before[1].Foreign {
			t.Errorf("%s: packets left by the other uplink: %+v, before %+v", what, after, before)
		}
	}
	c.must("netns", "add", "work", "--ifname", "wan1", "--resolv", "192.0.2.53")
	p := c.inNamespace("work")
	asks := func(names ...string) { // each name is of a socket that stays open
		t.Helper()
		for n, to := range []string{internet + ":99", "[" + internet6 + "]:99"} {
			eventually(t, "the far end answers", func() error {
				p.do("new %s udp%d", names[n], 4+2*n)
				if got := p.do("try %s %s", names[n], to); got != "x" {
					return fmt.Errorf("%s: %s", to, got)
				}
				return nil
			})
		}
	}
	asks("a", "b")
	none("an answer to a source that is not the namespace's", func() {
		c.must("netns", "exec", "work", "--", "sh", "-c", `ip address add 198.51.100.77/32 dev eth0; ip -6 address add 2001:db8:ffff::77/128 dev eth0 nodad
			for to in $(ip route get 198.51.100.1 | grep -o 'via [^ ]*' | cut -c5-) $(ip -6 route get 2001:db8:ffff::1 | grep -o 'via [^ ]*' | cut -c5-); do
				case $to in *:*) from=2001:db8:ffff::77 ;; *) from=198.51.100.77 ;; esac
				! ping -c 1 -W 1 -I $from $to
			done
			ip address del 198.51.100.77/32 dev eth0; ip -6 address del 2001:db8:ffff::77/128 dev eth0`)
	})
	none("its link is down", func() {
		c.sh("ip link set tav1 down")
		arrive()
	})
	c.must("netns", "set", "work", "--ifname", "wan1")
	none("its link has gone", func() {
		c.sh("ip link del tav1")
		arrive()
	})
	c.must("netns", "set", "work", "--ifname", "wan1")
	asks("c", "d")
	none("it is deleted", func() {
		c.must("netns", "del", "work", "--kill", "5")
		arrive()
	})
}
