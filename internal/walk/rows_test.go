package walk

import (
	"fmt"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
)

// TestKernelRows: what a walk from the manual gets wrong, each by name: what the kernel says, to a socket or where there is none
// to RTM_GETROUTE, and that the walk says the same.
func TestKernelRows(t *testing.T) {
	l := newLab(t)
	const far4, far6 = "10.9.1.5", "fd09:0:1::5"
	udp := func(dst string, change func(f *flow)) flow {
		f := flow{Question: route.Question{Dst: netip.MustParseAddr(dst), IPProto: unix.IPPROTO_UDP}}
		if change != nil {
			change(&f)
		}
		return f
	}
	from := func(addr string) func(f *flow) { return func(f *flow) { f.Src = netip.MustParseAddr(addr) } }
	by := func(link string) func(f *flow) { return func(f *flow) { f.oif = link } }
	through := func(addr string) func(f *flow) {
		return func(f *flow) { f.iif, f.Src = "c0", netip.MustParseAddr(addr) }
	}
	tos := func(tos uint8) func(f *flow) { return func(f *flow) { f.TOS = tos } }
	noProto := func(f *flow) { f.IPProto = 0 }
	default4, default6 := "route add default via 10.0.1.1 dev c0 metric 10", "route add default via fd00:1::1 dev c0 metric 10"
	other4, other6 := "route add default via 10.0.2.1 dev c1 table 100", "route add default via fd00:2::1 dev c1 table 100"
	for _, tt := range []struct {
		name          string
		rules, routes []string
		flow          flow
		want          string
	}{
		{"a rule that is unreachable", []string{"rule add pref 100 to 10.9.1.0/24 unreachable"}, []string{default4}, udp(far4, nil), "ENETUNREACH"},
		{"a rule that is unreachable, IPv6", []string{"rule add pref 100 to fd09::/16 unreachable"}, []string{default6}, udp(far6, nil), "ENETUNREACH"},
		{"a route that is unreachable", nil, []string{default4, "route add unreachable 10.9.1.0/24"}, udp(far4, nil), "EHOSTUNREACH"},
		{"a route that is unreachable, IPv6", nil, []string{default6, "route add unreachable fd09::/16"}, udp(far6, nil), "EHOSTUNREACH"},
		{"blackhole", nil, []string{default4, "route add blackhole 10.9.1.0/24"}, udp(far4, nil), "EINVAL"},
		{"prohibit", []string{"rule add pref 100 prohibit"}, []string{default4}, udp(far4, nil), "EACCES"},
		{"nothing found", nil, nil, udp(far4, nil), "ENETUNREACH"},
		{"throw goes on with the next rule", []string{"rule add pref 100 lookup 100"}, []string{default4, other4, "route add throw 10.9.1.0/24 table 100"}, udp(far4, nil), "c0"},
		{"throw goes on, IPv6", []string{"rule add pref 100 lookup 100"}, []string{default6, other6, "route add throw fd09::/16 table 100"}, udp(far6, nil), "c0"},
		{"IPv4 with a device is on the link when nothing is found", nil, nil, udp(far4, by("c1")), "c1"},
		{"and through prohibit", []string{"rule add pref 100 prohibit"}, []string{default4}, udp(far4, by("c1")), "c1"},
		{"IPv6 with a device is not", []string{"rule add pref 100 prohibit"}, []string{default6}, udp(far6, by("c1")), "EACCES"},
		{"IPv4 without a protocol is asked as UDP", []string{"rule add pref 100 ipproto udp lookup 100"}, []string{default4, other4}, udp(far4, noProto), "c1"},
		{"IPv6 without a protocol is not", []string{"rule add pref 100 ipproto udp lookup 100"}, []string{default6, other6}, udp(far6, noProto), "c0"},
		{"forwarded packets are of user 0", []string{"rule add pref 100 uidrange 0-0 lookup 100"}, []string{default4, other4}, udp(far4, through("198.51.100.7")), "c1"},
		{"forwarded packets are of user 0, IPv6", []string{"rule add pref 100 uidrange 0-0 lookup 100"}, []string{default6, other6}, udp(far6, through("2001:db8:77::7")), "c1"},
		{"another user is not", []string{"rule add pref 100 uidrange 0-0 lookup 100"}, []string{default4, other4}, udp(far4, func(f *flow) { f.UID = 1000 }), "c0"},
		{"IPv6 with a device takes its routes only", []string{"rule add pref 100 lookup 100"}, []string{"route add default via fd00:2::1 dev c1 metric 10", "route add default via fd00:1::1 dev c0 table 100"}, udp(far6, by("c1")), "c1"},
		{"and no route with an error", []string{"rule add pref 100 lookup 100"}, []string{"route add default via fd00:2::1 dev c1 metric 10", "route add unreachable default table 100"}, udp(far6, by("c1")), "c1"},
		{"IPv6 with a device and a source, too", []string{"rule add pref 100 lookup 100"}, []string{"route add default via fd00:1::1 dev c0 table 100"}, udp(far6, func(f *flow) { f.oif, f.Src = "c1", netip.MustParseAddr("fd00:2::2") }), "ENETUNREACH"},
		{"the longest prefix, then the least metric", nil, []string{default4, "route add 10.9.0.0/16 via 10.0.2.1 dev c1 metric 5", "route add 10.9.1.0/24 via 10.0.2.1 dev c1 metric 9", "route add 10.9.1.0/24 via 10.0.1.1 dev c0 metric 8"}, udp(far4, nil), "c0"},
		{"what is suppressed goes on with the next rule, and no shorter route is tried", []string{"rule add pref 100 lookup 100 suppress_prefixlength 16"}, []string{default4, "route add 10.0.0.0/8 via 10.0.2.1 dev c1 table 100", "route add 10.9.0.0/16 via 10.0.2.1 dev c1 table 100"}, udp(far4, nil), "c0"},
		{"errors are not suppressed", []string{"rule add pref 100 lookup 100 suppress_prefixlength 16"}, []string{default4, "route add prohibit 10.9.0.0/16 table 100"}, udp(far4, nil), "EACCES"},
		{"IPv4 looks again with the source that it has chosen", []string{"rule add pref 100 from 10.0.1.2 prohibit"}, []string{default4}, udp(far4, nil), "EACCES"},
		{"and that one decides", []string{"rule add pref 100 from 10.0.1.2 lookup 100"}, []string{default4, other4}, udp(far4, nil), "c1"},
		{"IPv6 looks once if it finds a route", []string{"rule add pref 100 from fd00:1::2 lookup 100"}, []string{default6, other6}, udp(far6, nil), "c0"},
		{"and again with a source if it finds none", []string{"rule add pref 100 from fd00:1::2 lookup 100", "rule add pref 101 from fd00:2::2 lookup 100", "rule add pref 102 from fd00:3::2 lookup 100"}, []string{other6}, udp(far6, nil), "c1"},
		{"a rule with no source is none of one", []string{"rule add pref 100 from 10.0.2.2 lookup 100"}, []string{default4, other4}, udp(far4, nil), "c0"},
		{"of an address", []string{"rule add pref 100 from 10.0.2.2 lookup 100"}, []string{default4, other4}, udp(far4, from("10.0.2.2")), "c1"},
		{"not turns the whole selector round", []string{"rule add not pref 100 from 10.0.2.2 fwmark 1 lookup 100"}, []string{default4, other4}, udp(far4, from("10.0.2.2")), "c1"},
		{"a rule with a TOS does not look at the precedence", []string{"rule add pref 100 tos 0x18 lookup 100"}, []string{default4, other4}, udp(far4, tos(0xb8)), "c1"},
		{"nor does a route", nil, []string{default4, "route add default tos 0x18 via 10.0.2.1 dev c1"}, udp(far4, tos(0xb8)), "c1"},
		{"IPv6 does", []string{"rule add pref 100 tos 0x18 lookup 100"}, []string{default6, other6}, udp(far6, tos(0xb8)), "c0"},
		{"ECN is no TOS", []string{"rule add pref 100 tos 0x10 lookup 100"}, []string{default4, other4}, udp(far4, tos(0x13)), "c1"},
		{"goto a priority that is missing", []string{"rule add pref 100 goto 5555", "rule add pref 101 lookup 100"}, []string{default4, other4}, udp(far4, nil), "c1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := set{family: tt.flow.Family(), rules: tt.rules, routes: tt.routes, flows: []flow{tt.flow}}
			if wrong := l.check(s); wrong != "" {
				t.Error(wrong)
			}
			if got := l.says(tt.flow); got != tt.want {
				t.Errorf("the kernel says %s, want %s", got, tt.want)
			}
		})
	}
}

// says is what the kernel does with a packet: the link, or the error.
func (l *lab) says(f flow) (said string) {
	p := f.packet(l.index)
	name := func(index int) string { return l.links[index].Name }
	l.ns.Do(func() {
		if p.Iif == 0 && p.IPProto == unix.IPPROTO_UDP {
			p.Bound, p.Dport = p.Oif != 0, 1
			s := connect(p)
			said = fmt.Sprint("MTU ", s.mtu)
			for index, link := range l.links {
				if link.MTU == s.mtu {
					said = name(index)
				}
			}
			if s.err != 0 {
				said = unix.ErrnoName(s.err)
			}
			return
		}
		c := dial(l.t)
		defer c.Close()
		r, err := c.Match(p.Question)
		if said = name(r.Index); err != nil {
			said = unix.ErrnoName(errno(err))
		}
	})
	return said
}
