package cli

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

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
			var lines []string
			log := slog.New(newLineHandler(slog.LevelInfo, func(_ slog.Level, line string) error {
				lines = append(lines, line)
				return nil
			}))
			tt.log(log)
			if got := strings.Join(lines, "\n"); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}

// TestLineHandlerShares: loggers made from one do not mix their lines up.
func TestLineHandlerShares(t *testing.T) {
	var lines []string
	log := slog.New(newLineHandler(slog.LevelInfo, func(_ slog.Level, line string) error {
		lines = append(lines, line)
		return nil
	}))
	one, two := log.With("n", 1), log.With("n", 2)
	one.Info("a")
	two.Info("b")
	one.Info("c")
	if got, want := strings.Join(lines, "|"), "msg=a n=1|msg=b n=2|msg=c n=1"; got != want {
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

// writes are what a log wrote, each by itself.
type writes []string

func (w *writes) Write(text []byte) (int, error) {
	*w = append(*w, string(text))
	return len(text), nil
}

func TestTogether(t *testing.T) {
	var to writes
	options := &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}
	log := slog.New(textHandler(&to, options)).With("n", 1)
	want := func(lines ...string) {
		t.Helper()
		if !slices.Equal(to, lines) {
			t.Errorf("got %q, want %q", []string(to), lines)
		}
		to = nil
	}
	log.Info("a")
	log.Info("b")
	want("level=INFO msg=a n=1\n", "level=INFO msg=b n=1\n")

	Together(log, func() {
		log.Info("a")
		Together(log, func() { log.Info("b") })
		want()
		log.Debug("nothing")
		log.Info("c")
	})
	want("level=INFO msg=a n=1\nlevel=INFO msg=b n=1\nlevel=INFO msg=c n=1\n")
	Together(log, func() {})
	want()

	func() {
		defer func() { _ = recover() }() // the panic below
		Together(log, func() {
			log.Error("last words")
			panic("bug")
		})
	}()
	want("level=ERROR msg=\"last words\" n=1\n")
	log.Info("after")
	want("level=INFO msg=after n=1\n")

	long := strings.Repeat("x", heldMost/2)
	Together(log, func() {
		log.Info(long)
		want()
		log.Info(long)
		if len(to) != 1 {
			t.Errorf("%d writes of more than is kept", len(to))
		}
		to = nil
	})
	want()
	Together(slog.New(slog.DiscardHandler), func() { log.Info("other") })
	want("level=INFO msg=other n=1\n")
}
