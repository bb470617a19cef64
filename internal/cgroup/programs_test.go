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
	const m = "0x2000000"
	p := startIn(t, c.file("/ta-wan0"))
	for _, kind := range []string{"tcp4", "tcp6", "udp4", "udp6", "raw4", "raw6", "mptcp4"} {
		p.want(m, "%s socket %s", kind, kind)
	}
	// What it binds a socket to, and whether it gets that, changes nothing.
	for _, tt := range []struct{ kind, addr, answer string }{
		{"udp4", "192.0.2.1:0", m},
		{"udp4", "127.0.0.1:0", m},
		{"udp4", "224.0.0.251:0", m},
		{"udp4", "192.0.2.77:0", "cannot assign requested address"},
		{"tcp4", "192.0.2.1:0", m},
		{"udp6", "[2001:db8::1]:0", m},
		{"udp6", "[::ffff:192.0.2.1]:0", m},
		{"tcp6", "[2001:db8::77]:0", "cannot assign requested address"},
		{"raw4", "192.0.2.1:0", m},
		{"mptcp4", "192.0.2.1:0", m},
	} {
		p.want(m, "b socket %s", tt.kind)
		p.want(tt.answer, "b bind %s", tt.addr)
		p.want(m, "b mark")
	}

	// A mark of the program's own shares the socket with ours.
	p.want("0x2000099", "tcp4 set 0x99")
	p.want("0x2080000", "tcp4 set 0x7080000")
	p.want(m, "tcp4 set 0")
	p.want("invalid argument", "tcp4 setshort")
	p.want(m, "tcp4 setlong")
	// It gets nothing into our bits.
	p.want("0x2000099", "tcp4 set 0xff000099")

	p.want(m, "l socket tcp4")
	p.want(m, "l bind 0.0.0.0:0")
	p.want(m, "l listen")
	p.want("0x2000099", "l set 0x99")
	p.want(m, "l6 socket tcp6")
	p.want(m, "l6 listen")

	// Connections keep what they have.
	p.want(m, "c socket udp4")
	p.want(m, "c connect 127.0.0.1:9")
	p.want(m, "c socket udp6")
	p.want(m, "c connect [::1]:9")
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
