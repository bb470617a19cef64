package e2e

import "testing"

// acknowledge sends an acknowledgement of nothing to a port, which asks the kernel for a reset.
const acknowledge = `
import socket, struct, sys
to, port = sys.argv[1], int(sys.argv[2])
family = socket.AF_INET6 if ":" in to else socket.AF_INET
probe = socket.socket(family, socket.SOCK_DGRAM)
probe.connect((to, 9))
source = probe.getsockname()[0]
def tcp(checksum): return struct.pack("!HHIIBBHHH", 5555, port, 1, 2, 5 << 4, 16, 1000, checksum, 0)
whole = socket.inet_pton(family, source) + socket.inet_pton(family, to) + struct.pack("!HH", 6, 20) + tcp(0)
total = sum(struct.unpack("!%dH" % (len(whole) // 2), whole))
while total >> 16: total = (total & 0xffff) + (total >> 16)
raw = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_TCP)
raw.sendto(tcp(~total & 0xffff), (to, 0))`

// TestLockUnseenAnswers: what the kernel answers for a listener without asking the lock, resets and SYN cookies, does not leave
// by the link with addresses of another uplink. Asked at the link's own address, the kernel answers as ever.
func TestLockUnseenAnswers(t *testing.T) {
	c := newCrossing(t)
	p := c.bound("wan1")
	listen := func(kind string) (port string) {
		t.Helper()
		p.want("ok", "new l %s\nbind l %s:0", kind, map[byte]string{'4': "0.0.0.0", '6': "[::]"}[kind[len(kind)-1]])
		return p.do("listen l")
	}
	scan := func(n int, to, port string) func() {
		return func() { c.isps[n].ns.Run(t, "python3", "-c", acknowledge, to, port) }
	}
	for _, cookies := range []string{"0", "2"} {
		sysctl(t, c.ns, "net/ipv4/tcp_syncookies", cookies)
		for _, kind := range []string{"tcp4", "tcp6"} {
			port := listen(kind)
			for n := range c.isps {
				inet, inet6 := at(n)
				to, bare := inet, inet
				if kind != "tcp4" {
					to, bare = "["+inet6+"]", inet6
				}
				if cookies != "0" || n == 1 {
					c.dial(p, n, to, port, n == 1)
				}
				if n == 1 {
					c.only(n, scan(n, bare, port))
				} else {
					c.nothing(scan(n, bare, port))
				}
			}
			p.want("ok", "close l")
		}
	}
	// Both uplinks in one network: what comes in by the other link, for an address of this one, is answered.
	port := listen("tcp4")
	inet, _ := at(1)
	c.isps[0].ns.IP(t, "route add "+inet+"/32 via 10.1.0.2")
	c.only(1, scan(0, inet, port))
}
