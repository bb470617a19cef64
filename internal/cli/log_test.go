package cli

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func noPrefix(slog.Level) string { return "" }

func TestLineHandler(t *testing.T) {
	for _, tt := range []struct {
		name string
		log  func(*slog.Logger)
		want string
	}{
		{"plain", func(l *slog.Logger) { l.Info("serving", "tables", 40) }, `msg=serving tables=40`},
		{"attrs are kept", func(l *slog.Logger) { l.With("ifname", "wan0").With("family", "inet").Warn("lost", "err", "x y") },
			`msg=lost ifname=wan0 family=inet err="x y"`},
		{"groups are kept", func(l *slog.Logger) { l.With("a", 1).WithGroup("g").With("b", 2).Info("m", "c", 3) },
			`msg=m a=1 g.b=2 g.c=3`},
		{"only our time and level are left out", func(l *slog.Logger) { l.WithGroup("g").Info("m", "time", 1, "level", 2) },
			`msg=m g.time=1 g.level=2`},
		{"newline in a value", func(l *slog.Logger) { l.Error("m", "err", errors.New("one\ntwo"), "tag", "\r\n<0>x") },
			`msg=m err="one\ntwo" tag="\r\n<0>x"`},
		{"newline in the message", func(l *slog.Logger) { l.Info("one\ntwo\n") }, `msg="one\ntwo\n"`},
		{"below the level", func(l *slog.Logger) { l.Debug("m") }, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var lines bytes.Buffer
			tt.log(slog.New(newLineHandler(&lines, slog.LevelInfo, noPrefix)))
			if got := strings.TrimSuffix(lines.String(), "\n"); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}

// TestLineHandlerShares: loggers made from one do not mix their lines up.
func TestLineHandlerShares(t *testing.T) {
	var lines bytes.Buffer
	log := slog.New(newLineHandler(&lines, slog.LevelInfo, noPrefix))
	one, two := log.With("n", 1), log.With("n", 2)
	one.Info("a")
	two.Info("b")
	one.Info("c")
	if got, want := lines.String(), "msg=a n=1\nmsg=b n=2\nmsg=c n=1\n"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// TestJournal: standard error that is the journal gets priorities, and nothing that the
// journal keeps itself.
func TestJournal(t *testing.T) {
	var st syscall.Stat_t
	if err := syscall.Fstat(2, &st); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, stream string
		want         string // "" for plain lines
	}{
		{"journal", fmt.Sprintf("%d:%d", st.Dev, st.Ino), "<7>msg=d\n<6>msg=i\n<4>msg=w\n<3>msg=e\n<3>msg=higher\n"},
		{"another stream", fmt.Sprintf("%d:%d", st.Dev, st.Ino+1), ""},
		{"none", "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("JOURNAL_STREAM", tt.stream)
			path := filepath.Join(t.TempDir(), "stderr")
			f, err := os.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			defer func(old *os.File) { os.Stderr = old }(os.Stderr)
			os.Stderr = f
			log, err := NewLogger(LogConfig{Debug: true})
			if err != nil {
				t.Fatal(err)
			}
			log.Debug("d")
			log.Info("i")
			log.Warn("w")
			log.Error("e")
			log.Log(t.Context(), slog.LevelError+4, "higher")
			Flush()
			got, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if tt.want != "" && string(got) != tt.want {
				t.Errorf("got\n%swant\n%s", got, tt.want)
			}
			if tt.want == "" && (strings.Contains(string(got), "<") || strings.Count(string(got), "time=") != 5) {
				t.Errorf("got\n%swant plain lines", got)
			}
		})
	}
}

// TestLogFIFO: a log that is a FIFO which nobody reads is refused, and does not keep the process
// from starting.
func TestLogFIFO(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := NewLogger(LogConfig{Path: path}); !errors.Is(err, syscall.ENXIO) {
		t.Errorf("without a reader: got %v, want %v", err, syscall.ENXIO)
	}
	reader, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	log, err := NewLogger(LogConfig{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	log.Info("m")
	if line, err := bufio.NewReader(reader).ReadString('\n'); !strings.HasSuffix(line, "msg=m\n") {
		t.Errorf("got %q, %v", line, err)
	}
}
