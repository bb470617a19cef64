package client

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// packet is one datagram, parsed by the reader of its session.
type packet struct {
	to      *session
	from    wire.Addr
	cred    wire.Cred
	reply   wire.Reply
	request wire.Request
	isReply bool
	cut     bool // it was longer than any request
	err     error
}

// changed looks at what events concern. Events are hints: what is true now has to be read.
func (l *loop) changed(events []route.Event) {
	if slices.ContainsFunc(events, mayDelete) {
		if err := l.kernel.AwaitTold(); err != nil {
			l.log.Warn("cannot wait until what the kernel tells is so", "err", err)
		}
	}
	l.followAddresses(events)
	n := digest(events)
	moved := n.overrun || len(n.addresses)+len(n.links) > 0 // a link or an address
	if moved || len(n.main) > 0 {
		l.env.Picture.Invalidate()
	}
	if moved || n.nexthops {
		l.env.Picture.Lost()
	}
	l.env.Picture.Addressed(n.addressed)
	l.keepLocks(n)
	l.serveNewlyBound(n)
	large := l.followLarge(events)
	l.noteHistory(n)
	l.hearReturned(events)
	l.read = make(map[linkOf][]route.Address)
	for _, s := range l.all() {
		if n.overrun {
			s.inst.Missed()
		}
		l.hear(s, n, large[s.family()])
	}
	l.read = nil
	l.noteFronts(n)
	if n.overrun || n.newDefault || len(n.addresses)+len(n.tables) > 0 {
		l.checkPrefixesSoon()
	}
	l.scope.note(n)
}

// followAddresses has it noted in events which deleted addresses are still somewhere, as of them.
func (l *loop) followAddresses(events []route.Event) {
	if slices.ContainsFunc(events, func(e route.Event) bool { return e.Kind == route.Overrun }) {
		where, err := l.kernel.Whereabouts()
		if err != nil {
			l.log.Warn("cannot read the addresses of the host", "err", err)
			return
		}
		l.where = where
	}
	l.where.Follow(events)
}

// mayDelete reports whether the kernel deletes routes, addresses or rules as an event says, and those that go with them.
func mayDelete(e route.Event) bool {
	return e.Deleted || e.Kind == route.LinkChanged || e.Kind == route.LinkGone
}

// hear has a session looked at as far as news concern it. large says that main has been followed for it already.
func (l *loop) hear(s *session, n news, large bool) {
	switch {
	case n.overrun || n.concerns(s) || l.wentAlong(s, n):
		s.noteLeaving(n)
		l.look(s)
		l.tellSoon(s)
	case (len(n.main)+len(n.lost) > 0 || len(n.gone) > 0 && s.inst.SharesRoutes()) && !large:
		s.hear(n)
		l.tellSoon(s)
	case s.lease.watched && n.addressed[s.inst.Index] && !large && s.leased() != 0 && s.inst.Stale():
		s.follow()
		l.tellSoon(s)
	case n.others[s.family()]:
		l.tellSoon(s)
	}
}

// wentAlong reports whether an address that a route of type local makes is gone, of which there is no event: the kernel deletes
// such routes of IPv4 with the last other address of their link, and those of both families with their nexthop object.
func (l *loop) wentAlong(s *session, n news) bool {
	if len(n.left)+len(n.objects) == 0 || !s.inst.Present || s.created != 0 {
		return false
	}
	addresses, err := l.addressesOn(linkOf{s.family(), s.inst.Index})
	return err == nil && s.find(addresses) < 0
}

// noteHistory notes what routes the kernel deleted without an event: those over links that were down, and those with an
// address that was deleted as their source. What happened to main before that, and after it, is in the events only.
func (l *loop) noteHistory(n news) {
	if len(n.silent) > 0 {
		l.env.Picture.Emptied(n.silent)
	}
	if len(n.history)+len(n.left)+len(n.objects)+len(n.replaced) == 0 {
		return
	}
	for _, s := range l.sessions {
		s.inst.HearReplaced(n.replaced)
		s.inst.Hear(n.history[linkOf{s.family(), s.inst.Index}], n.left, n.back)
		s.inst.ForgetObjects(n.objects)
	}
}

// hearReturned decides whether main keeps what it got back.
func (l *loop) hearReturned(events []route.Event) {
	if err := l.env.HearReturned(events); err != nil {
		l.log.Warn("cannot delete a route of main that its link has lost", "err", err)
	}
}

// hearFirst takes over what the kernel has told so far, before main gets routes back. Else main may get one that it has lost with
// its link, and loses it again when the event is heard; another program that adds the same route in between is told that it
// is there, of which there is no event, and would lose its own. What the kernel tells after this is left to HearReturned.
func (l *loop) hearFirst() {
	limit := time.After(100 * time.Millisecond)
	for l.watcher.HasNews() {
		select {
		case events := <-l.changes:
			l.changed(events)
		case <-time.After(100 * time.Microsecond): // the reader found nothing new
		case <-limit:
			return
		}
	}
}

// hearLast waits for the events of what main got back last. The kernel has sent them already.
func (l *loop) hearLast() {
	limit := time.After(100 * time.Millisecond)
	for l.env.UnheardReturns() {
		select {
		case events := <-l.changes:
			l.followAddresses(events)
			l.hearReturned(events)
		case <-limit:
			return
		}
	}
}

// followLarge carries over what events say of a main with very many routes, and returns the families that have one.
func (l *loop) followLarge(events []route.Event) map[int]bool {
	large := make(map[int]bool)
	for _, family := range families {
		changes, isLarge := l.env.Picture.Hear(family, events)
		if !isLarge {
			continue
		}
		large[family] = true
		for _, s := range l.sessions {
			if s.family() != family || s.lease.state != held || !s.lease.uplink.Settings.PlacesRoutes() {
				continue
			}
			s.inst.FollowChanges(s.lease.table, changes, events)
			if l.env.Picture.Uncertain(family) {
				s.lookLater()
			}
		}
	}
	return large
}

func (l *loop) readKernel() {
	for {
		events, err := l.watcher.Next()
		if err != nil {
			if !errors.Is(err, os.ErrClosed) && !errors.Is(err, io.EOF) {
				l.fail(fmt.Errorf("watch the kernel: %w", err))
			}
			return
		}
		select {
		case l.changes <- events:
		case <-l.stopped:
			return
		}
	}
}

func (l *loop) readPeers() {
	for {
		err := l.conns.Receive(func(to any, datagrams []wire.Datagram) {
			for _, d := range datagrams {
				select {
				case l.inbox <- parse(to.(*session), d):
				case <-l.stopped:
				}
			}
		})
		if err != nil {
			if !errors.Is(err, os.ErrClosed) {
				l.fail(err)
			}
			return
		}
	}
}

func (l *loop) fail(err error) {
	select {
	case l.failures <- err:
	default: // one is enough to end
	}
}

func parse(s *session, d wire.Datagram) packet {
	p := packet{to: s, from: d.From, cred: d.Cred}
	if p.reply, p.err = wire.ParseReply(d.Data); p.err == nil {
		p.isReply = true
		return p
	}
	noReply := p.err
	if p.request, p.err = wire.ParseRequest(d.Data); p.request.Cmd == wire.Response {
		p.err = noReply
	}
	if p.cut = d.Truncated; p.cut {
		p.err = fmt.Errorf("longer than %d bytes", wire.MaxReplace)
	}
	return p
}
