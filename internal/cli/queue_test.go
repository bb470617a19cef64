package cli

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// quiet are options without what changes from run to run.
var quiet = &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
	if a.Key == slog.TimeKey {
		return slog.Attr{}
	}
	return a
}}

// reader takes lines apart that a test has logged: counted ones, and notices of dropped ones.
type reader struct {
	t       *testing.T
	next    int // the number that comes next, or a later one where some were dropped
	lines   int
	dropped int
}

func (r *reader) take(line string) {
	r.t.Helper()
	var n int
	if _, err := fmt.Sscanf(line, "level=INFO msg=m n=%d", &n); err == nil {
		if n < r.next {
			r.t.Fatalf("line %d comes behind line %d", n, r.next-1)
		}
		r.next = n + 1
		r.lines++
		return
	}
	_, count, ok := strings.Cut(line, " lines=")
	if _, err := fmt.Sscan(count, &n); err != nil || !ok || n == 0 || !strings.HasPrefix(line, "level=WARN ") {
		r.t.Fatalf("got line %q", line)
	}
	r.dropped += n
}

// TestQueueNobodyReads: whoever logs to a pipe that nobody reads goes on. When somebody reads
// again, he has each line, or hears how many were dropped.
func TestQueueNobodyReads(t *testing.T) {
	from, to, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	log := newLogger(newQueue(to.Write), quiet, nil)
	text := strings.Repeat("x", 900)
	const all = 3 * queueMost / 900 // more than there is room for
	for n := range all {
		log.Info("m", "n", n, "text", text)
	}
	r := &reader{t: t}
	lines := bufio.NewScanner(from)
	for r.lines+r.dropped < all && lines.Scan() {
		r.take(lines.Text())
	}
	if r.dropped == 0 || r.lines == 0 || r.lines+r.dropped != all {
		t.Fatalf("%d lines read and %d dropped of %d: %v", r.lines, r.dropped, all, lines.Err())
	}
	log.Info("m", "n", all)
	if lines.Scan(); lines.Text() != fmt.Sprintf("level=INFO msg=m n=%d", all) {
		t.Errorf("afterwards: got %q", lines.Text())
	}
}

// TestQueueBurst: a reader who reads, however slowly, has all of a burst, in order.
func TestQueueBurst(t *testing.T) {
	from, to, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	log := newLogger(newQueue(to.Write), quiet, nil)
	const all = 1000
	text := strings.Repeat("x", 900)
	for n := range all {
		log.Info("m", "n", n, "text", text)
	}
	r := &reader{t: t}
	lines := bufio.NewScanner(bufio.NewReaderSize(from, 16))
	for r.lines < all && lines.Scan() {
		r.take(lines.Text())
	}
	if r.lines != all || r.dropped != 0 {
		t.Errorf("%d lines read and %d dropped of %d", r.lines, r.dropped, all)
	}
}

// TestQueueWrites: lines that wait go out together, whole, and as many as one write takes.
func TestQueueWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got []string
		var slow time.Duration
		q := newQueue(func(text []byte) (int, error) {
			time.Sleep(slow)
			got = append(got, string(text))
			return len(text), nil
		})
		q.notice = func(int) []byte { t.Error("dropped"); return nil }
		half, more := strings.Repeat("x", batchMost/2-1)+"\n", strings.Repeat("y", 2*batchMost)+"\n"
		var want []string
		check := func(name string) {
			t.Helper()
			time.Sleep(time.Minute)
			synctest.Wait()
			if strings.Join(got, "|") != strings.Join(want, "|") {
				t.Errorf("%s: %d writes, want %d", name, len(got), len(want))
			}
			got, want = nil, nil
		}
		q.Write([]byte("one\n"))
		want = []string{"one\n"}
		check("one")
		q.Write([]byte("no end"))
		want = []string{"no end\n"}
		check("what is no line becomes one")

		slow = time.Second
		q.Write([]byte("first\n"))
		synctest.Wait() // it is on its way
		for _, line := range []string{"a\n", "\n", "b\n", half, half, half, more, "c\n", "d\n"} {
			q.Write([]byte(line))
		}
		want = []string{"first\n", "a\n\nb\n" + half, half + half, more, "c\nd\n"}
		check("many")

		q.batch = 1
		q.Write([]byte("first\n"))
		synctest.Wait()
		q.Write([]byte("a\n"))
		q.Write([]byte("b\n"))
		want = []string{"first\n", "a\n", "b\n"}
		check("each by itself")
	})
}

