package server

import (
	"context"
	"log/slog"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// hung is a log that never takes the line with a text: whoever writes it holds the mutex for ever.
type hung struct {
	slog.Handler
	text    string
	release chan struct{}
}

func (h hung) Enabled(context.Context, slog.Level) bool { return true }

func (h hung) Handle(_ context.Context, r slog.Record) error {
	if r.Message == h.text {
		<-h.release
	}
	return nil
}

// TestWatchdogDeadlock: the service manager hears nothing more of a server of which a loop does not
// come round.
func TestWatchdogDeadlock(t *testing.T) {
	const period = 50 * time.Millisecond
	cfg := Default()
	cfg.SocketName = "watchdog-test-" + strconv.Itoa(int(time.Now().UnixNano()))
	cfg.Database = filepath.Join(t.TempDir(), "leases.db")
	release := make(chan struct{})
	log := slog.New(hung{slog.DiscardHandler, "malformed datagram", release})
	pings := make(chan struct{}, 1000)
	ready := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() {
		ended <- Run(ctx, cfg, Host{
			Ready:       func() error { close(ready); return nil },
			Alive:       func() error { pings <- struct{}{}; return nil },
			AlivePeriod: period,
		}, log)
	}()
	<-ready
	for range 5 {
		<-pings
	}
	to, err := wire.Exact(cfg.SocketName)
	if err != nil {
		t.Fatal(err)
	}
	if err := wire.SendApart(wire.Message{Data: []byte("{"), To: to}); err != nil {
		t.Fatal(err)
	}
	for quiet := false; !quiet; {
		select {
		case <-pings:
		case <-time.After(20 * period):
			quiet = true
		}
	}
	close(release)
	<-pings
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestWatchdogWrites: the time of writes to the database does not count, but any other does, in
// between, too.
func TestWatchdogWrites(t *testing.T) {
	var writing atomic.Int64
	w := watchdog{writing: func() time.Duration { return time.Duration(writing.Load()) }}
	one, other := w.add(), w.add()
	const patience = 20 * time.Second
	age := func(l *loop, d time.Duration) { l.began.Add(-int64(d)) }
	w.begin(one)
	if w.stuck(patience) {
		t.Error("stuck at once")
	}
	age(one, time.Minute)
	writing.Add(int64(time.Minute)) // one write
	if w.stuck(patience) {
		t.Error("stuck, while the database is written to")
	}
	age(one, 21*time.Second)
	if !w.stuck(patience) {
		t.Error("not stuck")
	}
	one.end()
	if w.stuck(patience) {
		t.Error("stuck, while both loops wait for work")
	}
	// The other loop goes on, and writes, while one is stuck for another reason.
	w.begin(one)
	for range 30 {
		w.begin(other)
		age(one, time.Second)
		writing.Add(int64(100 * time.Millisecond))
		other.end()
	}
	if !w.stuck(patience) {
		t.Error("not stuck beside a loop that is not")
	}
}
