// Package e2e runs the real commands against the real kernel, in private network
// namespaces inside a sandbox.
package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

func TestMain(m *testing.M) {
	if !isProbe() {
		nettest.Main(m, "sqlite3", "strace")
	}
}

const (
	serverBin = "table-allocator-server"
	clientBin = "table-allocator-client"
	// patience is how long an event may take before a test says that it does not come. It
	// is no measure of anything: the machine may be busy.
	patience = 30 * time.Second
)

// bin is the path of one of our commands, built with the race detector.
func bin(t *testing.T, name string) string {
	t.Helper()
	dir, err := binDir()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, name)
}

var binDir = sync.OnceValues(func() (string, error) {
	if dir := os.Getenv("TABLE_ALLOCATOR_BIN"); dir != "" {
		return dir, nil
	}
	dir, err := os.MkdirTemp("", "bin")
	if err != nil {
		return "", err
	}
	out, err := exec.Command("go", "build", "-race", "-o", dir+"/", "../../cmd/...").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build the commands: %w\n%s", err, out)
	}
	return dir, nil
})

func unordered(got, want []string) string {
	count := make(map[string]int)
	for _, s := range want {
		count[s]++
	}
	for _, s := range got {
		count[s]--
	}
	diff := ""
	for s, n := range count {
		switch {
		case n > 0:
			diff += fmt.Sprintf("\n  missing: %s", s)
		case n < 0:
			diff += fmt.Sprintf("\n  too many: %s", s)
		}
	}
	return diff
}

// eventually waits until check returns nil.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited %v until %s: %v", patience, what, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// fullSize tells whether tests run at the size that takes long.
func fullSize() bool { return os.Getenv("SOAK") == "full" }

func unorderedError(got, want []string) error {
	if diff := unordered(got, want); diff != "" {
		return errors.New(diff)
	}
	return nil
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
