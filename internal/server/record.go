package server

import (
	"context"
	"log/slog"
	"time"

	"golang.org/x/time/rate"

	"github.com/table-allocator/table-allocator/internal/allocator"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// record is what the log says of an operation.
type record struct {
	cred   wire.Cred
	op     allocator.Op
	result allocator.Result
}

// recorder writes what the log says of operations.
type recorder struct {
	log   *slog.Logger
	attrs []slog.Attr // of a line
}

func (w *recorder) wants(o allocator.Outcome) bool {
	level := slog.LevelInfo
	if o == allocator.Renewed {
		level = slog.LevelDebug
	}
	return o != allocator.NotHeld && w.log.Enabled(context.Background(), level)
}

func (w *recorder) write(r *record) {
	uid, pid := slog.Uint64("uid", uint64(r.cred.UID)), slog.Int("pid", int(r.cred.PID))
	write := func(level slog.Level, msg string) {
		w.attrs = append(leaseAttrs(w.attrs[:0], r.result.Lease), pid, uid)
		// A Logger would look for the line of this call, and copy the attributes.
		line := slog.NewRecord(time.Now(), level, msg, 0)
		line.AddAttrs(slog.Attr{Value: slog.GroupValue(w.attrs...)})
		_ = w.log.Handler().Handle(context.Background(), line) // as a Logger does
	}
	switch r.result.Outcome {
	case allocator.Granted:
		write(slog.LevelInfo, "lease granted")
	case allocator.Released:
		write(slog.LevelInfo, "lease released")
	case allocator.Renewed:
		write(slog.LevelDebug, "lease renewed")
	case allocator.Refused:
		w.log.LogAttrs(context.Background(), slog.LevelWarn, "lease refused", slog.String("ifname", r.op.Key.Ifname),
			slog.String("addr", r.op.Key.Addr), slog.String("family", r.op.Key.Family.String()), slog.String("tag", r.op.Tag),
			uid, pid, slog.Any("err", r.result.Err))
	}
}

func leaseAttrs(to []slog.Attr, l allocator.Lease) []slog.Attr {
	return append(to,
		slog.String("ifname", l.Key.Ifname),
		slog.String("addr", l.Key.Addr),
		slog.String("family", l.Key.Family.String()),
		slog.Uint64("table", uint64(l.Table)),
		slog.String("tag", l.Tag),
		slog.Uint64("owner", uint64(l.Owner)),
		slog.Int64("expires", l.Expires),
	)
}

// throttle bounds the rate of log lines that somebody else can cause as fast as he likes.
type throttle struct {
	log    *slog.Logger
	rate   *rate.Limiter
	hidden int // lines that were not written
}

func newThrottle(log *slog.Logger) *throttle {
	return &throttle{log: log, rate: rate.NewLimiter(1, 10)}
}

func (t *throttle) write(level slog.Level, msg string, args ...any) {
	if !t.rate.Allow() {
		t.hidden++
		return
	}
	if t.hidden > 0 {
		args = append(args, "hidden", t.hidden) // lines like this before it
		t.hidden = 0
	}
	t.log.Log(context.Background(), level, msg, args...)
}
