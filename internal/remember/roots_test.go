package remember

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestRootsFile: a file is used by the path that was checked, and not if others can write it or put another one there.
func TestRootsFile(t *testing.T) {
	dir := t.TempDir()
	file, link := filepath.Join(dir, "sub", "file"), filepath.Join(dir, "link")
	if err := os.Mkdir(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name         string
		dirMode      os.FileMode
		fileMode     os.FileMode
		dirUID, fUID int
		why          string
	}{
		{"root's", 0o755, 0o644, 0, 0, ""},
		{"below a directory like /tmp", 0o777 | os.ModeSticky, 0o644, 0, 0, ""},
		{"a file for all", 0o755, 0o646, 0, 0, "file is writable for others"},
		{"a directory for all", 0o777, 0o644, 0, 0, "sub is writable for others"},
		{"a user's file", 0o755, 0o644, 0, 4711, "file is not root's"},
		{"a user's directory", 0o755, 0o644, 4711, 0, "sub is not root's"},
		{"a user's directory like /tmp", 0o777 | os.ModeSticky, 0o644, 4711, 0, "sub is not root's"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for path, of := range map[string]struct {
				uid  int
				mode os.FileMode
			}{file: {tt.fUID, tt.fileMode}, filepath.Dir(file): {tt.dirUID, tt.dirMode}} {
				if err := os.Chown(path, of.uid, 0); err != nil {
					t.Fatal(err)
				}
				if err := os.Chmod(path, of.mode); err != nil {
					t.Fatal(err)
				}
			}
			got, err := RootsFile(link)
			switch {
			case tt.why == "" && (err != nil || got != file):
				t.Errorf("got %q, %v, want %q", got, err, file)
			case tt.why != "" && (err == nil || !strings.Contains(err.Error(), tt.why)):
				t.Errorf("got %q, %v, want an error that has %q", got, err, tt.why)
			}
		})
	}
}
