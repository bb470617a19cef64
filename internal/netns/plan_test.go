package netns

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

var (
	testPools   = Pools{Inet: DefaultInet, Inet6: netip.MustParsePrefix("fd00:1:2::/64")}
	testMarking = wire.Marking{Mark: 0x02000000, Mask: 0xff000000, Block: 9002, Fallback: 15002}
)

func TestCheckName(t *testing.T) {
	for name, good := range map[string]bool{
		"a": true, "Work-2_x": true, "abcdefghijklmno": true,
		"": false, "abcdefghijklmnop": false, "2a": false, "-h": false, "--all": false, "_a": false, ".a": false, "a.b": false, "..": false,
		"../../x": false, "a/b": false, "a b": false, "a\n": false, "a\x00": false, "\x1b[31m": false, "ä": false,
	} {
		if err := CheckName(name); (err == nil) != good {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestConfig(t *testing.T) {
	right := Config{Name: "work", Ifname: "wan1", OnLoss: uplink.Block, Resolv: Uplink}
	for _, tt := range []struct {
		name, want string
		change     func(*Config)
	}{
		{"right", "", func(*Config) {}},
		{"addresses", "", func(c *Config) { c.Resolv = "192.0.2.53,2001:db8::53" }},
		{"a file", "", func(c *Config) { c.Resolv = "/etc/resolv.work" }},
		{"no link", "no name of an uplink", func(c *Config) { c.Ifname = "" }},
		{"a path", "no name of an uplink", func(c *Config) { c.Ifname = "../wan" }},
		{"a link that is too long", "no name of an uplink", func(c *Config) { c.Ifname = "abcdefghijklmnop" }},
		{"the link of a namespace", "no name of an uplink", func(c *Config) { c.Ifname = "tav1" }},
		{"no name", "no name of a namespace", func(c *Config) { c.Name = "x/y" }},
		{"no address", `name servers "dns.example"`, func(c *Config) { c.Resolv = "dns.example" }},
		{"a stub of the host", "loopback", func(c *Config) { c.Resolv = "192.0.2.53,127.0.0.53" }},
	} {
		c := right
		tt.change(&c)
		if err := c.Check(); (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want %q", tt.name, err, tt.want)
		}
	}
}

// TestPlan: each number has a link and addresses of its own.
func TestPlan(t *testing.T) {
	for number, want := range map[int]string{
		1:         "tav1 172.24.0.2/31 172.24.0.3/31 fd00:1:2::2/127 fd00:1:2::3/127",
		127:       "tav127 172.24.0.254/31 172.24.0.255/31 fd00:1:2::fe/127 fd00:1:2::ff/127",
		128:       "tav128 172.24.1.0/31 172.24.1.1/31 fd00:1:2::100/127 fd00:1:2::101/127",
		maxNumber: "tav255 172.24.1.254/31 172.24.1.255/31 fd00:1:2::1fe/127 fd00:1:2::1ff/127",
	} {
		p := planOf(number, testPools)
		if got := strings.Join([]string{p.link, p.here.inet.String(), p.ours.inet.String(), p.here.inet6.String(), p.ours.inet6.String()}, " "); got != want {
			t.Errorf("%d: got %s, want %s", number, got, want)
		}
	}
}

func TestFreeNumber(t *testing.T) {
	prefixes := func(text ...string) (all []netip.Prefix) {
		for _, p := range text {
			all = append(all, netip.MustParsePrefix(p))
		}
		return all
	}
	for _, tt := range []struct {
		name  string
		taken map[int]bool
		used  []netip.Prefix
		want  int
	}{
		{"nothing in use", nil, nil, 1},
		{"others", map[int]bool{1: true, 2: true, 4: true}, nil, 3},
		{"routes", nil, prefixes("172.24.0.0/29", "fd00:1:2::8/125"), 8},
		{"defaults, and halves of them", nil, prefixes("0.0.0.0/0", "128.0.0.0/1", "::/0", "8000::/1"), 1},
		{"all of the pool", nil, prefixes("172.16.0.0/12"), 0},
	} {
		got, err := freeNumber(tt.taken, tt.used, testPools)
		if got != tt.want || (err == nil) != (tt.want != 0) {
			t.Errorf("%s: got %d, %v, want %d", tt.name, got, err, tt.want)
		}
	}
}

// TestRules: whose a rule is, and what is left of a namespace that nobody remembers.
func TestRules(t *testing.T) {
	one, two := planOf(1, testPools), planOf(2, testPools)
	for _, tt := range []struct {
		family int
		onLoss uplink.OnLoss
		want   []string
	}{
		{unix.AF_INET, uplink.Block, []string{"8990: from all to 172.24.0.3 lookup main suppress_prefixlength 30 proto 116", "9003: from all iif tav1 unreachable proto 116"}},
		{unix.AF_INET6, uplink.Fallback, []string{"8990: from all to fd00:1:2::3 lookup main suppress_prefixlength 126 proto 116", "15003: from all iif tav1 nop proto 116"}},
	} {
		rules, err := one.rules(testMarking, tt.onLoss, tt.family)
		var got []string
		for _, r := range append(rules, uplink.LookupOf(rules[1], 10000)) {
			got = append(got, r.String())
			if !one.ofNamespace(r) || two.ofNamespace(r) || strayRule(r, []plan{one, two}) || !strayRule(r, []plan{two}) {
				t.Errorf("%s: taken for that of another namespace, or of none", r)
			}
		}
		if err != nil || !slices.Equal(got[:2], tt.want) {
			t.Errorf("got %q, %v, want %q", got, err, tt.want)
		}
	}
	for _, r := range []route.Rule{
		{Priority: 9003, Traffic: route.Traffic{Iif: "tav1"}, Action: route.Unreachable},                                                   // another program's
		{Priority: 91000, Traffic: route.Traffic{Iif: "lo"}, Table: 10000, Protocol: route.Protocol},                                       // unbound
		{Priority: 9002, Traffic: route.Traffic{Mark: 2, Mask: 6}, Table: 10000, Protocol: route.Protocol},                                 // of a mark
		{Priority: 19999, Dst: netip.MustParsePrefix("172.24.0.2/31"), Table: unix.RT_TABLE_MAIN, MinLength: 31, Protocol: route.Protocol}, // of a network
	} {
		if one.ofNamespace(r) || strayRule(r, nil) {
			t.Errorf("%s: taken for that of a namespace", r)
		}
	}
}

// TestSettings: what forwards is the links of namespaces and of the uplinks that they may use, each once.
func TestSettings(t *testing.T) {
	states := []State{
		{Config: Config{Ifname: "wan1", OnLoss: uplink.Block}, Number: 1, Phase: Up},
		{Config: Config{Ifname: "wan1", OnLoss: uplink.Fallback}, Number: 2, Phase: Adding},
		{Config: Config{Ifname: "wan9", OnLoss: uplink.Block}, Number: 3, Phase: Deleting},
	}
	var want []string
	for _, link := range []string{"tav1", "wan1", "tav2", "wan0"} {
		want = append(want, "ipv4/conf/"+link+"/forwarding", "ipv6/conf/"+link+"/force_forwarding")
	}
	if got := settings(states, testPools, []string{"wan0", "wan1"}); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	r := ruleset(states, testPools, []string{"wan1"}, []string{"wan0", "wan1"})
	if len(r.Namespaces) != 3 || !slices.Equal(r.Namespaces[0].Uplinks, []string{"wan1"}) || !slices.Equal(r.Namespaces[1].Uplinks, []string{"wan1", "wan0"}) || r.Namespaces[0].Link != "tav1" {
		t.Errorf("ruleset: %+v", r)
	}
}

func TestResolvText(t *testing.T) {
	servers := []netip.Addr{netip.MustParseAddr("127.0.0.53"), netip.MustParseAddr("192.0.2.53")}
	got := resolvText(servers, "# of a manager\nnameserver 10.0.0.1\nsearch example.org\noptions edns0\nsortlist 10.0.0.0\n")
	if want := "nameserver 192.0.2.53\nsearch example.org\noptions edns0\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestWaitsForPrefix: how long a namespace keeps addresses of a prefix that its link has lost.
func TestWaitsForPrefix(t *testing.T) {
	const lost = time.Hour
	for name, c := range map[string]struct {
		missed time.Duration
		leased bool
		now    time.Duration
		want   time.Duration
		waits  bool
	}{
		"just lost":                  {0, true, lost, lost, true},
		"a moment later":             {lost, true, lost + prefixPatience - 1, lost, true},
		"for good":                   {lost, true, lost + prefixPatience, 0, false},
		"the link has no IPv6":       {0, false, lost, 0, true},
		"and has had none for a day": {lost, false, 25 * time.Hour, 0, true},
	} {
		if missed, waits := (State{Missed: c.missed}).waits(c.leased, c.now); missed != c.want || waits != c.waits {
			t.Errorf("%s: %s, %v", name, missed, waits)
		}
	}
}
