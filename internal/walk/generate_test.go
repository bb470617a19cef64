package walk

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
)

// set is a random host: rules and routes as lines of ip, and flows to ask for.
type set struct {
	family        int
	rules, routes []string
	flows         []flow
}

// lines are what makes the host.
func (s set) lines() []string {
	lines := []string{"rule flush", "rule add pref 32766 lookup main", "nexthop flush"} // which takes routes that no other flush does
	for _, table := range tables {
		lines = append(lines, "route flush table "+table)
	}
	for i := range 3 { // a flush of main takes the networks
		lines = append(lines, fmt.Sprintf("route add %s dev c%d", word(s.family, fmt.Sprintf("10.0.%d.0/24", i+1), fmt.Sprintf("fd00:%d::/64", i+1)), i),
			fmt.Sprintf("nexthop add id %d via %s dev c%d", i+1, word(s.family, fmt.Sprintf("10.0.%d.1", i+1), fmt.Sprintf("fd00:%d::1", i+1)), i))
	}
	lines = append(lines, "nexthop add id 4 group 1/2")
	return slices.Concat(lines, s.routes, s.rules)
}

var tables = []string{"main", "100", "101", "10000", "10001"}

func word(family int, ipv4, ipv6 string) string {
	if family == unix.AF_INET {
		return ipv4
	}
	return ipv6
}

// flow is a packet; links have their names.
type flow struct {
	route.Question
	iif, oif string
}

func (f flow) packet(index map[string]int) Packet {
	f.Iif, f.Oif = index[f.iif], index[f.oif]
	return Packet{Question: f.Question}
}

func newSet(r *rand.Rand, family int) set {
	s := set{family: family}
	g := generator{r, family}
	for range 3 + r.IntN(12) {
		s.routes = append(s.routes, g.route())
	}
	for range 2 + r.IntN(11) {
		s.rules = append(s.rules, g.rule())
	}
	if r.IntN(2) == 0 {
		s.rules = append(s.rules, g.ours()...)
	}
	// Of several next hops the kernel looks at the group of the one that it takes, in IPv6.
	if family == unix.AF_INET6 && slices.ContainsFunc(s.routes, func(line string) bool {
		return strings.Contains(line, " nexthop ") || strings.HasSuffix(line, " nhid 4")
	}) {
		s.rules = slices.DeleteFunc(s.rules, func(line string) bool { return strings.Contains(line, " suppress_ifgroup ") })
	}
	for range 40 {
		s.flows = append(s.flows, g.flow())
	}
	return s
}

type generator struct {
	*rand.Rand
	family int
}

func (g generator) of(ipv4, ipv6 string) string { return word(g.family, ipv4, ipv6) }

func (g generator) one(words ...string) string { return words[g.IntN(len(words))] }

func (g generator) often(percent int) bool { return g.IntN(100) < percent }

func (g generator) prefix() string {
	if g.family == unix.AF_INET {
		return g.one("0.0.0.0/1", "128.0.0.0/1", "10.0.0.0/8", "10.9.0.0/16", "10.9.1.0/24", "10.9.1.5/32", "203.0.113.0/24", "10.0.2.0/24")
	}
	return g.one("::/1", "2000::/3", "fd00::/8", "fd09::/32", "fd09:0:1::/48", "fd09:0:1::5/128", "2001:db8::/32", "fd00:2::/64")
}

func (g generator) route() string {
	n := g.IntN(3)
	to, table := g.prefix(), g.one(tables...)
	if g.often(35) {
		to = "default"
	}
	if g.family == unix.AF_INET6 && g.often(15) {
		to += fmt.Sprintf(" from fd00:%d::/64", 1+g.IntN(3))
	}
	gateway := func(n int) string {
		return fmt.Sprintf("via %s dev c%d", g.of(fmt.Sprintf("10.0.%d.1", n+1), fmt.Sprintf("fd00:%d::1", n+1)), n)
	}
	metric := fmt.Sprintf(" metric %d table %s", 10*(1+g.IntN(90)), table)
	switch k := g.IntN(100); {
	case k < 20:
		return "route add " + g.one("blackhole", "unreachable", "prohibit", "throw") + " " + to + metric
	case k < 30:
		return "route add " + to + fmt.Sprintf(" dev c%d", n) + metric
	case k < 40 && g.family == unix.AF_INET:
		return "route add " + to + " tos 0x10 " + gateway(n) + metric
	case k < 48:
		return "route add " + to + metric + " nexthop " + gateway(n) + " nexthop " + gateway((n+1)%3)
	case k < 56 && !strings.Contains(to, " from "):
		return "route add " + to + metric + " nhid " + g.one("1", "2", "3", "4")
	}
	if g.family == unix.AF_INET6 && g.often(30) {
		metric += " pref " + g.one("low", "high")
	}
	return "route add " + to + " " + gateway(n) + metric
}

