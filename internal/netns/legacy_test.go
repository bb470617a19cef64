package netns

import (
	"cmp"
	"os"
	"path/filepath"
	"strings"
	"testing"
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
		if err := changeLegacies("tav1", false); err != nil { // what cannot be changed is no error
			t.Error(err)
		}
	}
}
