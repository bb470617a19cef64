// Package onchange executes the program that a user wants to be told of changes by. It hides what makes that safe for a
// daemon with rights: a program that root alone can have written, checked and executed as one open file, no shell, an
// environment of plain words, no descriptors, a process group that is killed as a whole, and that a slow program costs
// neither its caller nor more than one process.
package onchange

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
)

// limit is how long a program may run.
const limit = 30 * time.Second

// path is what the program has as PATH.
const path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// maxOutput is how much of what a program prints is kept for the log.
const maxOutput = 512

// Value is a variable of the program's environment, without the TA_ that its name begins with there.
type Value struct{ Name, Text string }

// Runner executes a program for changes, one at a time. NewRunner makes it.
type Runner struct {
	log   *slog.Logger
	limit time.Duration
	ctx   context.Context // of the programs; ended by Close
	end   context.CancelFunc
	done  sync.WaitGroup

	mu      sync.Mutex
	program string // "": none
	order   []string
	waiting map[string][]Value
	running bool
}

// NewRunner returns a runner without a program.
func NewRunner(log *slog.Logger) *Runner {
	r := &Runner{log: log, limit: limit, waiting: make(map[string][]Value)}
	r.ctx, r.end = context.WithCancel(context.Background())
	return r
}

// Set names the program, or with "" none. It returns an error if the program would not be executed as it is now.
func (r *Runner) Set(program string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.program = program
	if program == "" {
		r.order = nil
		clear(r.waiting)
		return nil
	}
	_, err := outside.Ask(program, outside.Limit, func() (struct{}, error) {
		f, err := open(program)
		if err == nil {
			err = f.Close()
		}
		return struct{}{}, err
	})
	return err
}

// Tell executes the program for a change of a subject, now or when it has ended. A later change of the same subject takes
// the place of one that waits. Tell never waits.
func (r *Runner) Tell(subject string, values ...Value) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.program == "" || r.ctx.Err() != nil {
		return
	}
	if r.waiting[subject] == nil {
		r.order = append(r.order, subject)
	}
	r.waiting[subject] = values
	if !r.running {
		r.running = true
		r.done.Go(r.work)
	}
}

// Close kills the program if it runs, and waits for its end.
func (r *Runner) Close() {
	r.end()
	r.done.Wait()
}

// work executes the program for what waits.
func (r *Runner) work() {
	for {
		r.mu.Lock()
		if len(r.order) == 0 || r.ctx.Err() != nil {
			r.running = false
			r.mu.Unlock()
			return
		}
		subject, program := r.order[0], r.program
		values := r.waiting[subject]
		r.order = r.order[1:]
		delete(r.waiting, subject)
		r.mu.Unlock()
		if err := r.execute(program, values); err != nil && r.ctx.Err() == nil {
			r.log.Error("the program of on_change failed", "program", program, "subject", subject, "err", err)
		}
	}
}

// execute opens the program, checks it and executes what it has opened.
func (r *Runner) execute(program string, values []Value) error {
	f, err := outside.Ask(program, outside.Limit, func() (*os.File, error) { return open(program) })
	if err != nil {
		return err
	}
	defer f.Close()
	return r.executeFile(f, values)
}

func (r *Runner) executeFile(f *os.File, values []Value) error {
	cmd, err := command(f, values)
	if err != nil {
		return err
	}
	var output tail
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		return err
	}
	err = r.wait(cmd)
	if err != nil && len(output.text) > 0 {
		err = fmt.Errorf("%w; it printed %q", err, output.text)
	}
	return err
}

// wait waits for the end of a program, and kills its process group: at the limit, and what it has left behind. Until it is
// reaped no other group can have its number.
func (r *Runner) wait(cmd *exec.Cmd) error {
	pid := cmd.Process.Pid
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
			if !errors.Is(err, unix.EINTR) {
				return
			}
		}
	}()
	timer := time.NewTimer(r.limit)
	defer timer.Stop()
	var why error
	select {
	case <-ended:
	case <-timer.C:
		why = fmt.Errorf("it was killed after %v", r.limit)
	case <-r.ctx.Done():
		why = r.ctx.Err()
	}
	if err := unix.Kill(-pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		why = errors.Join(why, err)
	}
	<-ended
	err := cmd.Wait()
	if why != nil {
		return why
	}
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil // a process with a session of its own goes on
	}
	return err
}

// command is a program as it is executed: by the descriptor that it was checked by.
func command(f *os.File, values []Value) (*exec.Cmd, error) {
	if err := closeAll(); err != nil {
		return nil, err
	}
	cmd := &exec.Cmd{
		Path: fmt.Sprintf("/proc/self/fd/%d", f.Fd()), Args: []string{f.Name()}, Dir: "/", Env: []string{"PATH=" + path},
		SysProcAttr: &syscall.SysProcAttr{Setpgid: true},
		WaitDelay:   time.Second, // for output that nobody ends
	}
	magic := make([]byte, 2)
	if n, err := f.ReadAt(magic, 0); err == nil && n == len(magic) && string(magic) == "#!" {
		cmd.Path, cmd.ExtraFiles = "/proc/self/fd/3", []*os.File{f} // the interpreter reads the script from there
	}
	for _, v := range values {
		cmd.Env = append(cmd.Env, "TA_"+v.Name+"="+plain(v.Text))
	}
	return cmd, nil
}

// closeAll has the descriptors closed in programs that this process got from its parent. Those that it opens itself are.
func closeAll() error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("list the descriptors: %w", err)
	}
	for _, e := range entries {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
	return nil
}

// plain replaces what is not of the alphabet of values: names of links may have characters that mean something to a shell,
// or make a word an option.
func plain(text string) string {
	text = strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', strings.ContainsRune(" .,:%_-+", r):
			return r
		}
		return '_'
	}, text)
	if strings.HasPrefix(text, "-") {
		text = "_" + text[1:]
	}
	return text
}

// tail keeps the end of what is written.
type tail struct{ text []byte }

func (t *tail) Write(b []byte) (int, error) {
	t.text = append(t.text, b...)
	t.text = slices.Delete(t.text, 0, max(0, len(t.text)-maxOutput))
	return len(b), nil
}
