package route

import (
	"fmt"
	"os/exec"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// The kernel tells that a route or an address is deleted before the route has gone, or those with that source.
func TestAwaitTold(t *testing.T) {
	t.Parallel()
	n, c, _, _ := uplink(t)
	for range 50 { // whom the kernel tells after us
		watch(t, n, Routes4|Addresses4)
	}
	w := watch(t, n, Routes4|Addresses4)
	ip := exec.Command("ip", "-force", "-batch", "-")
	commands, err := ip.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Start(ip); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = commands.Close(), ip.Wait() })
	const dst = "198.51.100.0/24"
	for _, tt := range []struct {
		add, del string
		told     func(Event) bool
	}{
		{"route add " + dst + " dev eth0", "route del " + dst, func(e Event) bool { return e.Kind == RouteChanged && e.Deleted && e.Route.Dst == prefix(dst) }},
		{"addr add 203.0.113.5/32 dev eth0\nroute add " + dst + " dev eth0 src 203.0.113.5", "addr del 203.0.113.5/32 dev eth0",
			func(e Event) bool { return e.Kind == AddressChanged && e.Deleted && e.Addr == addr("203.0.113.5") }},
	} {
		stale := 0
		for range 200 {
			if _, err := fmt.Fprintf(commands, "%s\n%s\n", tt.add, tt.del); err != nil {
				t.Fatal(err)
			}
			for told := false; !told; {
				events, err := w.Next()
				if err != nil {
					t.Fatal(err)
				}
				told = slices.ContainsFunc(events, tt.told)
			}
			n.Do(func() { err = c.AwaitTold() })
			if err != nil {
				t.Fatal(err)
			}
			routes, _, err := c.RoutesAtMost(unix.AF_INET, unix.RT_TABLE_MAIN, 100)
			if err != nil {
				t.Fatal(err)
			}
			if slices.ContainsFunc(routes, func(r Route) bool { return r.Dst == prefix(dst) }) {
				stale++
			}
		}
		if stale > 0 {
			t.Errorf("%s: main has it still, %d times", tt.del, stale)
		}
	}
}
