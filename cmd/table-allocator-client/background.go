package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/cli"
)

// pipeVariable names the environment variable by which the process in the background knows that
// descriptor pipeFD is a pipe to the process in the foreground.
const (
	pipeVariable = "TABLE_ALLOCATOR_CLIENT_PIPE"
	pipeFD       = 3
)

// remark begins a line for standard error. The last line in the pipe is the table's number, followed by
// a space and the reason if there is no table.
const remark = "! "

// foreground starts the process in the background, waits for its answer and prints it.
func foreground() error {
	report := reportTo(os.Stdout)
	answers, err := startHolder(os.Args[1:])
	if err != nil {
		report(0, err.Error())
		return nil
	}
	report(answer(answers))
	return nil
}

// answer waits for the table, or why there is none.
func answer(answers *os.File) (table uint32, why string) {
	defer answers.Close()
	lines := bufio.NewScanner(answers)
	for lines.Scan() {
		if text, ok := strings.CutPrefix(lines.Text(), remark); ok {
			warn(text)
			continue
		}
		number, why, _ := strings.Cut(lines.Text(), " ")
		table, err := strconv.ParseUint(number, 10, 32)
		if err != nil {
			break
		}
		return uint32(table), why
	}
	if errors.Is(lines.Err(), os.ErrDeadlineExceeded) {
		return 0, "the process in the background has not answered yet"
	}
	return 0, "the process in the background ended without an answer"
}

// startHolder starts the process that holds the lease of a command line.
func startHolder(args []string) (answers *os.File, err error) {
	answers, pipe, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make a pipe: %w", err)
	}
	defer pipe.Close()
	_, err = start(args, "", []string{pipeVariable + "=" + strconv.Itoa(pipeFD)}, pipe.Fd())
	if err != nil {
		answers.Close()
		return nil, err
	}
	return answers, nil
}

// start runs this program with other arguments in a session of its own. The new process inherits no
// descriptor of the caller but those in more, which become its descriptors from 3 on, since the caller
// may wait until its pipe is closed, or hold a lock by one. dir is the working directory, "" the caller's.
func start(args []string, dir string, env []string, more ...uintptr) (pid int, err error) {
	exe, err := executable()
	if err != nil {
		return 0, fmt.Errorf("find own program: %w", err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	if err := closeOnExec(); err != nil {
		return 0, err
	}
	// A signal that is ignored stays ignored across exec; one that is caught gets its default action.
	if ignored := ignoredSignals(); len(ignored) > 0 {
		caught := make(chan os.Signal, 1)
		signal.Notify(caught, ignored...)
		defer signal.Stop(caught)
	}
	// The new process begins with the signal mask of this thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var none, before unix.Sigset_t
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &none, &before); err != nil {
		return 0, fmt.Errorf("clear the signal mask: %w", err)
	}
	// Not os.StartProcess: that starts one more process first, to see whether pidfds work.
	// A host may have many clients, and GOMAXPROCS=1 saves a fifth of their memory. It comes last,
	// so that a value which the caller has set counts.
	pid, err = syscall.ForkExec(exe, append([]string{os.Args[0]}, args...), &syscall.ProcAttr{
		Dir:   dir,
		Env:   slices.Concat(os.Environ(), []string{"GOMAXPROCS=1"}, env),
		Files: append([]uintptr{null.Fd(), null.Fd(), null.Fd()}, more...),
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	err = errors.Join(err, unix.PthreadSigmask(unix.SIG_SETMASK, &before, nil))
	if err != nil {
		return 0, fmt.Errorf("start the process in the background: %w", err)
	}
	return pid, nil
}

// executable is the path of this program: by the name that it was called by, if /proc is not mounted.
func executable() (string, error) {
	exe, err := os.Executable()
	if err == nil {
		return exe, nil
	}
	if exe, err = exec.LookPath(os.Args[0]); err != nil {
		return "", err
	}
	return filepath.Abs(exe)
}

// ignoredSignals returns the signals that are ignored now and that signal.Notify can catch. The two
// signals of the C library, which the runtime never touches, get their default action here.
func ignoredSignals() (ignored []os.Signal) {
	const (
		last            = 64
		ofC, lastOfC    = 32, 33 // SIGCANCEL and SIGSETXID of glibc
		handlerIgnore   = 1      // SIG_IGN
		sizeOfSignalSet = 8
	)
	for sig := uintptr(1); sig <= last; sig++ {
		var action, before [8]uint64 // a struct sigaction of the kernel, on any machine; zero is SIG_DFL
		_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, sig, 0, uintptr(unsafe.Pointer(&before)), sizeOfSignalSet, 0, 0)
		switch {
		case errno != 0 || *(*uintptr)(unsafe.Pointer(&before)) != handlerIgnore:
		case sig >= ofC && sig <= lastOfC:
			unix.RawSyscall6(unix.SYS_RT_SIGACTION, sig, uintptr(unsafe.Pointer(&action)), 0, sizeOfSignalSet, 0, 0)
		default:
			ignored = append(ignored, syscall.Signal(sig))
		}
	}
	return ignored
}

// closeOnExec keeps all descriptors above standard error from being inherited.
func closeOnExec() error {
	err := unix.CloseRange(pipeFD, ^uint(0), unix.CLOSE_RANGE_CLOEXEC)
	if err == nil {
		return nil
	}
	// Before Linux 5.11.
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("list own descriptors: %w", err)
	}
	for _, entry := range fds {
		if fd, err := strconv.Atoi(entry.Name()); err == nil && fd >= pipeFD {
			unix.CloseOnExec(fd)
		}
	}
	return nil
}

// parentPipe returns the pipe to the process in the foreground, or nil if this process was not started
// by one.
func parentPipe() *os.File {
	if os.Getenv(pipeVariable) != strconv.Itoa(pipeFD) {
		return nil
	}
	os.Unsetenv(pipeVariable)
	unix.CloseOnExec(pipeFD)
	return os.NewFile(pipeFD, "pipe")
}

// dropHangups makes SIGHUP do nothing. A client in the background has no terminal to lose and no configuration to read
// again, and who sends SIGHUP to every process of a host does not mean that its rules go.
func dropHangups() { signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP) }

