package e2e

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// TestMovedWithAddress: an address that goes from one link to another at once leaves what move took of the first link to that one, as
// far as a host without a watch keeps it, and takes what main has over the second.
func TestMovedWithAddress(t *testing.T) {
	const six = "address del 2001:db8::2/64 dev wan0\naddress add 2001:db8::2/64 dev wan1 nodad\n"
	for name, change := range map[string]string{
		"IPv6":                                      six,
		"IPv6, there before it went":                "address add 2001:db8::2/64 dev wan1 nodad\naddress del 2001:db8::2/64 dev wan0\n",
		"IPv6, to and fro":                          six + "address del 2001:db8::2/64 dev wan1\naddress add 2001:db8::2/64 dev wan0 nodad\n",
		"IPv6, with a default of the other link":    six + "route append ::/0 via 2001:db8::1 dev wan1 metric 30\n",
		"IPv4, the last address of the first link":  "address del 10.77.0.2/24 dev wan0\naddress add 10.77.0.2/24 dev wan1\n",
		"IPv4, not the last one":                    "address add 10.79.0.2/24 dev wan0\naddress del 10.77.0.2/24 dev wan0\naddress add 10.77.0.2/24 dev wan1\n",
		"IPv4, with its default over the next link": "address del 10.77.0.2/24 dev wan0\naddress add 10.77.0.2/24 dev wan1\nroute append default via 10.77.0.1 dev wan1 metric 30\n",
	} {
		for _, frozen := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, frozen %t", name, frozen), func(t *testing.T) {
				h, plain := newHost(t), nettest.New(t, "plain")
				for _, ns := range []*nettest.Namespace{h.ns, plain} {
					ns.Batch(t, `link add wan0 type veth peer name peer0
link add wan1 type veth peer name peer1
link set peer0 up
link set peer1 up
link set wan0 up
link set wan1 up
address add 10.77.0.2/24 dev wan0
address add 10.78.0.2/24 dev wan1
address add 2001:db8::2/64 dev wan0 nodad
address add 2001:db8:1::2/64 dev wan1 nodad
route add default via 10.77.0.1 metric 10
route add default via 10.78.0.1 metric 20
route add ::/0 via 2001:db8::1 dev wan0 metric 10
route add ::/0 via 2001:db8:1::1 dev wan1 metric 20
`)
				}
				h.serve()
				w := h.watch("--routes", "move", "--clean")
				eventually(t, "move has taken the default routes", func() error {
					if left := h.ns.IP(t, "route show default") + h.ns.IP(t, "-6 route show default"); left != "" {
						return fmt.Errorf("main has %s", left)
					}
					return nil
				})
				if frozen {
					h.freeze(w.cmd.Process.Pid)
				}
				for _, ns := range []*nettest.Namespace{h.ns, plain} {
					ns.Batch(t, change)
				}
				if frozen {
					_ = w.cmd.Process.Signal(syscall.SIGCONT)
				}
				for _, c := range []struct{ family, from, to string }{{"-4", "10.77.0.2", "198.51.100.1"}, {"-6", "2001:db8::2", "2001:db8:ffff::1"}} {
					link := "wan0"
					if strings.Contains(plain.IP(t, "address show dev wan1"), c.from+"/") {
						link = "wan1"
					}
					eventually(t, c.from+" leaves by "+link, func() error {
						out := h.ns.IP(t, fmt.Sprintf("%s route get %s from %s", c.family, c.to, c.from))
						if !strings.Contains(out, " dev "+link+" ") || !strings.Contains(out, " table 1") {
							return fmt.Errorf("%s", out)
						}
						return nil
					})
				}
				w.stop()
				for _, family := range []string{"-4", "-6"} {
					eventually(t, "main is that of the host without a watch", func() error {
						got, want := routesOf(t, h.ns, family), routesOf(t, plain, family)
						if !slices.Equal(got, want) {
							return fmt.Errorf("%q, want %q", got, want)
						}
						return nil
					})
				}
			})
		}
	}
}

func routesOf(t *testing.T, ns *nettest.Namespace, family string) []string {
	t.Helper()
	var lines []string
	for line := range strings.Lines(ns.IP(t, family+" route show")) {
		lines = append(lines, strings.TrimSpace(line))
	}
	return slices.Sorted(slices.Values(lines))
}
