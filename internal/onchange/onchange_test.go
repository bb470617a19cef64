package onchange

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// newDir makes a directory that root alone can write to, up to /.
func newDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/etc", "onchange")
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func write(t *testing.T, path, text string, mode os.FileMode) string {
	t.Helper()
	err := nettest.WriteExecutable(path, []byte(text))
	if err == nil {
		err = os.Chmod(path, mode)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func newRunner(t *testing.T) (*Runner, *nettest.Log) {
	log := new(nettest.Log)
	r := NewRunner(slog.New(slog.NewTextHandler(log, nil)))
	t.Cleanup(r.Close)
	return r, log
}

// eventually waits until check returns "".
func eventually(t *testing.T, check func() string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		why := check()
		if why == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(why)
		}
	}
}

func waitText(t *testing.T, path, want string) {
	t.Helper()
	eventually(t, func() string {
		if got, _ := os.ReadFile(path); string(got) != want { // until it is there
			return fmt.Sprintf("%s has %q, want %q", path, got, want)
		}
		return ""
	})
}

// TestOpen: what somebody else could have put there is not executed.
func TestOpen(t *testing.T) {
	const ok, user = "", 4711
	for _, tt := range []struct {
		name    string
		prepare func(dir, file string) error
		want    string
	}{
		{"root's", func(dir, file string) error { return nil }, ok},
		{"a user's", func(dir, file string) error { return os.Chown(file, user, 0) }, "program is not root's"},
		{"writable for a group", func(dir, file string) error { return os.Chmod(file, 0o775) }, "program is writable for others"},
		{"writable for all", func(dir, file string) error { return os.Chmod(file, 0o757) }, "program is writable for others"},
		{"not executable", func(dir, file string) error { return os.Chmod(file, 0o644) }, "program is not executable"},
		{"in a user's directory", func(dir, file string) error { return os.Chown(dir, user, 0) }, "sub/ is not root's"},
		{"in a group's directory", func(dir, file string) error { return os.Chmod(dir, 0o775) }, "sub/ is writable for others"},
		{"in a directory for all", func(dir, file string) error { return os.Chmod(dir, 0o777) }, "sub/ is writable for others"},
		{"in a directory like /tmp", func(dir, file string) error { return os.Chmod(dir, 0o777|os.ModeSticky) }, "sub/ is writable for others"},
		{"below a user's directory", func(dir, file string) error { return os.Chown(filepath.Dir(dir), user, 0) }, "is not root's"},
		{"below a directory for all", func(dir, file string) error { return os.Chmod(filepath.Dir(dir), 0o777) }, "is writable for others"},
		{"a link", func(dir, file string) error {
			return exec.Command("ln", "-sf", "/bin/sh", file).Run()
		}, "program is a symbolic link"},
		{"behind a link", func(dir, file string) error {
			return exec.Command("sh", "-ec", `mv "$1" "$1.moved" && ln -s "$1.moved" "$1"`, "sh", dir).Run()
		}, "sub is a symbolic link"},
		{"a directory", func(dir, file string) error {
			return exec.Command("sh", "-ec", `rm "$1" && mkdir "$1"`, "sh", file).Run()
		}, "program is no regular file"},
		{"a FIFO", func(dir, file string) error {
			return exec.Command("sh", "-ec", `rm "$1" && mkfifo -m 755 "$1"`, "sh", file).Run()
		}, "program is no regular file"},
		{"gone", func(dir, file string) error { return os.Remove(file) }, "no such file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := filepath.Join(newDir(t), "sub")
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			file := write(t, filepath.Join(dir, "program"), "#!/bin/sh\n", 0o755)
			if err := tt.prepare(dir, file); err != nil {
				t.Fatal(err)
			}
			f, err := open(file)
			switch {
			case tt.want == ok && err != nil:
				t.Error(err)
			case tt.want != ok && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("got %v, want an error that has %q", err, tt.want)
			}
			if err == nil {
				f.Close()
			}
			r, _ := newRunner(t)
			if err := r.Set(file); (err == nil) != (tt.want == ok) {
				t.Errorf("Set: %v", err)
			}
		})
	}
	for _, path := range []string{"program", "./program", "/etc/../etc/program", "/etc//program", "/", "", "/etc/program/"} {
		if CheckPath(path) == nil {
			t.Errorf("the path %q is accepted", path)
		}
	}
}

