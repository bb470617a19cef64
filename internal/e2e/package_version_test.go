package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestPackageVersion: packages have the version of the tag, what follows a tag sorts behind it, and what comes before the
// first one sorts before 0.1.0.
func TestPackageVersion(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	text, err := os.ReadFile("../../packaging/package/build.mk")
	if err != nil {
		t.Fatal(err)
	}
	makefile := append(text, "\nversion:\n\t@echo $(PACKAGE_VERSION)\ndate:\n\t@echo $$SOURCE_DATE_EPOCH\nneeds-go:\n"...)
	if err := os.WriteFile(filepath.Join(dir, "Makefile"), makefile, 0o644); err != nil {
		t.Fatal(err)
	}
	run := func(argv ...string) string {
		t.Helper()
		cmd := exec.Command(argv[0], argv[1:]...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a",
			"GIT_AUTHOR_DATE=1700000000 +0300", "GIT_COMMITTER_DATE=1700000000 +0300", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_DIR="+filepath.Join(dir, ".git"), "GIT_WORK_TREE="+dir)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%q: %v\n%s", argv, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	version := func() string { return run("make", "-s", "version", "SHELL=/bin/bash") }
	commit := func() { run("git", "commit", "--quiet", "--allow-empty", "--message=change") }
	if err := os.WriteFile(filepath.Join(dir, "CHANGELOG.md"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	date := run("env", "-u", "SOURCE_DATE_EPOCH", "make", "-s", "date", "SHELL=/bin/bash")
	if v := version(); v != "" || !regexp.MustCompile(`^[0-9]{10}$`).MatchString(date) {
		t.Errorf("without git the version is %q and the date %q", v, date)
	}
	run("git", "init", "--quiet")
	commit()
	var got []string
	for _, step := range []struct {
		tag, want string
	}{
		{"", `0\.1\.0~git202311142213\.[0-9a-f]{7}`},
		{"v0.1.0", `0\.1\.0`},
		{"", `0\.1\.0\+1\.g[0-9a-f]{7,}`},
		{"v0.1.1", `0\.1\.1`},
	} {
		if step.tag != "" {
			run("git", "tag", step.tag)
		} else if len(got) > 0 {
			commit()
		}
		v := version()
		if !regexp.MustCompile(`^` + step.want + `$`).MatchString(v) {
			t.Errorf("got version %q, want %s", v, step.want)
		}
		if len(got) > 0 {
			run("dpkg", "--compare-versions", got[len(got)-1], "lt", v)
		}
		got = append(got, v)
	}
}
