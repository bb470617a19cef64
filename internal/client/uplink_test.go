package client

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

func TestRules(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*Uplink)
		want   []string
	}{
		{"default", func(*Uplink) {}, []string{
			"10000: from 10.77.0.2 lookup 4000000000 proto 116",
			"20000: from all to 10.77.0.0/24 lookup 4000000000 proto 116",
			"91000: from all iif lo lookup 4000000000 proto 116",
		}},
		{"priorities", func(u *Uplink) { u.Priorities = Priorities{1, 2, 3} }, []string{
			"1: from 10.77.0.2 lookup 4000000000 proto 116",
			"2: from all to 10.77.0.0/24 lookup 4000000000 proto 116",
			"3: from all iif lo lookup 4000000000 proto 116",
		}},
		{"no network rule", func(u *Uplink) { u.NoNetwork = true }, []string{
			"10000: from 10.77.0.2 lookup 4000000000 proto 116",
			"91000: from all iif lo lookup 4000000000 proto 116",
		}},
		{"forward", func(u *Uplink) { u.Forward = true }, []string{
			"10000: from 10.77.0.2 lookup 4000000000 proto 116",
			"10000: from 10.77.0.0/24 lookup 4000000000 proto 116",
			"20000: from all to 10.77.0.0/24 lookup 4000000000 proto 116",
			"91000: from all iif lo lookup 4000000000 proto 116",
		}},
		{"forward of a single address", func(u *Uplink) {
			u.Forward, u.Network = true, netip.MustParsePrefix("10.77.0.2/32")
		}, []string{
			"10000: from 10.77.0.2 lookup 4000000000 proto 116",
			"20000: from all to 10.77.0.2 lookup 4000000000 proto 116",
			"91000: from all iif lo lookup 4000000000 proto 116",
		}},
		{"inet6", func(u *Uplink) {
			u.Key.Family, u.Key.Address, u.Network = wire.Inet6, "fd00::2", netip.MustParsePrefix("fd00::2/64")
			u.Settings.Prefix = netip.MustParsePrefix("2001:db8:1::/56")
		}, []string{
			"10000: from fd00::2 lookup 4000000000 proto 116",
			"9999: from 2001:db8:1::/56 lookup main suppress_prefixlength 0 proto 116",
			"10000: from 2001:db8:1::/56 lookup 4000000000 proto 116",
			"20000: from all to fd00::/64 lookup 4000000000 proto 116",
			"91000: from all iif lo lookup 4000000000 proto 116",
		}},
		{"inet6 of DHCPv6", func(u *Uplink) {
			u.Key.Family, u.Key.Address, u.Network = wire.Inet6, "fd00::2", netip.MustParsePrefix("fd00::2/128")
		}, []string{
			"10000: from fd00::2 lookup 4000000000 proto 116",
			"91000: from all iif lo lookup 4000000000 proto 116",
		}},
		{"unspec", func(u *Uplink) { u.Key.Family = wire.Unspec }, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			u := cable()
			tt.change(&u)
			var got []string
			for _, r := range u.rules(4000000000) {
				got = append(got, r.String())
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestLeftovers(t *testing.T) {
	var (
		host    = netip.MustParsePrefix("10.77.0.2/32")
		hosted  = netip.MustParsePrefix("10.77.0.2/24") // with its host bits
		source  = route.Rule{Priority: 10000, Src: host, Table: 10000}
		network = route.Rule{Priority: 20000, Dst: hosted, Table: 10000}
		unbound = route.Rule{Priority: 91000, Iif: "lo", Table: 10000}
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
			r := ruleset{uplink: cable()}
			r.tables, r.originals = r.uplink.leftovers(tt.rules)
			var got []route.Rule
			for _, rule := range tt.rules {
				if r.owns(rule) {
					got = append(got, rule)
				}
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestTrust(t *testing.T) {
	for _, tt := range []struct {
		name string
		uid  uint32
		more []uint32
		want bool
	}{
		{"root", 0, nil, true},
		{"somebody", 4711, nil, false},
		{"somebody who was named", 4711, []uint32{4711}, true},
		{"everybody of another user namespace", wire.OverflowID(), []uint32{wire.OverflowID()}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := newTrust(tt.more).has(tt.uid); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}