func (g generator) rule() string {
	priority := 1 + g.IntN(40000)
	line := fmt.Sprintf("rule add pref %d", priority)
	if g.often(12) {
		line = fmt.Sprintf("rule add not pref %d", priority)
	}
	add := func(percent int, format string, args ...any) {
		if g.often(percent) {
			line += fmt.Sprintf(" "+format, args...)
		}
	}
	own := g.source()
	add(30, "from %s", g.one(own, g.of("10.0.0.0/16", "fd00::/16"), g.prefix()))
	add(25, "to %s", g.prefix())
	add(12, "iif %s", g.one("lo", "c0", "c1", "gone0"))
	add(12, "oif %s", g.one("c0", "c1", "c2"))
	add(15, "fwmark %s", g.one("0x1", "0x2000000/0xff000000", "0/0x1", "0x3000000/0xfe000000"))
	add(10, "uidrange %s", g.one("0-0", "1000-1000", "1-65535"))
	add(12, "ipproto %s", g.one("udp", "tcp", g.of("icmp", "ipv6-icmp")))
	add(8, "sport %s", g.one("5000", "4000-6000"))
	add(8, "dport %s", g.one("53", "1-1024"))
	add(8, "tos %s", g.one("0x10", "0x08", "0x18"))
	add(3, "tun_id 5")
	if g.often(12) {
		return fmt.Sprintf("raw %d %s %s", priority, g.one(tables[1:]...), g.selectors())
	}
	switch k := g.IntN(100); {
	case k < 8:
		return line + " " + g.one("unreachable", "prohibit", "blackhole")
	case k < 13:
		return line + " nop"
	case k < 20:
		return line + fmt.Sprintf(" goto %s", g.one("32766", "20000", "39999"))
	}
	line += " lookup " + g.one(tables...)
	add(15, "suppress_prefixlength %s", g.one("0", "1", "8", "16"))
	add(8, "suppress_ifgroup %d", 1+g.IntN(2))
	return line
}

// selectors are what newer kernels let rules select by, which `ip` of Debian 12 cannot write: attributes with their bytes.
func (g generator) selectors() string {
	port := func(n uint16) string { return hex.EncodeToString(binary.NativeEndian.AppendUint16(nil, n)) }
	switch g.IntN(6) {
	case 0:
		return "25=" + g.one("2e", "00", "04", "06") // DSCP
	case 1:
		return "25=" + g.one("20", "28", "00") + " 30=" + g.one("38", "20") // and its mask
	case 2:
		return "23=" + port(4096) + port(4096) + " 28=" + port(0xf000) // source port and mask: 5000 and 7000 are in it
	case 3:
		return "24=" + port(32) + port(32) + " 29=" + port(0xffe0) // destination port and mask: 53 is in it
	case 4:
		return g.of("25=02", "26=00012345 27=000fffff") // flow label, which no packet here has
	default:
		return g.of("25=02", "26=00000000 27=00000fff") // and its mask
	}
}

// ours are rules as a lease has them.
func (g generator) ours() (lines []string) {
	for i := range 2 {
		a, n := g.of(fmt.Sprintf("10.0.%d.2", i+1), fmt.Sprintf("fd00:%d::2", i+1)), g.of(fmt.Sprintf("10.0.%d.0/24", i+1), fmt.Sprintf("fd00:%d::/64", i+1))
		lines = append(lines,
			fmt.Sprintf("rule add pref 9998 from %s lookup main suppress_prefixlength %s", a, g.of("7", "6")),
			fmt.Sprintf("rule add pref 10000 from %s lookup %d", a, 10000+i),
			fmt.Sprintf("rule add pref 10001 from %s unreachable", a),
			fmt.Sprintf("rule add pref 19999 to %s lookup main suppress_prefixlength %s", n, g.of("23", "63")),
			fmt.Sprintf("rule add pref 20000 to %s lookup %d", n, 10000+i),
			fmt.Sprintf("rule add pref 91000 iif lo lookup %d", 10000+i),
			fmt.Sprintf("rule add pref 9002 fwmark %#x/0xff000000 lookup %d", 0x2000000*(i+1), 10000+i),
			fmt.Sprintf("rule add pref 9003 fwmark %#x/0xff000000 unreachable", 0x2000000*(i+1)))
	}
	return lines
}

func (g generator) source() string { return g.address(1 + g.IntN(3)) }

func (g generator) address(link int) string {
	return g.of(fmt.Sprintf("10.0.%d.2", link), fmt.Sprintf("fd00:%d::2", link))
}

func (g generator) flow() flow {
	var f flow
	if g.family == unix.AF_INET {
		f.Dst = netip.MustParseAddr(g.one("10.9.1.5", "10.9.1.6", "10.9.2.1", "203.0.113.9", "150.1.1.1", "10.0.1.9", "10.0.2.2", "10.200.1.1"))
	} else {
		f.Dst = netip.MustParseAddr(g.one("fd09:0:1::5", "fd09:0:1::6", "fd09:0:2::1", "2001:db8::9", "3fff::1", "fd00:1::9", "fd00:2::2", "fdff::1"))
	}
	f.Mark = []uint32{0, 0, 0, 1, 0x2000000, 0x3000000, 0x4000000}[g.IntN(7)]
	f.TOS = []uint8{0, 0, 0, 0x10, 0x08, 0xb8, 0xa0}[g.IntN(7)]
	f.IPProto = []uint8{0, unix.IPPROTO_UDP, unix.IPPROTO_UDP, unix.IPPROTO_TCP}[g.IntN(4)]
	if f.IPProto != 0 && g.often(50) {
		f.Sport, f.Dport = []uint16{0, 5000, 7000}[g.IntN(3)], []uint16{53, 8080}[g.IntN(2)]
	}
	if g.often(30) {
		f.iif, f.Src = g.one("c0", "c1"), netip.MustParseAddr(g.of("198.51.100.7", "2001:db8:77::7"))
		return f
	}
	f.UID = []uint32{0, 0, 1000, 2000}[g.IntN(4)]
	if g.often(50) {
		f.Src = netip.MustParseAddr(g.source())
	}
	if g.often(25) {
		f.oif = g.one("c0", "c1", "c2")
	}
	return f
}
