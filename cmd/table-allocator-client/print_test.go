package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/inspect"
	"github.com/table-allocator/table-allocator/internal/outside"
)

func TestPrintStatus(t *testing.T) {
	report := inspect.Report{
		Server:  inspect.Server{State: inspect.Stopped},
		Unbound: []inspect.Unbound{{Family: "inet", Ifname: "wan0", Gateway: "192.0.2.1", Table: 254}, {Family: "inet6"}},
		Uplinks: []inspect.Row{
			{Ifname: "wan0", Address: "192.0.2.5", Table: 10000, LeaseLeft: 3599, Gateway: "192.0.2.1", PID: 71, Mode: "copy"},
			{Ifname: "wan1", Address: "2001:db8:1234:5678:9abc:def0:1234:5678", Table: 10000, LeaseLeft: 86399, PID: 4194304, Mode: "copy",
				Findings: []inspect.Finding{
					{Name: "no-route", Severity: inspect.Error, What: "no route (leaves by wan0)", Evidence: "table 10000 has no route to the Internet", Cure: "give main a default route over wan1"},
					{Name: "incomplete", Severity: inspect.Error, What: "misses rules or routes", Evidence: "rule 20000: from all to 2001:db8:1234:5678::/64 lookup 10000 proto 116", Cure: "wait"},
				}},
		},
		Others: []inspect.Row{{Ifname: "tun0", Address: "openvpn", Table: 10001, LeaseLeft: 700000, PID: 5, Mode: "none"}},
	}
	for _, tt := range []struct {
		name   string
		legend bool
		width  int
		want   string
	}{
		{"pipe", true, 0, `
server   stopped: systemctl start table-allocator-server
unbound  IPv4 by wan0 through 192.0.2.1, IPv6 no route

IFNAME  ADDRESS                                 TABLE  LEFT    MODE  PID      STATE                      GATEWAY
wan0    192.0.2.5                               10000  59m59s  copy  71       ok                         192.0.2.1
wan1    2001:db8:1234:5678:9abc:def0:1234:5678  10000  23h59m  copy  4194304  no route (leaves by wan0)  -
    why table 10000 has no route to the Internet
    do  give main a default route over wan1
    and misses rules or routes
    why rule 20000: from all to 2001:db8:1234:5678::/64 lookup 10000 proto 116
    do  wait
tun0    openvpn                                 10001  8d02h   none  5        ok                         -
`},
		{"terminal", true, 80, `
server   stopped: systemctl start table-allocator-server
unbound  IPv4 by wan0 through 192.0.2.1, IPv6 no route

IFNAME  ADDRESS                                 TABLE  LEFT    MODE  PID
wan0    192.0.2.5                               10000  59m59s  copy  71
    state ok  gateway 192.0.2.1
wan1    2001:db8:1234:5678:9abc:def0:1234:5678  10000  23h59m  copy  4194304
    state no route (leaves by wan0)
    why table 10000 has no route to the Internet
    do  give main a default route over wan1
    and misses rules or routes
    why rule 20000: from all to 2001:db8:1234:5678::/64 lookup 10000 proto 116
    do  wait
tun0    openvpn                                 10001  8d02h   none  5
    state ok
`},
		{"for scripts", false, 0, `
wan0  192.0.2.5                               10000  59m59s  copy  71       ok                         192.0.2.1
wan1  2001:db8:1234:5678:9abc:def0:1234:5678  10000  23h59m  copy  4194304  no route (leaves by wan0)  -
tun0  openvpn                                 10001  8d02h   none  5        ok                         -
`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			if err := printStatus(&out, report, tt.legend, tt.width); err != nil {
				t.Fatal(err)
			}
			want := strings.ReplaceAll(strings.TrimPrefix(tt.want, "\n"), "systemctl start table-allocator-server", outside.Service("start", "table-allocator-server"))
			if got := out.String(); got != want {
				t.Errorf("got\n%s", got)
			}
			for line := range strings.Lines(out.String()) {
				if tt.width > 0 && len(strings.TrimSuffix(line, "\n")) > tt.width {
					t.Errorf("%d columns: %s", len(line), line)
				}
			}
		})
	}
}

