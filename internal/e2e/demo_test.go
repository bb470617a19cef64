package e2e

import (
	"bufio"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// demoProgram builds the demo into a directory that everybody can read, with the commands
// in bin below it and an empty tmp.
func demoProgram(t *testing.T) (dir, demo string) {
	t.Helper()
	dir = t.TempDir()
	demo = filepath.Join(dir, "demo")
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
	tmp := filepath.Join(dir, "tmp")
	if err := errors.Join(os.Mkdir(tmp, 0), os.Chmod(tmp, 0o777|os.ModeSticky)); err != nil {
		t.Fatal(err)
	}
	return dir, demo
}

// demoCommand is a command that runs it.
func demoCommand(dir string, command ...string) *exec.Cmd {
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "HOME=/nonexistent", "TMPDIR="+filepath.Join(dir, "tmp"))
	return cmd
}

// wantNoTraces fails the test if a demo has left files.
func wantNoTraces(t *testing.T, dir string) {
	t.Helper()
	for _, pattern := range []string{filepath.Join(dir, "tmp", "*"), "/tmp/table-allocator-demo-*", "/dev/shm/*"} {
		if left, err := filepath.Glob(pattern); err != nil || len(left) > 0 {
			t.Errorf("the demo has left %q, %v", left, err)
		}
	}
}

// TestDemo: make demo works as root and, through a user namespace, as somebody else.
func TestDemo(t *testing.T) {
	t.Parallel()
	dir, demo := demoProgram(t)
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
			out, err := demoCommand(dir, tt.command...).CombinedOutput()
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
				// A shell in a network namespace on wan1.
				`(?s)netns exec work bash.*\n203\.0\.113\.2\n0 packets of the namespace were seen at 192\.0\.2\.1, the gateway of wan0\n1 packets of the namespace were seen at 203\.0\.113\.1, the gateway of wan1\n.*work +wan1 .*netns del work`,
				// What is left when one address is gone.
				`(?s)ip address del.*10000:\s+from 203\.0\.113\.2 lookup 10001 proto 116.*10001\s+inet\s+wan1.*3 packets from 203\.0\.113\.2`,
				// An uplink loses its Internet.
				`(?s)release --all.*\* wan0 .*IPv4  unbound traffic uses wan0: the best that works`,
				`(?s)blackhole\n[0-9]+ requests without an answer; after [0-9.]+ s request [0-9]+ is the first from 203\.0\.113\.2, and is answered\n`,
				`(?s)is answered.*  wan0 .*dead \(5 rounds without an answer: tcp:80\).*\* wan1 .*IPv4  unbound traffic uses wan1: the only one that works`,
				`the download from 192\.0\.2\.2 has [0-9]+ kB, stood still for [0-9.]+ s, and misses nothing\n`,
			} {
				if !regexp.MustCompile(want).Match(out) {
					t.Errorf("the demo does not show %s", want)
				}
			}
			if regexp.MustCompile(`(?s)ip address del.*192\.0\.2\.2 lookup.*release --all`).Match(out) {
				t.Error("rules of the address that went are left")
			}
			checkReadme(t, string(out))
			wantNoTraces(t, dir)
			if t.Failed() {
				t.Logf("it showed:\n%s", out)
			}
		})
	}
}

// checkReadme compares the first session in README.md with what the demo shows: the same commands in the same order, and
// of ip the same lines.
func checkReadme(t *testing.T, shown string) {
	t.Helper()
	_, session, _ := strings.Cut(readFile(t, "../../README.md"), "\n    # ")
	session, _, _ = strings.Cut("    # "+session, "\n\n")
	fields := func(text string) string { return strings.Join(strings.Fields(text), " ") }
	rest, isIP, commands := "", false, 0
	for line := range strings.Lines(session) {
		line = fields(line)
		if command, ok := strings.CutPrefix(line, "# "); ok {
			command, _, _ = strings.Cut(command, " # ")
			if commands == 0 {
				rest = shown
			}
			commands++
			isIP = strings.HasPrefix(command, "ip ")
			_, after, found := strings.Cut(rest, "$ "+command+"\n")
			if !found {
				t.Errorf("the demo does not run %q of README.md, or not in its order", command)
				return
			}
			rest = after
			continue
		}
		output, _, _ := strings.Cut(rest, "$ ")
		if isIP && !slices.Contains(lines(output), line) {
			t.Errorf("README.md has the line %q, the demo shows\n%s", line, output)
		}
	}
	if commands < 6 {
		t.Errorf("README.md begins with %d commands", commands)
	}
}

// TestReadmeLength: README.md is what one reads on a way to a first result; the rest is in manual pages.
func TestReadmeLength(t *testing.T) {
	if n := strings.Count(readFile(t, "../../README.md"), "\n"); n < 120 || n > 150 {
		t.Errorf("README.md has %d lines, want 120 to 150", n)
	}
}

// TestDemoInterrupted: ^C in the middle ends all of it, and leaves nothing.
func TestDemoInterrupted(t *testing.T) {
	t.Parallel()
	dir, demo := demoProgram(t)
	cmd := demoCommand(dir, demo)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }) // it has ended, or should have
	lines := bufio.NewScanner(out)
	for lines.Scan() && !strings.Contains(lines.Text(), "lookup 10000") {
	}
	if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	// The pipe ends with the last process that holds it.
	for lines.Scan() {
		if strings.Contains(lines.Text(), "ip address del") {
			t.Error("it goes on")
		}
	}
	if err := cmd.Wait(); err == nil {
		t.Error("exit code: got 0, want another")
	}
	eventually(t, "no process of the demo is left", func() error {
		procs, err := filepath.Glob("/proc/[0-9]*/cwd")
		if err != nil {
			return err
		}
		for _, p := range procs {
			if at, err := os.Readlink(p); err == nil && at == dir {
				return errors.New(p)
			}
		}
		return nil
	})
	wantNoTraces(t, dir)
}

// TestDemoForbidden: where users cannot have a user namespace, or have no rights in it,
// the demo says what to do.
func TestDemoForbidden(t *testing.T) {
	t.Parallel()
	dir, demo := demoProgram(t)
	for _, tt := range []struct {
		name    string
		command []string
		want    string
	}{
		// The setting is one of each user namespace: this one ends with the test.
		{"setting", []string{"unshare", "--mount", "sh", "-c", `mount -t proc proc /proc &&
			exec unshare --user --map-user=12345 --map-group=12345 --keep-caps sh -c \
			'echo 0 >/proc/sys/user/max_user_namespaces && exec "$0"' "$0"`, demo},
			"demo: make namespaces: .*\n/proc/sys/user/max_user_namespaces is 0, which forbids .*: run make demo as root\n"},
		// As AppArmor does it on Ubuntu.
		{"no rights in it", []string{"setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups",
			"strace", "-f", "-o", "/dev/null", "-e", "trace=mount", "-e", "inject=mount:error=EPERM", demo},
			"demo: make mounts private: operation not permitted\n.*: run make demo as root\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out, err := demoCommand(dir, tt.command...).CombinedOutput()
			if err == nil {
				t.Error("exit code: got 0, want another")
			}
			if !regexp.MustCompile("^" + tt.want + "$").Match(out) {
				t.Errorf("got %s\nwant %s", out, tt.want)
			}
			wantNoTraces(t, dir)
		})
	}
}
