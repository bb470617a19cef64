package netns

import (
	"cmp"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// TestUnsure: a table of iptables-legacy whose program is not installed may drop what namespaces send, and nobody can tell.
func TestUnsure(t *testing.T) {
	names := filepath.Join(t.TempDir(), "ip_tables_names")
	before := legacies
	legacies = map[string]string{"nosuch-legacy": names}
	t.Cleanup(func() { legacies = before })
	for _, tt := range []struct {
		tables string
		state  Config
		want   string
	}{
		{"nat\nfilter\n", Config{IPv6: true}, "there is a table filter of nosuch-legacy, which is not installed here"},
		{"nat\nfilter\n", Config{IPv6: true, Firewall: FirewallNone}, ""},
		{"nat\nfilter\n", Config{IPv6: true, Wiring: WiringMacvlan}, ""},
		{"nat\nfilter\n", Config{}, ""}, // it is no table of IPv4
		{"nat\n", Config{IPv6: true}, ""},
	} {
		if err := os.WriteFile(names, []byte(tt.tables), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := unsureOf(State{Config: tt.state}); (got == "") != (tt.want == "") || !strings.Contains(got, tt.want) {
			t.Errorf("%q, %+v: %q", tt.tables, tt.state, got)
		}
		left := leftOf(State{Config: tt.state})
		if left != "" {
			t.Errorf("%+v may leave rules that it never had: %q", tt.state, left)
		}
		tt.state.Name, tt.state.Firewall = "work", cmp.Or(tt.state.Firewall, FirewallAccept)
		left = leftOf(State{Config: tt.state, Number: 7})
		if (left == "") != (tt.want == "") || left != "" && !(strings.Contains(left, "namespace work is deleted") && strings.Contains(left, "its link, tav7") && strings.Contains(left, "nosuch-legacy -S FORWARD")) {
			t.Errorf("%q, %+v leaves: %q", tt.tables, tt.state, left)
		}
		if err := (&Host{legacy: new(legacyReader)}).changeLegacies("tav1", false); err != nil { // what cannot be changed is no error
			t.Error(err)
		}
	}
}

// TestLegacyRate: the service executes the program of such a table once in a while, and not at each look, also where it may not
// execute it; a command does each time. What this process changes there is read again.
func TestLegacyRate(t *testing.T) {
	const program = "/usr/local/sbin/counted-legacy" // which says of itself that it drops, and has no rules of ours to delete
	calls := filepath.Join(t.TempDir(), "calls")
	names := filepath.Join(t.TempDir(), "ip_tables_names")
	before := legacies
	legacies = map[string]string{"counted-legacy": names}
	t.Cleanup(func() {
		legacies = before
		if err := os.Remove(program); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(names, []byte("filter\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	reads := func(do func()) int {
		t.Helper()
		if err := os.WriteFile(calls, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		do()
		text, err := os.ReadFile(calls)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(text), "-w -S FORWARD\n")
	}
	work := State{Config: Config{Name: "work", IPv6: true}}
	accepting := work
	accepting.Firewall = FirewallAccept
	for _, exit := range []string{"0", "4"} { // 4: it may not
		script := "#!/bin/sh\necho \"$*\" >>" + calls + "\n[ \"$2\" = -C ] && exit 1\necho '-P FORWARD DROP'\nexit " + exit + "\n"
		if err := nettest.WriteExecutable(program, []byte(script)); err != nil {
			t.Fatal(err)
		}
		h := &Host{legacy: &legacyReader{keep: time.Hour}}
		look := func(s State) func() {
			return func() {
				for _, link := range []string{"tav1", "tav2", "tav1", "tav2"} {
					h.legacyDrops(s, link)
				}
			}
		}
		if n := reads(look(work)); n != 1 {
			t.Errorf("exit %s: four looks of the service read it %d times", exit, n)
		}
		h.legacy.keep = 0
		if n := reads(look(work)); n != 4 {
			t.Errorf("exit %s: four looks of commands read it %d times", exit, n)
		}
		h.legacy.keep = time.Hour
		n := reads(func() { _ = h.changeLegacies("tav1", true); look(accepting)() }) // the error is that of the exit code
		if want := map[string]int{"0": 1, "4": 0}[exit]; n != want {                 // what was changed is read again, and an error is not
			t.Errorf("exit %s: looks after a change read it %d times, want %d", exit, n, want)
		}
	}
}
