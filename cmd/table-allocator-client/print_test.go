package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/inspect"
)

func TestPrintRows(t *testing.T) {
	short := []inspect.Row{
		{Ifname: "wan0", Address: "192.0.2.5", Table: 10000, LeaseLeft: 3599, Gateway: "192.0.2.1", PID: 71, Mode: "copy"},
		{Ifname: "wan1", Address: "2001:db8::5", Missing: "a holder: there is no client for it, and no watch"},
	}
	long := []inspect.Row{{Ifname: "wan0", Address: "2001:db8:1234:5678:9abc:def0:1234:5678", Table: 10000, LeaseLeft: 86399,
		Gateway: "fe80::1234:5678:9abc:def0", PID: 4194304, Mode: "copy",
		Missing: "rule 20000: from all to 2001:db8:1234:5678::/64 lookup 10000 proto 116, route default via fe80::1"}}
	longest := []inspect.Row{{Ifname: "enp101s0f1np123", Address: "2001:db8:1234:5678:9abc:def0:1234:5678", Table: 4294967295, LeaseLeft: 700000,
		Gateway: "2001:db8:1234:5678:9abc:def0:1234:ffff", PID: 4194304, Mode: "none"}}
	for _, tt := range []struct {
		name   string
		rows   []inspect.Row
		colour bool
		want   string
	}{
		{"none", nil, false, `
IFNAME  ADDRESS  TABLE  LEFT  MODE  PID  GATEWAY
`},
		{"short", short, false, `
IFNAME  ADDRESS      TABLE  LEFT    MODE  PID  GATEWAY
wan0    192.0.2.5    10000  59m59s  copy  71   192.0.2.1
wan1    2001:db8::5  -      -       -     -    -
    misses a holder: there is no client for it, and no watch
`},
		{"in colour", short[1:], true, `
IFNAME  ADDRESS      TABLE  LEFT  MODE  PID  GATEWAY
wan1    2001:db8::5  -      -     -     -    -
` + "\x1b[31m    misses a holder: there is no client for it, and no watch\x1b[0m\n"},
		{"long", long, false, `
IFNAME  ADDRESS                                 TABLE  LEFT    MODE  PID
wan0    2001:db8:1234:5678:9abc:def0:1234:5678  10000  23h59m  copy  4194304
    gateway fe80::1234:5678:9abc:def0
    misses rule 20000: from all to 2001:db8:1234:5678::/64 lookup 10000 proto
      116, route default via fe80::1
`},
		{"longest", longest, false, `
IFNAME           ADDRESS
enp101s0f1np123  2001:db8:1234:5678:9abc:def0:1234:5678
    table 4294967295  left 8d02h  mode none  pid 4194304
    gateway 2001:db8:1234:5678:9abc:def0:1234:ffff
`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			if err := printRows(&out, tt.rows, tt.colour); err != nil {
				t.Fatal(err)
			}
			if got := out.String(); got != strings.TrimPrefix(tt.want, "\n") {
				t.Errorf("got\n%s", got)
			}
			for line := range strings.Lines(strings.NewReplacer("\x1b[31m", "", "\x1b[0m", "", "\n", "\n").Replace(out.String())) {
				if len(strings.TrimSuffix(line, "\n")) > screen {
					t.Errorf("%d columns: %s", len(line), line)
				}
			}
		})
	}
}
