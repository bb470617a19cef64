package uplink

import (
	"fmt"
	"net/netip"
	"reflect"
	"testing"

	"github.com/table-allocator/table-allocator/internal/wire"
)

func TestParseClasslessRoutes(t *testing.T) {
	for _, tt := range []struct{ name, in, want string }{
		{"none", "", "[]"},
		{"as dhclient hands it on", "16 10 99 192 168 1 254 0 192 168 1 1", "[{10.99.0.0/16 192.168.1.254} {0.0.0.0/0 192.168.1.1}]"},
		{"on the link", "24 10 1 2 0 0 0 0", "[{10.1.2.0/24 invalid IP}]"},
		{"a host", "32 192 168 1 254 0 0 0 0", "[{192.168.1.254/32 invalid IP}]"},
		{"an odd length", "25 129 210 177 128 10 0 0 1", "[{129.210.177.128/25 10.0.0.1}]"},
		{"host bits", "20 10 1 31 10 0 0 1", "[{10.1.16.0/20 10.0.0.1}]"},
		{"cut short", "16 10 99 192 168 1", "[] error: route 1 is cut short or has a prefix length above 32"},
		{"second cut short", "0 192 168 1 1 24", "[{0.0.0.0/0 192.168.1.1}] error: route 2 is cut short or has a prefix length above 32"},
		{"too long", "33 1 2 3 4 5 1 2 3 4", "[] error: route 1 is cut short or has a prefix length above 32"},
		{"no octet", "16 10 999 1 1 1 1", `[] error: "999": not an octet`},
		{"words", "default", `[] error: "default": not an octet`},
		{"second not octets", "0 192 168 1 1 0 x", `[{0.0.0.0/0 192.168.1.1}] error: "x": not an octet`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			routes, err := ParseClasslessRoutes(tt.in)
			got := fmt.Sprint(routes)
			if err != nil {
				got += " error: " + err.Error()
			}
			if got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}

func FuzzParseClasslessRoutes(f *testing.F) {
	f.Add("16 10 99 192 168 1 254 0 192 168 1 1")
	f.Add("33 1")
	f.Fuzz(func(t *testing.T, in string) {
		routes, _ := ParseClasslessRoutes(in) // the routes before it count
		for _, r := range routes {
			if !r.Dst.IsValid() || r.Dst != r.Dst.Masked() {
				t.Errorf("%q: %v", in, r)
			}
		}
	})
}

func TestParseRoute(t *testing.T) {
	for _, tt := range []struct {
		name, in string
		v6       bool
		want     string
	}{
		{"prefix and gateway", "10.99.0.0/16,192.168.1.254", false, "{10.99.0.0/16 192.168.1.254}"},
		{"with via", "10.99.0.0/16,via 192.168.1.254", false, "{10.99.0.0/16 192.168.1.254}"},
		{"as ip has it", "10.99.0.0/16 via 192.168.1.254", false, "{10.99.0.0/16 192.168.1.254}"},
		{"on the link", "10.99.0.0/16", false, "{10.99.0.0/16 invalid IP}"},
		{"an address", "10.99.0.1", false, "{10.99.0.1/32 invalid IP}"},
		{"default", "default", false, "{0.0.0.0/0 invalid IP}"},
		{"IPv6", "2001:db8::/32,fe80::1", true, "{2001:db8::/32 fe80::1}"},
		{"IPv6 default", "default,fe80::1", true, "{::/0 fe80::1}"},
		{"the other family", "2001:db8::/32", false, `error: "2001:db8::/32": not a destination of this family (want a prefix, an address or default)`},
		{"gateway of the other family", "10.0.0.0/8,fe80::1", false, `error: "fe80::1": not a gateway of this family`},
		{"nothing", "", false, `error: "": not a destination of this family (want a prefix, an address or default)`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, err := ParseRoute(tt.in, !tt.v6)
			got := fmt.Sprint(r)
			if err != nil {
				got = "error: " + err.Error()
			}
			if got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}

func TestSettingsOverTheWire(t *testing.T) {
	s := Settings{
		Routes: MoveRoutes, OnLoss: Block, SpecificFirst: true, Metric: 100,
		Gateways:    []netip.Addr{netip.MustParseAddr("192.0.2.1")},
		Static:      []StaticRoute{{Dst: netip.MustParsePrefix("10.0.0.0/8")}},
		Nameservers: []netip.Addr{netip.MustParseAddr("192.0.2.53")},
		ServersFile: DefaultServersFile,
	}
	data, err := s.Encode()
	if err != nil {
		t.Fatal(err)
	}
	back, err := DecodeSettings(data)
	if err != nil || fmt.Sprint(back) != fmt.Sprint(s) {
		t.Errorf("got %v, %v, want %v", back, err, s)
	}
	for _, bad := range []string{`{}`, `{"routes":"fly","on_loss":"block"}`, `{"routes":"none","on_loss":"maybe"}`,
		`{"routes":"move","on_loss":"block","more":1}`, `{"routes":"none","on_loss":"block","gateways":["192.0.2.1"]}`,
		`{"routes":"move","on_loss":"block","gateways":["0.0.0.0"]}`, `[]`, `{`} {
		if _, err := DecodeSettings([]byte(bad)); err == nil {
			t.Errorf("%s was taken", bad)
		}
	}
}

// TestUpdatedWithoutRoutes: who places the routes itself says a prefix and name servers, and takes nothing else away.
func TestUpdatedWithoutRoutes(t *testing.T) {
	before := Settings{Routes: CopyRoutes, OnLoss: Block, SpecificFirst: true, Gateways: []netip.Addr{netip.MustParseAddr("fe80::1")},
		Nameservers: []netip.Addr{netip.MustParseAddr("2001:db8::53")}}
	u := Uplink{Key: wire.Key{Family: wire.Inet6, Ifname: "wan0", Address: "2001:db8::2"}, Priorities: OriginalPriorities, Settings: before}
	for text, want := range map[string]Settings{
		`{"routes":"none","on_loss":"fallback"}`: {},
		`{"routes":"none","on_loss":"fallback","prefix":"2001:db8:1::/48","nameservers":["2001:db8::54"],"resolver":"resolved"}`: {
			Prefix: netip.MustParsePrefix("2001:db8:1::/48"), Nameservers: []netip.Addr{netip.MustParseAddr("2001:db8::54")}, Resolver: Resolved},
	} {
		got, err := u.Updated(wire.Request{Key: u.Key, Cmd: wire.Replace, Settings: text})
		want.Routes, want.OnLoss, want.SpecificFirst, want.Gateways = before.Routes, before.OnLoss, before.SpecificFirst, before.Gateways
		if err != nil || !reflect.DeepEqual(got.Settings, want) {
			t.Errorf("%s: got %+v, %v, want %+v", text, got.Settings, err, want)
		}
	}
}

// FuzzSettings reads what a Replace brings, from the datagram on.
func FuzzSettings(f *testing.F) {
	key := wire.Key{Family: wire.Inet, Ifname: "wan0", Address: "192.0.2.5"}
	for _, text := range []string{
		`{"routes":"move","on_loss":"block","specific_first":true,"metric":100,"gateways":["192.0.2.1"],"nameservers":["192.0.2.53"]}`,
		`{"routes":"copy","on_loss":"fallback","static":[{"dst":"10.0.0.0/8","via":"192.0.2.1"}],"servers_file":"/run/x"}`,
	} {
		f.Add(wire.Request{Key: key, Cmd: wire.Replace, Tag: "x", Settings: text}.Append(nil))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		req, err := wire.ParseRequest(data)
		if err != nil || req.Cmd != wire.Replace {
			return
		}
		told, err := (Uplink{Key: req.Key, Priorities: OriginalPriorities}).Updated(req)
		if err != nil {
			return
		}
		again, err := told.Settings.Encode()
		if err != nil {
			t.Fatalf("%+v cannot be told again: %v", told.Settings, err)
		}
		if back, err := DecodeSettings(again); req.Settings != "" && (err != nil || !reflect.DeepEqual(back, told.Settings)) {
			t.Errorf("%+v read again: %+v, %v", told.Settings, back, err)
		}
	})
}

func FuzzParseRoute(f *testing.F) {
	f.Add("10.99.0.0/16 via 192.168.1.254", true)
	f.Add("default,fe80::1%eth0", false)
	f.Fuzz(func(t *testing.T, in string, family4 bool) {
		r, err := ParseRoute(in, family4)
		if err == nil && (!r.Dst.IsValid() || r.Dst != r.Dst.Masked() || r.Dst.Addr().Is4() != family4 ||
			r.Via.IsValid() && r.Via.Is4() != family4) {
			t.Errorf("%q: %v", in, r)
		}
	})
}
