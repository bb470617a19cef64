package wire

import (
	"strings"
	"testing"
)

var marking = Marking{Mark: 0x02000000, Mask: 0xff000000, Block: 9002, Fallback: 15002}

// TestRequestFits: the server reads 512 bytes.
func TestRequestFits(t *testing.T) {
	quotes := func(n int) string { return strings.Repeat(`"`, n) }
	r := Request{Key: Key{Unspec, quotes(MaxIfname), quotes(MaxAddress)}, Tag: quotes(MaxTag), Want: 1<<32 - 1, Marks: true}
	data := r.Append(nil)
	if back, err := ParseRequest(data); err != nil || back != r || len(data) > MaxRequest {
		t.Errorf("%d bytes, %+v, %v", len(data), back, err)
	}
}

func TestRequestBytes(t *testing.T) {
	key := Key{Inet, "ta0", "10.77.0.2"}
	for _, tt := range []struct {
		name string
		req  Request
		want string
	}{
		{"request with a tag", Request{Key: key, Tag: "op1"},
			`{"address":"10.77.0.2","ifname":"ta0","tag":"op1","addr_family":2,"cmd":0,"version":1}`},
		{"release without one", Request{Key: key, Cmd: Release},
			`{"address":"10.77.0.2","ifname":"ta0","addr_family":2,"cmd":1,"version":1}`},
		{"that understands marks", Request{Key: key, Want: 7, Marks: true},
			`{"address":"10.77.0.2","ifname":"ta0","addr_family":2,"cmd":0,"version":1,"want":7,"marks":1}`},
		{"mark", Request{Key: Key{Ifname: "ta0"}, Cmd: Mark}, `{"ifname":"ta0","cmd":16,"version":1}`},
		{"mark that is known", Request{Key: Key{Ifname: `a"b`}, Cmd: Mark, Known: true}, `{"ifname":"a\"b","cmd":16,"version":1,"known":1}`},
		{"health", Request{Key: Key{Inet6, AnyInterface, ""}, Cmd: Health}, `{"ifname":".","addr_family":10,"cmd":21,"version":1}`},
		{"query with a mark", Request{Key: key, Cmd: Query, Marking: marking},
			`{"address":"10.77.0.2","ifname":"ta0","addr_family":2,"cmd":17,"version":1,"mark":33554432,"mask":4278190080,"block":9002,"fallback":15002}`},
		{"what has to be escaped", Request{Key: Key{Unspec, `a"b`, `c\d`}, Tag: "ä<&>"},
			`{"address":"c\\d","ifname":"a\"b","tag":"ä<&>","addr_family":0,"cmd":0,"version":1}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := string(tt.req.Append(nil))
			if got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
			back, err := ParseRequest([]byte(got))
			if err != nil || back != tt.req {
				t.Errorf("read again: got %+v, %v, want %+v", back, err, tt.req)
			}
		})
	}
}

func TestParseRequest(t *testing.T) {
	const good = `{"address":"10.0.0.1","ifname":"eth1","addr_family":2,"cmd":0,"version":1}`
	query := func(m Marking) string {
		return string(Request{Key: Key{Inet, "eth1", "10.0.0.1"}, Cmd: Query, Marking: m}.Append(nil))
	}
	nested := func(n int) string {
		return strings.Replace(good, "{", `{"x":`+strings.Repeat("[", n)+strings.Repeat("]", n)+`,`, 1)
	}
	for _, tt := range []struct {
		name, in string
		wantErr  string // "" for none
	}{
		{"as the original sends it", good, ""},
		{"space around", " \t\n" + good + "\n", ""},
		{"space within", strings.NewReplacer(":", " : ", ",", " ,\n").Replace(good), ""},
		{"unknown keys", strings.Replace(good, "{", `{"a":{"b":[1,"}",null]},"c":-1.5e3,"d":"\"","e":true,`, 1), ""},
		{"a key in another case is another key", strings.Replace(good, "cmd", "Cmd", 1), "cmd: missing"},
		{"escaped string", strings.Replace(good, "eth1", `\u0065th1`, 1), ""},
		{"empty", "", "not a JSON object"},
		{"a number", "1", "not a JSON object"},
		{"a list", "[]", "not a JSON object"},
		{"a string", `"x"`, "not a JSON object"},
		{"null", "null", "not a JSON object"},
		{"half", "{", "not a JSON object"},
		{"two objects", good + good, "not a JSON object"},
		{"NUL behind", good + "\x00", "not a JSON object"},
		{"invalid UTF-8", strings.Replace(good, "eth1", "eth\xff", 1), "not a JSON object"},
		{"no keys", "{}", "version: missing"},
		{"nested 32 deep", nested(31), ""},
		{"nested deeper", nested(32), "nested deeper than 32"},
		{"a key twice", strings.Replace(good, "{", `{"cmd":0,`, 1), "cmd: given twice"},
		{"an unknown key twice", strings.Replace(good, "{", `{"x":0,"x":1,`, 1), ""},
		{"no ifname", strings.Replace(good, "ifname", "name", 1), "ifname: missing"},
		{"no family", strings.Replace(good, "addr_family", "family", 1), "addr_family: missing"},
		{"no version", strings.Replace(good, "version", "v", 1), "version: missing"},
		{"another version", strings.Replace(good, `"version":1`, `"version":2`, 1), "version 2: this is version 1"},
		{"unknown command", strings.Replace(good, `"cmd":0`, `"cmd":3`, 1), "cmd 3: unknown"},
		{"command that would fold", strings.Replace(good, `"cmd":0`, `"cmd":256`, 1), "cmd: 256 is not within 0 to 255"},
		{"family that would fold", strings.Replace(good, `_family":2`, `_family":258`, 1), "addr_family: 258 is not within 0 to 255"},
		{"unknown family", strings.Replace(good, `_family":2`, `_family":3`, 1), "addr_family 3: want 2, 10 or 0"},
		{"fraction", strings.Replace(good, `"cmd":0`, `"cmd":0.0`, 1), "cmd: not an integer in range"},
		{"exponent", strings.Replace(good, `"version":1`, `"version":1e0`, 1), "version: not an integer in range"},
		{"number as string", strings.Replace(good, `"cmd":0`, `"cmd":"0"`, 1), "cmd: not an integer in range"},
		{"string as number", strings.Replace(good, `"eth1"`, `1`, 1), "ifname: not a string"},
		{"null for a string", strings.Replace(good, `"eth1"`, `null`, 1), "ifname: not a string"},
		{"empty ifname", strings.Replace(good, "eth1", "", 1), "ifname: 0 bytes, want 1 to 15"},
		{"ifname of 15 bytes", strings.Replace(good, "eth1", "eth456789012345", 1), ""},
		{"ifname of 16 bytes", strings.Replace(good, "eth1", "eth4567890123456", 1), "ifname: 16 bytes, want 1 to 15"},
		{"NUL in ifname", strings.Replace(good, "eth1", `eth\u0000`, 1), "ifname: contains the control character U+0000"},
		{"newline in ifname", strings.Replace(good, "eth1", `e\nth`, 1), "ifname: contains the control character U+000A"},
		{"long tag", strings.Replace(good, "{", `{"tag":"`+strings.Repeat("t", 128)+`",`, 1), "tag: 128 bytes, want 0 to 127"},
		{"newline in tag", strings.Replace(good, "{", `{"tag":"a\nb",`, 1), "tag: contains the control character U+000A"},
		{"long address", strings.Replace(good, "10.0.0.1", strings.Repeat("1", 46), 1), "address: 46 bytes, want 1 to 45"},
		{"marks of 2", strings.Replace(good, "{", `{"marks":2,`, 1), "marks: 2 is not within 0 to 1"},
		{"mark", `{"ifname":"eth1","cmd":16,"version":1}`, ""},
		{"mark with an address that is none", `{"ifname":"eth1","cmd":16,"version":1,"address":"x","addr_family":77}`, ""},
		{"mark without ifname", `{"cmd":16,"version":1}`, "ifname: missing"},
		{"mark with an empty ifname", `{"ifname":"","cmd":16,"version":1}`, "ifname: 0 bytes, want 1 to 15"},
		{"mark without version", `{"ifname":"eth1","cmd":16}`, "version: missing"},
		{"query that breaks no bound", query(marking), ""},
		{"query with a mark outside of its mask", query(Marking{3, 6, 9, 15}), "mark 0x3: want bits of the mask 0x6, without the lowest"},
		{"query with the lowest bit", query(Marking{1, 3, 9, 15}), "mark 0x1: want bits of the mask 0x3, without the lowest"},
		{"query without a mark", query(Marking{0, 3, 9, 15}), "mark 0x0: want bits of the mask 0x3, without the lowest"},
		{"query with a priority behind main", query(Marking{2, 3, 9, 32765}), "block 9, fallback 32765: want two priorities from 1 to 32764"},
		{"query with one priority", query(Marking{2, 3, 9, 9}), "block 9, fallback 9: want two priorities from 1 to 32764"},
		{"query with a mark of 33 bits", strings.Replace(query(marking), "33554432", "4294967296", 1), "mark: 4294967296 is not within 0 to 4294967295"},
		{"query with two masks", strings.Replace(query(marking), "{", `{"mask":1,`, 1), "mask: given twice"},
		{"no address", strings.Replace(good, "10.0.0.1", "10.0.0", 1), `address "10.0.0": not an address`},
		{"address with a leading zero", strings.Replace(good, "10.0.0.1", "010.0.0.1", 1), `address "010.0.0.1": not an address`},
		{"address of the other family", strings.Replace(good, "10.0.0.1", "fd00::1", 1), `address "fd00::1": not an address of family inet`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ParseRequest([]byte(tt.in))
			got := ""
			if err != nil {
				got = err.Error()
			}
			if got != tt.wantErr {
				t.Errorf("got error %q, want %q", got, tt.wantErr)
			}
		})
	}
}

// TestResponseLike: what looks like a response is told apart however broken it is, and
// nothing else is taken for one.
func TestResponseLike(t *testing.T) {
	for _, tt := range []struct {
		name, in string
		want     bool
	}{
		{"a reply", `{"version":1,"cmd":2,"table":10000,"lease_expires":4933}`, true},
		{"behind an error", `{"address":5,"cmd" : 2 }`, true},
		{"cut off", `{"version":1,"cmd":2,"table":1`, true},
		{"twice", `{"cmd":2,"cmd":0}`, true},
		{"broken, with another command", `{"cmd":0`, false},
		{"another number", `{"cmd":20}`, false},
		{"in a string", `{"tag":"\"cmd\":2,"}`, false},
		{"no JSON", `cmd 2`, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, err := ParseRequest([]byte(tt.in))
			if err == nil {
				t.Fatal("got no error")
			}
			if got := r.Cmd == Response; got != tt.want {
				t.Errorf("a response: got %v, want %v", got, tt.want)
			}
		})
	}
}

func TestCanonical(t *testing.T) {
	for _, tt := range []struct {
		name string
		in   Key
		want string // or the error
	}{
		{"IPv4", Key{Inet, "a", "10.0.0.1"}, "10.0.0.1"},
		{"IPv6", Key{Inet6, "a", "FD00:0::02"}, "fd00::2"},
		{"IPv6 that ends like IPv4", Key{Inet6, "a", "::1.2.3.4"}, "::102:304"},
		{"IPv6 with a zone", Key{Inet6, "a", "fe80::1%eth0"}, `address "fe80::1%eth0": want it without its zone, since ifname says the link`},
		{"IPv6 with a zone as inet", Key{Inet, "a", "fe80::1%eth0"}, `address "fe80::1%eth0": want it without its zone, since ifname says the link`},
		{"IPv4 with a zone", Key{Inet, "a", "10.0.0.1%eth0"}, `address "10.0.0.1%eth0": not an address`},
		{"IPv4 in IPv6", Key{Inet6, "a", "::ffff:10.0.0.1"}, `address "::ffff:10.0.0.1": this is IPv4, written as IPv6: want 10.0.0.1`},
		{"IPv4 in IPv6 as inet", Key{Inet, "a", "::ffff:a00:1"}, `address "::ffff:a00:1": this is IPv4, written as IPv6: want 10.0.0.1`},
		{"IPv4 in IPv6 with a zone", Key{Inet, "a", "::ffff:a00:1%x"}, `address "::ffff:a00:1%x": this is IPv4, written as IPv6: want 10.0.0.1`},
		{"IPv4 as inet6", Key{Inet6, "a", "10.0.0.1"}, `address "10.0.0.1": not an address of family inet6`},
		{"any text", Key{Unspec, "a", "modem 1"}, "modem 1"},
		{"IPv4 in IPv6 as text", Key{Unspec, "a", "::ffff:10.0.0.1"}, "::ffff:10.0.0.1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := tt.in.Canonical()
			text := got.Address
			if err != nil {
				text = err.Error()
			}
			if text != tt.want {
				t.Errorf("got %q, want %q", text, tt.want)
			}
		})
	}
}

func TestReplyBytes(t *testing.T) {
	for _, tt := range []struct {
		name  string
		reply Reply
		want  string
	}{
		{"lease", Reply{Table: 10000, Expires: 4933}, `{"version":1,"cmd":2,"table":10000,"lease_expires":4933}`},
		{"release", Reply{}, `{"version":1,"cmd":2,"table":0,"lease_expires":0}`},
		{"refusal", Refuse(Exhausted, `no "table"`), `{"version":1,"cmd":2,"table":0,"lease_expires":0,"code":"exhausted","error":"no \"table\""}`},
		{"holder", Reply{Table: 4294967295, Expires: 1, PID: 7}, `{"version":1,"cmd":2,"table":4294967295,"lease_expires":1,"pid":7}`},
		{"mark", Reply{Marking: marking},
			`{"version":1,"cmd":2,"table":0,"lease_expires":0,"mark":33554432,"mask":4278190080,"block":9002,"fallback":15002}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := string(tt.reply.Append(nil))
			if got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
			back, err := ParseReply([]byte(got))
			if err != nil || back != tt.reply {
				t.Errorf("read again: got %+v, %v, want %+v", back, err, tt.reply)
			}
		})
	}
}

// TestReplyFits: old clients read 254 bytes, and a message in the middle of which they
// stop is one that they drop.
func TestReplyFits(t *testing.T) {
	largest := Marking{Mark: 1<<32 - 2, Mask: 1<<32 - 1, Block: 32763, Fallback: 32764}
	for _, text := range []string{strings.Repeat("x", 1000), strings.Repeat(`"`, 1000), strings.Repeat("\x01", 1000), strings.Repeat("€", 1000)} {
		got := Reply{Table: 1<<32 - 1, Expires: expiresMax, PID: 1 << 30, Mode: "none", Code: NotServed, Error: text, Marking: largest}.Append(nil)
		if len(got) > MaxReply {
			t.Errorf("reply with %.3q...: %d bytes, want at most %d", text, len(got), MaxReply)
		}
		back, err := ParseReply(got)
		if err != nil {
			t.Fatalf("%s: %v", got, err)
		}
		if back.Error == "" || !strings.HasPrefix(text, back.Error) {
			t.Errorf("error came back as %q", back.Error)
		}
	}
}

func TestParseReply(t *testing.T) {
	for _, tt := range []struct{ name, in, wantErr string }{
		{"of the original", `{"version":1,"cmd":2,"table":10000,"lease_expires":4933}`, ""},
		{"extra keys", `{"version":1,"cmd":2,"table":1,"lease_expires":2,"x":{}}`, ""},
		{"list", `[]`, "not a JSON object"},
		{"nothing", ``, "not a JSON object"},
		{"no table", `{"version":1,"cmd":2,"lease_expires":4933}`, "table: missing"},
		{"request", `{"version":1,"cmd":0,"table":1,"lease_expires":1}`, "cmd 0: not a response"},
		{"version 2", `{"version":2,"cmd":2,"table":1,"lease_expires":1}`, "version 2: this is version 1"},
		{"negative table", `{"version":1,"cmd":2,"table":-1,"lease_expires":1}`, "table: -1 is not within 0 to 4294967295"},
		{"table too large", `{"version":1,"cmd":2,"table":4294967296,"lease_expires":1}`, "table: 4294967296 is not within 0 to 4294967295"},
		{"expiry of ages", `{"version":1,"cmd":2,"table":1,"lease_expires":9223372036854775807}`, "lease_expires: 9223372036854775807 is not within 0 to 8589934592"},
		{"negative expiry", `{"version":1,"cmd":2,"table":1,"lease_expires":-1}`, "lease_expires: -1 is not within 0 to 8589934592"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ParseReply([]byte(tt.in))
			got := ""
			if err != nil {
				got = err.Error()
			}
			if got != tt.wantErr {
				t.Errorf("got error %q, want %q", got, tt.wantErr)
			}
		})
	}
}

func FuzzParseRequest(f *testing.F) {
	f.Add([]byte(`{"address":"10.77.0.2","ifname":"ta0","tag":"op1","addr_family":2,"cmd":0,"version":1}`))
	f.Add([]byte(`{"a":[{"b":"\"}"}],"address":"fd00::2","ifname":"e\u0074h","addr_family":10,"cmd":18,"version":1}`))
	f.Add([]byte(`{`))
	f.Fuzz(func(t *testing.T, data []byte) {
		req, err := ParseRequest(data)
		if err != nil {
			return
		}
		back, err := ParseRequest(req.Append(nil))
		if err != nil || back != req {
			t.Errorf("%+v read again: %+v, %v", req, back, err)
		}
	})
}

func FuzzParseReply(f *testing.F) {
	f.Add([]byte(`{"version":1,"cmd":2,"table":10000,"lease_expires":4933}`))
	f.Add([]byte(`{"version":1,"cmd":2,"table":0,"lease_expires":0,"code":"exhausted","error":"no table is free"}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		reply, err := ParseReply(data)
		if err != nil {
			return
		}
		out := reply.Append(nil)
		if len(reply.Code) < 20 && len(out) > MaxReply {
			t.Errorf("%+v: %d bytes", reply, len(out))
		}
	})
}

func BenchmarkParseRequest(b *testing.B) {
	data := []byte(`{"address":"10.77.0.2","ifname":"ta0","tag":"op1","addr_family":2,"cmd":0,"version":1}`)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ParseRequest(data); err != nil {
			b.Fatal(err)
		}
	}
}
