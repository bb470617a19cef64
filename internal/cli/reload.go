package cli

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

// Reloads returns a channel with what load returns for each SIGHUP, or for several at once, until ctx ends. load reads
// files and looks up names of users, which the goroutine waits for and the receiver does not.
func Reloads[T any](ctx context.Context, load func() T) <-chan T {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGHUP)
	reloads := make(chan T)
	go func() {
		for {
			select {
			case <-signals:
			case <-ctx.Done():
				return
			}
			select {
			case reloads <- load():
			case <-ctx.Done():
				return
			}
		}
	}()
	return reloads
}
