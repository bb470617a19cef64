package probe

import (
	"net/netip"
	"testing"
)

// reply is an answer to a question for the addresses of "check.example", with an alias before the address.
func reply(question []byte, records ...[]byte) []byte {
	b := append([]byte(nil), question...)
	b[2] |= 0x80
	b[7] = byte(len(records))
	for _, r := range records {
		b = append(append(b, 0xc0, dnsHeader), r...)
	}
	return b
}

func record(kind byte, data ...byte) []byte {
	return append([]byte{0, kind, 0, 1, 0, 0, 0, 60, 0, byte(len(data))}, data...)
}

func TestDNS(t *testing.T) {
	question := dnsQuestion(0x1234, "check.example", typeA)
	alias, inet, inet6 := record(5, 1, 'a', 0), record(typeA, 192, 0, 2, 1), record(typeAAAA, netip.MustParseAddr("2001:db8::1").AsSlice()...)
	for _, test := range []struct {
		name    string
		records [][]byte
		inet    bool
		want    string // "": none
	}{
		{"an alias and an address", [][]byte{alias, inet}, true, "192.0.2.1"},
		{"the other family", [][]byte{inet}, false, ""},
		{"both families", [][]byte{inet, inet6}, false, "2001:db8::1"},
		{"none", nil, true, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := reply(question, test.records...)
			if !isDNSAnswer(question, b) {
				t.Error("it is no answer")
			}
			got, err := dnsAddress(b, test.inet)
			if (err == nil) != (test.want != "") || err == nil && got.String() != test.want {
				t.Errorf("%v (%v), want %q", got, err, test.want)
			}
			for n := range b { // cut short it says less, and is read without harm
				_, _ = dnsAddress(b[:n], test.inet)
			}
		})
	}
	if other := dnsQuestion(0x1235, ".", typeNS); isDNSAnswer(question, other) || isDNSAnswer(other, reply(question)) {
		t.Error("the answer to another question counts")
	}
}

func FuzzDNSAddress(f *testing.F) {
	f.Add(reply(dnsQuestion(1, "check.example", typeA), record(typeA, 192, 0, 2, 1)), true)
	f.Add([]byte{0, 0, 0x80, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0xc0}, false)
	f.Fuzz(func(t *testing.T, b []byte, inet bool) {
		addr, err := dnsAddress(b, inet)
		if (err == nil) != addr.IsValid() || err == nil && addr.Is4() != inet {
			t.Errorf("%v, %v", addr, err)
		}
	})
}

func FuzzParsePage(f *testing.F) {
	f.Add("http://check.example:8080/204")
	f.Add("http://[2001:db8::1]:80/x")
	f.Fuzz(func(t *testing.T, url string) {
		p, err := ParsePage(url)
		if err == nil && (p.Port == 0 || p.Path == "" || p.Host == "") {
			t.Errorf("%q: %+v", url, p)
		}
	})
}

func TestParsePage(t *testing.T) {
	for _, test := range []struct {
		url  string
		want Page // zero: an error
	}{
		{"http://check.example/204", Page{"check.example", 80, "/204"}},
		{"http://check.example:8080", Page{"check.example", 8080, "/"}},
		{"http://192.0.2.1:81/a?b=c", Page{"192.0.2.1", 81, "/a?b=c"}},
		{"http://[2001:db8::1]:81/", Page{"2001:db8::1", 81, "/"}},
		{"http://[2001:db8::1]/", Page{"2001:db8::1", 80, "/"}},
		{"https://check.example/", Page{}},
		{"http:///204", Page{}},
		{"http://check.example:0/", Page{}},
		{"http://check.example/a b", Page{}},
		{"http://check..example/", Page{}},
		{"http://check.example\r\nX: y/", Page{}},
	} {
		if got, err := ParsePage(test.url); got != test.want || (err == nil) != (test.want != Page{}) {
			t.Errorf("%q: %+v (%v), want %+v", test.url, got, err, test.want)
		}
	}
}

func TestParseKind(t *testing.T) {
	for _, text := range []string{"icmp", "dns", "tcp:443"} {
		if k, err := ParseKind(text); err != nil || k.String() != text {
			t.Errorf("%q: %v (%v)", text, k, err)
		}
	}
	for _, text := range []string{"", "tcp", "tcp:0", "tcp:65536", "icmp:1", "http"} {
		if k, err := ParseKind(text); err == nil {
			t.Errorf("%q: %v, want an error", text, k)
		}
	}
}

func TestStatus(t *testing.T) {
	for text, want := range map[string]bool{
		"HTTP/1.1 204 No Content\r\n": true, "HTTP/1.0 204\r\n": true, "HTTP/1.1 302 Found\r\n": false, "HTTP/1.1 200 OK": false, "204": false, "": false,
	} {
		if got := checkStatus([]byte(text)) == nil; got != want {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	}
}

func TestPlanOf(t *testing.T) {
	a := netip.MustParseAddr
	all := Plan{[]netip.Addr{a("192.0.2.1"), a("2001:db8::1"), a("192.0.2.2"), a("192.0.2.3")}, DefaultKinds, nil}
	u := Uplink{Ifname: "wan0", Address: a("10.0.0.2"), Nameservers: []netip.Addr{a("2001:db8::53"), a("10.0.0.53")}, Gateway: a("10.0.0.1")}
	if got := all.Of(u); len(got.Targets) != 2 || got.Targets[1] != a("192.0.2.2") || len(got.Kinds) != 3 {
		t.Errorf("%+v, want the first two targets of the family", got)
	}
	if got := (Plan{Kinds: DefaultKinds}).Of(u); len(got.Targets) != 1 || got.Targets[0] != a("10.0.0.53") || got.text() != "dns" || !got.Asks() {
		t.Errorf("%+v, want the name server of the family, by DNS", got)
	}
	u.Nameservers = nil
	if got := (Plan{Kinds: DefaultKinds}).Of(u); len(got.Targets) != 1 || got.Targets[0] != u.Gateway || !got.GatewayAlone() || !got.Asks() {
		t.Errorf("%+v, want the gateway", got)
	}
	u.Gateway = netip.Addr{}
	if got := (Plan{Kinds: DefaultKinds}).Of(u); got.Asks() {
		t.Errorf("%+v asks nobody", got)
	}
}

func TestHabit(t *testing.T) {
	h := Habit{}
	k := Kind{Name: icmp}
	for range missesMost - 1 {
		h = h.after(k, false)
	}
	if h = h.after(k, true); h.Second {
		t.Error("the second target is the first, though that answered between")
	}
	for range missesMost {
		h = h.after(k, false)
	}
	if !h.Second || h.Kind != k {
		t.Errorf("%+v, want the second target first", h)
	}
}
