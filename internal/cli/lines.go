package cli

import (
	"io"
	"log/slog"
	"sync"
)

// Together runs f, and writes the lines that it logs with few system calls: one for a line
// costs more than to make the line. Where each line is a message of its own, as in syslog,
// it only runs f.
func Together(log *slog.Logger, f func()) {
	h, ok := log.Handler().(*togetherHandler)
	if !ok {
		f()
		return
	}
	h.lines.hold()
	defer h.lines.release()
	f()
}

// togetherHandler is a handler that writes to lines.
type togetherHandler struct {
	slog.Handler
	lines *lines
}

func newTogetherHandler(to io.Writer, handler func(io.Writer) slog.Handler) slog.Handler {
	l := &lines{to: to}
	return &togetherHandler{handler(l), l}
}

func (h *togetherHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &togetherHandler{h.Handler.WithAttrs(attrs), h.lines}
}

func (h *togetherHandler) WithGroup(name string) slog.Handler {
	return &togetherHandler{h.Handler.WithGroup(name), h.lines}
}

// lines passes each Write on at once, or together with others.
type lines struct {
	to io.Writer

	mu      sync.Mutex
	holding int
	held    []byte
}

// heldMost bounds the memory of lines that wait.
const heldMost = 64 << 10

func (l *lines) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.holding == 0 {
		return l.to.Write(line)
	}
	l.held = append(l.held, line...)
	if len(l.held) < heldMost {
		return len(line), nil
	}
	return len(line), l.flush()
}

func (l *lines) hold() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.holding++
}

func (l *lines) release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.holding--; l.holding == 0 {
		_ = l.flush() // nobody hears of lines that cannot be written, as ever
	}
}

func (l *lines) flush() error {
	if len(l.held) == 0 {
		return nil
	}
	_, err := l.to.Write(l.held)
	l.held = l.held[:0]
	return err
}
