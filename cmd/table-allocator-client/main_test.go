package main

import (
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"github.com/table-allocator/table-allocator/internal/cli"
)

// called runs a command line, which has to end without doing anything.
func called(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	catch := func(file **os.File) func() string {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		before := *file
		*file = w
		text := make(chan string)
		go func() {
			all, err := io.ReadAll(r)
			if err != nil {
				t.Error(err)
			}
			text <- string(all)
		}()
		return func() string {
			*file = before
			w.Close()
			defer r.Close()
			return <-text
		}
	}
	out, err := catch(&os.Stdout), catch(&os.Stderr)
	code = run("table-allocator-client", args)
	cli.Flush()
	return code, out(), err()
}

func allCommands() []command { return append(slices.Clone(commands), original) }

// Every command takes the options that all share, in every spelling.
func TestSharedFlags(t *testing.T) {
	for _, c := range allCommands() {
		for _, args := range [][]string{
			{"-d", "tas2", "--server-user", "root", "--server_user=4711", "--debug", "-i", "wan0"},
			{"--destination=tas2", "--server_user", "root", "--server-user", "4711", "--debug", "--ifname", "wan0"},
		} {
			f := newFlags(c.name)
			c.declare(f)
			if err := f.parse(args); err != nil {
				t.Errorf("%s %q: %v", c.name, args, err)
				continue
			}
			if f.server != "tas2" || !slices.Equal(f.uids, []uint32{0, 4711}) || !f.log.Debug {
				t.Errorf("%s %q: got %+v", c.name, args, f)
			}
			if got := f.Lookup("ifname"); got == nil || !got.Changed || got.Shorthand != "i" {
				t.Errorf("%s: --ifname is %+v", c.name, got)
			}
		}
		for _, args := range [][]string{
			{"-d", strings.Repeat("d", 107)}, {"--server-user", "no-such-user"}, {"--server-user", "65534"}, {"--debug=x"},
		} {
			f := newFlags(c.name)
			c.declare(f)
			if err := f.parse(args); err == nil || !strings.Contains(err.Error(), args[0]) && !strings.Contains(err.Error(), "--de") {
				t.Errorf("%s %q: got %v", c.name, args, err)
			}
		}
	}
}

// Wrong usage has an exit code of its own, but in the original's form and in run; one line on standard
// error says what is wrong, and nothing goes to standard output.
func TestExitCodes(t *testing.T) {
	const bind = " -i wan0"
	for _, tt := range []struct {
		args string
		code int
		say  string
	}{
		{"", 1, "tactl, or status, shows"},
		{"-a 10.77.0.2", 1, "-a ADDRESS and -i IFNAME are needed"},
		{"-4 --frobnicate", 1, "--frobnicate (see -4 --help)"},
		{"-4 -a 10.77.0.2 -n 24 -i wan0 dsl", 1, `"dsl"`},
		{"-4 -a 10.77.0.2 -n 24 -i wan0 -d " + strings.Repeat("d", 107), 1, "--destination"},
		{"stauts", 1, `"stauts" is not a command: did you mean status? (commands: watch status`},
		{"watch --frobnicate", 2, "--frobnicate (see watch --help)"},
		{"watch extra", 2, `unexpected argument "extra"`},
		{"watch -4 -6", 2, "-4 and -6 exclude each other"},
		{"watch --routes x", 2, "--routes x: want none, move or copy"},
		{"watch --on_loss x", 2, "--on-loss x: want fallback or block"},
		{"watch -i [a", 2, "not a pattern"},
		{"watch --exclude [a", 2, "exclude"},
		{"watch -t " + strings.Repeat("x", 128), 2, "tag: 128 bytes"},
		{"watch -c /nowhere/watch.json", 78, "/nowhere/watch.json"},
		{"watch --check /nowhere/watch.json", 78, "/nowhere/watch.json"},
		{"status extra", 2, "extra: no link"},
		{"status -i [a", 2, "not a pattern"},
		{"status -c /nowhere/watch.json", 1, "/nowhere/watch.json"},
		{"frobnicate", 1, `"frobnicate" is not a command (commands: watch`},
		{"uplinks use", 2, "want IFNAME, use IFNAME|auto, probe IFNAME or none"}, {"uplinks wan0 wan1", 2, "unexpected argument \"wan1\""},
		{"uplinks --run wan0", 2, "unexpected argument"}, {"uplinks -i wan0 wan1", 2, "unexpected argument"},
		{"lo", 1, "did you mean status lo?"}, {"192.0.2.2", 1, "did you mean status 192.0.2.2?"},
		{"help stauts", 1, "did you mean status"},
		{"version 2", 2, `"2"`},
		{"-a 10.77.0.2/24 -n 16 -i wan0", 1, "two prefix lengths"},
		{"-a 10.77.0.2 --unspec -4 -i wan0", 1, "--unspec excludes"},
		{"run true", 125, "a COMMAND is needed behind the link (see run --help)"},
		{"run", 125, "a link and a COMMAND are needed (see run --help)"},
		{"run" + bind, 125, "COMMAND"},
		{"run wan0 --frobnicate true", 125, "--frobnicate"},
		{"run -i ../x true", 125, "../x"},
		{"run --on-loss cry -i wan0 true", 125, "--on-loss cry"},
		{"run --wait -1 -i wan0 true", 125, "--wait -1"},
		{"run --wait 99999999999 -i wan0 true", 125, "--wait 99999999999"},
		{"attach 1", 2, "--ifname"},
		{"attach" + bind, 2, "PID"},
		{"attach init" + bind, 2, "init"},
		{"detach 0", 2, `"0"`},
		{"detach", 2, "PID"},
		{"bound wan0 wan1", 2, `"wan1"`},
		{"bind" + bind, 2, "--uid"},
		{"bind --uid 0", 2, "--ifname"},
		{"bind --uid 0 --cgroup" + bind, 2, "one of"},
		{"bind --uid no-such-user" + bind, 2, "no-such-user"},
		{"bind --proto carrier-pigeon" + bind, 2, "carrier-pigeon"},
		{"bind --dport 443" + bind, 2, "--proto"},
		{"bind --proto tcp --dport http" + bind, 2, "http"},
		{"bind --proto tcp --dport 0" + bind, 2, "--dport 0"},
		{"bind --proto tcp --dport 9-8" + bind, 2, "9-8"},
		{"bind --all" + bind, 2, "--all"},
		{"unbind --all" + bind, 2, "--all"},
		{"unbind --all --uid 0", 2, "--all"},
		{"unbind" + bind, 2, "--uid"},
	} {
		code, stdout, stderr := called(t, strings.Fields(tt.args)...)
		if code != tt.code || stdout != "" || !strings.Contains(stderr, tt.say) || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%q: got %d, %q, %q, want %d and one line with %q", tt.args, code, stdout, stderr, tt.code, tt.say)
		}
	}
}

