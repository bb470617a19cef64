package inspect

import "testing"

// TestUnsure: what nobody can tell of a network namespace is a note, and what it misses an error.
func TestUnsure(t *testing.T) {
	p := &patient{question: Question{Namespaces: func() []Namespace {
		return []Namespace{{Name: "fine", Ifname: "wan1"}, {Name: "bad", Ifname: "wan1", Missing: "a lease"}, {Name: "dark", Ifname: "wan1", Unsure: "a way"}}
	}}}
	want := map[string]string{"namespaces": "the network namespace bad on wan1 misses a lease", "namespace-unsure": "the network namespace dark on wan1 may miss a way"}
	severities := map[string]Severity{"namespaces": Error, "namespace-unsure": Note}
	found := 0
	for _, c := range Checks {
		if want[c.Name] == "" {
			continue
		}
		found++
		if got := c.look(p); len(got) != 1 || got[0].what != want[c.Name] || c.Severity != severities[c.Name] {
			t.Errorf("%s is %s: %+v", c.Name, c.Severity, got)
		}
	}
	if found != len(want) {
		t.Errorf("%d checks, want %d", found, len(want))
	}
}
