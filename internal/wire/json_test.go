package wire

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

// byEncodingJSON is what members should return, by the standard library.
func byEncodingJSON(text string) (all []pair, ok bool) {
	if !utf8.ValidString(text) || !json.Valid([]byte(text)) || strings.TrimLeft(text, " \t\r\n")[0] != '{' {
		return nil, false
	}
	d := json.NewDecoder(strings.NewReader(text))
	next := func(v any) {
		if err := d.Decode(v); err != nil {
			panic(err) // it was valid
		}
	}
	depth := 0
	for d := json.NewDecoder(strings.NewReader(text)); ; {
		t, err := d.Token()
		if err != nil {
			break
		}
		switch t {
		case json.Delim('{'), json.Delim('['):
			if depth++; depth > maxNesting {
				return nil, false
			}
		case json.Delim('}'), json.Delim(']'):
			depth--
		}
	}
	if _, err := d.Token(); err != nil {
		panic(err)
	}
	for d.More() {
		from := d.InputOffset()
		if _, err := d.Token(); err != nil {
			panic(err)
		}
		// What is between the quotes, as it stands there.
		key := strings.TrimLeft(text[from:d.InputOffset()], ", \t\r\n")
		var value json.RawMessage
		next(&value)
		all = append(all, pair{key[1 : len(key)-1], string(value)})
	}
	return all, true
}

func FuzzMembers(f *testing.F) {
	for _, text := range []string{
		`{"address":"10.77.0.2","ifname":"ta0","tag":"op1","addr_family":2,"cmd":0,"version":1}`,
		` { "a" : [ { } , -0.5e+3 , "\u00e9\"" ] , "a" : null } `,
		`{"a":{"b":[1,"}",null]},"c":-1.5e3,"d":"\"","e":true,"\u0061":false}`,
		`{"":""}`, `{}`, `{,}`, `{"a":1,}`, `{"a"}`, `{"a":}`, `{"a":01}`, `{"a":-}`, `{"a":1.}`, `{"a":1e}`, `{"a":.5}`, `{"a":+1}`,
		`{"a":"\x"}`, `{"a":"\u12g4"}`, `{"a":"\ud800"}`, "{\"a\":\"\x01\"}", "{\"a\":\"\xff\"}", "{\"a\xff\":1}", "{\"a\":\"é\U0001f600\"}", "\ufeff{}",
		`{"a":tru}`, `{"a":nulll}`, `{"a":1}}`, `{"a":1} x`, "{\"a\":1}\x00", `{"a":[1 2]}`, `{"a":{1:2}}`, `{'a':1}`, `{a:1}`, `{"a":NaN}`, `{"a":"`, `{"a":"\`, `{"a":"\u00`,
		`[{}]`, `"{}"`, `null`, ``, ` `,
		`{"a":` + strings.Repeat("[", 31) + strings.Repeat("]", 31) + `}`,
		`{"a":` + strings.Repeat("[", 32) + strings.Repeat("]", 32) + `}`,
		`{"a":` + strings.Repeat(`{"b":`, 32) + `1` + strings.Repeat("}", 32) + `}`,
		`{"a":` + strings.Repeat("[", 40) + `}`,
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		text := string(data)
		got, err := members(text, make([]pair, 0, usualMembers))
		want, ok := byEncodingJSON(text)
		if (err == nil) != ok || !slices.Equal(got, want) {
			t.Errorf("%q: got %q, %v, want %q, %v", text, got, err, want, ok)
		}
	})
}

// TestMembersTooDeep: what is too deep is told apart from what is no JSON.
func TestMembersTooDeep(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"deep", `{"a":` + strings.Repeat("[", 32) + strings.Repeat("]", 32) + `}`, "nested deeper than 32"},
		{"deep and broken", `{"a":` + strings.Repeat("[", 32) + strings.Repeat("]", 32) + `}x`, errNotObject.Error()},
		{"deep and not UTF-8", `{"a":` + strings.Repeat("[", 32) + strings.Repeat("]", 32) + ",\"b\":\"\xff\"}", errNotObject.Error()},
		{"deeper than encoding/json reads", `{"a":` + strings.Repeat("[", 10_001) + strings.Repeat("]", 10_001) + `}`, errNotObject.Error()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := members(tt.text, nil); err == nil || err.Error() != tt.want {
				t.Errorf("got %v, want %s", err, tt.want)
			}
		})
	}
}

// TestParseRequestAllocates: a request takes no memory besides its text.
func TestParseRequestAllocates(t *testing.T) {
	const text = `{"address":"10.77.0.2","ifname":"ta0","tag":"op1","addr_family":2,"cmd":0,"version":1}`
	got := testing.AllocsPerRun(100, func() {
		if _, err := ParseRequestText(text); err != nil {
			t.Fatal(err)
		}
	})
	if got != 0 {
		t.Errorf("got %v allocations, want none", got)
	}
}
