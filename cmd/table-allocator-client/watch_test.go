package main

import (
	"strings"
	"testing"
)

func TestHostOptions(t *testing.T) {
	for _, tt := range []struct {
		args string
		want string // of the error; "": none
	}{
		{"", ""},
		{"--ifname wan*,lte* --exclude wan9 -4 --routes move --on_loss block --specific-first -t x", ""},
		{"-4 -6", "-4 and -6 exclude each other"},
		{"--routes x", `routes "x"`},
		{"--on-loss x", `on-loss "x"`},
		{"--ifname [a", "not a pattern"},
		{"--exclude [a", "exclude"},
		{"-c /nowhere", "/nowhere"},
		{"extra", `unexpected argument "extra"`},
		{"--nothing", "unknown flag"},
		{"--server-user nobody-of-that-name", "no such user"},
		{"-t " + strings.Repeat("x", 128), "tag: 128 bytes"},
	} {
		err := newHostOptions("watch").parse(strings.Fields(tt.args))
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%q: got %v, want %s", tt.args, err, tt.want)
		}
	}
	for _, text := range []string{watchUsage, statusUsage} {
		if n := strings.Count(text, "\n"); n > 24 {
			t.Errorf("%d lines of help", n)
		}
		for line := range strings.Lines(text) {
			if len(strings.TrimSuffix(line, "\n")) > screen {
				t.Errorf("%d columns: %s", len(line), line)
			}
		}
	}
}
