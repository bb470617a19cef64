package client

import (
	"errors"
	"maps"
	"slices"
	"time"

	"golang.org/x/time/rate"

	"github.com/table-allocator/table-allocator/internal/nat"
	"github.com/table-allocator/table-allocator/internal/remember"
	"github.com/table-allocator/table-allocator/internal/wire"
)

const (
	// Wait this long after a change, so that a burst of addresses, or a firewall that loads its rules, costs one look.
	repliesIn = 50 * time.Millisecond
	// While a watch takes over the addresses of the one before, it is looked this often whether it has.
	adoptEvery = 250 * time.Millisecond
	// repliesNote is the file that says that there are tables, or may be.
	repliesNote = "tables"
)

// replies keeps the nftables tables by which replies leave by the uplink that was asked, as long as the configuration wants that for an
// address in service. Changing them may wait for other programs that change nftables: that runs beside the loop. Without the wish,
// and without the note that a watch before made tables, nftables is not touched, which would load modules of the kernel.
type replies struct {
	*host
	note    remember.Dir  // of this network namespace; "": it cannot be kept
	placed  bool          // there may be tables
	adopted time.Duration // until then tables of the watch before wait for addresses that are not in service yet; 0: there were none
	at      time.Duration // when they are looked at next; 0: nothing may have changed
	busy    chan struct{} // is closed once a look that runs beside the loop has ended; nil: none runs
	last    nat.Replies   // what the tables were made to be
	tables  *nat.Watcher  // nil: changes are not followed
	told    string
	heals   *rate.Limiter
	accuse  blame
}

// newReplies takes over what the watch before has left.
func newReplies(h *host) *replies {
	r := &replies{host: h, heals: rate.NewLimiter(rate.Every(healEvery), healBurst)}
	var err error
	if r.note, err = remember.Own("replies"); err != nil {
		h.log.Warn("cannot note nftables tables for the next watch", "err", err)
		return r
	}
	var there bool
	if r.placed = r.note.Read(repliesNote, &there) == nil && there; r.placed {
		r.adopted = wire.Now() + startGrace
	}
	return r
}

// soon has the tables looked at. Where there are none, and nobody wants any, that costs nothing.
func (r *replies) soon() {
	if r.config.ReplyByUplink || r.placed {
		r.in(repliesIn)
	}
}

func (r *replies) in(pause time.Duration) {
	if at := wire.Now() + pause; r.at == 0 || at < r.at {
		r.at = at
	}
}

// wanted are the addresses in service whose replies are to leave by their uplink.
func (r *replies) wanted() nat.Replies {
	want := make(nat.Replies)
	for _, s := range r.sessions {
		if u := s.lease.uplink; u.Replies && u.IsAddress() && s.serves() {
			want[s.addr] = wire.ReplyMark(s.lease.table)
		}
	}
	return want
}

// next is when runDue has something to do.
func (r *replies) next() time.Duration {
	if r.busy != nil {
		return 0
	}
	return r.at
}

// runDue makes the tables what is wanted.
func (r *replies) runDue(now time.Duration) {
	if r.at == 0 || now < r.at || r.busy != nil {
		return
	}
	if now < r.adopted && slices.ContainsFunc(r.sessions, func(s *session) bool { return s.lease.uplink.Replies && !s.serves() }) {
		r.at = now + adoptEvery
		return
	}
	r.at = 0
	want := r.wanted()
	if len(want) == 0 && !r.placed {
		r.unfollow()
		return
	}
	if len(want) > 0 {
		r.follow()
	}
	done, note := make(chan struct{}), r.note
	r.placed, r.busy = true, done
	r.readers.Go(func() {
		changed, err := placeReplies(note, want)
		close(done)
		r.hand(func() { r.synced(want, changed, err) })
	})
}

// placeReplies makes the tables what is wanted, and notes that there are some before there are.
func placeReplies(note remember.Dir, want nat.Replies) (changed bool, err error) {
	if len(want) > 0 && note != "" {
		err = note.Write(repliesNote, true)
	}
	changed, syncErr := nat.SyncReplies(want)
	if len(want) == 0 && syncErr == nil && note != "" {
		err = note.Remove(repliesNote)
	}
	return changed, errors.Join(syncErr, err)
}

// synced takes over what a look at the tables brought.
func (r *replies) synced(want nat.Replies, changed bool, err error) {
	r.busy = nil
	again := changed && maps.Equal(want, r.last)
	r.last = nil
	if err == nil {
		r.placed, r.last, r.told = len(want) > 0, want, ""
	}
	switch {
	case err != nil:
		if r.told != err.Error() {
			r.told = err.Error()
			r.log.Warn("replies that have no source when their route is chosen leave as main has it: reply_by_uplink cannot be had", "err", err)
		}
	case again:
		r.restored()
	}
	if len(want) == 0 {
		r.unfollow()
	}
}

// restored notes that another program changed the tables. If it goes on, they are restored at times only.
func (r *replies) restored() {
	r.accuse.do(func() {
		r.log.Warn("another program changed the nftables tables " + nat.RepliesName + "; they are restored, but not faster than every " + healEvery.String() + " if it goes on")
	})
	if !r.heals.Allow() {
		r.at = wire.Now() + healEvery
	}
}

// follow has changes of nftables looked at.
func (r *replies) follow() {
	if r.tables != nil {
		return
	}
	tables, err := nat.Watch()
	if err != nil {
		return // the look says why not
	}
	r.tables = tables
	r.readers.Go(func() {
		for tables.Next() == nil {
			r.hand(func() {
				if r.at == 0 { // else a look that was put off would not be
					r.at = wire.Now() + repliesIn
				}
			})
		}
	})
}

func (r *replies) unfollow() {
	if r.tables != nil {
		_ = r.tables.Close() // it was only read
		r.tables = nil
	}
}

// stop ends what runs beside the loop. The tables stay.
func (r *replies) stop() { r.unfollow() }

// remove deletes the tables at the end of a watch that takes everything back.
func (r *replies) remove() {
	if r.busy != nil {
		<-r.busy
	}
	if !r.placed {
		return
	}
	if _, err := placeReplies(r.note, nil); err != nil {
		r.log.Warn("cannot delete the nftables tables "+nat.RepliesName, "err", err)
	}
}
