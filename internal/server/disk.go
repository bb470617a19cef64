package server

import (
	"strings"
	"sync"
	"time"

	"github.com/table-allocator/table-allocator/internal/allocator"
)

// disk runs what writes to the database. Mostly that does not wait for the disk and is done
// before anything else could be. If it takes longer, the others go on meanwhile: who holds a
// lease renews it, and what else is asked for is kept until the database can be written again.
type disk struct {
	work     chan func()
	done     chan struct{}
	patience *time.Timer
	running  sync.WaitGroup
}

// patience is what a transaction takes of the processor, and some more.
const patience = 2 * time.Millisecond

func newDisk() *disk {
	d := &disk{work: make(chan func()), done: make(chan struct{}), patience: time.NewTimer(patience)}
	d.running.Go(d.run)
	return d
}

func (d *disk) run() {
	for work := range d.work {
		work()
		d.done <- struct{}{}
	}
}

func (d *disk) close() {
	close(d.work)
	d.running.Wait()
}

// begin starts work and waits for a while. It tells whether that was enough.
func (d *disk) begin(work func()) (done bool) {
	d.work <- work
	d.patience.Reset(patience)
	select {
	case <-d.done:
		d.patience.Stop()
		return true
	case <-d.patience.C:
		return false
	}
}

// beside is called with mu, and gives it up while the disk takes its time.
func (s *server) beside(work func()) {
	if s.disk.begin(work) {
		return
	}
	if s.receiving != nil {
		s.receiving.turn.Unlock()
		s.receiving = nil
	}
	s.mu.Unlock()
	<-s.disk.done
	s.mu.Lock()
	s.landed.Broadcast()
}

// queue is what waits until the database can be written.
type queue struct {
	asks  []ask
	taken int                   // asks that were before them
	last  map[allocator.Key]int // the last ask about a key, counted from the first one ever
}

// Beyond these somebody asks in vain, and has to ask again.
const (
	queueMost  = 4096
	usersQueue = queueMost / 2 // for those who are not first
)

// add keeps an ask, unless there are most already. Who hears nothing asks the same again.
func (q *queue) add(a ask, most int) (ok bool) {
	k := a.op().Key
	if i, ok := q.last[k]; ok && q.asks[i-q.taken] == a {
		return true
	}
	if len(q.asks) >= most {
		return false
	}
	if q.last == nil {
		q.last = make(map[allocator.Key]int)
	}
	// Its texts are parts of something larger.
	k.Ifname, k.Addr = strings.Clone(k.Ifname), strings.Clone(k.Addr)
	a.req.Ifname, a.req.Address, a.req.Tag = k.Ifname, k.Addr, strings.Clone(a.req.Tag)
	q.last[k] = q.taken + len(q.asks)
	q.asks = append(q.asks, a)
	return true
}

func (q *queue) has(k allocator.Key) bool {
	_, ok := q.last[k]
	return ok
}

// take removes the first asks, up to most, that came to one socket.
func (q *queue) take(most int) []ask {
	n := 0
	for ; n < min(most, len(q.asks)) && q.asks[n].socket == q.asks[0].socket; n++ {
		if k := q.asks[n].op().Key; q.last[k] == q.taken+n {
			delete(q.last, k)
		}
	}
	asks := q.asks[:n]
	if q.asks, q.taken = q.asks[n:], q.taken+n; len(q.asks) == 0 {
		*q = queue{} // a slow disk is rare
	}
	return asks
}
