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
			for _, r := range u.Rules(4000000000) {
				got = append(got, r.String())
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}
