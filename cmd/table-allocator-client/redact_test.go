package main

import "testing"

func TestRedacted(t *testing.T) {
	type row struct {
		Address, Evidence string
		Left              int
	}
	in := []row{
		{"203.0.113.2", "table 10000 has \"default via 203.0.113.1 dev wan1\"", 3},
		{"2001:db8:2:3::2", "to 203.0.113.0/24 from 203.0.113.2, 10.1.2.3, fe80::1, fd00::1, 127.0.0.1", 4},
		{"vpn-one", "at 12:30:05, version 1.2.3, 0.0.0.0, mac 02:00:00:00:00:01", 5},
		{"10.1.2.3:80", "connect a socket to 203.0.113.2: no route; 203.0.113.2:443: refused; dnat to 203.0.113.2:80.", 6},
		{"[2001:db8:2:3::2]:53", "dial 2001:db8:2:3::2: no route, from:203.0.113.2 to:2001:db8:2:3::2, ::ffff:203.0.113.2:80, fe80::1:, 10.1.2.3:", 7},
		{"", "source:203.0.113.2-203.0.113.1, 203.0.113.2.example.org, 2001:db8:2:4::/64", 8},
	}
	want := []row{
		{"203.0.x.x(1)", "table 10000 has \"default via 203.0.x.x(2) dev wan1\"", 3},
		{"2001:db8::x(3)", "to 203.0.x.x(4)/24 from 203.0.x.x(1), 10.1.2.3, fe80::1, fd00::1, 127.0.0.1", 4},
		{"vpn-one", "at 12:30:05, version 1.2.3, 0.0.0.0, mac 02:00:00:00:00:01", 5},
		{"10.1.2.3:80", "connect a socket to 203.0.x.x(1): no route; 203.0.x.x(1):443: refused; dnat to 203.0.x.x(1):80.", 6},
		{"[2001:db8::x(3)]:53", "dial 2001:db8::x(3): no route, from:203.0.x.x(1) to:2001:db8::x(3), ::ffff:203.0.x.x(1):80, fe80::1:, 10.1.2.3:", 7},
		{"", "source:203.0.x.x(1)-203.0.x.x(2), 203.0.x.x(1).example.org, 2001:db8::x(5)/64", 8},
	}
	got := redacted(in, true)
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("got %+v, want %+v", got[i], want[i])
		}
	}
	if in[0].Address != "203.0.113.2" || redacted(in, false)[0] != in[0] {
		t.Errorf("what is not to be redacted: %+v", in)
	}
}
