package uplink

import (
	"math"
	"net/netip"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/wire"
)

func TestValidate(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*Uplink)
		want   string // in the error; "": none
	}{
		{"plain", func(*Uplink) {}, ""},
		{"all", func(u *Uplink) {
			s := &u.Settings
			s.Routes, s.OnLoss, s.SpecificFirst = MoveRoutes, Block, true
			s.Gateways, s.Nameservers = []netip.Addr{netip.MustParseAddr("192.0.2.1")}, []netip.Addr{netip.MustParseAddr("127.0.0.1")}
			s.Static = []StaticRoute{{Dst: netip.MustParsePrefix("10.0.0.0/8"), Via: netip.MustParseAddr("192.0.2.1")}}
			s.Prefix = netip.MustParsePrefix("198.51.100.0/24")
		}, ""},
		{"unspec", func(u *Uplink) { u.Key.Family, u.Key.Address = wire.Unspec, "any/thing" }, ""},
		{"routes of unspec", func(u *Uplink) { u.Key.Family, u.Settings.Routes = wire.Unspec, CopyRoutes }, "family inet or inet6"},
		{"a prefix of unspec", func(u *Uplink) {
			u.Key.Family, u.Settings.Prefix = wire.Unspec, netip.MustParsePrefix("2001:db8::/56")
		}, "family inet or inet6"},
		{"loopback", func(u *Uplink) { u.Key.Address = "127.0.0.1" }, "127.0.0.1"},
		{"broadcast", func(u *Uplink) { u.Key.Address = "255.255.255.255" }, "255.255.255.255"},
		{"link-local", func(u *Uplink) { u.Key.Family, u.Key.Address = wire.Inet6, "fe80::1" }, "link-local"},
		{"tag", func(u *Uplink) { u.Tag = "a\x07b" }, "tag"},
		{"a gateway of IPv6", func(u *Uplink) {
			u.Settings.Routes, u.Settings.Gateways = CopyRoutes, []netip.Addr{netip.MustParseAddr("fe80::1")}
		}, "gateway fe80::1: not of family inet"},
		{"a name server of IPv6", func(u *Uplink) { u.Settings.Nameservers = []netip.Addr{netip.MustParseAddr("2001:db8::53")} }, "nameserver"},
		{"a route of IPv6", func(u *Uplink) {
			u.Settings.Routes, u.Settings.Static = CopyRoutes, []StaticRoute{{Dst: netip.MustParsePrefix("2001:db8::/32")}}
		}, "route 2001:db8::/32"},
		{"a route of IPv4", func(u *Uplink) {
			u.Key.Family, u.Key.Address = wire.Inet6, "2001:db8::5"
			u.Settings.Routes, u.Settings.Static = CopyRoutes, []StaticRoute{{Dst: netip.MustParsePrefix("10.0.0.0/8")}}
		}, "route 10.0.0.0/8"},
		{"a prefix of IPv6", func(u *Uplink) { u.Settings.Prefix = netip.MustParsePrefix("2001:db8::/56") }, "prefix 2001:db8::/56"},
		{"everything as a prefix", func(u *Uplink) { u.Settings.Prefix = netip.MustParsePrefix("0.0.0.0/0") }, "prefix 0.0.0.0/0"},
		{"an address as a prefix", func(u *Uplink) { u.Settings.Prefix = netip.MustParsePrefix("192.0.2.7/32") }, "prefix 192.0.2.7/32"},
		{"no room, for a prefix", func(u *Uplink) {
			u.Priorities.Source, u.Settings.Prefix = math.MaxUint32-2, netip.MustParsePrefix("198.51.100.0/24")
		}, "prefix, forward: no room"},
		{"no room before", func(u *Uplink) { u.Priorities.Source, u.Settings.SpecificFirst = 2, true }, "specific-first: no room"},
		{"no room behind", func(u *Uplink) { u.Priorities.Source, u.Settings.OnLoss = 1<<32-1, Block }, "on-loss block: no room"},
		{"settings", func(u *Uplink) { u.Settings.OnLoss = "cry" }, "on-loss"},
	} {
		u := Uplink{
			Key:        wire.Key{Family: wire.Inet, Ifname: "wan0", Address: "192.0.2.5"},
			Network:    netip.MustParsePrefix("192.0.2.5/24"),
			Priorities: OriginalPriorities,
			Settings:   Settings{Routes: NoRoutes, OnLoss: Fallback},
		}
		tt.change(&u)
		err := u.Validate()
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: got %v, want %q", tt.name, err, tt.want)
		}
	}
}

// A newer call cannot give a holder what its priorities have no room for: the rule before 1 would
// be one at 0, before the kernel's own for local addresses.
func TestUpdatedRefuses(t *testing.T) {
	u := Uplink{Key: wire.Key{Family: wire.Inet, Ifname: "wan0", Address: "192.0.2.5"}, Priorities: Priorities{1, 2, 3}}
	for _, settings := range []string{
		`{"routes":"none","on_loss":"fallback","prefix":"198.51.100.7/32"}`,
		`{"routes":"none","on_loss":"fallback","specific_first":true}`,
		`{"routes":"copy","on_loss":"fallback","gateways":["fe80::1"]}`,
	} {
		if got, err := u.Updated(wire.Request{Key: u.Key, Cmd: wire.Replace, Settings: settings}); err == nil {
			t.Errorf("%s: got %+v", settings, got)
		}
	}
}
