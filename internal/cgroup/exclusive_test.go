package cgroup

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// TestExclusive: a program that others attached alone in a cgroup above is named, with the cgroup. What cannot do without ours
// is refused, and the rest said.
func TestExclusive(t *testing.T) {
	c := testCgroups(t)
	for _, h := range testHooks(t, testMark) {
		dir := c.file("/" + h.spec.Name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		open, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer open.Close()
		other, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "other", Type: h.spec.Type, AttachType: h.spec.AttachType, Instructions: verdict(allow), License: "MIT"})
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		if err := link.RawAttachProgram(link.RawAttachProgramOptions{Target: int(open.Fd()), Program: other, Attach: h.spec.AttachType}); err != nil {
			t.Fatal(err)
		}
		missing, err := c.place(-1, "/"+h.spec.Name+"/ta-wan0", testMark)
		if h.needed == nil && (err != nil || len(missing) != 1) {
			t.Errorf("%s: %v, %v", h.spec.Name, missing, err)
			continue
		}
		if h.needed == nil {
			err = missing[0].Err
		}
		if !errors.Is(err, errExclusive) || !strings.Contains(err.Error(), `"other"`) || !strings.Contains(err.Error(), dir) {
			t.Errorf("%s: %v", h.spec.Name, err)
		}
	}
}
