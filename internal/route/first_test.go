package route

import (
	"fmt"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// TestFirstRoutes reads tables in one go. One with routes ends the answer, and is not in the way of the next call.
func TestFirstRoutes(t *testing.T) {
	n, c := dial(t)
	n.IP(t, "link set lo up")
	var lines []string
	for i := range 6000 {
		lines = append(lines, fmt.Sprintf("route add blackhole 10.%d.%d.0/24 table 10008", i>>8, i&0xff))
		lines = append(lines, fmt.Sprintf("route add blackhole fd00:%x::/32 table 10008", i))
	}
	for _, table := range []int{10002, 10020, 10031} {
		lines = append(lines, fmt.Sprintf("route add blackhole 10.0.0.0/8 table %d", table), fmt.Sprintf("route add blackhole fd00::/8 table %d", table))
	}
	n.Batch(t, lines...)
	for _, tt := range []struct {
		name         string
		table, count int
		want         []int // routes of each table; -1: many, and not all
	}{
		{"one that is not there", 10000, 1, []int{0}},
		{"one", 10002, 1, []int{1}},
		{"a large one", 10008, 1, []int{-1}},
		{"up to one with routes", 10000, 32, []int{0, 0, 1}},
		{"up to a large one", 10003, 32, []int{0, 0, 0, 0, 0, -1}},
		{"from a large one on", 10008, 32, []int{-1}},
		{"behind a large one", 10009, 2, []int{0, 0}},
		{"as many as there may be", 10032, 100, make([]int, FirstMost)},
		{"again, behind a large one", 10020, 1, []int{1}},
	} {
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			t.Run(fmt.Sprintf("%s, family %d", tt.name, family), func(t *testing.T) {
				var tables [][]Route
				var err error
				n.Do(func() { tables, err = c.FirstRoutes(family, uint32(tt.table), tt.count) })
				if err != nil {
					t.Fatal(err)
				}
				var got []int
				for i, routes := range tables {
					for _, r := range routes {
						if r.Table != uint32(tt.table+i) || r.Family != family {
							t.Errorf("route of table %d, family %d among those of table %d", r.Table, r.Family, tt.table+i)
						}
					}
					count := len(routes)
					if count >= 400 && count < 6000 {
						count = -1
					}
					got = append(got, count)
				}
				if !slices.Equal(got, tt.want) {
					t.Errorf("got %v, want %v", got, tt.want)
				}
			})
		}
	}
}
