package server

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/allocator"
	"github.com/table-allocator/table-allocator/internal/route"
)

func TestHarmless(t *testing.T) {
	key := allocator.Key{Family: allocator.Inet, Ifname: "eth0", Addr: "10.0.0.1"}
	last := allocator.Key{Family: allocator.Inet, Ifname: "eth1", Addr: "10.0.0.2"}
	var nobody allocator.Key
	from := func(prefix string, protocol uint8) route.Rule {
		return route.Rule{Src: netip.MustParsePrefix(prefix), Protocol: protocol}
	}
	ours, theirs := uint8(route.Protocol), uint8(unix.RTPROT_BOOT)
	network := route.Rule{Dst: netip.MustParsePrefix("10.0.0.0/24"), Protocol: ours}
	unbound := route.Rule{Traffic: route.Traffic{Iif: "lo"}, Protocol: ours}
	originals, scripts := unbound, unbound
	originals.Protocol, originals.Priority = unix.RTPROT_UNSPEC, 91000
	scripts.Protocol, scripts.Priority = unix.RTPROT_UNSPEC, 32765
	not := from("10.0.0.1/32", ours)
	not.Flags = 2 // FIB_RULE_INVERT
	for _, tt := range []struct {
		name  string
		rules []route.Rule
		last  allocator.Key
		want  bool
	}{
		{"no rules", nil, nobody, true},
		{"from the address itself", []route.Rule{from("10.0.0.1/32", theirs)}, nobody, true},
		{"from its network", []route.Rule{from("10.0.0.0/24", theirs)}, nobody, false},
		{"from all", []route.Rule{{Protocol: theirs}}, nobody, false},
		{"from another address", []route.Rule{from("10.0.0.3/32", ours)}, nobody, false},
		{"from another address, after a holder", []route.Rule{from("10.0.0.3/32", ours)}, last, false},
		{"from anybody but the address", []route.Rule{not}, nobody, false},
		{"all of a client that died", []route.Rule{from("10.0.0.1/32", ours), network, unbound}, nobody, true},
		{"all of the original's that died", []route.Rule{from("10.0.0.1/32", unix.RTPROT_UNSPEC), originals}, nobody, true},
		{"of a script", []route.Rule{from("10.0.0.1/32", unix.RTPROT_UNSPEC), scripts}, nobody, false},
		{"its rules without the first", []route.Rule{network, unbound}, nobody, false},
		{"all of the last holder", []route.Rule{from("10.0.0.2/32", ours), network, unbound}, last, true},
		{"some of the last holder", []route.Rule{unbound}, last, true},
		{"some of the last holder, forwarding", []route.Rule{from("10.0.0.0/24", ours)}, last, true},
		{"of the last holder and of another tool", []route.Rule{from("10.0.0.2/32", ours), {Traffic: route.Traffic{Iif: "lo"}, Protocol: theirs}}, last, false},
		{"of a holder elsewhere", []route.Rule{from("10.0.0.2/32", ours)}, nobody, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := harmless(tt.rules, key, tt.last); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
	if harmless([]route.Rule{from("10.0.0.1/32", ours)}, allocator.Key{Addr: "modem"}, nobody) {
		t.Error("a rule was taken for that of an identifier")
	}
}

func TestTaken(t *testing.T) {
	key := allocator.Key{Family: allocator.Inet, Ifname: "eth0", Addr: "10.0.0.1"}
	from := func(prefix string, protocol uint8) route.Rule {
		return route.Rule{Src: netip.MustParsePrefix(prefix), Protocol: protocol}
	}
	ours := uint8(route.Protocol)
	for _, tt := range []struct {
		name  string
		rules []route.Rule
		want  bool
	}{
		{"no rules", nil, false},
		{"its own", []route.Rule{from("10.0.0.1/32", ours)}, false},
		{"of another client", []route.Rule{from("10.0.0.2/32", ours), {Traffic: route.Traffic{Iif: "lo"}, Protocol: ours}}, true},
		{"of another program", []route.Rule{from("10.0.0.2/32", unix.RTPROT_BOOT)}, false},
		{"for a network", []route.Rule{from("10.0.0.0/24", ours)}, false},
		{"its own and a delegated address", []route.Rule{from("10.0.0.2/32", ours), from("10.0.0.1/32", ours)}, false},
		{"from all", []route.Rule{{Traffic: route.Traffic{Iif: "lo"}, Protocol: ours}}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := &rulesInUse{tables: map[allocator.Family]map[uint32][]route.Rule{allocator.Inet: {10000: tt.rules}}}
			if got := r.taken(10000, key); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
			if r.taken(10001, key) || r.taken(10000, allocator.Key{Family: allocator.Unspec, Ifname: "eth0", Addr: "modem"}) {
				t.Error("a table without rules was taken")
			}
		})
	}
}
