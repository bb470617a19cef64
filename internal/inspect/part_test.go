package inspect

import (
	"testing"

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
