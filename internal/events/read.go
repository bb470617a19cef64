package events

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/table-allocator/table-allocator/internal/remember"
)

const lookEvery = 200 * time.Millisecond // for new events

// Read returns the events of the caller's network namespace, in order.
func Read() (all []Event, err error) { return read(Path, Namespace()) }

func read(path string, netns uint64) (all []Event, err error) {
	for _, name := range []string{path + ".1", path} {
		f, err := remember.Open(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		t := tail{f: f, netns: netns}
		err = t.more(func(e Event) error { all = append(all, e); return nil })
		f.Close()
		if err != nil {
			return nil, err
		}
	}
	return all, nil
}

// Follow calls f for each event of the caller's network namespace from now on, in order, until ctx ends or f fails.
func Follow(ctx context.Context, f func(Event) error) error { return follow(ctx, Path, Namespace(), f) }

func follow(ctx context.Context, path string, netns uint64, f func(Event) error) error {
	t := tail{netns: netns}
	defer func() { t.close() }()
	for first := true; ; first = false {
		if err := t.open(path, first); err != nil {
			return err
		}
		if err := t.more(f); err != nil {
			return err
		}
		if t.replaced(path) { // what is written to it until now counts
			if err := t.more(f); err != nil {
				return err
			}
			t.close()
			continue
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(lookEvery):
		}
	}
}

// tail is a file that grows.
type tail struct {
	f     *os.File
	netns uint64
	part  []byte // of a line
}

// open opens the file if none is open and there is one. atEnd skips what it has.
func (t *tail) open(path string, atEnd bool) error {
	if t.f != nil {
		return nil
	}
	f, err := remember.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	t.f, t.part = f, nil
	if atEnd {
		_, err = f.Seek(0, io.SeekEnd)
	}
	return err
}

func (t *tail) close() {
	if t.f != nil {
		t.f.Close()
		t.f = nil
	}
}

// replaced reports whether the path is another file now.
func (t *tail) replaced(path string) bool {
	if t.f == nil {
		return false
	}
	now, err := os.Lstat(path)
	open, openErr := t.f.Stat()
	return openErr == nil && (errors.Is(err, fs.ErrNotExist) || err == nil && !os.SameFile(now, open))
}

// more calls f for the whole lines that the file has by now. A line that is none of ours is left out.
func (t *tail) more(f func(Event) error) error {
	if t.f == nil {
		return nil
	}
	lines := bufio.NewReader(t.f)
	for {
		line, err := lines.ReadSlice('\n')
		if err == io.EOF || err == bufio.ErrBufferFull {
			t.part = append(t.part, line...)
			if err == io.EOF {
				return nil
			}
			continue
		}
		if err != nil {
			return err
		}
		var e Event
		wrong := json.Unmarshal(append(t.part, line...), &e)
		t.part = nil
		if wrong != nil || e.Netns != t.netns {
			continue
		}
		if err := f(e); err != nil {
			return err
		}
	}
}
