package install

import (
	"testing"

	"github.com/table-allocator/table-allocator/internal/route"
)

// TestLostWithObject: the table keeps what the link lost of a nexthop object until somebody deletes the object.
func TestLostWithObject(t *testing.T) {
	m := newMover(t)
	m.IP(t, "nexthop add id 7 via 192.0.2.1 dev wan0")
	m.IP(t, "route add default nhid 7 metric 5")
	i := m.placed()
	for _, step := range []struct {
		name string
		do   func()
		want int
	}{
		{"at first", func() {}, 1},
		{"the link was down", func() {
			m.IP(t, "link set wan0 down")
			m.IP(t, "link set wan0 up")
			i.Hear([]route.Event{{Kind: route.LinkChanged, Down: true}}, nil, nil)
		}, 1},
		{"another object was deleted", func() { i.ForgetObjects(map[uint32]bool{8: true}) }, 1},
		{"the object was deleted", func() { i.ForgetObjects(map[uint32]bool{7: true}) }, 0},
	} {
		m.Do(func() {
			step.do()
			i.Follow(movedTable, false)
		})
		if got := m.defaults("10000"); len(got) != step.want {
			t.Errorf("%s: the table has %q", step.name, got)
		}
	}
}
