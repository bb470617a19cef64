package e2e

import (
	"errors"
	"fmt"
	"math/rand/v2"
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

// spot is where strace meddles with a process: each thread's n-th call of a kind fails, or the process is killed
// there.
type spot struct {
	call string
	what string
	n    int
}

func (s spot) String() string { return fmt.Sprintf("%s %s %d", s.call, s.what, s.n) }

// kills reports whether the process is killed.
func (s spot) kills() bool { return s.what == "signal=KILL" }

// meddled is a process under strace.
type meddled struct {
	*process
	h     *host
	name  string
	spot  spot
	trace string
	wrote *nettest.Log // apart from the log of process, since thousands of these say nothing new
}

// meddle starts one of our commands under strace.
func (h *host) meddle(s spot, name string, args ...string) *meddled {
	h.t.Helper()
	trace := filepath.Join(h.t.TempDir(), "trace")
	options := []string{"-f", "-qq", "-y", "-o", trace, "-e", "trace=" + s.call, "-e", fmt.Sprintf("inject=%s:%s:when=%d", s.call, s.what, s.n)}
	if !s.kills() { // with it strace 6.1 sends a signal at the first call or never
		options = append(options, "--seccomp-bpf")
	}
	cmd := exec.Command("strace", slices.Concat(options, []string{staticBin(h.t, name)}, args)...)
	cmd.Env = append(os.Environ(), "GOMAXPROCS=1") // as in the background, and nearly all calls are of one thread
	log := &nettest.Log{}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.WaitDelay = patience // a strace that is killed leaves its processes, which have the pipe
	return &meddled{h.start(cmd), h, name, s, trace, log}
}

// staticBin is bin without the race detector, if there is one: under strace that is several times as fast.
func staticBin(t *testing.T, name string) string {
	t.Helper()
	if dir := os.Getenv("TABLE_ALLOCATOR_STATIC_BIN"); dir != "" {
		return filepath.Join(dir, name)
	}
	return bin(t, name)
}

// hit reports whether the process came to the spot.
func (m *meddled) hit() bool {
	m.h.t.Helper()
	text := readFile(m.h.t, m.trace)
	return strings.Contains(text, "(INJECTED)") || strings.Contains(text, "+++ killed by SIGKILL")
}

// impossible reports whether the Go runtime ended the process since it could not wake itself, by a write to an eventfd
// that no real kernel refuses.
func (m *meddled) impossible() bool {
	return strings.Contains(m.wrote.String(), "runtime: netpollBreak")
}

// ended reports whether the process has ended.
func (m *meddled) ended() bool {
	select {
	case <-m.done:
		return true
	default:
		return false
	}
}

// signal sends a signal to the process itself.
func (m *meddled) signal(sig syscall.Signal) {
	for _, pid := range m.h.pids(m.name) {
		_ = syscall.Kill(pid, sig) // the process may have ended
	}
}

// end ends the process with SIGTERM and waits for that.
func (m *meddled) end() error {
	m.signal(syscall.SIGTERM)
	select {
	case <-m.done:
	case <-time.After(patience):
		m.signal(syscall.SIGQUIT) // for the stacks
		<-m.done
		return errors.New("it does not end")
	}
	if code := m.cmd.ProcessState.ExitCode(); code != 0 && !m.spot.kills() && !m.impossible() {
		return fmt.Errorf("exit code %d", code)
	}
	return nil
}

// picture is all of the kernel and of the files that our commands change, one line each.
func (h *host) picture(files ...string) (all []string) {
	h.t.Helper()
	for _, family := range []string{"-4", "-6"} {
		for _, line := range h.ruleLines(family) {
			all = append(all, family+" rule "+line)
		}
		for _, line := range h.routeLines(family, "all") {
			if !strings.Contains(line, " table local ") { // link-local addresses come late
				all = append(all, family+" route "+line)
			}
		}
	}
	for _, lease := range h.leases() {
		all = append(all, "lease "+lease)
	}
	for _, file := range files {
		for _, line := range lines(readFile(h.t, file)) {
			all = append(all, filepath.Base(file)+" "+line)
		}
	}
	return append(all, h.remembered()...)
}

// remembered are the files that our commands keep of this network namespace for later ones.
func (h *host) remembered() (files []string) {
	h.t.Helper()
	info, err := os.Stat(h.ns.Path())
	if err != nil {
		h.t.Fatal(err)
	}
	inode := fmt.Sprint(info.Sys().(*syscall.Stat_t).Ino)
	err = filepath.WalkDir("/run/table-allocator", func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() && slices.Contains(strings.Split(path, "/"), inode) {
			files = append(files, "file "+path)
		}
		return nil // what is gone is fine
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		h.t.Fatal(err)
	}
	return files
}

// soon waits until check returns nil, or the process has ended. It returns what check says last.
func (m *meddled) soon(check func() error) error {
	begin := time.Now()
	for {
		ended := m != nil && m.ended()
		err := check()
		if err == nil || ended || time.Since(begin) > patience {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// sweep tries a process at each spot of each kind, in full or at some that are drawn. try reports whether the process
// came to the spot, and what was wrong afterwards.
func sweep(t *testing.T, kinds []spot, most, draws int, rnd *rand.Rand, try func(spot) (hit bool, err error)) {
	t.Helper()
	tried, begun := 0, time.Now()
	one := func(s spot) bool {
		hit, err := try(s)
		if err != nil {
			t.Errorf("%s: %v", s, err)
		}
		if hit {
			tried++
		}
		return hit
	}
	if !fullSize() {
		for range draws {
			s := kinds[rnd.IntN(len(kinds))]
			// Threads count for themselves, so that most places are early ones.
			for s.n = 1 + rnd.IntN(most); !one(s) && s.n > 1 && !t.Failed(); s.n = (s.n + 1) / 2 {
			}
		}
	} else {
		for _, s := range kinds {
			missed, before := 0, tried
			for s.n = 1; missed < 3 && !t.Failed(); s.n++ { // the count differs from run to run; what failed leaves another host
				if missed++; one(s) {
					missed = 0
				}
			}
			t.Logf("%s %s: %d places", s.call, s.what, tried-before)
		}
	}
	t.Logf("%d places in %v", tried, time.Since(begun).Round(time.Millisecond))
}

// kinds are all pairs of calls and what happens to them, and a kill at each fcntl, as which locks are taken: an error that
// strace makes would be of other calls of that name, too, that cannot fail.
func kinds(calls ...string) (all []spot) {
	all = append(all, spot{call: "fcntl", what: "signal=KILL"})
	for _, call := range calls {
		for _, what := range []string{"signal=KILL", "error=ENOBUFS", "error=ENOMEM", "error=EINTR", "error=EIO"} {
			all = append(all, spot{call: call, what: what})
		}
	}
	return all
}
