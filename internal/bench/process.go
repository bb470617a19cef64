package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/pprof"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/table-allocator/table-allocator/internal/server"
)

// process is a server that bench started.
type process struct {
	cmd *exec.Cmd
	log string // the path of its log
}

// spawn starts a server, and waits until it answers.
func spawn(t target, log string, args ...string) (*process, error) {
	f, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p := &process{cmd: exec.Command(args[0], args[1:]...), log: log}
	p.cmd.Stdout, p.cmd.Stderr = f, f
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	for until := time.Now().Add(silence); ; time.Sleep(time.Millisecond) {
		err := t.try()
		if err == nil {
			return p, nil
		}
		if time.Now().After(until) {
			text, _ := os.ReadFile(log) // without one the error stands alone
			return nil, errors.Join(fmt.Errorf("%s does not serve: %w\n%s", args[0], err, text), p.kill())
		}
	}
}

// stop ends the server as a service manager does. The original does not catch the signal.
func (p *process) stop() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	err := p.cmd.Wait()
	if status := p.cmd.ProcessState.Sys().(syscall.WaitStatus); err != nil && status.Signal() != syscall.SIGTERM {
		text, _ := os.ReadFile(p.log)
		return fmt.Errorf("%s: %w\n%s", p.cmd.Args[0], err, text[max(0, len(text)-1000):])
	}
	return nil
}

func (p *process) kill() error {
	err := p.cmd.Process.Kill()
	_ = p.cmd.Wait() // the error is that it was killed
	return err
}

// serveCommand is the first argument of the process that is the server with a profiler.
const serveCommand = "serve"

func serveProfiled(config, profile string) error {
	cfg, err := server.LoadConfig(config)
	if err != nil {
		return err
	}
	f, err := os.Create(profile)
	if err != nil {
		return err
	}
	defer f.Close() // pprof refuses a profile that is not whole
	if err := pprof.StartCPUProfile(f); err != nil {
		return err
	}
	defer pprof.StopCPUProfile()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	return server.Run(ctx, cfg, server.Host{}, slog.New(slog.NewTextHandler(os.Stderr, nil)))
}

// memory is the proportional set size of a process in bytes.
func memory(pid int) (float64, error) {
	kib, err := field(fmt.Sprintf("/proc/%d/smaps_rollup", pid), "Pss:")
	return float64(kib) * 1024, err
}

// processor is the processor time that the threads of a process have used.
func processor(pid int) (used time.Duration, err error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	for _, path := range tasks {
		text, readErr := os.ReadFile(path)
		if readErr == nil {
			var ns int64
			_, readErr = fmt.Sscan(string(text), &ns)
			used += time.Duration(ns)
		}
		err = errors.Join(err, readErr)
	}
	return used, err
}

// wakeups is how often the threads of a process gave up their processor to wait.
func wakeups(pid int) (n float64, err error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	for _, path := range tasks {
		one, fieldErr := field(path, "voluntary_ctxt_switches:")
		n, err = n+float64(one), errors.Join(err, fieldErr)
	}
	return n, err
}

// field reads a number from a file of /proc.
func field(path, name string) (int, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close() // only read
	for r := bufio.NewReader(f); ; {
		line, err := r.ReadString('\n')
		if err == io.EOF {
			return 0, fmt.Errorf("%s has no %s", path, name)
		}
		if err != nil {
			return 0, err
		}
		if rest, ok := strings.CutPrefix(line, name); ok {
			return strconv.Atoi(strings.Fields(rest)[0])
		}
	}
}

// processes are the pids of the processes that run a program.
func processes(path string) (pids []int, err error) {
	path, err = filepath.EvalSymlinks(path)
	if err != nil {
		return nil, err
	}
	if path, err = filepath.Abs(path); err != nil {
		return nil, err
	}
	exes, err := filepath.Glob("/proc/[0-9]*/exe")
	for _, exe := range exes {
		if at, err := os.Readlink(exe); err == nil && at == path {
			pid, _ := strconv.Atoi(strings.Split(exe, "/")[2]) // it matched digits
			pids = append(pids, pid)
		}
	}
	return pids, err
}
