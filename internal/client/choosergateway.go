package client

import (
	"errors"
	"os"
	"time"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// followNeighbours has the kernel say, while uplinks are probed, which neighbours answer no more.
func (c *chooser) followNeighbours() {
	switch {
	case c.config.Probes == nil && c.neighbours != nil:
		c.ignoreNeighbours()
	case c.config.Probes != nil && c.neighbours == nil:
		w, err := route.WatchFailedNeighbours()
		if err != nil {
			c.log.Warn("a gateway that does not answer any more is found by probes only", "err", err)
			return
		}
		c.neighbours = w
		c.readers.Go(func() { c.readNeighbours(w) })
	}
}

// ignoreNeighbours ends followNeighbours.
func (c *chooser) ignoreNeighbours() {
	if c.neighbours != nil {
		_ = c.neighbours.Close() // it is open
		c.neighbours = nil
	}
}

func (c *chooser) readNeighbours(w *route.Watcher) {
	for {
		events, err := w.Next()
		if err != nil {
			if !errors.Is(err, os.ErrClosed) {
				c.hand(func() { c.log.Warn("a gateway that does not answer any more is found by probes only", "err", err) })
			}
			return
		}
		c.hand(func() {
			for _, e := range events {
				c.noteFailed(wire.Now(), e)
			}
		})
	}
}

// noteFailed doubts the uplinks whose gateway does not answer on the link any more. That alone does not make them dead.
func (c *chooser) noteFailed(now time.Duration, e route.Event) {
	for _, p := range c.uplinks {
		if p.session != nil && p.session.inst.Index == e.Index && p.session.inst.Default().Gateway == e.Addr && p.health.State.Works() {
			c.doubt(now, p)
		}
	}
}

// doubt has the next round ask by all kinds, and soon: a packet may find the gateway silent long before the next round of a
// standby. Rounds of a suspect uplink are not more frequent for that.
func (c *chooser) doubt(now time.Duration, p *probed) {
	p.doubted = true
	p.due = min(p.due, max(now, p.began+c.numbers.Suspect))
}
