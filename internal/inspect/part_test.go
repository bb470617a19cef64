package inspect

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
)

// TestPartText: what newer kernels let rules select by.
func TestPartText(t *testing.T) {
	for other, want := range map[string]string{
		"":                          "dport 32",
		"tos=10":                    "dport 32 tos 0x10",
		"dscp=2e":                   "dport 32 dscp 46",
		"dscp=2e dscp_mask=3f":      "dport 32 dscp 46",
		"dport_mask=e0ff":           "dport 0x20/0xffe0",
		"dport_mask=e0ff tos=10":    "dport 0x20/0xffe0 tos 0x10",
		"flowlabel=00012345":        "dport 32",
		"dport_mask=zz dscp=xx":     "dport 32 dscp 0",
		"dport_mask=e0ff dscp=08":   "dport 0x20/0xffe0 dscp 8",
		"suppress_ifgroup=01000000": "dport 32",
	} {
		if got := partText(route.Rule{Traffic: route.Traffic{Dports: route.Ports{First: 32, Last: 32}}, Other: other}); got != want {
			t.Errorf("%s: got %q, want %q", other, got, want)
		}
	}
}

func TestMarkOf(t *testing.T) {
	for _, tt := range []struct {
		text  string
		want  uint32
		known bool
	}{
		{"0x00000007", 7, true},
		{"7 accept", 7, true},
		{"mark and 0xff00ffff or 0x40000", 0x40000, true},
		{"meta mark & 0xff00ffff | 0x00040000", 0x40000, true},
		{"(meta mark & 0xff00ffff) ^ 0x40000 counter", 0x40000, true},
		{"meta mark | 0x4000", 0x4000, true},
		{"meta mark & 0xff00ffff", 0, false},
		{"ct mark", 0, false},
		{"ct mark & 0xff", 0, false},
		{"0x1 | ct mark", 0, false},
		{"", 0, false},
	} {
		if got, known := markOf(tt.text); got != tt.want || known != tt.known {
			t.Errorf("%q: got %#x, %v, want %#x, %v", tt.text, got, known, tt.want, tt.known)
		}
	}
}

// TestMoveRule: what a person is told to do about a rule in front stays done when the program that added it starts again.
func TestMoveRule(t *testing.T) {
	for _, tt := range []struct {
		name string
		rule route.Rule
		want string // a part of it
	}{
		{"of nobody known", route.Rule{Priority: 500, Action: route.Lookup, Table: 77}, "ip rule add priority 10002 from all lookup 77 && ip rule delete priority 500 "},
		{"of strongSwan", route.Rule{Priority: 220, Action: route.Lookup, Table: 220}, "where strongSwan is configured, or set a smaller priority"},
		{"of wg-quick, which would be first again", route.Rule{Priority: 9999, Action: route.Lookup, Table: 51820}, "set Table = off where wg-quick is configured"},
		{"by a mark", route.Rule{Priority: 500, Traffic: route.Traffic{Mark: 1, Mask: 1}, Action: route.Lookup, Table: 77}, "what sets the mark"},
	} {
		if got := moveRule(tt.rule, unix.AF_INET, 10000); !strings.Contains(got, tt.want) {
			t.Errorf("%s: %q", tt.name, got)
		}
	}
}
