package main

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestInit: what a package makes before main, each of many clients keeps for as long as it runs, whatever its command
// needs of it. A regular expression may take 50 KiB.
func TestInit(t *testing.T) {
	const most = 16 << 10
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), "GODEBUG=inittrace=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	packages := 0
	for line := range strings.Lines(string(out)) {
		var name, at, took string
		var bytes int
		// init internal/bytealg @0.008 ms, 0 ms clock, 0 bytes, 0 allocs
		if n, _ := fmt.Sscanf(line, "init %s @%s ms, %s ms clock, %d bytes", &name, &at, &took, &bytes); n < 4 {
			continue
		}
		if !strings.Contains(name, "/table-allocator/") {
			continue
		}
		packages++
		if bytes > most {
			t.Errorf("%s takes %d bytes before main, more than %d: make it where it is needed first", name, bytes, most)
		}
	}
	if packages == 0 {
		t.Errorf("no package of ours in\n%s", out)
	}
}
