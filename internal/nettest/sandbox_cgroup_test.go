package nettest

import (
	"path/filepath"
	"slices"
	"testing"
)

// The cgroups of sandboxes that were killed are swept, and those of others never, also between their making and the
// first process in them.
func TestSweepCgroups(t *testing.T) {
	parent := Cgroup(t)
	live, err := lockedCgroup(parent)
	if err != nil {
		t.Fatal(err)
	}
	dead, err := lockedCgroup(parent)
	if err != nil {
		t.Fatal(err)
	}
	dead.Close()
	sweepCgroups(parent)
	if left, _ := filepath.Glob(filepath.Join(parent, cgroupPrefix+"*")); !slices.Equal(left, []string{live.Name()}) {
		t.Errorf("left are %q, want %q", left, live.Name())
	}
	live.Close()
}
