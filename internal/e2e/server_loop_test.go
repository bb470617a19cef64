package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestServerBatch: requests that wait together are answered together, and neither socket
// takes a request before it asks for credentials.
func TestServerBatch(t *testing.T) {
	h := newHost(t)
	trace := filepath.Join(h.dir, "strace")
	server := h.start(exec.Command("strace", "-f", "-o", trace, "-e", "trace=bind,setsockopt,sendmmsg",
		bin(t, serverBin), "-c", h.config()))
	server.waitLog("msg=serving")
	pid := h.pids(serverBin)[0]
	t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGKILL) }) // it outlives strace, and ends before it else
	traced := func() string {
		text, err := os.ReadFile(trace)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}

	// Each thread tells the tracer that it stands still; from then on requests only queue.
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the server is stopped", func() error {
		threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			return err
		}
		if stopped := strings.Count(traced(), "--- stopped by SIGSTOP ---"); stopped < len(threads) {
			return fmt.Errorf("%d of %d threads", stopped, len(threads))
		}
		return nil
	})
	const n = 8
	var peers [n]*rawPeer
	for i := range peers {
		peers[i] = h.cPeer(fmt.Sprint("peer", i))
		peers[i].send(acquire(i + 1))
	}
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	for i, p := range peers {
		reply, _ := p.receive()
		wantTable(t, reply, uint32(10000+i))
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := server.wait(); code != 0 { // strace's is that of the server
		t.Errorf("exit code: got %d, want 0", code)
	}

	calls := traced()
	if !regexp.MustCompile(fmt.Sprintf(`(?m)sendmmsg.*\)\s+= %d$`, n)).MatchString(calls) {
		t.Errorf("no sendmmsg sent %d answers", n)
	}
	asked := make(map[string]bool)
	bound := 0
	for line := range strings.Lines(calls) {
		if m := regexp.MustCompile(`setsockopt\((\d+), SOL_SOCKET, SO_PASSCRED, \[1\]`).FindStringSubmatch(line); m != nil {
			asked[m[1]] = true
		}
		if m := regexp.MustCompile(`bind\((\d+), \{sa_family=AF_UNIX, sun_path=@"tas_socket`).FindStringSubmatch(line); m != nil {
			bound++
			if !asked[m[1]] {
				t.Errorf("socket %s is bound before it asks for credentials", m[1])
			}
		}
	}
	if bound != 2 {
		t.Errorf("sockets: got %d, want both forms of the name", bound)
	}
	if t.Failed() {
		t.Logf("trace:\n%s", calls)
	}
}

// TestServerJournal: lines for journald have priorities, and leave out what it knows. A
// JOURNAL_STREAM that somebody inherited is not about this stderr.
func TestServerJournal(t *testing.T) {
	for _, tt := range []struct {
		name    string
		journal bool
		line    string
	}{
		{"journal", true, `^<6>msg=[^\n]*$`},
		{"another stream", false, `^time=\S+ level=INFO msg=[^\n]*$`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			f, err := os.Create(filepath.Join(h.dir, "stderr"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			var st unix.Stat_t
			if err := unix.Fstat(int(f.Fd()), &st); err != nil {
				t.Fatal(err)
			}
			inode := st.Ino
			if !tt.journal {
				inode++
			}
			cmd := exec.Command("sh", "-c", `exec "$0" "$@" 2>&3`, bin(t, serverBin), "-c", h.config())
			cmd.ExtraFiles = []*os.File{f}
			cmd.Env = append(os.Environ(), fmt.Sprintf("JOURNAL_STREAM=%d:%d", st.Dev, inode))
			server := h.start(cmd)
			read := func() string {
				text, err := os.ReadFile(f.Name())
				if err != nil {
					t.Fatal(err)
				}
				return string(text)
			}
			eventually(t, "the server serves", func() error {
				if text := read(); !strings.Contains(text, "msg=serving") {
					return errors.New(text)
				}
				return nil
			})
			wantTable(t, h.cPeer("peer").ask(acquire(1)), 10000)
			if code := server.stop(); code != 0 {
				t.Errorf("exit code: got %d, want 0", code)
			}
			lines := strings.Split(strings.TrimSuffix(read(), "\n"), "\n")
			for _, line := range lines {
				if !regexp.MustCompile(tt.line).MatchString(line) || tt.journal && strings.Contains(line, "time=") {
					t.Errorf("got line %q", line)
				}
			}
			if len(lines) < 3 {
				t.Errorf("got %q, want that it serves, a lease, and that it stopped", lines)
			}
		})
	}
}
