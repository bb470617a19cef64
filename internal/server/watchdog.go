package server

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"
)

// watchdog finds out whether the loops work, without the server's mutex. Its clock stands still while
// the database is written to: the service manager must not kill the server because a disk hangs, since
// a new one would wait for the same disk.
type watchdog struct {
	writing func() time.Duration // how long, in all, the database has been written to
	loops   []*loop
}

// loop is a loop of the server. began is when its round began, by the watchdog's clock; 0 while the loop
// waits for something to do.
type loop struct{ began atomic.Int64 }

var started = time.Now()

func (w *watchdog) now() int64 { return int64(time.Since(started) - w.writing()) }

func (w *watchdog) add() *loop {
	l := &loop{}
	w.loops = append(w.loops, l)
	return l
}

func (w *watchdog) begin(l *loop) { l.began.Store(w.now()) }

func (l *loop) end() { l.began.Store(0) }

// stuck reports whether the round of a loop takes longer than patience: the loop itself hangs, or it
// waits for the mutex.
func (w *watchdog) stuck(patience time.Duration) bool {
	now := w.now()
	for _, l := range w.loops {
		if began := l.began.Load(); began != 0 && now-began > int64(patience) {
			return true
		}
	}
	return false
}

// live notifies the service manager each period, unless a loop is stuck.
func (s *server) live(ctx context.Context, host Host) {
	t := time.NewTicker(host.AlivePeriod)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		if s.watchdog.stuck(host.AlivePeriod * 4 / 3) { // 20 s with the unit's WatchdogSec=30
			s.log.Log(ctx, slog.LevelError, "a loop is stuck, so the service manager hears nothing and will restart the server")
			continue
		}
		s.tell(host.Alive)
	}
}
