package main

import (
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/uplinks"
)

// TestPrintUplinks: a terminal that shows more than ASCII gets the last hour as characters, and others do not.
func TestPrintUplinks(t *testing.T) {
	report := uplinks.Report{
		Probing: true,
		Uplinks: []uplinks.Uplink{{
			Ifname: "wan0", Family: "inet", Address: "192.0.2.2", Table: 10000, State: "degraded", Reason: "30 % of the last 60 rounds lost", Since: 90, RTT: 12.34, Loss: 30,
			Bytes: 12345, Used: true, Hour: []uplinks.Minute{{Loss: -1}, {RTT: 10}, {RTT: 80, Loss: 50}, {Loss: 100}},
		}},
		Unbound: []uplinks.Choice{{Family: "inet", Ifname: "wan0", Table: 10000, Why: "the only one that works"}},
	}
	const line = "* wan0    192.0.2.2  10000  0     12.3ms  30%   90s    degraded (30 % of the last 60 rounds lost), 12 kB of probes\n"
	for _, tt := range []struct {
		name, locale string
		width        int
		hour         string
	}{
		{"a terminal", "C.UTF-8", 80, "    rtt    ▂█   to 80.0ms\n    loss    ▅█  to 100%\n"},
		{"a terminal with ASCII", "C", 80, ""},
		{"a pipe", "C.UTF-8", 0, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("LC_ALL", tt.locale)
			var out strings.Builder
			if err := printUplinks(&out, report, tt.width); err != nil {
				t.Fatal(err)
			}
			want := "  IFNAME  ADDRESS    TABLE  RANK  RTT     LOSS  SINCE  STATE\n" + line + tt.hour + "IPv4  unbound traffic uses wan0: the only one that works\n"
			if out.String() != want {
				t.Errorf("got\n%swant\n%s", &out, want)
			}
		})
	}
}
