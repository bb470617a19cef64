package uplink

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// cable is the uplink of the tests.
func cable() Uplink {
	return Uplink{
		Key:        wire.Key{Family: wire.Inet, Ifname: "wan0", Address: "10.77.0.2"},
		Network:    netip.MustParsePrefix("10.77.0.2/24"),
		Tag:        "cable",
		Priorities: OriginalPriorities,
	}
}

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
		{"copy", func(u *Uplink) { u.Settings.Routes = CopyRoutes }, []string{
			"10000: from 10.77.0.2 lookup 4000000000 proto 116",
			"19999: from all to 10.77.0.0/24 lookup main suppress_prefixlength 23 proto 116",
			"20000: from all to 10.77.0.0/24 lookup 4000000000 proto 116",
			"91000: from all iif lo lookup 4000000000 proto 116",
		}},
		{"replies", func(u *Uplink) { u.Replies = true }, []string{
			"10000: from 10.77.0.2 lookup 4000000000 proto 116",
			"10000: from all fwmark 0x16b2800 lookup 4000000000 proto 116",
			"20000: from all to 10.77.0.0/24 lookup 4000000000 proto 116",
			"91000: from all iif lo lookup 4000000000 proto 116",
		}},
		{"move, IPv6", func(u *Uplink) {
			u.Key.Family, u.Key.Address, u.Network = wire.Inet6, "fd00::2", netip.MustParsePrefix("fd00::2/64")
			u.Settings.Routes = MoveRoutes
		}, []string{
			"10000: from fd00::2 lookup 4000000000 proto 116",
			"19999: from all to fd00::/64 lookup main suppress_prefixlength 63 proto 116",
			"20000: from all to fd00::/64 lookup 4000000000 proto 116",
			"91000: from all iif lo lookup 4000000000 proto 116",
			"91001: from all lookup 4000000000 proto 116",
		}},
		{"main first", func(u *Uplink) {
			u.Settings.Routes, u.Settings.OnLoss, u.Settings.SpecificFirst = CopyRoutes, Block, true
			u.Ties = []Tie{{Prefix: prefix("10.0.0.0/8")}, {prefix("10.3.0.0/24"), true, 1}}
		}, []string{
			"9997: from 10.77.0.2 to 10.0.0.0/8 lookup 4000000000 proto 116",
			"9996: from 10.77.0.2 to 10.3.0.0/24 lookup main suppress_prefixlength 23 proto 116",
			"9998: from 10.77.0.2 lookup main suppress_prefixlength 7 proto 116",
			"10000: from 10.77.0.2 lookup 4000000000 proto 116",
			"10001: from 10.77.0.2 unreachable proto 116",
			"19999: from all to 10.77.0.0/24 lookup main suppress_prefixlength 23 proto 116",
			"20000: from all to 10.77.0.0/24 lookup 4000000000 proto 116",
			"91000: from all iif lo lookup 4000000000 proto 116",
		}},
		{"a network of a class that nobody is allotted", func(u *Uplink) { u.Network = netip.MustParsePrefix("10.77.0.2/7") }, []string{
			"10000: from 10.77.0.2 lookup 4000000000 proto 116",
			"91000: from all iif lo lookup 4000000000 proto 116",
		}},
		{"ranges", func(u *Uplink) {
			u.Ranges = []netip.Prefix{netip.MustParsePrefix("10.77.8.0/28"), netip.MustParsePrefix("8.0.0.0/7")}
		}, []string{
			"10000: from 10.77.0.2 lookup 4000000000 proto 116",
			"10003: from 10.77.8.0/28 lookup 4000000000 proto 116",
			"20000: from all to 10.77.0.0/24 lookup 4000000000 proto 116",
			"91000: from all iif lo lookup 4000000000 proto 116",
		}},
		{"forward", func(u *Uplink) { u.Forward = true }, []string{
			"10000: from 10.77.0.2 lookup 4000000000 proto 116",
			"10003: from 10.77.0.0/24 lookup 4000000000 proto 116",
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
			"10002: from 2001:db8:1::/56 lookup main suppress_prefixlength 6 proto 116",
			"10003: from 2001:db8:1::/56 lookup 4000000000 proto 116",
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
			for _, r := range u.Rules(4000000000) {
				got = append(got, r.String())
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestTies(t *testing.T) {
	for _, tt := range []struct {
		name, main string
		want       []Tie
	}{
		{"none", "10.0.0.0/8 via 192.0.2.7\n10.3.0.0/24 dev 8\n172.16.0.0/12 dev 8", nil},
		{"one prefix", "10.0.0.0/8 via 192.0.2.7\n10.0.0.0/8 dev 8 metric 5", []Tie{{Prefix: prefix("10.0.0.0/8")}}},
		{"a default is none", "default via 192.0.2.7\ndefault dev 8 metric 5\n0.0.0.0/1 dev 7\n0.0.0.0/1 dev 8 metric 5", nil},
		{"one that leads nowhere", "10.0.0.0/8 via 192.0.2.7\n10.0.0.0/8 type 6 metric 5", []Tie{{Prefix: prefix("10.0.0.0/8")}}},
		{"longer ones", "10.0.0.0/8 via 192.0.2.7\n10.0.0.0/8 dev 8 metric 5\n10.3.0.0/16 dev 8\n10.3.1.0/24 dev 8\n10.4.0.0/16 via 192.0.2.7\n10.5.0.0/16 type 7",
			[]Tie{{Prefix: prefix("10.0.0.0/8")}, {prefix("10.3.0.0/16"), true, 1}, {prefix("10.5.0.0/16"), true, 1}}},
		{"and a tie in there", "10.0.0.0/8 via 192.0.2.7\n10.0.0.0/8 dev 8 metric 5\n10.3.0.0/16 dev 8\n10.3.1.0/24 via 192.0.2.7\n10.3.1.0/24 dev 8 metric 5",
			[]Tie{{Prefix: prefix("10.0.0.0/8")}, {prefix("10.3.0.0/16"), true, 1}, {prefix("10.3.1.0/24"), false, 2}}},
	} {
		if got := Ties(mainOf("", tt.main).Routes, planLink); !slices.Equal(got, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
		}
	}
}