// background holds the lease. Until the table is reported, warnings go to the terminal of the caller,
// too.
func (h *holdFlags) background(parent *os.File) error {
	dropHangups()
	pipe := &parentWriter{file: parent}
	h.log.Syslog = true // unless there is a path
	log, err := cli.NewLogger(h.log)
	if err == nil {
		err = os.Chdir(string(filepath.Separator))
	}
	if err != nil {
		pipe.report(0, err.Error())
		return exitError{cli.ExitError}
	}
	toParent := slog.NewTextHandler(pipe, &slog.HandlerOptions{Level: slog.LevelWarn, ReplaceAttr: withoutTime})
	return h.holdLease(pipe.report, slog.New(slog.NewMultiHandler(log.Handler(), toParent)))
}

func withoutTime(groups []string, a slog.Attr) slog.Attr {
	if len(groups) == 0 && a.Key == slog.TimeKey {
		return slog.Attr{}
	}
	return a
}

// parentWriter writes remarks to the process in the foreground, for as long as that process waits. The
// pipe has room for all remarks and the answer, so a write to it never blocks.
type parentWriter struct {
	file *os.File
	size int // of the remarks
	done atomic.Bool
}

const remarksMost = 16 << 10

func (w *parentWriter) Write(line []byte) (int, error) {
	if w.size += len(remark) + len(line); w.size <= remarksMost && !w.done.Load() {
		// The process in the foreground may have been killed; the lease is wanted all the same.
		_, _ = io.WriteString(w.file, remark+string(line))
	}
	return len(line), nil
}

func (w *parentWriter) report(table uint32, why string) {
	if w.done.Swap(true) {
		return
	}
	text := strconv.FormatUint(uint64(table), 10)
	if why != "" {
		text += " " + strings.ReplaceAll(why, "\n", "; ")
	}
	_, _ = io.WriteString(w.file, text+"\n") // as above
	w.file.Close()
}
