package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/cli"
)

// pipeVariable tells the process in the background that descriptor pipeFD leads to the
// one in front.
const (
	pipeVariable = "TABLE_ALLOCATOR_CLIENT_PIPE"
	pipeFD       = 3
)

// Over the pipe go lines for standard error, then the one line that ends it: the table,
// and behind a space why there is none.
const remark = "! "

// foreground starts the process that does everything, waits for its answer and prints it.
func foreground() error {
	report := reportTo(os.Stdout)
	answers, err := startBackground()
	if err != nil {
		report(0, err.Error())
		return nil
	}
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
		report(uint32(table), why)
		return nil
	}
	report(0, "the process in the background ended without an answer")
	return nil
}

// startBackground runs this command line again in a session of its own, with no
// descriptor of the caller's: the caller may be waiting for its end of a pipe to close,
// or hold a lock.
func startBackground() (answers *os.File, err error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find own program: %w", err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	answers, pipe, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make a pipe: %w", err)
	}
	defer pipe.Close()
	if err := closeOnExec(); err != nil {
		return nil, err
	}
	// What is ignored stays ignored across exec; what is caught gets its default back.
	if ignored := ignoredSignals(); len(ignored) > 0 {
		caught := make(chan os.Signal, 1)
		signal.Notify(caught, ignored...)
		defer signal.Stop(caught)
	}
	// The mask of this thread is the one that the new process begins with.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var none, before unix.Sigset_t
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &none, &before); err != nil {
		return nil, fmt.Errorf("clear the signal mask: %w", err)
	}
	// os.StartProcess begins with another process, to see whether pidfds work.
	// There may be many such processes, and one processor at a time takes a fifth less memory.
	// What the caller has set comes first, and counts.
	_, err = syscall.ForkExec(exe, os.Args, &syscall.ProcAttr{
		Env:   append(os.Environ(), "GOMAXPROCS=1", pipeVariable+"="+strconv.Itoa(pipeFD)),
		Files: []uintptr{null.Fd(), null.Fd(), null.Fd(), pipe.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	err = errors.Join(err, unix.PthreadSigmask(unix.SIG_SETMASK, &before, nil))
	if err != nil {
		return nil, fmt.Errorf("start the process in the background: %w", err)
	}
	return answers, nil
}

// ignoredSignals lists the signals that are ignored now: the runtime catches most of them by
// itself. Those that belong to the C library, which the runtime leaves as it finds them, get
// their default here.
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

// closeOnExec keeps everything above standard error from being inherited.
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

// parentPipe leads to the process in front, in the one that it started.
func parentPipe() *os.File {
	if os.Getenv(pipeVariable) != strconv.Itoa(pipeFD) {
		return nil
	}
	os.Unsetenv(pipeVariable)
	unix.CloseOnExec(pipeFD)
	return os.NewFile(pipeFD, "pipe")
}

// background holds the lease. Until it has reported, what it warns of is for the person
// at the terminal, too.
func (h *holdFlags) background(parent *os.File) error {
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
	return h.lease(pipe.report, slog.New(slog.NewMultiHandler(log.Handler(), toParent)))
}

func withoutTime(groups []string, a slog.Attr) slog.Attr {
	if len(groups) == 0 && a.Key == slog.TimeKey {
		return slog.Attr{}
	}
	return a
}

// parentWriter writes remarks to the process in front, for as long as that process waits. The pipe
// has room for all of them and the answer behind them, lest that process stands still.
type parentWriter struct {
	file *os.File
	size int // of the remarks
	done atomic.Bool
}

const remarksMost = 16 << 10

func (w *parentWriter) Write(line []byte) (int, error) {
	if w.size += len(remark) + len(line); w.size <= remarksMost && !w.done.Load() {
		// Whoever waited may have been killed; the lease is wanted all the same.
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
