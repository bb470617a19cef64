package client

import (
	"bytes"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/jsonc"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

func watchConfig(t *testing.T, text string) (WatchConfig, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "watch.json")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return LoadWatchConfig(path, WatchConfig{Server: "tas_socket", Selection: uplink.Selection{Profiles: []uplink.Profile{uplink.DefaultProfile()}, Exclude: uplink.DefaultExclude}})
}

func TestLoadWatchConfig(t *testing.T) {
	got, err := watchConfig(t, `{ // all of it
		"socket_path": "other",
		"exclude": ["x*"],
		"reconcile_seconds": 5,
		"reply_by_uplink": true,
		"links": [
			{
				"ifname": "wan*", "families": ["inet"], "tag": "cable", "table": 10017, "priority": [1000, 2000, 9000],
				"no_network_rule": true, "forward": true, "routes": "move", "on_loss": "block", "specific_first": true, "own_link_only": true, "unbound": false, "cgroup": true, "reply_by_uplink": false, "mptcp": true,
				"nameservers": ["192.0.2.53", "2001:db8::53"], "dnsmasq_servers": "/run/x", "resolver": "resolved",
			},
			{},
		],
	}`)
	if err != nil {
		t.Fatal(err)
	}
	want := WatchConfig{Server: "other", ReconcileEvery: 5 * time.Second, Selection: uplink.Selection{ReplyByUplink: true, Exclude: []string{"x*"}, Profiles: []uplink.Profile{{
		Ifname: "wan*", Families: []wire.Family{wire.Inet}, Tag: "cable", Want: 10017, Priorities: uplink.Priorities{Source: 1000, Network: 2000, Unbound: 9000},
		NoNetwork: true, NoUnbound: true, Cgroup: true, Forward: true, NoReplies: true,
		Settings: uplink.Settings{Routes: uplink.MoveRoutes, OnLoss: uplink.Block, SpecificFirst: true, OwnLinkOnly: true, MPTCP: true, Resolver: uplink.Resolved, ServersFile: "/run/x",
			Nameservers: []netip.Addr{netip.MustParseAddr("192.0.2.53"), netip.MustParseAddr("2001:db8::53")}},
	}, uplink.DefaultProfile()}}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if uplink.DefaultExclude[0] != "lo" {
		t.Errorf("reading a file changed the defaults: %q", uplink.DefaultExclude)
	}
	for _, tt := range []struct{ text, want string }{
		{`{}`, ""},
		{`{"probe":{"reset":"all"}}`, "probe.reset: want never or dead"},
		{`{"probe":{"reset":"dead"}}`, ""},
		{`{"probe":{"on_change":"changed"}}`, "probe.on_change: want the absolute path of a program"},
		{`{"probe":{"on_change":"/etc/../tmp/changed"}}`, "probe.on_change: want the absolute path of a program"},
		{`{"probe":{"on_change":"/etc/table-allocator/changed"}}`, ""},
		{`{"reply_by_uplink":1}`, "reply_by_uplink: want true or false"},
		{`{"links":[{"reply_by_uplink":1}]}`, "links[0].reply_by_uplink: want true or false"},
		{`{"links":{}}`, "links: want a list of objects, have {}"},
		{`{"links":[]}`, "links: none"},
		{`{"links":[7]}`, "not a JSON object"},
		{`{"links":[{},{"x":1}]}`, "links[1].x: unknown key"},
		{`{"links":[{"tag":"a","tag":"b"}]}`, "tag: given twice"},
		{`{"links":[{"ifname":""}]}`, "links[0]: ifname is not a pattern"},
		{`{"links":[{"ifname":"[a"}]}`, "links[0]: ifname is not a pattern"},
		{`{"links":[{"families":["inet7"]}]}`, `links[0].families: want a list of "inet" and "inet6", have "inet7"`},
		{`{"links":[{"priority":[1,2,3]}]}`, "links[0]: priority: want numbers above 0"},
		{`{"links":[{"priority":[1,2]}]}`, "links[0].priority: want three numbers, have 2"},
		{`{"links":[{"routes":"x"}]}`, `links[0]: routes "x"`},
		{`{"links":[{"on_loss":null}]}`, "links[0].on_loss: want fallback or block, have null"},
		{`{"links":[{"table":-1}]}`, "links[0].table: want the number of a table, have -1"},
		{`{"links":[{"nameservers":["::ffff:192.0.2.53"]}]}`, "links[0]: nameserver ::ffff:192.0.2.53: this is IPv4, written as IPv6: want 192.0.2.53"},
		{`{"probe":{"targets":["9.9.9.9","::ffff:192.0.2.53"]}}`, "probe.targets: ::ffff:192.0.2.53: this is IPv4, written as IPv6: want 192.0.2.53"},
		{`{"links":[{"resolver":"bind"}]}`, `links[0]: resolver "bind": want dnsmasq, resolved or none`},
		{`{"links":[{"dnsmasq_servers":"x"}]}`, "links[0]: dnsmasq_servers is no absolute path"},
		{`{"links":[{"tag":"` + strings.Repeat("x", 128) + `"}]}`, "links[0]: tag: 128 bytes"},
		{`{"exclude":["[a"]}`, `exclude "[a"`},
		{`{"exclude":"lo"}`, "exclude: want a list of patterns"},
		{`{"reconcile_seconds":0}`, "reconcile_seconds: want at least 1"},
		{`{"reconcile_seconds":"1"}`, "reconcile_seconds: want seconds"},
		{`{"socket_path":""}`, "socket_path"},
		{`{"Links":[]}`, "Links: unknown key"},
		{`[]`, "not a JSON object"},
		{"{\n\"links\":[", "watch.json: line 2, column 10: "},
	} {
		_, err := watchConfig(t, tt.text)
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "watch.json")) {
			t.Errorf("%s: got %v, want %s", tt.text, err, tt.want)
		}
	}
}

