package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"syscall"
)

// LogConfig says where log lines go. Without anything they go to standard error.
type LogConfig struct {
	Command string // the name in syslog
	Syslog  bool
	Path    string // a file that lines are appended to
	Debug   bool
}

// NewLogger opens the destination of the process's log. Whoever logs never waits for it: lines
// are queued, and dropped when too many wait; a line says how many were. A syslog that is not
// there is no reason not to run: lines go to standard error then, the first of them saying so.
func NewLogger(cfg LogConfig) (*slog.Logger, error) {
	options := &slog.HandlerOptions{Level: slog.LevelInfo}
	if cfg.Debug {
		options.Level = slog.LevelDebug
	}
	if cfg.Path != "" {
		// Without waiting, as for the reader of a FIFO.
		f, err := os.OpenFile(cfg.Path, os.O_APPEND|os.O_CREATE|os.O_WRONLY|syscall.O_NONBLOCK, 0o640)
		if err != nil {
			return nil, fmt.Errorf("open log: %w", err)
		}
		return newLogger(newQueue(f.Write), options, nil), nil
	}
	var syslogErr error
	if cfg.Syslog {
		s := newSyslog()
		if syslogErr = s.dial(); syslogErr == nil || errors.Is(syslogErr, syscall.EAGAIN) { // is there, and slow
			return newLogger(&queue{batch: 1, to: s.write}, options, syslogPrefix(cfg.Command)), nil
		}
	}
	var prefix func(slog.Level) string
	if stderrIsJournal() {
		prefix = func(level slog.Level) string { return fmt.Sprintf("<%d>", severity(level)) }
	}
	log := newLogger(Stderr, options, prefix)
	if syslogErr != nil {
		log.Warn("syslog is not there, logging to standard error", "err", syslogErr)
	}
	return log, nil
}

// newLogger makes the logger of a queue. With a prefix, who reads keeps time and level itself.
func newLogger(q *queue, options *slog.HandlerOptions, prefix func(slog.Level) string) *slog.Logger {
	to := func(w io.Writer) *slog.Logger {
		if prefix == nil {
			return slog.New(slog.NewTextHandler(w, options))
		}
		return slog.New(newLineHandler(w, options.Level, prefix))
	}
	q.mu.Lock()
	q.notice = func(dropped int) []byte {
		var line bytes.Buffer
		to(&line).Warn("log lines dropped, because nobody read them in time", "lines", dropped)
		return line.Bytes()
	}
	q.mu.Unlock()
	if q != Stderr {
		queues = append(queues, q)
	}
	return to(q)
}

// stderrIsJournal follows systemd.exec(5): JOURNAL_STREAM names the device and inode of
// the stream, which a redirected stderr is not.
func stderrIsJournal() bool {
	var st syscall.Stat_t
	if syscall.Fstat(2, &st) != nil {
		return false
	}
	return os.Getenv("JOURNAL_STREAM") == fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}

// severity is the level as syslog(3) and the journal have it.
func severity(level slog.Level) int {
	switch {
	case level >= slog.LevelError:
		return 3
	case level >= slog.LevelWarn:
		return 4
	case level >= slog.LevelInfo:
		return 6
	}
	return 7
}

// lineHandler writes a prefix and the record's text, without the time and the level that the
// receiver keeps itself.
type lineHandler struct {
	slog.Handler
	shared *lineShared
}

type lineShared struct {
	to     io.Writer
	prefix func(slog.Level) string
	mu     sync.Mutex
	buf    bytes.Buffer
}

func newLineHandler(to io.Writer, level slog.Leveler, prefix func(slog.Level) string) slog.Handler {
	shared := &lineShared{to: to, prefix: prefix}
	text := slog.NewTextHandler(&shared.buf, &slog.HandlerOptions{
		Level: level,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey) {
				return slog.Attr{}
			}
			return a
		},
	})
	return &lineHandler{text, shared}
}

func (h *lineHandler) Handle(ctx context.Context, r slog.Record) error {
	s := h.shared
	s.mu.Lock()
	defer s.mu.Unlock()
	s.buf.Reset()
	s.buf.WriteString(s.prefix(r.Level))
	if err := h.Handler.Handle(ctx, r); err != nil {
		return err
	}
	_, err := s.to.Write(s.buf.Bytes())
	return err
}

func (h *lineHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &lineHandler{h.Handler.WithAttrs(attrs), h.shared}
}

func (h *lineHandler) WithGroup(name string) slog.Handler {
	return &lineHandler{h.Handler.WithGroup(name), h.shared}
}
