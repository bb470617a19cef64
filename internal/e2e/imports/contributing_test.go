package imports_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const internal = "../../../internal"

// TestContributing: CONTRIBUTING.md lists every package, and what it says of the code is there: files, and names of packages.
func TestContributing(t *testing.T) {
	data, err := os.ReadFile("../../../CONTRIBUTING.md")
	if err != nil {
		t.Fatal(err)
	}
	text := string(data)
	parts, _, _ := strings.Cut(text, "Imports go down this list")
	packages, err := os.ReadDir(internal)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range packages {
		if !regexp.MustCompile(`(?m)^ {4,}(.*  )?` + p.Name() + `\b`).MatchString(parts) {
			t.Errorf("the list of parts has no %s", p.Name())
		}
	}
	for _, m := range regexp.MustCompile("`([a-z]+)[./]([A-Za-z_]+)(\\.go)?`").FindAllStringSubmatch(text, -1) {
		quoted, dir, name := strings.Trim(m[0], "`"), m[1], m[2]
		if m[3] != "" {
			if _, err := os.Stat(filepath.Join(internal, dir, name+".go")); err != nil {
				t.Error(err)
			}
		} else if dir != "loop" && !strings.Contains(quoted, "/") && !declares(t, filepath.Join(internal, dir), name) {
			t.Errorf("%s is not there", quoted)
		}
	}
}

// declares reports whether a package declares a name.
func declares(t *testing.T, dir, name string) (found bool) {
	t.Helper()
	declaration := regexp.MustCompile(`(?m)^(func|type|var|const|func \([^)]*\)|\t)\s*` + name + `\b`)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		data, err := os.ReadFile(path)
		found = found || declaration.Match(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}
