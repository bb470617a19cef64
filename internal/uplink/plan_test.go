package uplink

import (
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

const planTable = 10000

// mainRoute is a route of link 7 in main, as something else than we made it.
func mainRoute(dst, via, src string, metric uint32) route.Route {
	r := route.NewRoute(unix.RT_TABLE_MAIN, prefix(dst), addr(via), 7)
	r.Protocol, r.Src, r.Metric = unix.RTPROT_BOOT, addr(src), metric
	return r
}

func addr(text string) netip.Addr {
	if text == "" {
		return netip.Addr{}
	}
	return netip.MustParseAddr(text)
}

func prefix(text string) netip.Prefix {
	if text == "default" {
		return defaultPrefix(true)
	}
	return netip.MustParsePrefix(text)
}

func TestMakePlan(t *testing.T) {
	network := mainRoute("192.0.2.0/24", "", "192.0.2.5", 0)
	network.Protocol = unix.RTPROT_KERNEL
	multipath := mainRoute("10.9.0.0/16", "", "", 0)
	multipath.Multipath = true
	encap := mainRoute("10.8.0.0/16", "192.0.2.1", "", 0)
	encap.Encap = true
	mine := mainRoute("default", "192.0.2.1", "192.0.2.5", 7)
	mine.Protocol = route.Protocol
	tests := []struct {
		name     string
		settings Settings
		network  string // of the address; default 192.0.2.5/24
		others   string // another network of the link
		main     []route.Route
		taken    []route.Route
		kept     []route.Route
		table    string // lines of the table
		leave    string // lines of main
		left     int
	}{
		{
			name:     "none leaves all to the caller",
			settings: Settings{Routes: NoRoutes},
			main:     []route.Route{network},
		},
		{
			name:     "the network is there without being told",
			settings: Settings{Routes: CopyRoutes},
			table:    "192.0.2.0/24 scope link src 192.0.2.5",
		},
		{
			name:     "move takes network and default out of main",
			settings: Settings{Routes: MoveRoutes},
			main:     []route.Route{network, mainRoute("default", "192.0.2.1", "", 100)},
			table:    "192.0.2.0/24 scope link src 192.0.2.5; default via 192.0.2.1 src 192.0.2.5 metric 100",
			leave:    "192.0.2.0/24 scope link src 192.0.2.5; default via 192.0.2.1 metric 100",
		},
		{
			name:     "copy leaves them there",
			settings: Settings{Routes: CopyRoutes},
			main:     []route.Route{network, mainRoute("default", "192.0.2.1", "", 100)},
			table:    "192.0.2.0/24 scope link src 192.0.2.5; default via 192.0.2.1 src 192.0.2.5 metric 100",
		},
		{
			name:     "what was taken stays, though main has it no more",
			settings: Settings{Routes: MoveRoutes},
			taken:    []route.Route{network, mainRoute("default", "192.0.2.1", "", 0)},
			table:    "192.0.2.0/24 scope link src 192.0.2.5; default via 192.0.2.1 src 192.0.2.5",
		},
		{
			name:     "a changed gateway replaces the one before",
			settings: Settings{Routes: MoveRoutes},
			main:     []route.Route{mainRoute("default", "192.0.2.9", "", 0)},
			taken:    []route.Route{network, mainRoute("default", "192.0.2.1", "", 0)},
			table:    "default via 192.0.2.9 src 192.0.2.5; 192.0.2.0/24 scope link src 192.0.2.5",
			leave:    "default via 192.0.2.9",
		},
		{
			name:     "gateways with rising metric",
			settings: Settings{Routes: CopyRoutes, Metric: 50, Gateways: []netip.Addr{addr("192.0.2.1"), addr("192.0.2.2")}},
			table:    "192.0.2.0/24 scope link src 192.0.2.5; default via 192.0.2.1 src 192.0.2.5 metric 50; default via 192.0.2.2 src 192.0.2.5 metric 51",
		},
		{
			name:     "a gateway that main has too is there once",
			settings: Settings{Routes: MoveRoutes, Gateways: []netip.Addr{addr("192.0.2.1")}},
			main:     []route.Route{network, mainRoute("default", "192.0.2.1", "", 0)},
			table:    "192.0.2.0/24 scope link src 192.0.2.5; default via 192.0.2.1 src 192.0.2.5",
			leave:    "192.0.2.0/24 scope link src 192.0.2.5; default via 192.0.2.1",
		},
		{
			name:     "a gateway told beside another default",
			settings: Settings{Routes: CopyRoutes, Gateways: []netip.Addr{addr("192.0.2.1")}},
			main:     []route.Route{mainRoute("default", "192.0.2.9", "", 0)},
			table:    "192.0.2.0/24 scope link src 192.0.2.5; default via 192.0.2.9 src 192.0.2.5; default via 192.0.2.1 src 192.0.2.5 metric 1",
		},
		{
			name:     "a /32 lease: its gateway is off the link",
			settings: Settings{Routes: MoveRoutes, Gateways: []netip.Addr{addr("198.51.100.1")}},
			network:  "192.0.2.5/32",
			table:    "default via 198.51.100.1 src 192.0.2.5 onlink",
		},
		{
			name: "option 121",
			settings: Settings{Routes: MoveRoutes, Static: []StaticRoute{
				{prefix("10.99.0.0/16"), addr("192.0.2.254")}, {prefix("default"), addr("192.0.2.1")}, {prefix("10.1.0.0/16"), netip.Addr{}}}, Metric: 9},
			table: "10.1.0.0/16 scope link src 192.0.2.5 metric 9; 192.0.2.0/24 scope link src 192.0.2.5; 10.99.0.0/16 via 192.0.2.254 src 192.0.2.5 metric 9; default via 192.0.2.1 src 192.0.2.5 metric 9",
		},
		{
			name:     "a link without a gateway",
			settings: Settings{Routes: MoveRoutes},
			network:  "10.64.0.2/32",
			main:     []route.Route{mainRoute("10.64.0.1/32", "", "10.64.0.2", 0), mainRoute("default", "", "", 0)},
			table:    "10.64.0.1 scope link src 10.64.0.2; default scope link src 10.64.0.2",
			leave:    "10.64.0.1 scope link src 10.64.0.2; default scope link",
		},
		{
			name:     "routes of another address of the link are not ours",
			settings: Settings{Routes: MoveRoutes},
			others:   "198.51.100.5/24",
			main: []route.Route{network, mainRoute("198.51.100.0/24", "", "198.51.100.5", 0),
				mainRoute("default", "198.51.100.1", "", 0), mainRoute("10.0.0.0/8", "192.0.2.1", "", 0)},
			table: "192.0.2.0/24 scope link src 192.0.2.5; 10.0.0.0/8 via 192.0.2.1 src 192.0.2.5",
			leave: "192.0.2.0/24 scope link src 192.0.2.5; 10.0.0.0/8 via 192.0.2.1",
		},
		{
			name:     "a route that prefers another address of the network serves this one, too",
			settings: Settings{Routes: CopyRoutes},
			others:   "192.0.2.9/24",
			main: []route.Route{mainRoute("192.0.2.0/24", "", "192.0.2.9", 0), mainRoute("default", "192.0.2.1", "192.0.2.9", 100),
				mainRoute("10.0.0.0/8", "198.51.100.1", "192.0.2.9", 0)},
			table: "192.0.2.0/24 scope link src 192.0.2.5; default via 192.0.2.1 src 192.0.2.5 metric 100",
		},
		{
			name:     "multipath and encap are left alone; ours in main, too",
			settings: Settings{Routes: MoveRoutes},
			main:     []route.Route{network, multipath, encap, mine},
			table:    "192.0.2.0/24 scope link src 192.0.2.5",
			leave:    "192.0.2.0/24 scope link src 192.0.2.5",
			left:     2,
		},
		{
			name:     "copy keeps what went with the link",
			settings: Settings{Routes: CopyRoutes},
			main:     []route.Route{network},
			kept:     []route.Route{network, mainRoute("default", "192.0.2.1", "", 100)},
			table:    "192.0.2.0/24 scope link src 192.0.2.5; default via 192.0.2.1 src 192.0.2.5 metric 100",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.network == "" {
				tt.network = "192.0.2.5/24"
			}
			v := View{Index: 7, Network: prefix(tt.network), Main: tt.main}
			if tt.others != "" {
				v.Others = []netip.Prefix{prefix(tt.others)}
			}
			u := Uplink{Key: wire.Key{Family: wire.Inet, Ifname: "wan0", Address: v.Network.Addr().String()}, Network: v.Network, Settings: tt.settings}
			p := MakePlan(u, v, planTable, tt.taken, tt.kept)
			wantRoutes(t, "table", p.Table, tt.table)
			wantRoutes(t, "leaves main", p.Leave, tt.leave)
			if len(p.Left) != tt.left {
				t.Errorf("left alone: %q, want %d", p.Left, tt.left)
			}
			for _, r := range p.Table {
				if r.Table != planTable || r.Protocol != route.Protocol || r.Src != v.Network.Addr() {
					t.Errorf("in the table: %s", r)
				}
			}
		})
	}
}

