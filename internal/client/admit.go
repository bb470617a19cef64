package client

import (
	"errors"
	"maps"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

const (
	// A burst of addresses is one look at the host, and so is what comes right after it.
	admitIn = 20 * time.Millisecond
	// So many addresses at once may have been too many for the kernel's queue of events.
	burst      = 100
	afterBurst = 5 * time.Second
	// How long an address waits that the server, or the kernel, refuses for good.
	refusedFor = 10 * time.Minute
	// A holder of somebody else's that took its rules away is about to end.
	afterForeign = 2 * time.Second
)

type onLink struct {
	addr  netip.Addr
	index int
}

// noticed looks in the events for what no session knows of. It only notes what is to be
// done: many batches of events may come before that.
func (l *loop) noticed(events []route.Event) {
	w := l.watch
	var known map[onLink]bool
	var held map[uint32]bool
	for _, e := range events {
		switch e.Kind {
		case route.Overrun:
			w.next, w.blind = 0, true
		case route.AddressChanged:
			if e.Deleted {
				w.forgive(e.Addr)
			} else if w.blocked[e.Addr] { // if nobody serves it, it may send now
				delete(w.blocked, e.Addr)
				w.next = min(w.next, wire.Now()+fallBackIn)
			}
			if e.Deleted || w.admitAt != 0 {
				continue
			}
			if known == nil {
				known = make(map[onLink]bool, len(l.sessions))
				for _, s := range l.sessions {
					known[onLink{s.addr, s.inst.Index}] = true
				}
			}
			if !known[onLink{e.Addr, e.Index}] {
				l.admitSoon()
			}
		case route.LinkChanged:
			l.admitSoon() // by its name it may be another's now
		case route.RuleChanged:
			if !e.Deleted || e.Protocol != route.Protocol {
				continue
			}
			if held == nil {
				held = l.tables()
			}
			if (held[e.Table] || !isLeased(e.Table)) && w.healAt == 0 {
				w.healAt = wire.Now()
			} else if len(w.foreign) > 0 {
				w.next = min(w.next, wire.Now()+afterForeign)
			}
		}
	}
}

// retry asks again for one address of each family that the server refused: it may have been
// started with another configuration.
func (w *watch) retry() {
	w.retried = make(map[wire.Key]bool)
	for _, family := range []wire.Family{wire.Inet, wire.Inet6} {
		for key := range w.refused {
			if key.Family == family {
				w.retried[key] = true
				delete(w.refused, key)
				break
			}
		}
	}
}

// welcome asks for all of a family once the server grants one that it had refused.
func (l *loop) welcome(s *session) {
	if !s.again || s.lease.state != held {
		return
	}
	s.again = false
	maps.DeleteFunc(l.watch.refused, func(key wire.Key, _ time.Duration) bool { return key.Family == s.lease.uplink.Key.Family })
	l.admitSoon()
}

// forgive lets an address that went be served when it comes again.
func (w *watch) forgive(addr netip.Addr) {
	if len(w.ended)+len(w.refused) == 0 {
		return
	}
	text := addr.String()
	maps.DeleteFunc(w.ended, func(key wire.Key, _ bool) bool { return key.Address == text })
	maps.DeleteFunc(w.refused, func(key wire.Key, _ time.Duration) bool { return key.Address == text })
}

func (l *loop) admitSoon() {
	if l.watch.admitAt == 0 {
		l.watch.admitAt = wire.Now() + admitIn
	}
}

// dropped looks after an address whose session is over: it may have come back meanwhile.
func (l *loop) dropped(s *session) {
	if l.watch == nil {
		return
	}
	l.forget(s)
	l.unlearn(s)
	switch {
	case len(s.enders) > 0:
		l.watch.ended[s.lease.uplink.Key] = true
	case s.inst.Present: // there was no table for it, nor will there be one soon
		l.watch.refused[s.lease.uplink.Key] = wire.Now() + refusedFor
	}
	l.admitSoon()
}

// suspects are the sessions that a look may find changed. Events tell of what changes, so
// that a glance at the whole is enough unless some were lost.
func (l *loop) suspects() []*session {
	names, addresses, err := l.kernel.HostAddresses()
	routes := make(map[int]map[uint32]int) // how many of ours each table has
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		have, familyErr := l.kernel.OurRoutes(family)
		err = errors.Join(err, familyErr)
		routes[family] = make(map[uint32]int)
		for _, r := range have {
			routes[family][r.Table]++
		}
	}
	if err != nil || l.watch.blind {
		return l.all()
	}
	there := make(map[onLink]route.Address, len(addresses))
	for _, a := range addresses {
		there[onLink{a.Addr, a.Index}] = a
	}
	return slices.DeleteFunc(l.all(), func(s *session) bool {
		a, ok := there[onLink{s.addr, s.inst.Index}]
		return ok && a.Created == s.created && names[s.inst.Index] == s.lease.uplink.Key.Ifname && a.Tentative() != s.inst.Usable && !a.DADFailed() &&
			(s.lease.state != held || s.inst.Installed && routes[s.lease.uplink.Family()][s.lease.table] == s.inst.Routes())
	})
}

