package cgroup

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What joins a group of multicast joins it on the link that it is bound to, whatever main's routes say.
func TestJoin(t *testing.T) {
	inNamespace(t)
	c := testCgroups(t)
	ip := func(args string) string {
		t.Helper()
		out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput()
		if err != nil {
			t.Fatalf("ip %s: %v\n%s", args, err, out)
		}
		return string(out)
	}
	for _, args := range []string{
		"link set lo up", "link add ja type veth peer name ja1", "link add jb type veth peer name jb1", "link set ja up", "link set jb up",
		"address add 10.1.0.2/24 dev ja", "address add 10.2.0.2/24 dev jb", "address add 10.2.0.3/24 dev jb", "route add default dev ja",
	} {
		ip(args)
	}
	const m = "0x12000000"
	mark := Mark{0x12000000, 0xff000000}
	a, b := ifindex(t, "ja"), ifindex(t, "jb")
	syncLock(t, mark.Value, b, "10.2.0.2", "10.2.0.3", "fe80::1")
	if _, err := c.place(-1, "/ta-wan0", mark); err != nil {
		t.Fatal(err)
	}
	p := startIn(t, c.file("/ta-wan0"))

	group4, group6 := netip.MustParseAddr("239.1.2.3"), netip.MustParseAddr("ff0e::1234")
	index := func(i int) string { return fmt.Sprintf("%x", binary.NativeEndian.AppendUint32(nil, uint32(i))) }
	bytes := func(addr string) string { return fmt.Sprintf("%x", netip.MustParseAddr(addr).AsSlice()) }
	g4, g6 := bytes(group4.String()), bytes(group6.String())
	sockaddr := func(family uint16, addr string) string {
		text := fmt.Sprintf("%x0000", binary.NativeEndian.AppendUint16(nil, family))
		if family == unix.AF_INET6 {
			text += "00000000"
		}
		return text + addr + strings.Repeat("00", 128-len(text+addr)/2)
	}
	req := func(i int, groups ...string) string { return index(i) + "00000000" + strings.Join(groups, "") }
	s4, s6 := sockaddr(unix.AF_INET, g4), sockaddr(unix.AF_INET6, g6)
	from4, from6 := sockaddr(unix.AF_INET, bytes("198.51.100.1")), sockaddr(unix.AF_INET6, bytes("2001:db8::7"))
	for _, tt := range []struct {
		name, kind string
		option     int
		value      string
		want       string
	}{
		{"mreq, no link", "udp4", unix.IP_ADD_MEMBERSHIP, g4 + "00000000", m},
		{"mreq, own address", "udp4", unix.IP_ADD_MEMBERSHIP, g4 + bytes("10.2.0.3"), m},
		{"mreq, address of another link", "udp4", unix.IP_ADD_MEMBERSHIP, g4 + bytes("10.1.0.2"), refused},
		{"mreqn, no link", "udp4", unix.IP_ADD_MEMBERSHIP, g4 + "00000000" + index(0), m},
		{"mreqn, own address", "udp4", unix.IP_ADD_MEMBERSHIP, g4 + bytes("10.2.0.2") + index(0), m},
		{"mreqn, address of another link", "udp4", unix.IP_ADD_MEMBERSHIP, g4 + bytes("10.1.0.2") + index(0), refused},
		{"mreqn, own link", "udp4", unix.IP_ADD_MEMBERSHIP, g4 + "00000000" + index(b), m},
		{"mreqn, own link, which counts, and an address", "udp4", unix.IP_ADD_MEMBERSHIP, g4 + bytes("10.1.0.2") + index(b), m},
		{"mreqn, another link", "udp4", unix.IP_ADD_MEMBERSHIP, g4 + "00000000" + index(a), refused},
		{"mreq_source, no link", "udp4", unix.IP_ADD_SOURCE_MEMBERSHIP, g4 + "00000000" + bytes("198.51.100.1"), m},
		{"mreq_source, another link", "udp4", unix.IP_ADD_SOURCE_MEMBERSHIP, g4 + bytes("10.1.0.2") + bytes("198.51.100.1"), refused},
		{"group_req, no link", "udp4", joinGroup, req(0, s4), m},
		{"group_req, own link", "udp4", joinGroup, req(b, s4), m},
		{"group_req, another link", "udp4", joinGroup, req(a, s4), refused},
		{"group_source_req, no link", "udp4", joinSourceGroup, req(0, s4, from4), m},
		{"group_source_req, another link", "udp4", joinSourceGroup, req(a, s4, from4), refused},
		{"ipv6_mreq, no link", "udp6", unix.IPV6_JOIN_GROUP, g6 + index(0), m},
		{"ipv6_mreq, own link", "udp6", unix.IPV6_JOIN_GROUP, g6 + index(b), m},
		{"ipv6_mreq, another link", "udp6", unix.IPV6_JOIN_GROUP, g6 + index(a), refused},
		{"IPv6 group_req, no link", "udp6", joinGroup, req(0, s6), m},
		{"IPv6 group_req, another link", "udp6", joinGroup, req(a, s6), refused},
		{"IPv6 group_source_req, no link", "udp6", joinSourceGroup, req(0, s6, from6), m},
		{"IPv6 group_source_req, another link", "udp6", joinSourceGroup, req(a, s6, from6), refused},
		{"too short", "udp4", unix.IP_ADD_MEMBERSHIP, g4, "invalid argument"},
		{"too short for a link", "udp6", unix.IPV6_JOIN_GROUP, g6, "invalid argument"},
		{"another option", "udp4", unix.IP_TTL, "07000000", m},
	} {
		p.want(m, "s socket %s", tt.kind)
		p.want(tt.want, "s join %d,%s", tt.option, tt.value)
		group := map[string]string{"udp4": group4.String(), "udp6": group6.String()}[tt.kind]
		joined := tt.want == m && tt.name != "another option"
		if got := strings.Contains(ip("maddr show dev jb"), group); got != joined {
			t.Errorf("%s: on the link: %v, want %v", tt.name, got, joined)
		}
		if strings.Contains(ip("maddr show dev ja"), group) {
			t.Errorf("%s: on the other link", tt.name)
		}
		p.do("s close")
	}
	p.want(m, "s socket udp4")
	p.want(m, "s join %d,%s", unix.IP_ADD_MEMBERSHIP, g4+bytes("127.0.0.1")) // the host itself
	syncLock(t, mark.Value, 0)
	p.want(refused, "s join %d,%s", unix.IP_ADD_MEMBERSHIP, bytes("239.1.2.4")+"00000000")
	p.want(m, "s socket udp6")
	p.want(refused, "s join %d,%s", unix.IPV6_JOIN_GROUP, g6+index(0))
}
