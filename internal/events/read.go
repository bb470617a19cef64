package events

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/remember"
)

const lookEvery = 200 * time.Millisecond // for new events

// Read returns the events of the caller's network namespace, in order.
func Read() (all []Event, err error) {
	return read(Path, Namespace())
}

func read(path string, netns uint64) (all []Event, err error) {
	for _, name := range []string{path + ".1", path} {
		t := tail{netns: netns}
		if err := t.open(name, false); err != nil {
			return nil, err
		}
		err = t.more(func(e Event) error { all = append(all, e); return nil })
		t.close()
		if err != nil {
			return nil, err
		}
	}
	return all, nil
}

// Follow calls f for each event of the caller's network namespace from now on, in order, until ctx ends or f fails. It calls silent
// once whenever the file system stops to answer, and goes on when that answers again.
func Follow(ctx context.Context, f func(Event) error, silent func(error)) error {
	return follow(ctx, Path, Namespace(), f, silent)
}

func follow(ctx context.Context, path string, netns uint64, f func(Event) error, silent func(error)) error {
	t := tail{netns: netns}
	defer func() { t.close() }()
	told := false
	for first := true; ; {
		switched, err := t.step(path, first, f)
		switch {
		case errors.Is(err, outside.ErrSilent):
			if !told {
				silent(err)
			}
			told = true
		case err != nil:
			return err
		default:
			told, first = false, false
		}
		if switched {
			continue
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(lookEvery):
		}
	}
}

// step calls f for what the file has by now. switched says that the path is another file, which is read next.
func (t *tail) step(path string, atEnd bool, f func(Event) error) (switched bool, err error) {
	if err = t.open(path, atEnd); err == nil {
		err = t.more(f)
	}
	if err == nil {
		switched, err = t.replaced(path)
	}
	if err == nil && switched { // what was written to it until now counts
		if err = t.more(f); err == nil {
			t.close()
		}
	}
	return switched && err == nil, err
}

// tail is a file that grows.
type tail struct {
	f     *os.File
	netns uint64
	at    int64  // where it is read next: a read that was given up must move nothing
	part  []byte // of a line
}

// open opens the file if none is open and there is one. atEnd skips what it has.
func (t *tail) open(path string, atEnd bool) error {
	if t.f != nil {
		return nil
	}
	type file struct {
		*os.File
		size int64
	}
	f, err := remember.Ask(func() (file, error) {
		f, err := remember.Open(path)
		if err != nil {
			return file{}, err
		}
		info, err := f.Stat()
		if err != nil {
			f.Close()
			return file{}, err
		}
		return file{f, info.Size()}, nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	*t = tail{f: f.File, netns: t.netns}
	if atEnd {
		t.at = f.size
	}
	return nil
}

func (t *tail) close() {
	if t.f != nil {
		t.f.Close()
		t.f = nil
	}
}

// replaced reports whether the path is another file now.
func (t *tail) replaced(path string) (bool, error) {
	f := t.f
	if f == nil {
		return false, nil
	}
	return remember.Ask(func() (bool, error) {
		now, err := os.Lstat(path)
		open, openErr := f.Stat()
		return openErr == nil && (errors.Is(err, fs.ErrNotExist) || err == nil && !os.SameFile(now, open)), nil
	})
}

// more calls f for the whole lines that the file has by now. A line that is none of ours is left out.
func (t *tail) more(f func(Event) error) error {
	file := t.f
	if file == nil {
		return nil
	}
	for {
		at := t.at
		chunk, err := remember.Ask(func() ([]byte, error) {
			b := make([]byte, 64<<10)
			n, err := file.ReadAt(b, at)
			if err == io.EOF {
				err = nil
			}
			return b[:n], err
		})
		if err != nil {
			return err
		}
		if len(chunk) == 0 {
			return nil
		}
		t.at += int64(len(chunk))
		t.part = append(t.part, chunk...)
		for {
			line, rest, whole := bytes.Cut(t.part, []byte("\n"))
			if !whole {
				break
			}
			t.part = rest
			var e Event
			if json.Unmarshal(line, &e) != nil || e.Netns != t.netns {
				continue
			}
			if err := f(e); err != nil {
				return err
			}
		}
	}
}
