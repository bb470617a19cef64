package cli

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"log/syslog"
	"os"
	"strings"
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

// NewLogger opens the destination. A syslog that is not there is no reason not to run:
// lines go to standard error then, the first of them saying so.
func NewLogger(cfg LogConfig) (*slog.Logger, error) {
	level := slog.LevelInfo
	if cfg.Debug {
		level = slog.LevelDebug
	}
	options := &slog.HandlerOptions{Level: level}
	if cfg.Path != "" {
		f, err := os.OpenFile(cfg.Path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o640)
		if err != nil {
			return nil, fmt.Errorf("open log: %w", err)
		}
		return slog.New(textHandler(f, options)), nil
	}
	if cfg.Syslog {
		w, err := syslog.New(syslog.LOG_DAEMON|syslog.LOG_INFO, cfg.Command)
		if err == nil {
			return slog.New(newLineHandler(level, syslogEmitter(w))), nil
		}
		log := slog.New(stderrHandler(options))
		log.Warn("syslog is not there, logging to standard error", "err", err)
		return log, nil
	}
	return slog.New(stderrHandler(options)), nil
}

func textHandler(to io.Writer, options *slog.HandlerOptions) slog.Handler {
	return newTogetherHandler(to, func(w io.Writer) slog.Handler { return slog.NewTextHandler(w, options) })
}

func stderrHandler(options *slog.HandlerOptions) slog.Handler {
	if !stderrIsJournal() {
		return textHandler(os.Stderr, options)
	}
	return newTogetherHandler(os.Stderr, func(w io.Writer) slog.Handler {
		return newLineHandler(options.Level, func(level slog.Level, line string) error {
			_, err := fmt.Fprintf(w, "<%d>%s\n", priority(level), line)
			return err
		})
	})
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

func priority(level slog.Level) syslog.Priority {
	switch {
	case level >= slog.LevelError:
		return syslog.LOG_ERR
	case level >= slog.LevelWarn:
		return syslog.LOG_WARNING
	case level >= slog.LevelInfo:
		return syslog.LOG_INFO
	}
	return syslog.LOG_DEBUG
}

func syslogEmitter(w *syslog.Writer) func(slog.Level, string) error {
	return func(level slog.Level, line string) error {
		switch priority(level) {
		case syslog.LOG_ERR:
			return w.Err(line)
		case syslog.LOG_WARNING:
			return w.Warning(line)
		case syslog.LOG_INFO:
			return w.Info(line)
		}
		return w.Debug(line)
	}
}

// lineHandler hands each record as a line of text, without the time and the level that
// the receiver keeps itself.
type lineHandler struct {
	slog.Handler
	shared *lineShared
}

type lineShared struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	emit func(slog.Level, string) error
}

func newLineHandler(level slog.Leveler, emit func(slog.Level, string) error) slog.Handler {
	shared := &lineShared{emit: emit}
	text := slog.NewTextHandler(io.Writer(&shared.buf), &slog.HandlerOptions{
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
	h.shared.mu.Lock()
	defer h.shared.mu.Unlock()
	h.shared.buf.Reset()
	if err := h.Handler.Handle(ctx, r); err != nil {
		return err
	}
	return h.shared.emit(r.Level, strings.TrimSuffix(h.shared.buf.String(), "\n"))
}

func (h *lineHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &lineHandler{h.Handler.WithAttrs(attrs), h.shared}
}

func (h *lineHandler) WithGroup(name string) slog.Handler {
	return &lineHandler{h.Handler.WithGroup(name), h.shared}
}
