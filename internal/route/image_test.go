package route

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestImage: whatever is done to main, as long as the events say all of it the image has what the
// kernel has, in its order.
func TestImage(t *testing.T) {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		t.Run(fmt.Sprint(family), func(t *testing.T) {
			t.Parallel()
			n, c, _, _ := uplink(t)
			w := watch(t, n, Routes4|Routes6)
			image, err := c.ReadImage(family, unix.RT_TABLE_MAIN, 0)
			if err != nil {
				t.Fatal(err)
			}
			seed := rand.Uint64()
			rnd := rand.New(rand.NewPCG(seed, 0))
			t.Logf("seed %d", seed)
			certain := 0
			const rounds = 400
			for round := range rounds {
				command := randomRoute(rnd, family)
				// A command that the kernel refuses changes nothing. The route of the mark comes after it.
				_, _ = n.Output("ip", strings.Fields(command)...)
				mark := fmt.Sprintf("-4 route add table 77 10.0.%d.%d dev eth0", round/256, round%256)
				n.IP(t, mark)
				sure := true
				for marked := false; !marked; {
					events, err := w.Next()
					if err != nil {
						t.Fatal(err)
					}
					for _, e := range events {
						sure = image.Apply(e) && sure
						marked = marked || e.Table == 77
					}
				}
				if !sure {
					if err := image.Read(c); err != nil {
						t.Fatal(err)
					}
					continue
				}
				certain++
				want, err := c.Routes(family, unix.RT_TABLE_MAIN)
				if err != nil {
					t.Fatal(err)
				}
				if got, want := describe(whole(image)), describe(want); got != want {
					t.Fatalf("after %s: got\n%swant\n%s", command, got, want)
				}
			}
			t.Logf("certain after %d of %d changes", certain, rounds)
			if certain < rounds/4 {
				t.Errorf("certain after %d of %d changes only", certain, rounds)
			}
		})
	}
}

func whole(i *Image) []Route {
	var routes []Route
	i.All(func(_ netip.Prefix, to []Route) { routes = append(routes, to...) })
	return routes
}

// describe is routes as text, sorted by destination, those of one destination in their order.
func describe(routes []Route) string {
	routes = slices.Clone(routes)
	slices.SortStableFunc(routes, func(a, b Route) int { return strings.Compare(a.Dst.String(), b.Dst.String()) })
	var b strings.Builder
	for _, r := range routes {
		r.Expires = 0
		fmt.Fprintln(&b, r)
	}
	return b.String()
}

func randomRoute(rnd *rand.Rand, family int) string {
	pick := func(words ...string) string { return words[rnd.IntN(len(words))] }
	verb := pick("add", "add", "add", "append", "prepend", "replace", "del", "del")
	metric := pick("", " metric 5", " metric 7")
	proto := pick("", " proto static", " proto bird")
	if family == unix.AF_INET6 {
		dst := pick("default", "fd01::/64", "fd02::/64", "fd03::/48", "fd04::9")
		return "-6 route " + verb + " " + dst + " via " + pick("fd00::1", "fd00::2") + " dev eth0" + metric + proto
	}
	dst := pick("default", "10.1.0.0/16", "10.2.0.0/16", "tos 0x10 10.2.0.0/16", "10.3.3.3")
	via := pick(" via 192.0.2.1 dev eth0", " via 192.0.2.3 dev eth0", " dev eth0", " nexthop via 192.0.2.1 nexthop via 192.0.2.3")
	if strings.Contains(via, "nexthop") {
		return "route " + verb + " " + dst + metric + proto + via
	}
	return "route " + verb + " " + dst + via + metric + proto
}

// TestImageLimit: of the routes of a routing daemon no more are kept than asked for, and what else
// there is in any case.
func TestImageLimit(t *testing.T) {
	n, c, _, _ := uplink(t)
	var b strings.Builder
	for i := range 100 {
		fmt.Fprintf(&b, "route add 10.%d.0.0/16 via 192.0.2.1 proto bgp\n", i)
	}
	b.WriteString("route add default via 192.0.2.1 proto bgp\nroute add 172.16.0.0/12 via 192.0.2.1 proto static\n")
	ipBatch(t, n, b.String())
	image, err := c.ReadImage(unix.AF_INET, unix.RT_TABLE_MAIN, 10)
	if err != nil {
		t.Fatal(err)
	}
	if image.Left() != 90 || image.Len() != 10+3 { // and the network of the link
		t.Errorf("%d routes, %d left out", image.Len(), image.Left())
	}
	for _, dst := range []string{"0.0.0.0/0", "172.16.0.0/12", "192.0.2.0/24"} {
		if len(image.To(prefix(dst))) != 1 {
			t.Errorf("no route to %s", dst)
		}
	}
}
