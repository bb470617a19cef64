package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
)

// TestDemo: make demo works as root and, through a user namespace, as somebody else.
func TestDemo(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	demo := filepath.Join(dir, "demo")
	if out, err := exec.Command("go", "build", "-o", demo, "../demo").CombinedOutput(); err != nil {
		t.Fatalf("build the demo: %v\n%s", err, out)
	}
	commands, err := binDir()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(commands, filepath.Join(dir, "bin")); err != nil {
		t.Fatal(err)
	}
	for up := dir; up != "/tmp"; up = filepath.Dir(up) {
		if err := os.Chmod(up, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		name    string
		command []string
	}{
		{"root", []string{demo}},
		// A user namespace may mount /proc only if it can see a whole one, as on a host; that of
		// the sandbox is partly read-only.
		{"user", []string{"unshare", "--mount", "sh", "-c",
			`mount -t proc proc /proc && exec setpriv --reuid 12345 --regid 12345 --clear-groups "$0"`, demo}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cmd := exec.Command(tt.command[0], tt.command[1:]...)
			cmd.Dir = dir
			cmd.Env = append(os.Environ(), "HOME=/nonexistent", "TMPDIR=/tmp")
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			for _, want := range []string{
				`(?m)^10000:\s+from 192\.0\.2\.2 lookup 10000 proto 116`,
				`(?m)^20000:\s+from all to 203\.0\.113\.0/24 lookup 10001 proto 116`,
				`(?m)^91000:\s+from all iif lo lookup 10000 proto 116`,
				`(?m)^10000\s+inet\s+wan0\s+192\.0\.2\.2\s+cable\s+0\s`,
				`3 packets from 192\.0\.2\.2 to 198\.51\.100\.1: 3 left by wan0 through 192\.0\.2\.1; 198\.51\.100\.1 saw them come from 192\.0\.2\.2`,
				`3 packets from 203\.0\.113\.2 to 198\.51\.100\.1: 3 left by wan1 through 203\.0\.113\.1; 198\.51\.100\.1 saw them come from 203\.0\.113\.2`,
				// What is left when one address is gone.
				`(?s)ip address del.*10000:\s+from 203\.0\.113\.2 lookup 10001 proto 116.*10001\s+inet\s+wan1.*3 packets from 203\.0\.113\.2`,
			} {
				if !regexp.MustCompile(want).Match(out) {
					t.Errorf("the demo does not show %s", want)
				}
			}
			if regexp.MustCompile(`(?s)ip address del.*192\.0\.2\.2 lookup`).Match(out) {
				t.Error("rules of the address that went are left")
			}
			if t.Failed() {
				t.Logf("it showed:\n%s", out)
			}
		})
	}
}
