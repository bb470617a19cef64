package main

import (
	"reflect"
	"testing"
)

func TestPrintable(t *testing.T) {
	type inner struct{ Name string }
	type outer struct {
		Text   string
		Number int
		All    []inner
		One    *inner
		None   *inner
		hidden string
	}
	shared := inner{"a\nb"}
	before := outer{"\x1b[31m", 7, []inner{{"wän0"}, {"\xff"}}, &shared, nil, "\n"}
	got := printable(before)
	want := outer{`"\x1b[31m"`, 7, []inner{{"wän0"}, {`"\xff"`}}, &inner{`"a\nb"`}, nil, "\n"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if before.All[1].Name != "\xff" || shared.Name != "a\nb" {
		t.Errorf("the value of the caller has changed: %+v, %q", before.All, shared.Name)
	}
}

func TestText(t *testing.T) {
	for _, tt := range []struct{ in, text, message string }{
		{"", "", ""},
		{`a "b" \c`, `a "b" \c`, `a "b" \c`},
		{"a\x1b[2Jb", `"a\x1b[2Jb"`, `a\x1b[2Jb`},
		{"\u202eabc", `"\u202eabc"`, `\u202eabc`},
		{"\u009b31m", `"\u009b31m"`, `\u009b31m`},
		{"a\xffb \"c\"", `"a\xffb \"c\""`, `a\xffb "c"`},
		{"one\ntwo\r", `"one\ntwo\r"`, "one\ntwo\\r"},
	} {
		if got := quoted(tt.in); got != tt.text {
			t.Errorf("quoted(%q) = %s, want %s", tt.in, got, tt.text)
		}
		if got := message(tt.in); got != tt.message {
			t.Errorf("message(%q) = %s, want %s", tt.in, got, tt.message)
		}
	}
}