// The kernel has a route to each /128 address of a link, for a while also when that is gone:
// it is of no other address.
func TestMakePlanHostRoutes(t *testing.T) {
	kernel := func(dst string) route.Route {
		r := mainRoute(dst, "", "", 256)
		r.Protocol = unix.RTPROT_KERNEL
		return r
	}
	main := []route.Route{kernel("2001:db8::2/128"), kernel("2001:db8::3/128"), kernel("2001:db8::4/128"), kernel("2001:db8::/64"),
		mainRoute("2001:db8::9/128", "", "", 1024)}
	const rest = "2001:db8::/64 src 2001:db8::2 metric 256 pref medium; 2001:db8::9 src 2001:db8::2 metric 1024 pref medium"
	for name, tt := range map[string]struct{ network, table string }{
		"of DHCPv6": {"2001:db8::2/128", rest},
		"a network": {"2001:db8::2/64", rest},
		"far end":   {"2001:db8::3/128", rest + "; 2001:db8::3 src 2001:db8::2 metric 256 pref medium"},
	} {
		u := Uplink{Key: wire.Key{Family: wire.Inet6, Ifname: "wan0", Address: "2001:db8::2"}, Settings: Settings{Routes: CopyRoutes}}
		v := View{Index: 7, Network: prefix(tt.network), Others: []netip.Prefix{prefix("2001:db8::4/128")}, Main: main}
		wantRoutes(t, name, MakePlan(u, v, planTable, nil, nil).Table, tt.table)
	}
}

