package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// fakeGo writes a program go, in a directory of its own, that has a version and downloads a toolchain
// with a hash.
func fakeGo(t *testing.T, version, sum string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for _, name := range []string{"go", "gofmt"} {
		script := fmt.Sprintf(`#!/bin/sh
case "$1 $2" in
"env GOVERSION") echo "go%s X:some" ;;
"env GOARCH") echo amd64 ;;
"mod download")
	mkdir -p "$GOMODCACHE/t/bin" "$GOMODCACHE/t/pkg/tool/linux" "$GOMODCACHE/t/src/cmd"
	echo "#!/bin/sh" >"$GOMODCACHE/t/bin/go"
	touch "$GOMODCACHE/t/bin/gofmt" "$GOMODCACHE/t/pkg/tool/linux/link" "$GOMODCACHE/t/src/_go.mod" "$GOMODCACHE/t/src/cmd/_go.mod"
	printf '{\n\t"Dir": "%%s",\n\t"Sum": "%s"\n}\n' "$GOMODCACHE/t" ;;
esac
`, version, sum)
		if err := nettest.WriteExecutable(filepath.Join(dir, name), []byte(script)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// findGo runs packaging/find-go in a copy of the module with this PATH. It returns where the link to go
// leads, "" without one.
func findGo(t *testing.T, path ...string) (link, stderr string, err error) {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"packaging/find-go", "go.mod"} {
		text, err := os.ReadFile("../../" + name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := nettest.WriteExecutable(filepath.Join(dir, name), text); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("unshare", "--mount", "sh", "-c", `[ ! -d /usr/local/go ] || mount -t tmpfs none /usr/local/go
		[ ! -e /usr/bin/go ] || mount --bind /dev/null /usr/bin/go # as no program
		exec "$0"`,
		filepath.Join(dir, "packaging/find-go"))
	cmd.Env = []string{"PATH=" + strings.Join(append(path, "/usr/bin", "/bin"), ":")}
	var errs strings.Builder
	cmd.Stderr = &errs
	err = cmd.Run()
	link, _ = os.Readlink(filepath.Join(dir, ".cache/go/go")) // there may be none
	return strings.TrimPrefix(link, dir+"/"), errs.String(), err
}

// goVersion is what go.mod asks for.
func goVersion(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "\ngo ")
	version, _, _ := strings.Cut(rest, "\n")
	return version
}

// TestFindGo: of several Go's the first that suffices is used, then one that downloads its successor
// itself, then one that can download a module.
func TestFindGo(t *testing.T) {
	t.Parallel()
	script, err := os.ReadFile("../../packaging/find-go")
	if err != nil {
		t.Fatal(err)
	}
	sum := ""
	for _, arch := range []string{"amd64", "arm64"} {
		_, rest, ok := strings.Cut(string(script), "["+goVersion(t)+"-"+arch+"]=")
		if !ok {
			t.Errorf("packaging/find-go has no hash of Go %s for %s", goVersion(t), arch)
		}
		if arch == "amd64" {
			sum, _, _ = strings.Cut(rest, "\n")
		}
	}
	enough, newer, auto, old, forged := fakeGo(t, goVersion(t), ""), fakeGo(t, "1.99rc1", ""), fakeGo(t, "1.24.4", ""), fakeGo(t, "1.19.8", sum), fakeGo(t, "1.19.8", "h1:other")
	for _, tt := range []struct {
		name, want, stderr string
		path               []string
	}{
		{name: "the first", path: []string{enough, old}},
		{name: "a newer one", path: []string{newer}},
		{name: "the second", path: []string{old, enough}, want: enough + "/go"},
		{name: "one that downloads", path: []string{auto}},
		{name: "behind an old one", path: []string{old, auto}, want: auto + "/go"},
		{name: "enough behind one that downloads", path: []string{auto, enough}, want: enough + "/go"},
		{name: "an old one", path: []string{old}, want: ".cache/go" + goVersion(t) + "/bin/go", stderr: "downloading Go " + goVersion(t)},
		{name: "another hash", path: []string{forged}, stderr: "has the hash h1:other, want " + sum},
		{name: "none", stderr: "this needs Go: sudo apt-get install golang-go"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, stderr, err := findGo(t, tt.path...)
			if got != tt.want || !strings.Contains(stderr, tt.stderr) {
				t.Errorf("got a link to %q and %q, want %q and %q", got, stderr, tt.want, tt.stderr)
			}
			if failed := tt.name == "another hash" || tt.name == "none"; failed != (err != nil) {
				t.Errorf("got the error %v", err)
			}
		})
	}
}