// TestExecutesWhatWasChecked: a file that takes the path of the program after the check is not executed.
func TestExecutesWhatWasChecked(t *testing.T) {
	dir := newDir(t)
	out := filepath.Join(dir, "out")
	sh, err := os.ReadFile("/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, text, want string }{
		{"a script", "#!/bin/sh\nprintf right >" + out, "right"},
		{"a binary", string(sh), ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := write(t, filepath.Join(dir, "program"), tt.text, 0o755)
			f, err := open(file)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			other := write(t, filepath.Join(dir, "other"), "#!/bin/sh\nprintf wrong >"+out, 0o755)
			if err := os.Rename(other, file); err != nil {
				t.Fatal(err)
			}
			r, _ := newRunner(t)
			if err := r.executeFile(f, nil); err != nil {
				t.Fatal(err)
			}
			if got, _ := os.ReadFile(out); string(got) != tt.want { // a binary writes none
				t.Errorf("got %q, want %q", got, tt.want)
			}
			_ = os.Remove(out) // which there may not be
		})
	}
}

// TestEnvironment: PATH and what is told, in words that mean nothing to a shell; no descriptor but those of every program
// and that of the script itself; a group of its own.
func TestEnvironment(t *testing.T) {
	dir := newDir(t)
	t.Setenv("SECRET", "of the watch")
	t.Setenv("LD_PRELOAD", "")
	leaked, err := syscall.Open("/etc/passwd", syscall.O_RDONLY, 0) // without O_CLOEXEC, as a parent leaves one
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(leaked)
	out := filepath.Join(dir, "out")
	// cat shows the environment that the program got: a shell adds variables of its own.
	file := write(t, filepath.Join(dir, "a program; touch "+strings.ReplaceAll(dir, "/", "_")), "#!/bin/sh\n"+
		"exec >"+out+".part\ntr '\\0' '\\n' </proc/$$/environ | sort\n"+
		"for fd in /proc/$$/fd/*; do echo \"fd ${fd##*/} $(readlink $fd)\"; done | grep -v -e '/proc' -e "+out+" \n"+
		"[ \"$(cut -d' ' -f5 /proc/$$/stat)\" = $$ ] && echo own group\n[ $# = 0 ] && echo no arguments\npwd\nmv "+out+".part "+out+"\n", 0o755)
	r, log := newRunner(t)
	if err := r.Set(file); err != nil {
		t.Fatal(err)
	}
	r.Tell("x", Value{"IFNAME", "-rf$(reboot)`'\";|&\n<>\\é"}, Value{"ADDRESS", "2001:db8::1%wan0"}, Value{"RTT_MS", "1.5"}, Value{"EMPTY", ""})
	eventually(t, func() string {
		if _, err := os.Stat(out); err != nil {
			return err.Error() + log.String()
		}
		return ""
	})
	text, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	var got, descriptors []string
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if number, isFD := strings.CutPrefix(line, "fd "); isFD {
			descriptors = append(descriptors, strings.Fields(number)[0])
			if strings.Contains(line, "passwd") {
				t.Errorf("it got a descriptor of the watch: %s", line)
			}
			continue
		}
		got = append(got, line)
	}
	want := []string{"PATH=" + path, "TA_ADDRESS=2001:db8::1%wan0", "TA_EMPTY=", "TA_IFNAME=_rf__reboot____________", "TA_RTT_MS=1.5", "own group", "no arguments", "/"}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if len(descriptors) > 6 { // 0, 2, the script by 3 and as the shell has it, what readlink and the pipe need
		t.Errorf("descriptors %q", descriptors)
	}
}

