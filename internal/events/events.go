// Package events keeps what happened to the uplinks of the host, for people and programs that ask later: two files of JSON
// lines below /run, which all holders and watches append to. It hides how the files change places, who may read them, and
// that who appends never waits.
package events

import (
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/table-allocator/table-allocator/internal/remember"
)

// Path is the file that is appended to. When it has MaxFile bytes it becomes Older, in place of that.
const (
	Path    = remember.Root + "/events"
	Older   = Path + ".1"
	MaxFile = 512 << 10
)

const (
	mostWaiting = 256             // events that wait to be written; more are dropped
	mostText    = 400             // bytes of a text
	closeIn     = 2 * time.Second // for what waits at the end of a process
	turnLock    = 1<<62 + 116     // of remember.Lock: no inode has this number
)

// What is the kind of an event. A word keeps its meaning.
type What string

// The kinds of events.
const (
	Started      What = "started"       // a watch
	Stopped      What = "stopped"       // a watch
	Served       What = "served"        // an address has a table, and its rules stand
	Refused      What = "refused"       // an address gets no table
	RouteLost    What = "route-lost"    // packets from an address leave by another link than its own, or nowhere
	RouteBack    What = "route-back"    // they leave by their link again
	RulesLost    What = "rules-lost"    // another program deleted rules, which are restored
	RuleCame     What = "rule-came"     // a rule of another program for some packets stands before those of addresses
	RuleWent     What = "rule-went"     // it is gone
	Excluded     What = "excluded"      // a link that looks like an uplink is none by the configuration
	Ended        What = "ended"         // an address is served no more
	ServerAway   What = "server-away"   // the server does not answer
	ServerBack   What = "server-back"   // it answers again
	UplinkDead   What = "uplink-dead"   // probes of an uplink get no answer
	UplinkAlive  What = "uplink-alive"  // they are answered again
	UplinkChosen What = "uplink-chosen" // unbound traffic leaves by another uplink
)

// What RuleCame and RuleWent say behind the quoted rule, for those who look for it.
const (
	CameFront = "comes before the rules of addresses"
	WentFront = "is gone"
)

// Event is something that happened.
type Event struct {
	Time    time.Time `json:"time"`
	What    What      `json:"what"`
	Ifname  string    `json:"ifname"`  // "": it concerns no single link
	Address string    `json:"address"` // "": nor an address
	Family  string    `json:"family"`
	Table   uint32    `json:"table"` // 0: none
	Text    string    `json:"text"`  // for people; it does not repeat link and address
	PID     int       `json:"pid"`
	Netns   uint64    `json:"netns"`   // of the process, see Namespace
	Dropped int       `json:"dropped"` // events before this one that could not be written
}

// Namespace is the number of the caller's network namespace in events.
func Namespace() uint64 {
	if cookie, err := remember.Namespace(); err == nil && cookie != 0 {
		return cookie
	}
	inode, _ := remember.NamespaceInode() // else 0: it is not known
	return inode
}

// Writer appends events. Its methods may be called from several goroutines.
type Writer struct {
	path    string
	log     *slog.Logger
	netns   uint64
	mu      sync.Mutex
	waiting []Event
	dropped int
	failed  bool          // which was logged
	done    chan struct{} // of the goroutine that writes; nil: none does
}

// NewWriter returns a writer for this network namespace. log hears once that events cannot be written.
func NewWriter(log *slog.Logger) *Writer { return newWriter(Path, log) }

func newWriter(path string, log *slog.Logger) *Writer {
	return &Writer{path: path, log: log, netns: Namespace()}
}

// Append has an event written, with the time and this process. It never waits: what does not fit is dropped and
// counted. An idle Writer has no goroutine.
func (w *Writer) Append(e Event) {
	e.Time, e.PID, e.Netns = time.Now().Round(time.Millisecond), os.Getpid(), w.netns
	if len(e.Text) > mostText {
		e.Text = e.Text[:mostText]
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.waiting) >= mostWaiting {
		w.dropped++
		return
	}
	e.Dropped, w.dropped = w.dropped, 0
	w.waiting = append(w.waiting, e)
	if w.done == nil {
		w.done = make(chan struct{})
		go w.drain(w.done)
	}
}

// Close waits until everything is written, for two seconds at most.
func (w *Writer) Close() {
	w.mu.Lock()
	done := w.done
	w.mu.Unlock()
	if done == nil {
		return
	}
	select {
	case <-done:
	case <-time.After(closeIn): // of a file system that hangs
	}
}

// drain writes what waits, and ends when nothing does.
func (w *Writer) drain(done chan struct{}) {
	defer close(done)
	for {
		w.mu.Lock()
		batch := w.waiting
		w.waiting = nil
		if len(batch) == 0 {
			w.done = nil
			w.mu.Unlock()
			return
		}
		w.mu.Unlock()
		var lines []byte
		for _, e := range batch {
			line, err := json.Marshal(e)
			if err != nil {
				continue // of these types none
			}
			lines = append(append(lines, line...), '\n')
		}
		err := w.write(lines)
		w.mu.Lock()
		for _, e := range batch {
			if err != nil {
				w.dropped += 1 + e.Dropped
			}
		}
		if err != nil && !w.failed {
			w.failed = true
			w.log.Debug("cannot write events, so that history does not show them", "err", err)
		}
		w.mu.Unlock()
	}
}

// write appends lines in one piece.
func (w *Writer) write(lines []byte) error {
	f, err := remember.OpenAppend(w.path)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err == nil && info.Size()+int64(len(lines)) > MaxFile {
		f.Close()
		if err := w.turn(info); err != nil {
			return err
		}
		if f, err = remember.OpenAppend(w.path); err != nil {
			return err
		}
	}
	if err == nil {
		_, err = f.Write(lines)
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	return err
}

// turn makes the file that is full the older one, unless another process has done so.
func (w *Writer) turn(full os.FileInfo) error {
	for range 100 {
		unlock, err := remember.Lock(turnLock)
		if errors.Is(err, remember.ErrBusy) {
			time.Sleep(time.Millisecond)
			continue
		}
		if err != nil {
			return err
		}
		defer unlock()
		now, err := os.Lstat(w.path)
		if err != nil || !os.SameFile(now, full) {
			return err
		}
		return os.Rename(w.path, w.path+".1")
	}
	return remember.ErrBusy
}
