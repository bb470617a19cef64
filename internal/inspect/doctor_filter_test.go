package inspect

import (
	"strings"
	"testing"
)

func TestDrops(t *testing.T) {
	const accepts, refuses = "type filter hook output priority filter; policy accept;\n", "type filter hook output priority filter; policy drop;\n"
	for _, tt := range []struct{ key, body, want string }{
		{"oifname", accepts, ""},
		{"oifname", refuses, "policy drop"},
		{"oifname", accepts + `oifname "wan1" drop`, `oifname "wan1" drop`},
		{"oifname", accepts + `oifname "wan1" counter packets 3 bytes 180 drop`, `oifname "wan1" counter packets 3 bytes 180 drop`},
		{"oifname", accepts + `oif { "wan0", "wan1" } reject with icmp admin-prohibited`, `oif { "wan0", "wan1" } reject with icmp admin-prohibited`},
		{"oifname", accepts + `oifname != "wg0" meta mark != 0x0000ca6c fib daddr type != local counter packets 0 bytes 0 reject`, `oifname != "wg0" meta mark != 0x0000ca6c fib daddr type != local counter packets 0 bytes 0 reject`},
		{"oifname", accepts + `oifname != "wan1" drop`, ""},
		{"oifname", accepts + `oifname "wan0" drop`, ""},
		{"oifname", accepts + `oifname "wan11" drop`, ""},
		{"oifname", accepts + `oifname "wan1" ip daddr 192.0.2.1 drop`, ""},
		{"oifname", accepts + `oifname "wan1" limit rate over 5/second drop`, ""},
		{"oifname", accepts + "oifname \"wan1\" accept\ndrop", ""},
		{"oifname", accepts + "oifname \"wan0\" accept\ndrop", "drop"},
		{"oifname", accepts + "iifname \"wan1\" drop", ""},
		{"oifname", accepts + "meta mark != 0x00000000 drop", ""},
		{"oifname", refuses + "ct state established,related accept\noifname \"lo\" accept", "policy drop"},
		{"oifname", refuses + "ct state { established, related } accept", "policy drop"},
		{"oifname", refuses + "ct state new accept", ""},
		{"oifname", refuses + "ip daddr 192.0.2.1 accept", ""},
		{"oifname", refuses + `oifname "wan*" accept`, ""},
		{"oifname", refuses + "oifname @uplinks accept", ""},
		{"oifname", refuses + "counter packets 0 bytes 0 jump ufw-before-output", ""},
		{"oifname", refuses + "oifname vmap { \"wan1\" : accept }", ""},
		{"iifname", refuses + "ct state established,related accept", ""},
		{"iifname", refuses + "iifname \"lo\" accept", "policy drop"},
		{"iifname", accepts + "iifname \"wan1\" drop\nct state established accept", `iifname "wan1" drop`},
		{"iifname", accepts + "ct state established accept\niifname \"wan1\" drop", ""},
		{"iifname", accepts + `iifname "wan1" fib daddr type != local drop`, ""},
		{"iifname", accepts + `iifname "wan1" meta mark != 0x00000001 drop`, ""},
		{"oifname", accepts + `oifname "wan1" counter packets 1 bytes 2 meta mark != 0x00000001 log prefix "no " fib daddr type != local drop`,
			`oifname "wan1" counter packets 1 bytes 2 meta mark != 0x00000001 log prefix "no " fib daddr type != local drop`},
		{"oifname", accepts + "ct state established accept\nmeta mark set 0x00000001\nmeta mark != 0x00000001 drop", ""},
		{"oifname", refuses + "meta mark set ct mark", "policy drop"},
		{"oifname", accepts + `comment "policy drop; was here"`, ""},
		{"oifname", accepts + "ip saddr 192.0.2.2 counter packets 0 bytes 0 reject", "ip saddr 192.0.2.2 counter packets 0 bytes 0 reject"},
		{"oifname", accepts + `oifname "wan1" ip saddr 192.0.2.2 drop`, `oifname "wan1" ip saddr 192.0.2.2 drop`},
		{"oifname", accepts + "ip saddr 192.0.2.22 drop", ""}, {"oifname", accepts + "ip daddr 192.0.2.2 drop", ""},
		{"oifname", accepts + "ip saddr 192.0.2.2 ip daddr 192.0.2.1 drop", ""}, {"oifname", accepts + "ip saddr 192.0.2.2 accept\ndrop", ""},
		{"iifname", accepts + "ip daddr 192.0.2.2 drop", "ip daddr 192.0.2.2 drop"},
	} {
		got, ofAddress := chain{body: tt.body}.drops(tt.key, "wan1", "192.0.2.2")
		if got != tt.want || ofAddress != strings.Contains(tt.want, "192.0.2.2") {
			t.Errorf("%s, %q: got %q, %v, want %q", tt.key, tt.body, got, ofAddress, tt.want)
		}
	}
}

// A chain of the family netdev is one of the links that it names.
func TestConcerns(t *testing.T) {
	for _, tt := range []struct {
		family, body string
		want         bool
	}{
		{"ip", "type filter hook output priority filter; policy drop;", true},
		{"inet", "type filter hook output priority filter; policy drop;", true},
		{"ip6", "type filter hook output priority filter; policy drop;", false},
		{"netdev", `type filter hook egress device "wan1" priority filter; policy drop;`, true},
		{"netdev", `type filter hook egress device "wan11" priority filter; policy drop;`, false},
		{"netdev", `type filter hook ingress devices = { "wan0", "wan1" } priority -500; policy drop;`, true},
		{"inet", `type filter hook ingress device "wan0" priority -500; policy drop;`, false},
		{"inet", "\n\t\ttype filter hook output priority filter; policy drop;\n\t\toifname \"lan0\" accept comment \"block device 7\"", true},
	} {
		if got := (chain{family: tt.family, body: tt.body}).concerns("ip", "wan1"); got != tt.want {
			t.Errorf("%s %s: got %v", tt.family, tt.body, got)
		}
	}
}
