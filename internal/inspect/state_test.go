package inspect

import (
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/walk"
	"github.com/table-allocator/table-allocator/internal/wire"
)

func TestGiveDefault(t *testing.T) {
	for kind, want := range map[string]string{"ppp": "defaultroute-metric", "": "DHCP", "wwan": "DHCP"} {
		if got := giveDefault(route.Link{Name: "ppp0", Kind: kind}, false); !strings.Contains(got, want) || !strings.Contains(got, "over ppp0") {
			t.Errorf("%q: got %q, want %q", kind, got, want)
		}
	}
}

// A holder that has asked for the first time, and was told neither a lease nor an error, is seen with words as every other one.
func TestRowOfLeaseEvidence(t *testing.T) {
	why := "timeout"
	for _, tt := range []struct {
		held   holder
		server Server
		want   string
	}{
		{holder{}, Server{}, "not answered yet"},
		{holder{}, Server{State: Stopped}, "not answered yet"},
		{holder{Reply: wire.Reply{Error: "pool is full"}}, Server{}, "pool is full"},
		{holder{silent: &why}, Server{}, "timeout"},
		{holder{absent: true}, Server{}, "no client"},
	} {
		key := wire.Key{Address: "192.0.2.2", Ifname: "wan1", Family: unix.AF_INET}
		row := rowOfLease(key, tt.held, tt.server)
		if len(row.Findings) != 1 || !strings.Contains(row.Findings[0].Evidence, tt.want) {
			t.Errorf("%+v of a server that is %q: got %+v, want %q", tt.held, tt.server.State, row.Findings, tt.want)
		}
	}
}

// Only what every network namespace begins with is the kernel's.
func TestRuleOwner(t *testing.T) {
	lookup := func(priority, table uint32, protocol uint8) route.Rule {
		return route.Rule{Priority: priority, Action: route.Lookup, Table: table, Protocol: protocol}
	}
	shadowing := lookup(0, unix.RT_TABLE_LOCAL, unix.RTPROT_BOOT)
	shadowing.Src = netip.MustParsePrefix("192.0.2.2/32")
	for _, tt := range []struct {
		rule route.Rule
		want string
	}{
		{lookup(0, unix.RT_TABLE_LOCAL, unix.RTPROT_KERNEL), ""}, {lookup(0, unix.RT_TABLE_LOCAL, unix.RTPROT_BOOT), ""},
		{lookup(32766, unix.RT_TABLE_MAIN, 0), ""}, {lookup(32767, unix.RT_TABLE_DEFAULT, unix.RTPROT_KERNEL), ""},
		{lookup(0, 200, unix.RTPROT_BOOT), "another program"}, {lookup(32766, 200, unix.RTPROT_STATIC), "static"},
		{shadowing, "another program"}, {route.Rule{Action: route.Prohibit}, "another program"},
		{lookup(1000, 200, unix.RTPROT_KERNEL), "another program"},
		{lookup(10000, 10000, route.Protocol), "ours"},
	} {
		if got := ruleOwner(tt.rule, nil); got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.rule, got, tt.want)
		}
	}
}

// TestOnlinkAdvice: `ip route` refuses a default route over a link without a network, unless it is told that the gateway is there.
func TestOnlinkAdvice(t *testing.T) {
	const link = 2
	network := route.NewRoute(unix.RT_TABLE_MAIN, netip.MustParsePrefix("192.0.2.0/24"), netip.Addr{}, link)
	for _, tt := range []struct {
		main []route.Route
		ppp  bool
		want bool
	}{
		{nil, false, true},
		{[]route.Route{network}, false, false},
		{nil, true, false},
	} {
		h := &host{worlds: map[int]*walk.World{unix.AF_INET: {Tables: map[uint32][]route.Route{unix.RT_TABLE_MAIN: tt.main}}}}
		c := candidate{at: route.Address{Index: link, Addr: netip.MustParseAddr("192.0.2.2")}, link: route.Link{Name: "wan1", PointToPoint: tt.ppp}}
		c.Key.Family = wire.Inet
		c.Key.Address = "192.0.2.2"
		got := h.needsOnlink(c)
		if text := giveDefault(c.link, got); got != tt.want || strings.Contains(text, "dev wan1 onlink") != tt.want {
			t.Errorf("%+v: %v, %q", tt, got, text)
		}
	}
}