func FuzzWatchConfig(f *testing.F) {
	f.Add([]byte(`{"links":[{"ifname":"wan*","families":["inet"],"tag":"cable","table":10017,"priority":[1000,2000,9000],"forward":true,` +
		`"routes":"move","on_loss":"block","specific_first":true,"own_link_only":true,"mptcp":true,"nameservers":["192.0.2.53","2001:db8::53"]},{},],"exclude":["x*"],}`))
	f.Add([]byte(`{"reconcile_seconds":5,"socket_path":"other","links":[{"no_network_rule":true,"dnsmasq_servers":"/run/x"}]} // x`))
	address := route.Address{Addr: netip.MustParseAddr("192.0.2.5")}
	f.Fuzz(func(t *testing.T, text []byte) {
		cfg := WatchConfig{Server: "tas_socket", Selection: uplink.Selection{Profiles: []uplink.Profile{uplink.DefaultProfile()}, Exclude: uplink.DefaultExclude}}
		err := jsonc.Read(bytes.NewReader(text), cfg.set)
		if err == nil {
			err = cfg.Validate()
		}
		if err != nil {
			if err.Error() == "" || len(err.Error()) > len(text)*6+1000 {
				t.Errorf("error of %d bytes", len(err.Error()))
			}
			return
		}
		// What was let through has to be of use: as a request, as rules, and to a holder.
		u, ok := cfg.Uplink(address, "wan0")
		if !ok {
			return
		}
		if _, err := wire.ParseRequest(wire.Request{Key: u.Key, Tag: u.Tag, Want: u.Want}.Append(nil)); err != nil {
			t.Errorf("%+v is no request: %v", u, err)
		}
		if len(u.Rules(10000)) == 0 {
			t.Errorf("%+v has no rules", u)
		}
		data, err := u.Settings.Encode()
		if err == nil {
			_, err = uplink.DecodeSettings(data)
		}
		if err != nil {
			t.Errorf("%+v cannot be told: %v", u.Settings, err)
		}
	})
}

// TestSettingsUnder: another profile leaves what a hook said of the network.
func TestSettingsUnder(t *testing.T) {
	gateway, server := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.53")
	hook := uplink.Settings{Routes: uplink.MoveRoutes, Gateways: []netip.Addr{gateway}, Metric: 7, OnLoss: uplink.Fallback, Nameservers: []netip.Addr{server}, ServersFile: "/run/hook"}
	profile := uplink.Settings{Routes: uplink.CopyRoutes, OnLoss: uplink.Block, SpecificFirst: true, ServersFile: "/run/profile"}
	s := &session{lease: &machine{uplink: uplink.Uplink{Settings: hook}}}
	if got := s.settingsUnder(profile); !reflect.DeepEqual(got, profile) {
		t.Errorf("without a hook: got %+v", got)
	}
	s.hooked = true
	want := uplink.Settings{Routes: uplink.CopyRoutes, OnLoss: uplink.Block, SpecificFirst: true, Gateways: hook.Gateways, Metric: 7, Nameservers: hook.Nameservers, ServersFile: "/run/profile"}
	if got := s.settingsUnder(profile); !reflect.DeepEqual(got, want) {
		t.Errorf("with a hook: got %+v, want %+v", got, want)
	}
	profile.Routes = uplink.NoRoutes
	if err := s.settingsUnder(profile).Validate(); err != nil {
		t.Errorf("with a profile that places no routes: %v", err)
	}
}
