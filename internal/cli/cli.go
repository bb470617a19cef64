// Package cli is what both commands share with the world around a process: where log
// lines go, when to stop, and the version. It hides log/slog's handlers, syslog and
// journald.
package cli

import (
	"context"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"
)

// Exit codes of the commands.
const (
	ExitOK    = 0
	ExitError = 1
)

// version is set by the linker (make build).
var version string

// Version is the version of this build.
func Version() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}

// once is how long a signal counts as the one before: timeout(1) sends SIGTERM to the process, and then to its process group, in
// which the process is. So does whoever relays a signal that the terminal has sent already.
const once = time.Second

// UntilSignal returns a context that ends at the first SIGTERM or SIGINT. A second later the signals have their default effect, so
// that another one kills. A reader of standard error who goes does not end the process any more.
func UntilSignal() (context.Context, context.CancelFunc) {
	surviveClosed()
	ctx, cancel := context.WithCancel(context.Background())
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, syscall.SIGTERM, os.Interrupt)
	go func() {
		defer signal.Stop(caught)
		select {
		case <-ctx.Done(): // the caller is done
		case <-caught:
			cancel()
			time.Sleep(once)
		}
	}()
	return ctx, cancel
}
