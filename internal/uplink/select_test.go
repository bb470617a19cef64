package uplink

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

func TestSelects(t *testing.T) {
	cfg := Selection{Exclude: append([]string{"wan9"}, DefaultExclude...), Profiles: []Profile{
		{Ifname: "wan?", Families: []wire.Family{wire.Inet}, Tag: "first",
			Settings: Settings{Nameservers: []netip.Addr{netip.MustParseAddr("192.0.2.53"), netip.MustParseAddr("2001:db8::53")}}},
		{Ifname: "*", Families: []wire.Family{wire.Inet, wire.Inet6}, Tag: "second"},
	}}
	for _, tt := range []struct{ ifname, addr, want string }{
		{"wan0", "192.0.2.5", "wan0-192.0.2.5-2 first [192.0.2.53]"},
		{"wan0", "2001:db8::5", ""}, // the first profile counts
		{"wan10", "2001:db8::5", "wan10-2001:db8::5-10 second []"},
		{"wan9", "192.0.2.5", ""},
		{"lan0", "fd00::5", "lan0-fd00::5-10 second []"},
		{"lan0", "fe80::5", ""},
		{"lan0", "ff02::5", ""},
		{"lan0", "::1", ""},
		{"lan0", "127.0.0.2", ""},
		{"lan0", "169.254.1.1", ""},
		{"lan0", "224.0.0.1", ""},
		{"lo", "192.0.2.5", ""},
		{"veth12ab", "192.0.2.5", ""},
		{"br-0123456789ab", "192.0.2.5", ""},
		{"br0", "192.0.2.5", "br0-192.0.2.5-2 second []"},
		{"docker0", "192.0.2.5", ""},
		{"", "192.0.2.5", ""}, // its link went meanwhile
	} {
		got := ""
		u, ok := cfg.Uplink(route.Address{Addr: netip.MustParseAddr(tt.addr), Bits: 24}, tt.ifname)
		if ok {
			got = fmt.Sprintf("%s %s %v", u.Key, u.Tag, u.Settings.Nameservers)
		}
		if got != tt.want {
			t.Errorf("%s on %q: got %q, want %q", tt.addr, tt.ifname, got, tt.want)
		}
	}
}