// TestKilled: at the limit the whole group ends, whatever it ignores; and what a program leaves behind ends with it.
func TestKilled(t *testing.T) {
	for _, tt := range []struct{ name, script, log string }{
		{"at the limit", "trap '' TERM INT HUP\nsleep 1000 & echo $! >>PIDS\necho $$ >>PIDS\nmv PIDS OUT\nwait\nsleep 1000\n", "it was killed after"},
		{"what is left", "sleep 1000 & echo $! >>PIDS\nmv PIDS OUT\nexit 3\n", "exit status 3"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := newDir(t)
			out := filepath.Join(dir, "out")
			script := strings.NewReplacer("PIDS", filepath.Join(dir, "pids"), "OUT", out).Replace(tt.script)
			file := write(t, filepath.Join(dir, "program"), "#!/bin/sh\n"+script, 0o755)
			r, log := newRunner(t)
			if err := r.Set(file); err != nil {
				t.Fatal(err)
			}
			r.limit = 0
			var pids []string
			for len(pids) == 0 || !strings.Contains(log.String(), tt.log) { // the limit may come too early
				r.limit += 500 * time.Millisecond
				r.Tell("x")
				eventually(t, func() string {
					r.mu.Lock()
					defer r.mu.Unlock()
					if r.running {
						return "it runs"
					}
					return ""
				})
				text, _ := os.ReadFile(out) // there may be none yet
				pids = strings.Fields(string(text))
			}
			for _, pid := range pids {
				eventually(t, func() string {
					stat, err := os.ReadFile("/proc/" + pid + "/stat")
					if err == nil && !strings.Contains(string(stat), ") Z ") {
						return "it runs: " + string(stat)
					}
					return ""
				})
			}
		})
	}
}

// TestClose: nothing runs when it returns, and nothing begins after that.
func TestClose(t *testing.T) {
	dir := newDir(t)
	out := filepath.Join(dir, "out")
	file := write(t, filepath.Join(dir, "program"), "#!/bin/sh\necho $TA_N $$ >>"+out+"\nexec sleep 1000\n", 0o755)
	r, _ := newRunner(t)
	if err := r.Set(file); err != nil {
		t.Fatal(err)
	}
	r.Tell("x", Value{"N", "1"})
	var pid string
	eventually(t, func() string {
		text, _ := os.ReadFile(out)
		if f := strings.Fields(string(text)); len(f) == 2 && strings.HasSuffix(string(text), "\n") {
			pid = f[1]
			return ""
		}
		return fmt.Sprintf("the program wrote %q", text)
	})
	r.Tell("x", Value{"N", "2"})
	r.Close()
	r.Tell("x", Value{"N", "3"})
	if _, err := os.Stat("/proc/" + pid); err == nil {
		t.Error("it runs on")
	}
	waitText(t, out, "1 "+pid+"\n")
}

// TestLatest: one at a time, and of each subject the latest change.
func TestLatest(t *testing.T) {
	dir := newDir(t)
	out, gate := filepath.Join(dir, "out"), filepath.Join(dir, "gate")
	if err := syscall.Mkfifo(gate, 0o600); err != nil {
		t.Fatal(err)
	}
	file := write(t, filepath.Join(dir, "program"), "#!/bin/sh\nread x <"+gate+"\necho $TA_N >>"+out+"\n", 0o755)
	r, _ := newRunner(t)
	if err := r.Set(file); err != nil {
		t.Fatal(err)
	}
	tell := func(subject, n string) { r.Tell(subject, Value{"N", n}) }
	tell("a", "a1")
	eventually(t, func() string {
		r.mu.Lock()
		defer r.mu.Unlock()
		if len(r.order) > 0 {
			return "the first one waits"
		}
		return ""
	})
	for i := 2; i < 100; i++ {
		tell("a", fmt.Sprint("a", i))
		tell("b", fmt.Sprint("b", i))
	}
	want := ""
	for _, n := range []string{"a1", "a99", "b99"} {
		if err := os.WriteFile(gate, []byte("go\n"), 0); err != nil { // it waits for the program, which could not begin beside write
			t.Fatal(err)
		}
		want += n + "\n"
		waitText(t, out, want)
	}
	r.Close()
	waitText(t, out, want)
}

// TestSet: without a program nothing runs.
func TestSet(t *testing.T) {
	r, _ := newRunner(t)
	if err := r.Set(""); err != nil {
		t.Error(err)
	}
	r.Tell("x")
	if r.running || len(r.order) > 0 {
		t.Error("it runs")
	}
}