// Several addresses of a link and family have a line above them, with the worst state and what to do; each has only what is
// different from that. Scripts get the addresses alone.
func TestPrintStatusFamilies(t *testing.T) {
	noRoute := func(table string) []inspect.Finding {
		return []inspect.Finding{{Name: "no-route", Severity: inspect.Error, What: "no route (leaves by wan0)", Evidence: "table " + table + " has no route", Cure: "give main a default route"}}
	}
	row := func(addr, family string, table uint32, gateway, state string, findings []inspect.Finding) inspect.Row {
		return inspect.Row{Ifname: "wan1", Address: addr, Family: family, Table: table, LeaseLeft: 60, PID: 71, Mode: "copy", Gateway: gateway, State: state, Findings: findings}
	}
	double := []inspect.Finding{{Name: "duplicate", Severity: inspect.Error, What: "another host has the address", Evidence: "00:00:5e:00:53:01 answers", Cure: "take another"}}
	report := inspect.Report{Server: inspect.Server{State: inspect.Running, PID: 1}, Unbound: []inspect.Unbound{{Family: "inet6"}}, Uplinks: []inspect.Row{
		row("192.0.2.5", "inet", 10000, "192.0.2.1", "ok", nil),
		row("192.0.2.6", "inet", 10001, "", "no-route", noRoute("10001")),
		row("192.0.2.7", "inet", 10002, "", "no-route", noRoute("10002")),
		row("192.0.2.8", "inet", 10003, "", "duplicate", double),
		row("2001:db8::5", "inet6", 10000, "fe80::1", "ok", nil),
		row("2001:db8::6", "inet6", 10001, "fe80::1", "ok", nil),
	}}
	for _, tt := range []struct {
		legend bool
		want   string
	}{
		{true, `
server   running, pid 1
unbound  IPv6 no route

IFNAME  ADDRESS        TABLE  LEFT   MODE  PID  STATE                              GATEWAY
wan1    IPv4(4)        -      1m00s  copy  71   no route (leaves by wan0), 2 of 4  -
    why table 10001 has no route
    do  give main a default route
wan1      192.0.2.5    10000  1m00s  copy  71   ok                                 192.0.2.1
wan1      192.0.2.6    10001  1m00s  copy  71   no route (leaves by wan0)          -
wan1      192.0.2.7    10002  1m00s  copy  71   no route (leaves by wan0)          -
wan1      192.0.2.8    10003  1m00s  copy  71   another host has the address       -
    why 00:00:5e:00:53:01 answers
    do  take another
wan1    IPv6(2)        -      1m00s  copy  71   ok                                 fe80::1
wan1      2001:db8::5  10000  1m00s  copy  71   ok                                 fe80::1
wan1      2001:db8::6  10001  1m00s  copy  71   ok                                 fe80::1
`},
		{false, `
wan1  192.0.2.5    10000  1m00s  copy  71  ok                            192.0.2.1
wan1  192.0.2.6    10001  1m00s  copy  71  no route (leaves by wan0)     -
wan1  192.0.2.7    10002  1m00s  copy  71  no route (leaves by wan0)     -
wan1  192.0.2.8    10003  1m00s  copy  71  another host has the address  -
wan1  2001:db8::5  10000  1m00s  copy  71  ok                            fe80::1
wan1  2001:db8::6  10001  1m00s  copy  71  ok                            fe80::1
`},
	} {
		var out bytes.Buffer
		if err := printStatus(&out, report, tt.legend, 0); err != nil {
			t.Fatal(err)
		}
		if got := out.String(); got != strings.TrimPrefix(tt.want, "\n") {
			t.Errorf("got\n%s", got)
		}
	}
}

func TestUnbindWords(t *testing.T) {
	for traffic, want := range map[string]string{
		"uidrange 4711-4711":          "--uid 4711",
		"uidrange 1000-1999":          "--uid 1000-1999",
		"ipproto tcp dport 443":       "--proto tcp --dport 443",
		"ipproto udp dport 1-6":       "--proto udp --dport 1-6",
		"iif tav0 (namespace work)":   "iif tav0 (namespace work)",
		"fwmark 0x2000000/0xff000000": "fwmark 0x2000000/0xff000000",
		"uidrange 7-7 sport 5":        "uidrange 7-7 sport 5",
		"uidrange 7-7 ipproto icmp":   "--uid 7 --proto icmp",
		"":                            "",
	} {
		if got := unbindWords(traffic); got != want {
			t.Errorf("%s: got %s, want %s", traffic, got, want)
		}
	}
}
