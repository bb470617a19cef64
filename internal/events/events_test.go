package events

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// Several writers fill the files more than once: what is read is whole, the newest, and no more than two files.
func TestTurns(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events")
	var all sync.WaitGroup
	const writers, each = 3, 2000
	text := strings.Repeat("x", 2*mostText)
	for n := range writers {
		w := newWriter(path, quiet)
		all.Go(func() {
			for i := range each {
				w.Append(Event{What: Served, Ifname: fmt.Sprint("wan", n), Table: uint32(i + 1), Text: text})
				if i%100 == 99 { // else most are dropped
					w.Close()
				}
			}
			w.Close()
		})
	}
	all.Wait()
	for n := range writers { // whose events others may have pushed out
		w := newWriter(path, quiet)
		w.Append(Event{What: Served, Ifname: fmt.Sprint("wan", n), Table: each + 1, Text: text})
		w.Close()
	}
	got, err := read(path, Namespace())
	if err != nil {
		t.Fatal(err)
	}
	last := make(map[string]uint32)
	for _, e := range got {
		if e.Table <= last[e.Ifname] || len(e.Text) != mostText {
			t.Fatalf("%+v comes after %d", e, last[e.Ifname])
		}
		last[e.Ifname] = e.Table
	}
	for n := range writers {
		if name := fmt.Sprint("wan", n); last[name] != each+1 {
			t.Errorf("the last event of %s is %d", name, last[name])
		}
	}
	files, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(files) != 2 {
		t.Errorf("files: %v, %v", files, err)
	}
	for _, f := range files { // writers that look at the same moment may each add a batch
		if info, err := f.Info(); err != nil || info.Size() > MaxFile+(writers-1)*mostWaiting*(mostText+200) || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f.Name(), info, err)
		}
	}
}

// What cannot be written is counted in the next event that can.
func TestDropped(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "events")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	w := newWriter(path, quiet)
	for range 3 { // each by itself: the count of those before goes with one
		w.Append(Event{What: Served})
		w.Close()
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	w.Append(Event{What: Ended})
	w.Close()
	got, err := read(path, Namespace())
	if err != nil || len(got) != 1 || got[0].What != Ended || got[0].Dropped != 3 {
		t.Errorf("%+v, %v", got, err)
	}
}

// Follow sees what is appended from now on, in order, also when the file becomes the older one, and none of another
// namespace.
func TestFollow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events")
	w := newWriter(path, quiet)
	other := newWriter(path, quiet)
	other.netns++
	w.Append(Event{What: Started, Table: 1})
	w.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	next, end := uint32(2), errors.New("enough")
	const last = 4000
	ready, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		<-ready
		for n := uint32(2); n <= last; n++ {
			w.Append(Event{What: Served, Table: n, Text: strings.Repeat("x", mostText)})
			other.Append(Event{What: Served})
			if n%50 == 0 {
				w.Close()
				other.Close()
			}
		}
		for ctx.Err() == nil { // follow may begin late
			w.Append(Event{What: Served, Table: last})
			w.Close()
		}
	}()
	time.AfterFunc(10*time.Millisecond, func() { close(ready) })
	err := follow(ctx, path, Namespace(), func(e Event) error {
		if e.Table == 1 {
			return errors.New("what was before is shown")
		}
		if e.Table < next {
			return fmt.Errorf("%d comes after %d", e.Table, next-1)
		}
		if next = e.Table + 1; e.Table == last {
			return end
		}
		return nil
	}, func(err error) { t.Logf("the file system: %v", err) })
	if !errors.Is(err, end) {
		t.Errorf("follow: %v, next is %d", err, next)
	}
	cancel()
	<-done // it writes into the directory, which goes now
	w.Close()
	other.Close()
}
