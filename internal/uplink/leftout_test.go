package uplink

import (
	"fmt"
	"net/netip"
	"reflect"
	"testing"

	"github.com/table-allocator/table-allocator/internal/wire"
)

func TestTakeValues(t *testing.T) {
	addrs := func(texts ...string) (list []netip.Addr) {
		for _, text := range texts {
			list = append(list, netip.MustParseAddr(text))
		}
		return list
	}
	prefix := netip.MustParsePrefix
	for _, tt := range []struct {
		name string
		u    Uplink
		want Settings
		left []string
	}{
		{"all right", Uplink{Key: wire.Key{Family: 2, Ifname: "wan0", Address: "192.0.2.2"}, Settings: Settings{Gateways: addrs("192.0.2.1", "10.0.0.1"),
			Nameservers: addrs("127.0.0.53", "8.8.8.8"), Static: []StaticRoute{{Dst: prefix("10.0.0.0/8")}, {Dst: prefix("0.0.0.0/0"), Via: netip.MustParseAddr("192.0.2.9")}}}},
			Settings{Gateways: addrs("192.0.2.1", "10.0.0.1"), Nameservers: addrs("127.0.0.53", "8.8.8.8"),
				Static: []StaticRoute{{Dst: prefix("10.0.0.0/8")}, {Dst: prefix("0.0.0.0/0"), Via: netip.MustParseAddr("192.0.2.9")}}}, nil},
		{"IPv4", Uplink{Key: wire.Key{Family: 2, Ifname: "wan0", Address: "192.0.2.2"}, Network: prefix("192.0.2.2/7"), Settings: Settings{
			Gateways:    addrs("127.0.0.1", "224.0.0.1", "0.0.0.0", "255.255.255.255", "192.0.2.2", "192.0.2.1"),
			Nameservers: addrs("224.0.0.251", "255.255.255.255", "192.0.2.1"),
			Static:      []StaticRoute{{Dst: prefix("224.0.0.0/4")}, {Dst: prefix("10.0.0.0/8"), Via: netip.MustParseAddr("224.0.0.1")}, {Dst: prefix("10.0.0.0/8")}}}},
			Settings{Gateways: addrs("192.0.2.1"), Nameservers: addrs("192.0.2.1"), Static: []StaticRoute{{Dst: prefix("10.0.0.0/8")}}},
			[]string{"gateway 127.0.0.1", "gateway 224.0.0.1", "gateway 0.0.0.0", "gateway 255.255.255.255", "gateway 192.0.2.2",
				"route 224.0.0.0/4", "route 10.0.0.0/8 via 224.0.0.1", "nameserver 224.0.0.251", "nameserver 255.255.255.255",
				"netmask 192.0.2.2/7"}},
		{"IPv6", Uplink{Key: wire.Key{Family: 10, Ifname: "wan0", Address: "2001:db8::2"}, Network: prefix("2001:db8::2/31"), Settings: Settings{
			Gateways:    addrs("::1", "ff02::1", "::", "::ffff:192.0.2.1", "fe80::1"),
			Nameservers: addrs("fe80::1%wan0", "fe80::1%x", "::1"), Prefix: prefix("2000::/3")}},
			Settings{Gateways: addrs("fe80::1"), Nameservers: addrs("fe80::1", "::1")},
			[]string{"gateway ::1", "gateway ff02::1", "gateway ::", "gateway ::ffff:192.0.2.1", "nameserver fe80::1%x", "prefix 2000::/3", "netmask 2001:db8::2/31"}},
		{"a link-local prefix", Uplink{Key: wire.Key{Family: 10, Ifname: "wan0", Address: "2001:db8::2"}, Settings: Settings{Prefix: prefix("fe80::/64")}},
			Settings{}, []string{"prefix fe80::/64"}},
		{"IPv4 written as IPv6", Uplink{Key: wire.Key{Family: 10, Ifname: "wan0", Address: "2001:db8::2"}, Settings: Settings{
			Nameservers: addrs("::ffff:192.0.2.53"), Static: []StaticRoute{{Dst: prefix("::ffff:192.0.2.0/120")}}, Prefix: prefix("::ffff:192.0.2.0/120")}},
			Settings{}, []string{"route ::ffff:192.0.2.0/120", "nameserver ::ffff:192.0.2.53", "prefix ::ffff:192.0.2.0/120"}},
		{"a prefix of no address", Uplink{Key: wire.Key{Family: 10, Ifname: "wan0", Address: "2001:db8::2"}, Settings: Settings{Prefix: prefix("::1.2.3.4/64")}},
			Settings{}, []string{"prefix ::102:304/64"}},
		{"a short prefix", Uplink{Key: wire.Key{Family: 10, Ifname: "wan0", Address: "2001:db8::2"}, Settings: Settings{Prefix: prefix("2001::/15")}},
			Settings{}, []string{"prefix 2001::/15"}},
		{"the shortest prefix", Uplink{Key: wire.Key{Family: 10, Ifname: "wan0", Address: "2001:db8::2"}, Settings: Settings{Prefix: prefix("2400::/16")}},
			Settings{Prefix: prefix("2400::/16")}, nil},
		{"one address as a prefix", Uplink{Key: wire.Key{Family: 10, Ifname: "wan0", Address: "2001:db8::2"}, Settings: Settings{Prefix: prefix("2001:db8:1::1/128")}},
			Settings{}, []string{"prefix 2001:db8:1::1/128"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var left []string
			for _, v := range tt.u.TakeValues() {
				if left = append(left, v.Key+" "+v.Value); v.Why == "" {
					t.Errorf("%v: no reason", v)
				}
			}
			if fmt.Sprint(tt.u.Settings) != fmt.Sprint(tt.want) {
				t.Errorf("got %+v, want %+v", tt.u.Settings, tt.want)
			}
			if !reflect.DeepEqual(left, tt.left) {
				t.Errorf("left out: got %q, want %q", left, tt.left)
			}
			tt.u.Settings.Routes, tt.u.Settings.OnLoss = CopyRoutes, Fallback
			tt.u.Priorities = OriginalPriorities
			if err := tt.u.Validate(); err != nil {
				t.Errorf("the rest is refused: %v", err)
			}
		})
	}
}
