package route

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// TestKeepRules compares what a Conn remembers with what is there, whoever changed it, and whatever of it cannot be heard.
func TestKeepRules(t *testing.T) {
	n, keeper := dial(t)
	other := dialIn(t, n)
	n.Do(func() {
		if err := keeper.KeepRules(); err != nil {
			t.Fatal(err)
		}
	})
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 0))
	keeper.snapshot.receive = func(fd int, p []byte, flags int) (int, unix.Sockaddr, error) {
		if rnd.IntN(10) == 0 {
			return 0, nil, unix.ENOMEM
		}
		return unix.Recvfrom(fd, p, flags)
	}
	check := func(what string) {
		t.Helper()
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			got, err := keeper.Rules(family)
			if err != nil {
				t.Fatal(err)
			}
			want, err := other.Rules(family)
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(got, want) {
				t.Fatalf("seed %d, %s: the rules of family %d are\n%q, want\n%q", seed, what, family, got, want)
			}
		}
	}
	check("at the beginning")
	addrs := map[int][]string{unix.AF_INET: {"192.0.2.1", "192.0.2.2", "192.0.2.3"}, unix.AF_INET6: {"2001:db8::1", "2001:db8::2"}}
	for step := range 300 {
		family := []int{unix.AF_INET, unix.AF_INET6}[rnd.IntN(2)]
		addr := netip.MustParseAddr(addrs[family][rnd.IntN(len(addrs[family]))])
		host := netip.PrefixFrom(addr, addr.BitLen())
		table := uint32(10000 + rnd.IntN(3))
		protocol := []uint8{0, Protocol, 200}[rnd.IntN(3)]
		var want []Rule
		for range rnd.IntN(4) {
			r := Rule{Priority: uint32(10000 + rnd.IntN(3)), Src: host, Table: table, Protocol: protocol, MinLength: uint8(rnd.IntN(3))}
			if rnd.IntN(3) == 0 {
				r.Src, r.Iif = netip.Prefix{}, "lo"
			}
			if rnd.IntN(3) == 0 {
				r.Traffic = Traffic{Iif: r.Iif, Mark: uint32(rnd.IntN(2)), Mask: 1, IPProto: unix.IPPROTO_TCP, Dports: Ports{443, 443}}
			}
			if !slices.Contains(want, r) {
				want = append(want, r)
			}
		}
		c, who := keeper, "own"
		if rnd.IntN(3) == 0 {
			c, who = other, "another's"
		}
		if _, _, err := c.SyncRules(family, func(r Rule) bool { return r.Table == table && r.Protocol == protocol }, want); err != nil {
			t.Fatalf("seed %d, step %d: %v", seed, step, err)
		}
		if rnd.IntN(10) == 0 {
			keeper.ForgetRules()
		}
		if rnd.IntN(2) == 0 { // changes pile up, too
			check(fmt.Sprintf("after step %d, %s", step, who))
		}
	}
	check("at the end")

	// A rule that another one stands for, to the kernel: it is not there, and the Conn knows.
	n.IP(t, "rule add from 192.0.2.9 tos 0x10 lookup 10009 pref 10000 protocol 116")
	r := Rule{Priority: 10000, Src: netip.MustParsePrefix("192.0.2.9/32"), Table: 10009, Protocol: Protocol}
	if _, _, err := keeper.SyncRules(unix.AF_INET, func(Rule) bool { return false }, []Rule{r}); err == nil {
		if have, _ := keeper.Rules(unix.AF_INET); !slices.Contains(have, r) {
			t.Error("SyncRules has no error, and the rule is not there")
		}
	}
	check("beside a variant")

	// More than the socket queues.
	commands := ""
	for i := range 2000 {
		commands += fmt.Sprintf("rule add from 198.51.%d.%d lookup 11000 pref 12000\n", 100+i/250, 1+i%250)
	}
	ipBatch(t, n, commands)
	check("after an overrun")
	if some, err := keeper.RulesWhere(unix.AF_INET, func(r *Rule) bool { return r.Table == 11000 }); err != nil || len(some) != 2000 {
		t.Errorf("RulesWhere: %d rules, %v", len(some), err)
	}
}

// TestRoutesSelected: routes on one link, those of ours in all tables, and those to short prefixes.
func TestRoutesSelected(t *testing.T) {
	n, c, index, _ := uplink(t)
	n.IP(t, "link add other type veth peer name far")
	n.IP(t, "link set other up")
	n.IP(t, "address add 192.0.2.77/32 dev other")
	for _, args := range []string{
		"route add 203.0.113.0/24 dev other protocol 116",
		"route add 203.0.113.0/25 dev other table 10000 protocol 116",
		"route add unreachable 203.0.113.0/26 table 10001 protocol 116",
		"route add 203.0.113.0/27 dev other table 10000 protocol 200",
		"-6 route add 2001:db8:77::/64 dev other table 10000 protocol 116",
		"route add default dev other metric 7",
		"route add 0.0.0.0/1 dev other",
		"route add unreachable 128.0.0.0/1",
		"route add 128.0.0.0/2 dev other",
		"-6 route add default dev other metric 7",
		"-6 route add 8000::/1 dev other",
		"-6 route add 2000::/3 dev other",
	} {
		n.IP(t, args)
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		all := mustRoutes(t, c, family, unix.RT_TABLE_MAIN)
		got, err := c.RoutesOn(family, unix.RT_TABLE_MAIN, index)
		want := slices.DeleteFunc(slices.Clone(all), func(r Route) bool { return r.Index != index })
		if err != nil || lines(got) != lines(want) || len(got) == 0 || len(got) == len(all) && family == unix.AF_INET {
			t.Errorf("RoutesOn family %d: %v\n%swant\n%s", family, err, lines(got), lines(want))
		}
		if got, err := c.RoutesOn(family, unix.RT_TABLE_MAIN, 1<<30); err != nil || len(got) > 0 {
			t.Errorf("RoutesOn a link that is not there: %d routes, %v", len(got), err)
		}
		got, err = c.Wide(family, unix.RT_TABLE_MAIN, 1)
		want = slices.DeleteFunc(slices.Clone(all), func(r Route) bool { return r.Dst.Bits() > 1 })
		if err != nil || lines(got) != lines(want) || len(got) < 2 {
			t.Errorf("Wide of family %d: %v\n%swant\n%s", family, err, lines(got), lines(want))
		}
		want = slices.DeleteFunc(mustRoutes(t, c, family, 0), func(r Route) bool { return r.Protocol != Protocol })
		got = nil
		if err := c.EachOfOurs(family, 0, func(r Route) { got = append(got, r) }); err != nil || lines(got) != lines(want) || len(got) == 0 {
			t.Errorf("EachOfOurs of family %d: %v\n%swant\n%s", family, err, lines(got), lines(want))
		}
	}
}
