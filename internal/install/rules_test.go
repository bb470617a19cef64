package install

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

var (
	testMarking = wire.Marking{Mark: 0x02000000, Mask: 0xff000000, Block: 9002, Fallback: 15002}
	testUser    = route.Traffic{UIDs: route.UIDs{First: 1000, Last: 1000, Set: true}}
)

// TestOwnsLookups: lookups of a lease go with it; guards are nobody's, and those of others
// stay.
func TestOwnsLookups(t *testing.T) {
	u := uplink.Uplink{Key: wire.Key{Family: wire.Inet, Ifname: "wan0", Address: "192.0.2.5"}}
	r := Rules{Uplink: u, tables: map[uint32]bool{10000: true}, Marking: testMarking}
	guard := uplink.GuardOf(testMarking, testUser, uplink.Block)
	for rule, want := range map[route.Rule]bool{
		uplink.LookupOf(guard, 10000): true,
		uplink.LookupOf(guard, 10001): false,
		guard:                         false,
	} {
		if got := r.owns(r.Uplink.Host(), rule); got != want {
			t.Errorf("%s is owned: %v", rule, got)
		}
	}
	r.Guards = []route.Rule{guard}
	want := r.Want(10000)
	if got := want[len(want)-1]; got != uplink.LookupOf(guard, 10000) {
		t.Errorf("the last rule is %s", got)
	}
}

func TestLeftovers(t *testing.T) {
	var (
		host    = netip.MustParsePrefix("10.77.0.2/32")
		hosted  = netip.MustParsePrefix("10.77.0.2/24") // with its host bits
		source  = route.Rule{Priority: 10000, Src: host, Table: 10000}
		network = route.Rule{Priority: 20000, Dst: hosted, Table: 10000}
		unbound = route.Rule{Priority: 91000, Traffic: route.Traffic{Iif: "lo"}, Table: 10000}
	)
	by := func(protocol uint8, r route.Rule) route.Rule { r.Protocol = protocol; return r }
	at := func(priority uint32, r route.Rule) route.Rule { r.Priority = priority; return r }
	from := func(addr string, r route.Rule) route.Rule { r.Src = netip.MustParsePrefix(addr); return r }
	to := func(net string, r route.Rule) route.Rule { r.Dst = netip.MustParsePrefix(net); return r }
	for _, tt := range []struct {
		name  string
		rules []route.Rule
		want  []route.Rule // those that go
	}{
		{"none", nil, nil},
		{"the original's three", []route.Rule{source, network, unbound}, []route.Rule{source, network, unbound}},
		{"of another prefix length", []route.Rule{source, to("10.77.0.2/16", network)}, []route.Rule{source, to("10.77.0.2/16", network)}},
		{"the original's of another address", []route.Rule{from("10.77.0.3/32", source), to("10.77.0.3/24", network), unbound}, nil},
		{"network rule of another table's holder", []route.Rule{source, {Priority: 20000, Dst: hosted, Table: 10001}}, []route.Rule{source}},
		{"without the source rule nothing tells whose the rest is", []route.Rule{network, unbound}, nil},
		{"an administrator's", []route.Rule{by(3, source), by(4, network), by(4, unbound)}, nil},
		{"unmarked on other priorities", []route.Rule{at(10001, source), at(19999, network), at(90999, unbound)}, nil},
		{"unmarked with more to it", []route.Rule{source, {Priority: 10000, Src: host, Table: 10000, MinLength: 1},
			{Priority: 10000, Src: host, Table: 10000, Other: "fwmark=01000000"}}, []route.Rule{source}},
		{"ours", []route.Rule{by(route.Protocol, source), by(route.Protocol, network), by(route.Protocol, at(7, unbound))},
			[]route.Rule{by(route.Protocol, source), by(route.Protocol, network), by(route.Protocol, at(7, unbound))}},
		{"ours of another address", []route.Rule{by(route.Protocol, from("10.77.0.3/32", source)), by(route.Protocol, unbound)}, nil},
		{"ours and the original's", []route.Rule{by(route.Protocol, source), network, unbound}, []route.Rule{by(route.Protocol, source)}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := Rules{Uplink: uplink.Uplink{Key: wire.Key{Family: wire.Inet, Ifname: "wan0", Address: "10.77.0.2"}}}
			r.tables, r.originals = r.Uplink.Leftovers(tt.rules)
			var got []route.Rule
			for _, rule := range tt.rules {
				if r.owns(r.Uplink.Host(), rule) {
					got = append(got, rule)
				}
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}