// The help of a command fits a screen and tells every option; so does that without a command and options, with the commands.
func TestHelp(t *testing.T) {
	for _, c := range allCommands() {
		f := newFlags(c.name)
		c.declare(f)
		calls := []string{"-h", "--help", "-i wan0 --help"}
		if c.name == "" {
			calls = []string{"-4 -h", "-4 --help", "-i wan0 --help"}
		}
		for _, args := range calls {
			code, help, stderr := called(t, strings.Fields(c.name+" "+args)...)
			if code != 0 || stderr != "" || !strings.HasPrefix(help, "Usage: table-allocator-client ") {
				t.Errorf("%s %s: got %d, %q, %q", c.name, args, code, help, stderr)
			}
			lines := strings.Split(strings.TrimSuffix(help, "\n"), "\n")
			if c.name != "" && len(lines) > 24 {
				t.Errorf("%s: %d lines", c.name, len(lines))
			}
			for _, line := range lines {
				if len(line) > screen {
					t.Errorf("%s: %d columns: %s", c.name, len(line), line)
				}
			}
			f.VisitAll(func(option *pflag.Flag) {
				long, short := " --"+option.Name+" ", " -"+option.Shorthand+","
				if option.Name == "inet" || option.Name == "inet6" {
					long, short = " -"+option.Shorthand+" ", ""
				}
				if spaced := strings.ReplaceAll(help, "\n", " \n"); !strings.Contains(spaced, long) || option.Shorthand != "" && !strings.Contains(spaced, short) {
					t.Errorf("%s --help does not tell %s", c.name, long)
				}
			})
		}
	}
	_, help, _ := called(t, "--help")
	for _, word := range []string{"help", "help help"} {
		if code, same, _ := called(t, strings.Fields(word)...); code != 0 || same != help {
			t.Errorf("%s: got %d and\n%s", word, code, same)
		}
	}
	lines := strings.Split(help, "\n")
	for at, line := range lines[3 : 3+len(commands)] {
		if !strings.HasPrefix(line, "  "+commands[at].name+" ") {
			t.Errorf("line %d of --help: %q, want the command %s", at+4, line, commands[at].name)
		}
	}
	if len(lines) > 24 || slices.ContainsFunc(lines, func(line string) bool { return len(line) > screen }) {
		t.Errorf("--help: %d lines: %s", len(lines), help)
	}
	if code, text, _ := called(t, "-h"); code != 0 || text != help {
		t.Errorf("-h: got %d and\n%s", code, text)
	}
	if code, out, stderr := called(t, "--version"); code != 0 || strings.Count(out, "\n") != 1 || stderr != "" {
		t.Errorf("--version: got %d, %q, %q", code, out, stderr)
	}
}

func TestParseUIDs(t *testing.T) {
	for _, tt := range []struct {
		text        string
		first, last uint32
	}{
		{"root", 0, 0}, {"1000", 1000, 1000}, {"1000-1999", 1000, 1999}, {"root-4711", 0, 4711}, {"www-data", 33, 33}, {"root-www-data", 0, 33}, {"www-data-4711", 33, 4711},
	} {
		got, err := parseUIDs(tt.text)
		if err != nil || !got.Set || got.First != tt.first || got.Last != tt.last {
			t.Errorf("%s: got %+v, %v", tt.text, got, err)
		}
	}
	for _, text := range []string{"", "-", "no-such-user", "1-", "-1", "1--2", "1-2-3"} {
		if got, err := parseUIDs(text); err == nil {
			t.Errorf("%q: got %+v", text, got)
		}
	}
}
