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

// UntilSignal returns a context that ends at the first SIGTERM or SIGINT. From then on
// the signals have their default effect, so that a second one kills. A reader of standard
// error who goes does not end the process any more.
func UntilSignal() (context.Context, context.CancelFunc) {
	surviveClosed()
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	context.AfterFunc(ctx, cancel)
	return ctx, cancel
}