// wantRoutes compares routes with a text of `ip route` without what they have in common.
func wantRoutes(t *testing.T, what string, routes []route.Route, want string) {
	t.Helper()
	count := make(map[string]int)
	if want != "" {
		for line := range strings.SplitSeq(want, "; ") {
			count[line]++
		}
	}
	for _, r := range routes {
		text := r.String()
		for _, cut := range []string{" dev #7", " table 10000", " table main", " table 254", " proto 116", " proto boot", " proto kernel", " proto 2"} {
			text = strings.ReplaceAll(text, cut, "")
		}
		count[strings.Join(strings.Fields(text), " ")]--
	}
	for line, n := range count {
		if n != 0 {
			t.Errorf("%s: %+d of %q", what, -n, line)
		}
	}
}

func TestStopgap(t *testing.T) {
	u := Uplink{
		Key:      wire.Key{Family: wire.Inet, Ifname: "wan0", Address: "192.0.2.5"},
		Settings: Settings{Routes: MoveRoutes, Gateways: []netip.Addr{addr("192.0.2.1"), addr("192.0.2.2")}},
	}
	v := View{Index: 7, Network: prefix("192.0.2.5/24"), Main: []route.Route{mainRoute("192.0.2.0/24", "", "192.0.2.5", 0)}}
	wantRoutes(t, "main", Stopgap(u, v), "default via 192.0.2.1 src 192.0.2.5 metric 7; default via 192.0.2.2 src 192.0.2.5 metric 8")
	v.Main = append(v.Main, mainRoute("default", "192.0.2.1", "", 0), mainRoute("default", "192.0.2.2", "", 100))
	wantRoutes(t, "main that has them", Stopgap(u, v), "")
}

func TestForget(t *testing.T) {
	old := Uplink{
		Key:      wire.Key{Family: wire.Inet, Ifname: "wan0", Address: "192.0.2.5"},
		Settings: Settings{Routes: MoveRoutes, Gateways: []netip.Addr{addr("192.0.2.1")}},
	}
	v := View{Index: 7, Network: prefix("192.0.2.5/24")}
	taken := []route.Route{mainRoute("192.0.2.0/24", "", "192.0.2.5", 0), mainRoute("default", "192.0.2.1", "", 0), mainRoute("10.0.0.0/8", "192.0.2.1", "", 0)}
	wantRoutes(t, "taken", WithoutGiven(taken, old, v), "192.0.2.0/24 scope link src 192.0.2.5; 10.0.0.0/8 via 192.0.2.1")
}
