package cli

import (
	"bytes"
	"context"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

const (
	queueMost = 1 << 20  // bytes that wait for a write; what comes beyond is dropped
	batchMost = 64 << 10 // bytes of one write
	endMost   = 200 * time.Millisecond
)

// queue takes lines, and a goroutine writes them: whoever logs does not wait for whoever reads.
// The goroutine ends when the queue is empty, so that a process at rest keeps nothing for it.
type queue struct {
	to    func(lines []byte) error // may take for ever
	batch int                      // bytes of one write: whole lines, and one at least

	mu      sync.Mutex
	notice  func(dropped int) []byte // the line that tells of dropped ones
	waiting []byte
	spare   []byte // memory to use again
	dropped int    // lines, since the last notice
	writing bool
	empty   chan struct{} // closed when nothing waits; nil: nobody wants to know
}

// newQueue makes a queue that writes as much as it can in one go.
func newQueue(write func([]byte) (int, error)) *queue {
	return &queue{batch: batchMost, to: func(lines []byte) error {
		_, err := write(lines)
		return err
	}}
}

// Write queues text, which becomes a line, or drops it. It always succeeds.
func (q *queue) Write(text []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.waiting)+len(text) > queueMost {
		q.dropped++
		return len(text), nil
	}
	q.waiting = append(q.waiting, text...)
	if !bytes.HasSuffix(text, newline) {
		q.waiting = append(q.waiting, newline...)
	}
	if !q.writing {
		q.writing = true
		go q.run()
	}
	return len(text), nil
}

var newline = []byte("\n")

func (q *queue) run() {
	for lines := q.take(); len(lines) > 0; lines = q.take() {
		for len(lines) > 0 {
			end := bytes.LastIndexByte(lines[:min(q.batch, len(lines))], '\n') + 1
			if end == 0 {
				end = bytes.IndexByte(lines, '\n') + 1
			}
			err := q.to(lines[:end])
			q.account(bytes.Count(lines[:end], newline), err)
			lines = lines[end:]
		}
	}
}

// take returns all that waits, and ends the writing if that is nothing.
func (q *queue) take() []byte {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.waiting, q.spare = q.spare[:0], q.waiting
	if len(q.spare) > 0 {
		return q.spare
	}
	q.writing = false
	if max(cap(q.waiting), cap(q.spare)) > batchMost {
		q.waiting, q.spare = nil, nil
	}
	if q.empty != nil {
		close(q.empty)
		q.empty = nil
	}
	return nil
}

// account counts the lines of a write that failed as dropped. After one that did not fail it
// tells how many were.
func (q *queue) account(lines int, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if err != nil {
		q.dropped += lines
		return
	}
	told := q.dropped
	if told == 0 || q.notice == nil {
		return
	}
	notice := q.notice(told)
	q.mu.Unlock()
	err = q.to(notice)
	q.mu.Lock()
	if err == nil {
		q.dropped -= told
	}
}

// flush waits until all is written, or until ctx ends.
func (q *queue) flush(ctx context.Context) {
	q.mu.Lock()
	if !q.writing {
		q.mu.Unlock()
		return
	}
	if q.empty == nil {
		q.empty = make(chan struct{})
	}
	empty := q.empty
	q.mu.Unlock()
	select {
	case <-empty:
	case <-ctx.Done():
	}
}

// Stdout and Stderr are the standard output and error, for what nobody may wait for. Their file
// descriptions are shared with other processes, and stay as they are.
var (
	Stdout = newQueue(func(text []byte) (int, error) { return os.Stdout.Write(text) })
	Stderr = newQueue(func(text []byte) (int, error) {
		surviveClosed()
		return os.Stderr.Write(text)
	})
)

// surviveClosed keeps the process alive when it writes to a standard output or error that is closed at its other
// end. Programs that this one executes do not inherit that.
var surviveClosed = sync.OnceFunc(func() { signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) })

// queues are those that Flush waits for.
var queues = []*queue{Stdout, Stderr}

// Flush waits until what was logged, and written to Stdout and Stderr, is out, and 200 ms at the
// most: perhaps nobody reads it.
func Flush() {
	ctx, cancel := context.WithTimeout(context.Background(), endMost)
	defer cancel()
	for _, q := range queues {
		q.flush(ctx)
	}
}

// Exit is os.Exit behind Flush.
func Exit(code int) {
	Flush()
	os.Exit(code)
}