// TestQueueFails: lines of a write that failed count as dropped, and are told of once one works.
func TestQueueFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got bytes.Buffer
		fails := true
		log := newLogger(newQueue(func(text []byte) (int, error) {
			if fails {
				return 0, errors.New("no space left")
			}
			return got.Write(text)
		}), quiet, nil)
		log.Info("a")
		synctest.Wait()
		log.Info("b")
		synctest.Wait()
		fails = false
		log.Info("c")
		synctest.Wait()
		log.Info("d")
		synctest.Wait()
		want := "level=INFO msg=c\nlevel=WARN msg=\"log lines dropped, because nobody read them in time\" lines=2\nlevel=INFO msg=d\n"
		if got.String() != want {
			t.Errorf("got\n%swant\n%s", got.String(), want)
		}
	})
}

// TestFlush: the end waits for a reader who reads, and 200 ms for one who does not.
func TestFlush(t *testing.T) {
	defer func(old []*queue) { queues = old }(queues)
	for _, tt := range []struct {
		name       string
		slow, want time.Duration
		wantLines  int
	}{
		{"reads at once", 0, 0, 2},
		{"reads", 75 * time.Millisecond, 150 * time.Millisecond, 2},
		{"reads slowly", 150 * time.Millisecond, endMost, 1},
		{"does not read", time.Hour, endMost, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				queues = []*queue{Stderr}
				var mu sync.Mutex
				lines := 0
				log := newLogger(newQueue(func(text []byte) (int, error) {
					time.Sleep(tt.slow)
					mu.Lock()
					defer mu.Unlock()
					lines++
					return len(text), nil
				}), quiet, nil)
				log.Info("a")
				synctest.Wait()
				log.Info("b")
				begun := time.Now()
				Flush()
				mu.Lock()
				if took := time.Since(begun); took != tt.want || lines != tt.wantLines {
					t.Errorf("%d lines in %v, want %d in %v", lines, took, tt.wantLines, tt.want)
				}
				mu.Unlock()
				time.Sleep(3 * time.Hour) // the writer's end
				synctest.Wait()
			})
		})
	}
}

// daemon is a syslog daemon of a test.
type daemon struct {
	close func()
	next  func() string // waits for a message
}

func (d daemon) want(t *testing.T, text string) {
	t.Helper()
	if got := d.next(); got != text {
		t.Errorf("got message %q, want %q", got, text)
	}
}

func listen(t *testing.T, network, path string) daemon {
	t.Helper()
	if network == "unixgram" {
		conn, err := net.ListenUnixgram(network, &net.UnixAddr{Name: path, Net: network})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return daemon{func() { conn.Close() }, func() string {
			buf := make([]byte, 1<<16)
			n, err := conn.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			return string(buf[:n])
		}}
	}
	l, err := net.Listen(network, path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	var lines *bufio.Reader
	var conn net.Conn
	return daemon{func() {
		l.Close()
		if conn != nil {
			conn.Close()
		}
	}, func() string {
		for {
			if lines == nil {
				if conn, err = l.Accept(); err != nil {
					t.Fatal(err)
				}
				lines = bufio.NewReader(conn)
			}
			line, err := lines.ReadString('\n')
			if err == nil {
				return line
			}
			if err != io.EOF {
				t.Fatal(err)
			}
			lines = nil
		}
	}}
}

// TestSyslog: a daemon that does not read delays nobody and has all in the end, one that is
// started again gets what comes then, and so does one that took its place.
func TestSyslog(t *testing.T) {
	for _, network := range []string{"unixgram", "unix"} {
		t.Run(network, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "log")
			d := listen(t, network, path)
			s := &syslog{path: path, patience: time.Hour}
			if err := s.dial(); err != nil {
				t.Fatal(err)
			}
			q := &queue{batch: 1, to: s.write}
			log := newLogger(q, quiet, func(level slog.Level) string { return fmt.Sprintf("<%d>", severity(level)) })
			text := strings.Repeat("x", 10_000) // 100 are more than any queue or buffer takes
			const all = 100
			for n := range all {
				log.Info(text, "n", n)
			}
			for n := range all {
				d.want(t, fmt.Sprintf("<6>msg=%s n=%d\n", text, n))
			}
			q.flush(context.Background())

			d.close()
			os.Remove(path)
			log.Info("nobody")
			q.flush(context.Background())
			log.Error("nobody either")
			q.flush(context.Background())
			d = listen(t, network, path)
			log.Warn("again")
			d.want(t, "<4>msg=again\n")
			d.want(t, "<4>msg=\"log lines dropped, because nobody read them in time\" lines=2\n")
			q.flush(context.Background())

			s.patience = time.Millisecond
			other := listen(t, network, path+"2")
			if err := os.Rename(path+"2", path); err != nil { // while the old one is there, and does not read
				t.Fatal(err)
			}
			for n := range all {
				log.Info(text, "n", n)
			}
			for {
				if got := other.next(); got == fmt.Sprintf("<6>msg=%s n=%d\n", text, all-1) {
					break
				}
			}
		})
	}
}
