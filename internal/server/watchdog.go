package server

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"
)

// watchdog finds out whether the loops work, without the mutex that they work under. Its clock
// stands still while the database is written to: a disk may hang, and a server that is killed for
// that forgets who waits.
type watchdog struct {
	writing func() time.Duration // how long, in all, the database has been written to
	loops   []*loop
}

// loop is when a round of one began, by the watchdog's clock; 0 while it waits for work.
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

// stuck reports whether a loop has not come round for so long, because of itself or because of
// another one that holds the mutex.
func (w *watchdog) stuck(patience time.Duration) bool {
	now := w.now()
	for _, l := range w.loops {
		if began := l.began.Load(); began != 0 && now-began > int64(patience) {
			return true
		}
	}
	return false
}

// live tells the service manager that the server works, as long as it does.
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
			s.log.Log(ctx, slog.LevelError, "a loop of the server is stuck, so the service manager is not told that it works")
			continue
		}
		s.tell(host.Alive)
	}
}
