package hook

import (
	"strings"
	"testing"
)

// environ reads lines NAME=VALUE, which may be indented. The last one of a name counts.
func environ(text string) Environment {
	env := make(Environment)
	for line := range strings.Lines(text) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			env[name] = value
		}
	}
	return env
}

// called are the calls, then the warnings, a line for each.
func called(t *testing.T, program string, args []string, env Environment) string {
	t.Helper()
	calls, warnings, err := Calls(program, args, env)
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, c := range calls {
		lines = append(lines, c.String())
	}
	for _, w := range warnings {
		lines = append(lines, "! "+w.String())
	}
	return strings.Join(lines, "\n")
}

type told struct {
	name string
	args string // of the script
	env  string // lines NAME=VALUE
	want string // lines: calls, then warnings
}

func testCalls(t *testing.T, program string, tests []told) {
	t.Helper()
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var want []string
			for line := range strings.Lines(tt.want) {
				if line = strings.TrimSpace(line); strings.HasPrefix(line, "--") { // the line before goes on
					want[len(want)-1] += " " + line
				} else if line != "" {
					want = append(want, line)
				}
			}
			got := called(t, program, strings.Fields(tt.args), environ(tt.env))
			if want := strings.Join(want, "\n"); got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		})
	}
}

// What the administrator sets counts for each program.
func TestSettings(t *testing.T) {
	const bound = `
		interface=wan0
		reason=BOUND
		new_ip_address=192.0.2.7
		new_subnet_mask=255.255.255.0
		new_routers=192.0.2.1 192.0.2.2
		new_domain_name_servers=192.0.2.53
		`
	testCalls(t, "dhclient", []told{
		{"defaults", "", bound,
			`hold -4 -a 192.0.2.7 -i wan0 --routes move -n 24 -t dhclient --metric 1 --gateway 192.0.2.1 --gateway 192.0.2.2
			--dnsmasq-servers /run/table-allocator/dnsmasq.servers --nameserver 192.0.2.53`},
		{"others", "", bound + "ROUTES=copy\nDNSMASQ_SERVERS=/etc/servers\nCLIENT_OPTIONS=--on-loss  block\t--debug",
			`hold -4 -a 192.0.2.7 -i wan0 --routes copy -n 24 -t dhclient --metric 1 --gateway 192.0.2.1 --gateway 192.0.2.2
			--dnsmasq-servers /etc/servers --nameserver 192.0.2.53 --on-loss block --debug`},
		{"no routes, no name servers", "", bound + "ROUTES=none\nDNSMASQ_SERVERS=", `hold -4 -a 192.0.2.7 -i wan0 --routes none -n 24 -t dhclient`},
		{"no routes of option 121", "", bound + "ROUTES=none\nDNSMASQ_SERVERS=\nnew_rfc3442_classless_static_routes=0 192 0 2 1",
			`hold -4 -a 192.0.2.7 -i wan0 --routes none -n 24 -t dhclient`},
		{"systemd-resolved", "", bound + "RESOLVER=resolved\nROUTES=none\nDNSMASQ_SERVERS=",
			`hold -4 -a 192.0.2.7 -i wan0 --routes none -n 24 -t dhclient --resolver resolved --nameserver 192.0.2.53`},
		{"dnsmasq by name", "", bound + "RESOLVER=dnsmasq\nROUTES=none\nDNSMASQ_SERVERS=/f",
			`hold -4 -a 192.0.2.7 -i wan0 --routes none -n 24 -t dhclient --dnsmasq-servers /f --nameserver 192.0.2.53`},
		{"no resolver", "", bound + "RESOLVER=none\nROUTES=none", `hold -4 -a 192.0.2.7 -i wan0 --routes none -n 24 -t dhclient`},
		{"what the client does not know", "", bound + "ROUTES=else where\nDNSMASQ_SERVERS=",
			`hold -4 -a 192.0.2.7 -i wan0 --routes else where -n 24 -t dhclient --metric 1 --gateway 192.0.2.1 --gateway 192.0.2.2`},
		{"links to leave alone", "", bound + "LEAVE_ALONE=lan* wan0", ""},
		{"a pattern", "", bound + "LEAVE_ALONE=lan* wa?[0-3]", ""},
		{"a negation", "", bound + "LEAVE_ALONE=wan[!1-9]", ""},
		{"no pattern for it", "", bound + "LEAVE_ALONE=lan* wan[!0] wan [wan0\nROUTES=none\nDNSMASQ_SERVERS=",
			"hold -4 -a 192.0.2.7 -i wan0 --routes none -n 24 -t dhclient"},
	})
	if !matches("[wan", "[wan") || matches("[wan", "wan") {
		t.Error("a broken pattern does not stand for itself")
	}
}

func TestUnknownProgram(t *testing.T) {
	for _, program := range []string{"", "wicked", "await"} {
		if calls, _, err := Calls(program, nil, environ("interface=wan0\nreason=BOUND\nnew_ip_address=192.0.2.7")); err == nil {
			t.Errorf("%q calls %v", program, calls)
		}
	}
}

// The first of two variables of one name counts, and what is not set is empty.
func TestParseEnvironment(t *testing.T) {
	env := ParseEnvironment([]string{"a=1", "a=2", "b=", "c", "d=x=y"})
	for name, want := range map[string]string{"a": "1", "b": "", "c": "", "d": "x=y", "e": ""} {
		if got := env[name]; got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
}

func TestLinkNames(t *testing.T) {
	for _, name := range []string{"", ".", "..", "a/b", "a b", "a:b", "a\tb", "a\x01b", "a\xffb", "0123456789abcdef"} {
		if got := called(t, "udev", nil, Environment{"INTERFACE": name}); strings.Contains(got, "end") {
			t.Errorf("%q: %s", name, got)
		}
	}
	for _, name := range []string{"wan0", "wan0.7", "w,an", `a"b`, "a*", "дом0"} {
		if got, want := called(t, "udev", nil, Environment{"INTERFACE": name}), "end dhclient of "+name+"\nrelease all of "+name; got != want {
			t.Errorf("%q: got %s, want %s", name, got, want)
		}
	}
}