// admit starts a session for each address that has none.
func (l *loop) admit() {
	w := l.watch
	w.admitAt = 0
	links, addresses, err := l.kernel.HostAddresses()
	if err != nil {
		l.log.Error("cannot read the addresses of the host", "err", err)
		return
	}
	sessions := make(map[wire.Key]bool, len(l.sessions))
	for _, s := range l.sessions {
		sessions[s.lease.uplink.Key] = true
	}
	now := wire.Now()
	maps.DeleteFunc(w.refused, func(_ wire.Key, until time.Duration) bool { return now >= until })
	foreign, ended := make(map[wire.Key]bool), make(map[wire.Key]bool)
	before := len(l.sessions)
	for _, a := range addresses {
		u, ok := w.config.Uplink(a, links[a.Index])
		switch key := u.Key; {
		case !ok || sessions[key] || w.refused[key] != 0:
		case w.ended[key]:
			ended[key] = true
		case !l.enrol(u, a):
			foreign[key] = true
		}
	}
	w.foreign, w.ended = foreign, ended
	if len(l.sessions)-before >= burst {
		w.next = min(w.next, now+afterBurst)
	}
}

// enrol starts a session, unless another process holds the key: that one answers for it.
func (l *loop) enrol(u uplink.Uplink, a route.Address) (ours bool) {
	log := l.log.With("ifname", u.Key.Ifname, "addr", u.Key.Address, "family", u.Key.Family.String())
	conn, err := peer.Open(u.Key, peer.AsHolder)
	switch {
	case err == nil:
	case !errors.Is(err, syscall.EADDRINUSE):
		log.Error("cannot hold an address", "err", err)
		return false
	case l.watch.foreign[u.Key]:
		return false
	default:
		log.Info("another process holds this address, and goes on to serve it", "holder", ownerOf(u.Key))
		return false
	}
	s := l.add(newMachine(u, false, true), conn)
	s.inst.Index, s.inst.Present, s.inst.Usable, s.created = a.Index, true, !a.Tentative(), a.Created
	s.again = l.watch.retried[u.Key]
	l.recall(s)
	if file := s.lease.uplink.Settings.ServersFile; file != "" {
		if _, err := os.Stat(file); err == nil {
			s.inst.ServersFile = file // with lines of the last holder, perhaps
		}
	}
	l.feed(s, event{kind: start})
	l.feed(s, event{kind: addressSeen})
	return true
}

// ownerOf describes the process that holds a key, as far as it can be found.
func ownerOf(key wire.Key) string {
	addr, err := wire.Padded(wire.HolderName(key))
	if err != nil {
		return err.Error()
	}
	owner, err := wire.FindOwner(addr)
	if err != nil {
		return err.Error()
	}
	return owner.String()
}
