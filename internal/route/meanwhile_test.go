package route

import (
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMeanwhile: who waits for thousands of routes has turns in between.
func TestMeanwhile(t *testing.T) {
	t.Parallel()
	n, c := dial(t)
	const count = 3 * answersBetween
	n.IP(t, "link set lo up")
	var batch strings.Builder
	for i := range count {
		fmt.Fprintf(&batch, "route add 10.0.%d.%d/32 dev lo table 1000 proto 116\n", i/250, i%250+1)
	}
	ipBatch(t, n, batch.String())
	calls := 0
	c.Meanwhile = func() { calls++ }
	for _, test := range []struct {
		name string
		do   func() error
		want int // calls at least
	}{
		{"one after the other", func() error { return c.EachOfOurs(unix.AF_INET, 1000, func(Route) {}) }, 1 + 3},
		{"at once", func() error { _, err := c.Routes(unix.AF_INET, 1000); return err }, 1},
		{"deleted together", func() error { return c.FlushTable(unix.AF_INET, 1000) }, 1 + count/atOnce},
	} {
		calls = 0
		if err := test.do(); err != nil {
			t.Fatalf("%s: %v", test.name, err)
		}
		if calls < test.want {
			t.Errorf("%s: called %d times, want %d", test.name, calls, test.want)
		}
	}
}
