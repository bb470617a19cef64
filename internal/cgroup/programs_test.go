package cgroup

import (
	"os"
	"strings"
	"testing"
)

func TestPrograms(t *testing.T) {
	c := testCgroups(t)
	addresses(t)
	if _, err := c.place(-1, "/ta-wan0", testMark); err != nil {
		t.Fatal(err)
	}
	const m, none = "0x2000000", "0x0"
	p := startIn(t, c.file("/ta-wan0"))
	for _, kind := range []string{"tcp4", "tcp6", "udp4", "udp6", "raw4", "raw6", "mptcp4"} {
		p.want(m, "%s socket %s", kind, kind)
	}
	for _, tt := range []struct{ kind, addr, want string }{
		{"udp4", "192.0.2.1:0", none},
		{"udp4", "0.0.0.0:0", m},
		{"udp4", "127.0.0.1:0", m},
		{"udp4", "127.1.2.3:0", m},
		{"udp4", "224.0.0.251:0", m},
		{"udp4", "255.255.255.255:0", m},
		{"tcp4", "192.0.2.1:0", none},
		{"udp6", "[2001:db8::1]:0", none},
		{"udp6", "[::]:0", m},
		{"udp6", "[::1]:0", m},
		{"udp6", "[ff0e::fb]:0", m},
		{"udp6", "[::ffff:192.0.2.1]:0", none},
		{"udp6", "[::ffff:127.0.0.1]:0", m},
		{"udp6", "[::ffff:224.0.0.251]:0", m},
		{"tcp6", "[2001:db8::1]:0", none},
		{"raw4", "192.0.2.1:0", m},   // the kernel asks nobody
		{"mptcp4", "192.0.2.1:0", m}, // it has the address and no mark where it counts, in the subflow
	} {
		p.want(m, "b socket %s", tt.kind)
		if got := p.do("b bind %s", tt.addr); got != tt.want {
			t.Errorf("%s bound to %s: got %s, want %s", tt.kind, tt.addr, got, tt.want)
		}
	}

	// A mark of the program's own shares the socket with ours.
	p.want("0x2000099", "tcp4 set 0x99")
	p.want("0x2080000", "tcp4 set 0x7080000")
	p.want(m, "tcp4 set 0")
	p.want("invalid argument", "tcp4 setshort")
	p.want(m, "tcp4 setlong")
	// It gets nothing into our bits, whether they are set or not.
	p.want(m, "b socket udp4")
	p.want(none, "b bind 192.0.2.1:0")
	p.want("0x99", "b set 0xff000099")

	p.want(m, "l socket tcp4")
	p.want(m, "l bind 0.0.0.0:0")
	p.want(none, "l listen")
	p.want("0x99", "l set 0x99")
	p.want(m, "l6 socket tcp6")
	p.want(none, "l6 listen")

	// Connections keep what they have.
	p.want(m, "c socket udp4")
	p.want(m, "c connect 127.0.0.1:9")
	p.want(m, "c socket udp6")
	p.want(m, "c connect [::1]:9")
}

// A socket whose bind to an address failed has lost its mark, and gets it back before anything is sent.
func TestFailedBind(t *testing.T) {
	c := testCgroups(t)
	addresses(t)
	const none, refused = "0x0", "operation not permitted"
	for _, tt := range []struct {
		mark        Mark
		have, first string // what a socket gets, and what becomes of the first datagram
	}{{testMark, "0x2000000", refused}, {Mark{0x03000000, 0xff000000}, "0x3000000", "0x3000000"}} {
		dir := "/ta-" + tt.have
		if _, err := c.place(-1, dir, tt.mark); err != nil {
			t.Fatal(err)
		}
		p := startIn(t, c.file(dir))
		for _, s := range []struct{ kind, absent, here, to string }{
			{"udp4", "192.0.2.77:0", "192.0.2.1:0", "127.0.0.1:9"},
			{"udp6", "[2001:db8::77]:0", "[2001:db8::1]:0", "[::1]:9"},
			{"udp6", "[::ffff:192.0.2.77]:0", "[::ffff:192.0.2.1]:0", "[::ffff:127.0.0.1]:9"},
		} {
			p.want(tt.have, "f socket %s", s.kind)
			p.want("cannot assign requested address", "f bind %s", s.absent)
			p.want(none, "f mark")
			p.want(tt.first, "f send %s", s.to)
			p.want(tt.have, "f mark")
			p.want(tt.have, "f send %s", s.to)
			p.want("invalid argument", "f bind %s", s.here) // it has a port by now
			p.want(none, "f mark")
			p.want(tt.have, "f connect %s", s.to)

			// One that has the address sends as ever, and so does one that was taken out.
			p.want(tt.have, "f socket %s", s.kind)
			p.want(none, "f bind %s", s.here)
			p.want(none, "f send %s9", strings.TrimSuffix(s.here, "0"))
		}
		p.want(tt.have, "out socket udp4")
		if _, err := c.Detach(p.cmd.Process.Pid); err != nil {
			t.Fatal(err)
		}
		p.want("0x1000000", "out send 127.0.0.1:9")
	}
}

// A kernel that does not ask the programs is noticed.
func TestVerify(t *testing.T) {
	if err := verify(testMark); err == nil || !strings.Contains(err.Error(), "net_cls") {
		t.Errorf("in no cgroup of ours: %v", err)
	}
}

func TestNested(t *testing.T) {
	c := testCgroups(t)
	inner := Mark{Value: 0x04000000, Mask: 0xff000000}
	if _, err := c.place(-1, "/table-allocator/wan0", testMark); err != nil {
		t.Fatal(err)
	}
	child := childOf("/table-allocator/wan0", wan1)
	if _, err := c.place(-1, child, inner); err != nil {
		t.Fatal(err)
	}
	p := startIn(t, c.file(child))
	p.want("0x4000000", "a socket tcp4")
	p.want("0x4000099", "a set 0x99")
	p.want("0x4000000", "b socket udp6")
	if err := os.Mkdir(c.file(child)+"/below", 0o755); err != nil {
		t.Fatal(err)
	}
	startIn(t, c.file(child)+"/below").want("0x4000000", "a socket tcp4")
}
