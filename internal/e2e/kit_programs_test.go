package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// machine is a network namespace in which programs run.
type machine struct {
	t   *testing.T
	ns  *nettest.Namespace
	dir string // for what the programs of the test write
}

// process is a program that start started. It is killed at the end of the test.
type process struct {
	t    *testing.T
	cmd  *exec.Cmd
	log  *nettest.Log
	done chan struct{} // closed when it has ended
}

// kill kills the process with SIGKILL.
func (p *process) kill() {
	_ = p.cmd.Process.Kill() // the process may have ended
	<-p.done
}

// stop ends the process with SIGTERM, and returns the exit code.
func (p *process) stop() int {
	p.t.Helper()
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // as above
	return p.wait()
}

// wait waits until the process has ended, and returns the exit code.
func (p *process) wait() int {
	p.t.Helper()
	select {
	case <-p.done:
	case <-time.After(patience):
		p.t.Fatalf("%s does not end; it wrote:\n%s", p.cmd, p.log.String())
	}
	return p.cmd.ProcessState.ExitCode()
}

// waitWriting is wait for a process that takes long, and writes as long as it makes progress.
func (p *process) waitWriting() int {
	p.t.Helper()
	for written := -1; len(p.log.String()) > written; {
		written = len(p.log.String())
		select {
		case <-p.done:
			return p.cmd.ProcessState.ExitCode()
		case <-time.After(patience):
		}
	}
	return p.wait()
}

// waitLog waits until the process has written text.
func (p *process) waitLog(text string) {
	p.t.Helper()
	eventually(p.t, "the log says "+text, func() error {
		if strings.Contains(p.log.String(), text) {
			return nil
		}
		select {
		case <-p.done:
			p.t.Fatalf("%s ended without writing %q; it wrote:\n%s", p.cmd, text, p.log.String())
		default:
		}
		return fmt.Errorf("it wrote:\n%s", p.log.String())
	})
}

// result is the output and exit code of a program that has ended.
type result struct {
	stdout, stderr string
	code           int
}

// start starts cmd on the machine, and keeps what it writes.
func (h *machine) start(cmd *exec.Cmd) *process {
	h.t.Helper()
	p := &process{t: h.t, cmd: cmd, log: &nettest.Log{}, done: make(chan struct{})}
	if cmd.Stderr == nil {
		cmd.Stderr = p.log
	}
	if cmd.Stdout == nil {
		cmd.Stdout = p.log
	}
	if err := h.ns.Start(cmd); err != nil {
		h.t.Fatalf("start %s: %v", cmd, err)
	}
	go func() {
		_ = cmd.Wait() // ProcessState says how it ended
		close(p.done)
	}()
	h.t.Cleanup(func() {
		p.kill()
		if strings.Contains(p.log.String(), "DATA RACE") {
			h.t.Error("the race detector has something to say")
		}
		if text := p.log.String(); h.t.Failed() && text != "" {
			h.t.Logf("%s wrote:\n%s", filepath.Base(cmd.Path), text)
		}
	})
	return p
}

// run runs a program on the machine to its end. A process that the program leaves in the background
// must close stdout and stderr, or run does not return.
func (h *machine) run(name string, args ...string) result {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := h.ns.Start(cmd); err != nil {
		h.t.Fatalf("start %s: %v", cmd, err)
	}
	err := cmd.Wait()
	var exit *exec.ExitError
	if ctx.Err() != nil || err != nil && !errors.As(err, &exit) {
		h.t.Fatalf("%s: %v\nstdout: %s\nstderr: %s", cmd, err, stdout.String(), stderr.String())
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// together runs commands at the same time, to their ends.
func (h *machine) together(cmds []*exec.Cmd) []result {
	h.t.Helper()
	outs := make([]struct{ stdout, stderr bytes.Buffer }, len(cmds))
	errs := make([]error, len(cmds))
	var all sync.WaitGroup
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(2+len(cmds)/20)*patience)
	defer cancel()
	for i, cmd := range cmds {
		cmd.Stdout, cmd.Stderr = &outs[i].stdout, &outs[i].stderr
		all.Go(func() {
			if errs[i] = h.ns.Start(cmd); errs[i] == nil {
				stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() }) // the process may have ended
				errs[i] = cmd.Wait()
				stop()
			}
		})
	}
	all.Wait()
	var results []result
	for i, cmd := range cmds {
		var exit *exec.ExitError
		if errs[i] != nil && !errors.As(errs[i], &exit) {
			h.t.Fatalf("%s: %v", cmd, errs[i])
		}
		results = append(results, result{outs[i].stdout.String(), outs[i].stderr.String(), cmd.ProcessState.ExitCode()})
	}
	return results
}

// sh is a command line that runs a script.
func (h *machine) sh(script string) *exec.Cmd { return exec.Command("sh", "-c", script) }

// pids are the processes of one of our commands on the machine.
func (h *machine) pids(name string) []int {
	h.t.Helper()
	return slices.DeleteFunc(sharing(h.t, h.ns.Path(), "net"), func(pid int) bool {
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		return err != nil || filepath.Base(exe) != name
	})
}

// signal sends a signal to the clients with a command, like watch.
func (h *machine) signal(command string, signal unix.Signal) {
	h.t.Helper()
	for _, pid := range h.pids(clientBin) {
		args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err == nil && slices.Contains(strings.Split(string(args), "\x00"), command) {
			if err := unix.Kill(pid, signal); err != nil {
				h.t.Fatal(err)
			}
		}
	}
}

// sharing are the processes in a namespace: path stands for it, and kind is its name in /proc/PID/ns.
func sharing(t *testing.T, path, kind string) (pids []int) {
	t.Helper()
	own, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("/proc/[0-9]*/ns/" + kind)
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if ns, err := os.Stat(file); err == nil && os.SameFile(own, ns) {
			pid, err := strconv.Atoi(strings.Split(file, "/")[2])
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	return pids
}

// freeze stops a process, and waits until all its threads have stopped.
func (h *machine) freeze(pid int) {
	h.t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		h.t.Fatal(err)
	}
	eventually(h.t, fmt.Sprintf("process %d is stopped", pid), func() error {
		for _, state := range status(h.t, pid, "State") {
			if !strings.HasPrefix(state, "T") {
				return errors.New(state)
			}
		}
		return nil
	})
}

// status is a field of /proc/PID/status of each thread of a process.
func status(t *testing.T, pid int, field string) []string {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(files) == 0 {
		t.Fatalf("threads of %d: %q, %v", pid, files, err)
	}
	var values []string
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // a thread that ended
		}
		for line := range strings.Lines(string(text)) {
			if value, ok := strings.CutPrefix(line, field+":"); ok {
				values = append(values, strings.TrimSpace(value))
			}
		}
	}
	return values
}

func fdCount(t *testing.T, pid int) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// pssOf is the proportional set size of a process, in KiB.
func pssOf(t *testing.T, pid int) (kib int) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "Pss:"); ok {
			fmt.Sscan(rest, &kib)
		}
	}
	return kib
}
