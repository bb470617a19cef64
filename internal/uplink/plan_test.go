package uplink

import (
	"encoding/base64"
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

const (
	planTable = 10000
	planLink  = 7 // the ifindex of the uplink
	otherLink = 8
)

var addr = netip.MustParseAddr

func prefix(text string) netip.Prefix {
	if text == "default" {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	if text == "default6" {
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	if a, err := netip.ParseAddr(text); err == nil {
		return netip.PrefixFrom(a, a.BitLen())
	}
	return netip.MustParsePrefix(text)
}

// main is a route of main over the uplink's link, with words as `ip route` has them: "default via
// 192.0.2.1 metric 100 src 192.0.2.5 dev 8 proto 2 type 7".
func mainRoute(text string) route.Route {
	words := strings.Fields(text)
	value := make(map[string]string)
	for i := 1; i+1 < len(words); i += 2 {
		value[words[i]] = words[i+1]
	}
	number := func(key string, or uint32) uint32 {
		n := or
		if text := value[key]; text != "" {
			n = 0
			for _, c := range text {
				n = 10*n + uint32(c-'0')
			}
		}
		return n
	}
	dst := prefix(words[0])
	var via netip.Addr
	if value["via"] != "" {
		via = addr(value["via"])
	}
	r := route.NewRoute(unix.RT_TABLE_MAIN, dst, via, int(number("dev", planLink)))
	r.Protocol = uint8(number("proto", unix.RTPROT_BOOT))
	r.Type = uint8(number("type", unix.RTN_UNICAST))
	r.Metric = number("metric", r.Metric)
	r.NexthopID, r.TOS = number("nhid", 0), uint8(number("tos", 0))
	if value["src"] != "" {
		r.Src = addr(value["src"])
	}
	if value["from"] != "" {
		r.From = prefix(value["from"])
	}
	if r.Type != unix.RTN_UNICAST {
		r.Index, r.Scope = 0, unix.RT_SCOPE_UNIVERSE
	}
	return r
}

// mainOf is a Main of routes, one in each line; "local: " begins one over a link that is no uplink.
func mainOf(addresses, routes string) Main {
	m := Main{Index: planLink}
	for text := range strings.FieldsSeq(addresses) {
		m.Addresses = append(m.Addresses, Address{Addr: prefix(text).Addr(), Network: prefix(text).Masked()})
	}
	for line := range strings.Lines(routes) {
		line = strings.TrimSpace(line)
		if local, ok := strings.CutPrefix(line, "local: "); ok {
			m.Local = append(m.Local, mainRoute(local+" dev 8"))
		} else if line != "" {
			r := mainRoute(line)
			m.DeadEnd = m.DeadEnd || IsDeadEnd(r)
			m.Routes = append(m.Routes, r)
		}
	}
	return m
}

func uplinkOf(m Main, settings Settings) Uplink {
	u := cable()
	u.Network, u.Settings = netip.PrefixFrom(m.Addresses[0].Addr, m.Addresses[0].Network.Bits()), settings
	u.Key.Address = u.Network.Addr().String()
	if u.Network.Addr().Is6() {
		u.Key.Family = wire.Inet6
	}
	return u
}

// TestPlan: where the table of an address leads to, for what main has.
func TestPlan(t *testing.T) {
	const plain = `192.0.2.0/24 proto 2 src 192.0.2.5
		default via 192.0.2.1 metric 100`
	copied := Settings{Routes: CopyRoutes}
	for _, tt := range []struct {
		name      string
		addresses string // the first one's table
		main      string
		settings  Settings
		want      map[string]string // destination to gateway, or "link N" or "none"
	}{
		{"plain", "192.0.2.5/24", plain, copied,
			map[string]string{"192.0.2.9": "link 7", "9.9.9.9": "192.0.2.1"}},
		{"none: the caller fills the table", "192.0.2.5/24", plain, Settings{Routes: NoRoutes},
			map[string]string{"192.0.2.9": "none", "9.9.9.9": "none"}},
		{"an address without a gateway in its network", "203.0.113.9/28 198.51.100.2/24", `198.51.100.0/24 src 198.51.100.2
			203.0.113.0/28 src 203.0.113.9
			default via 198.51.100.1 metric 200`, copied,
			map[string]string{"9.9.9.9": "198.51.100.1", "198.51.100.7": "link 7"}},
		{"a host address of the other one's network", "198.51.100.50/32 198.51.100.2/24", `198.51.100.0/24 src 198.51.100.2
			default via 198.51.100.1 src 198.51.100.2`, copied,
			map[string]string{"9.9.9.9": "198.51.100.1", "198.51.100.7": "link 7"}},
		{"another network of the link, and a router in it", "198.51.100.31/24 192.0.2.68/29", `198.51.100.0/24
			192.0.2.64/29
			default via 198.51.100.1
			10.0.0.0/8 via 192.0.2.66`, copied,
			map[string]string{"192.0.2.65": "link 7", "10.1.1.1": "192.0.2.66", "9.9.9.9": "198.51.100.1"}},
		{"two providers on one link: the first", "192.0.2.5/24 198.51.100.5/24", `default via 192.0.2.1 metric 200
			default via 198.51.100.1 metric 100`, copied, map[string]string{"9.9.9.9": "192.0.2.1"}},
		{"two providers on one link: the second", "198.51.100.5/24 192.0.2.5/24", `default via 192.0.2.1 metric 100
			default via 198.51.100.1 metric 200`, copied, map[string]string{"9.9.9.9": "198.51.100.1"}},
		{"two routers in one network, each with its address: the first", "192.0.2.5/24 192.0.2.6/24", `default via 192.0.2.1 metric 100 src 192.0.2.5
			default via 192.0.2.254 metric 200 src 192.0.2.6`, copied, map[string]string{"9.9.9.9": "192.0.2.1"}},
		{"two routers in one network, each with its address: the second", "192.0.2.6/24 192.0.2.5/24", `default via 192.0.2.1 metric 100 src 192.0.2.5
			default via 192.0.2.254 metric 200 src 192.0.2.6`, copied, map[string]string{"9.9.9.9": "192.0.2.254"}},
		{"two routers in one network, and none with the address", "192.0.2.7/24 192.0.2.5/24", `default via 192.0.2.1 metric 100 src 192.0.2.5
			default via 192.0.2.254 metric 200`, copied, map[string]string{"9.9.9.9": "192.0.2.1"}},
		{"two lengths of one address, and a router in the shorter one and another address's network", "192.0.2.99/26 192.0.2.99/24 192.0.2.215/24 192.0.2.91/26",
			`default via 192.0.2.58 metric 100
			default via 192.0.2.118 metric 200`, copied, map[string]string{"9.9.9.9": "192.0.2.58"}},
		{"the same with the other length first", "192.0.2.99/24 192.0.2.99/26 192.0.2.215/24 192.0.2.91/26",
			`default via 192.0.2.58 metric 100
			default via 192.0.2.118 metric 200`, copied, map[string]string{"9.9.9.9": "192.0.2.58"}},
		{"a spare gateway of the same network", "192.0.2.5/24", `default via 192.0.2.1 metric 200
			default via 192.0.2.2 metric 100`, copied, map[string]string{"9.9.9.9": "192.0.2.2"}},
		{"static routes, the longer first", "192.0.2.5/24", plain + `
			10.0.0.0/8 via 192.0.2.7
			10.3.0.0/16 via 192.0.2.8`, copied, map[string]string{"10.1.1.1": "192.0.2.7", "10.3.1.1": "192.0.2.8"}},
		{"halves over the link", "192.0.2.5/24", plain + `
			0.0.0.0/1 via 192.0.2.7
			128.0.0.0/1 via 192.0.2.7`, copied, map[string]string{"9.9.9.9": "192.0.2.7"}},
		{"what leads nowhere is no link's", "192.0.2.5/24", plain + `
			default metric 4278198272 type 7
			198.51.100.0/24 type 9
			192.0.2.128/25 type 6`, copied, map[string]string{"192.0.2.200": "link 7", "198.51.100.1": "192.0.2.1", "9.9.9.9": "192.0.2.1"}},
		{"a route by an IPv6 gateway", "192.0.2.5/32", "default via fe80::1", copied, map[string]string{"9.9.9.9": "fe80::1"}},
		{"a network that main has not is not on the link", "192.0.2.5/24", "default via 192.0.2.1", copied,
			map[string]string{"192.0.2.9": "192.0.2.1"}},
		{"containers and a LAN", "192.0.2.5/24", plain + `
			local: 172.17.0.0/16 src 172.17.0.1
			local: 10.64.0.0/10 via 172.17.0.9
			local: 192.0.2.0/24
			local: 192.0.2.64/26`, copied,
			map[string]string{"172.17.0.2": "link 8", "10.64.0.1": "172.17.0.9", "192.0.2.9": "link 7", "192.0.2.65": "link 8"}},
		{"containers and a LAN, but only the own link", "192.0.2.5/24", plain + `
			10.96.0.0/12 via 192.0.2.7
			local: 172.17.0.0/16 src 172.17.0.1
			local: 10.64.0.0/10 via 172.17.0.9
			local: 192.0.2.64/26`, Settings{Routes: CopyRoutes, OwnLinkOnly: true},
			map[string]string{"172.17.0.2": "192.0.2.1", "10.64.0.1": "192.0.2.1", "192.0.2.65": "link 7", "10.97.0.1": "192.0.2.7"}},
		{"what the link has for a type of service only", "192.0.2.5/24", plain + `
			10.64.0.0/10 via 192.0.2.7 tos 16
			local: 10.64.0.0/10 via 172.17.0.9`, copied, map[string]string{"10.64.0.1": "172.17.0.9"}},
		{"the halves of a VPN are no LAN", "192.0.2.5/24", plain + `
			local: 0.0.0.0/1 via 10.8.0.1
			local: 64.0.0.0/7
			local: 10.0.0.0/8`, copied,
			map[string]string{"9.9.9.9": "192.0.2.1", "64.1.1.1": "192.0.2.1", "10.1.1.1": "link 8"}},
		{"gateways that the caller gave", "192.0.2.5/24", "192.0.2.0/24",
			Settings{Routes: CopyRoutes, Gateways: []netip.Addr{addr("192.0.2.1"), addr("192.0.2.2")}, Static: []StaticRoute{{prefix("10.0.0.0/8"), addr("192.0.2.9")}}},
			map[string]string{"9.9.9.9": "192.0.2.1", "10.1.1.1": "192.0.2.9"}},
		{"ours in main is nobody's", "192.0.2.5/24", plain + `
			10.0.0.0/8 via 192.0.2.7 proto 116`, copied, map[string]string{"10.1.1.1": "192.0.2.1"}},
		{"router advertisements", "2001:db8::5/64", `2001:db8::/64 proto 2
			fe80::/64 proto 2
			default6 via fe80::1 proto 9`, copied,
			map[string]string{"2600::1": "fe80::1", "2001:db8::9": "link 7", "fe80::9": "link 7"}},
		{"DHCPv6: the address itself", "2001:db8::5/128", `2001:db8::5 proto 2
			default6 via fe80::1`, copied, map[string]string{"2001:db8::5": "fe80::1"}},
		{"IPv6: nothing is shorter than fc00::/7 but halves", "2001:db8::5/64", `default6 via fe80::1
			local: fc00::/7
			local: 2000::/3`, copied, map[string]string{"2600::1": "fe80::1", "fd00::1": "link 8"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := mainOf(tt.addresses, tt.main)
			u := uplinkOf(m, tt.settings)
			routes := u.Plan(m, planTable)
			for dst, want := range tt.want {
				if got := wayTo(routes, addr(dst)); got != want {
					t.Errorf("to %s: got %s, want %s; table\n%v", dst, got, want, routes)
				}
			}
			for _, r := range routes {
				if r.Table != planTable || r.Protocol != route.Protocol || r.NexthopID != 0 || r.Index == planLink && r.Src != u.Addr() {
					t.Errorf("in the table: %s", r)
				}
			}
		})
	}
}

// wayTo is how the kernel would decide: the longest prefix, then the lowest metric, then the first.
func wayTo(routes []route.Route, dst netip.Addr) string {
	var best *route.Route
	for i, r := range routes {
		if r.TOS == 0 && r.Dst.Contains(dst) && (best == nil || r.Dst.Bits() > best.Dst.Bits() || r.Dst.Bits() == best.Dst.Bits() && r.Metric < best.Metric) {
			best = &routes[i]
		}
	}
	switch {
	case best == nil:
		return "none"
	case best.Gateway.IsValid():
		return best.Gateway.String()
	}
	return "link " + string(rune('0'+best.Index))
}

// TestPlanOnLink: a caller that knew the network before the address was there is believed.
func TestPlanOnLink(t *testing.T) {
	m := mainOf("192.0.2.5/32", "default via 192.0.2.1")
	m.OnLink = true
	u := uplinkOf(m, Settings{Routes: CopyRoutes})
	u.Network = prefix("192.0.2.5/24")
	if got := wayTo(u.Plan(m, planTable), addr("192.0.2.9")); got != "link 7" {
		t.Errorf("to a neighbour: %s", got)
	}
}

// TestMove: defaults leave main, and what leaves main stays in the table until something newer comes.
func TestMove(t *testing.T) {
	moved := Settings{Routes: MoveRoutes}
	for _, tt := range []struct {
		name, main, taken, lost string
		takes                   string // destinations and gateways
		want                    string // way to 9.9.9.9 in the table
	}{
		{"defaults only", "192.0.2.0/24 proto 2\ndefault via 192.0.2.1\n10.0.0.0/8 via 192.0.2.7\n0.0.0.0/1 via 192.0.2.7", "", "", "192.0.2.1", "192.0.2.7"},
		{"one with an address of the host", "192.0.2.0/24\ndefault via 192.0.2.1 src 198.51.100.9\ndefault via 192.0.2.2 metric 5 src 192.0.2.5", "", "", "192.0.2.2", "192.0.2.1"},
		{"two defaults", "default via 192.0.2.1\ndefault via 192.0.2.2 metric 5", "", "", "192.0.2.1 192.0.2.2", "192.0.2.1"},
		{"beside one that leads nowhere", "default via 192.0.2.1\ndefault metric 4278198272 type 7", "", "", "", "192.0.2.1"},
		{"what was taken", "192.0.2.0/24", "default via 192.0.2.1", "", "", "192.0.2.1"},
		{"a newer one in its place", "default via 192.0.2.9", "default via 192.0.2.1", "", "192.0.2.9", "192.0.2.9"},
		{"a newer one beside it", "default via 192.0.2.9 metric 10", "default via 192.0.2.1", "", "192.0.2.9", "192.0.2.1"},
		{"what went with the link", "192.0.2.0/24", "", "192.0.2.0/24\ndefault via 192.0.2.1", "", "192.0.2.1"},
		{"and comes back otherwise", "default via 192.0.2.9 metric 20", "", "default via 192.0.2.1", "192.0.2.9", "192.0.2.9"},
		{"and has no way to its gateway any more", "198.51.100.0/24", "", "default via 192.0.2.1", "", "none"},
		{"but for what was taken since", "192.0.2.0/24", "default via 192.0.2.9 metric 20", "default via 192.0.2.1", "", "192.0.2.9"},
		{"of a nexthop object", "default via 192.0.2.1 nhid 7", "", "", "", "192.0.2.1"},
		{"for some sources only", "default6 from 2001:db8::/48 via fe80::1", "", "", "", "none"},
		{"of a router advertisement", "default6 via fe80::1 proto 9", "", "", "", "none"},
		{"of IPv6", "default6 via fe80::1 proto 16", "", "", "fe80::1", "none"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := mainOf("192.0.2.5/24", tt.main)
			m.Taken, m.Lost = mainOf("", tt.taken).Routes, mainOf("", tt.lost).Routes
			m.OfHost = []netip.Addr{addr("198.51.100.9")}
			u := uplinkOf(m, moved)
			var got []string
			for _, r := range u.Takes(m) {
				got = append(got, r.Gateway.String())
			}
			if strings.Join(got, " ") != tt.takes {
				t.Errorf("takes %v, want %s", got, tt.takes)
			}
			if got := wayTo(u.Plan(m, planTable), addr("9.9.9.9")); got != tt.want {
				t.Errorf("the table leads to %s, want %s", got, tt.want)
			}
			u.Settings.Routes = CopyRoutes
			if got := u.Takes(m); got != nil {
				t.Errorf("copy takes %v", got)
			}
		})
	}
}

// TestLostLegs: of a route of several next hops that went with the link, those stay that whoever configures the link could
// put back.
func TestLostLegs(t *testing.T) {
	several := func(gateways ...string) (r route.Route) {
		t.Helper()
		var hops []byte
		for _, g := range gateways {
			hops = append(binary.NativeEndian.AppendUint16(hops, 16), 0, 0)
			hops = binary.NativeEndian.AppendUint32(hops, planLink)
			hops = append(binary.NativeEndian.AppendUint16(hops, 8), unix.RTA_GATEWAY, 0)
			hops = append(hops, addr(g).AsSlice()...)
		}
		body := []byte{unix.AF_INET, 0, 0, 0, unix.RT_TABLE_MAIN, unix.RTPROT_BOOT, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST, 0, 0, 0, 0}
		body = append(binary.NativeEndian.AppendUint16(body, uint16(4+len(hops))), unix.RTA_MULTIPATH, 0)
		if err := r.UnmarshalText(base64.StdEncoding.AppendEncode(nil, append(body, hops...))); err != nil || !r.Multipath {
			t.Fatalf("%v: %v", r, err)
		}
		return r
	}
	for _, tt := range []struct {
		lost []route.Route
		want string
	}{
		{[]route.Route{several("192.0.2.1", "192.0.2.2")}, "192.0.2.1"},
		{[]route.Route{several("198.51.100.1", "192.0.2.2")}, "192.0.2.2"},
		{[]route.Route{several("198.51.100.1", "198.51.100.2")}, "none"},
		{[]route.Route{several("192.0.2.1"), mainRoute("default via 198.51.100.1 metric 5")}, "192.0.2.1"},
		{[]route.Route{mainRoute("default via 198.51.100.1"), several("198.51.100.2", "198.51.100.3")}, "none"},
	} {
		m := mainOf("192.0.2.5/24", "192.0.2.0/24")
		m.Lost = tt.lost
		if got := wayTo(uplinkOf(m, Settings{Routes: CopyRoutes}).Plan(m, planTable), addr("9.9.9.9")); got != tt.want {
			t.Errorf("%v: the table leads to %s, want %s", tt.lost, got, tt.want)
		}
	}
}

// TestLostLinkLocal: a lost route by a link-local gateway stays as long as the link has a network of that kind.
func TestLostLinkLocal(t *testing.T) {
	for main, want := range map[string]string{
		"2001:db8::/64\nfe80::/64":                       "fe80::1",
		"2001:db8::/64":                                  "none", // the link is a port of a bridge now
		"2001:db8::/64\n::/0 via fe80::2 metric 2048":    "fe80::2",
		"2001:db8::/64\nfe80::/64\n::/0 via 2001:db8::7": "2001:db8::7",
	} {
		m := mainOf("2001:db8::5/64", main)
		m.Lost = []route.Route{mainRoute("::/0 via fe80::1")}
		if got := wayTo(uplinkOf(m, Settings{Routes: CopyRoutes}).Plan(m, planTable), addr("2600::9")); got != want {
			t.Errorf("main %q: the table leads to %s, want %s", main, got, want)
		}
	}
}

// A lost IPv4 route by an IPv6 gateway stays: main of IPv4 has no network that would tell.
func TestLostByOtherFamily(t *testing.T) {
	m := mainOf("192.0.2.5/24", "192.0.2.0/24")
	lost := mainRoute("default via 192.0.2.1")
	lost.Gateway = addr("fe80::1")
	m.Lost = []route.Route{lost}
	if got := wayTo(uplinkOf(m, Settings{Routes: CopyRoutes}).Plan(m, planTable), addr("198.51.100.1")); got != "fe80::1" {
		t.Errorf("the table leads to %s", got)
	}
}

func TestStopgap(t *testing.T) {
	m := mainOf("192.0.2.5/24", "192.0.2.0/24")
	u := uplinkOf(m, Settings{Routes: MoveRoutes, Gateways: []netip.Addr{addr("192.0.2.1"), addr("192.0.2.2")}})
	got := u.Stopgap(m)
	if len(got) != 2 || got[0].Gateway != addr("192.0.2.1") || got[0].Metric != planLink || got[1].Metric != planLink+1 {
		t.Errorf("got %v", got)
	}
	m = mainOf("192.0.2.5/24", "default via 192.0.2.1\ndefault via 192.0.2.2 metric 100")
	if got := u.Stopgap(m); got != nil {
		t.Errorf("main has them: got %v", got)
	}
	u.Network, u.Settings.Gateways = netip.MustParsePrefix("2001:db8::5/64"), []netip.Addr{addr("fe80::1")}
	u.Key.Address = "2001:db8::5"
	m.Routes = nil
	got = u.Stopgap(m)
	if len(got) != 1 || got[0].Metric != route.MetricIPv6+planLink {
		t.Fatalf("in IPv6 it comes behind the routes of advertisements: got %v", got)
	}
	if u.LostSource(m, got[0]) {
		t.Error("one with a source is that of a client")
	}
	if got[0].Src = (netip.Addr{}); !u.LostSource(m, got[0]) {
		t.Error("one whose source went is nobody's")
	}
}

func TestWithoutGiven(t *testing.T) {
	m := mainOf("192.0.2.5/24", "")
	u := uplinkOf(m, Settings{Routes: MoveRoutes, Gateways: []netip.Addr{addr("192.0.2.1")}})
	taken := []route.Route{mainRoute("default via 192.0.2.1"), mainRoute("default via 192.0.2.2 metric 5")}
	if got := u.WithoutGiven(m, taken); len(got) != 1 || got[0].Gateway != addr("192.0.2.2") {
		t.Errorf("got %v", got)
	}
}

// TestPlanBelow: the table of a macvlan without a default route has the gateways of the link below, over the macvlan.
func TestPlanBelow(t *testing.T) {
	for _, tt := range []struct{ name, main, below, want string }{
		{"no route of its own", "", "default via 192.0.2.1 metric 100", "192.0.2.1"},
		{"only its network", "192.0.2.200/32 proto 2", "default via 192.0.2.1", "192.0.2.1"},
		{"a default of its own", "default via 192.0.2.9 metric 500", "default via 192.0.2.1 metric 100", "192.0.2.9"},
		{"no default below", "", "", "none"},
		{"one that leads nowhere", "", "default type 7", "none"},
		{"without a gateway", "", "default", "none"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := mainOf("192.0.2.200/32", tt.main)
			for _, r := range mainOf("", tt.below).Routes {
				r.Index = otherLink
				m.Below = append(m.Below, r)
			}
			plan := uplinkOf(m, Settings{Routes: CopyRoutes}).Plan(m, planTable)
			if got := wayTo(plan, addr("198.51.100.1")); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
			for _, r := range plan {
				if r.Index != planLink {
					t.Errorf("%v leads over another link", r)
				}
			}
		})
	}
}
