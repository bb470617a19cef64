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
	// Wait this long after an event, so that a burst of addresses costs one read of the host.
	admitIn = 20 * time.Millisecond
	// With so many new addresses the kernel's queue of events may have been full, so everything is compared again
	// afterBurst later.
	burst      = 100
	afterBurst = 5 * time.Second
	// How long an address waits after the server, or the kernel, refused it for good.
	refusedFor = 10 * time.Minute
	// When another client deletes its rules it is about to end: look for its address this much later.
	afterForeign = 2 * time.Second
)

// note decides what the host has to do about events, and when. It does nothing yet, since more events may follow.
func (h *host) note(n news) {
	if n.overrun {
		h.reconcileAt, h.blind = 0, true
	}
	for addr := range n.went {
		h.clearRefusal(addr)
	}
	if n.linksChanged || h.admitAt == 0 && h.unknown(n.came) { // another profile may select a link by its new name
		h.admitSoon()
	}
	for at := range n.came {
		if h.blocked[at.addr] { // if no client serves the address, it may send now
			delete(h.blocked, at.addr)
			h.reconcileAt = min(h.reconcileAt, wire.Now()+fallBackIn)
		}
	}
	h.noteLost(n.lostRules)
}

// unknown reports whether any address has no session.
func (h *host) unknown(came map[onLink]bool) bool {
	if len(came) == 0 {
		return false
	}
	known := make(map[onLink]bool, len(h.sessions))
	for _, s := range h.sessions {
		known[onLink{s.addr, s.inst.Index}] = true
	}
	for at := range came {
		if !known[at] {
			return true
		}
	}
	return false
}

// noteLost has deleted rules restored, if they lead to tables of sessions. Rules of other tables may be those of
// another client that is about to end.
func (h *host) noteLost(tables map[uint32]bool) {
	if len(tables) == 0 {
		return
	}
	leased := h.tables()
	for table := range tables {
		if (leased[table] || !isLeased(table)) && h.healAt == 0 {
			h.healAt = wire.Now()
		} else if len(h.foreign) > 0 {
			h.reconcileAt = min(h.reconcileAt, wire.Now()+afterForeign)
		}
	}
}

// retryOne lets one refused address of each family be asked for again: the server may have been started anew, with
// another configuration.
func (h *host) retryOne() {
	h.retried = make(map[wire.Key]bool)
	for _, family := range []wire.Family{wire.Inet, wire.Inet6} {
		for key := range h.refused {
			if key.Family == family {
				h.retried[key] = true
				delete(h.refused, key)
				break
			}
		}
	}
}

// retryRefused lets all refused addresses of a family be asked for again, once the server grants a table to one.
func (h *host) retryRefused(s *session) {
	if !s.again || s.lease.state != held {
		return
	}
	s.again = false
	maps.DeleteFunc(h.refused, func(key wire.Key, _ time.Duration) bool { return key.Family == s.lease.uplink.Key.Family })
	h.admitSoon()
}

// clearRefusal lets an address that was deleted be served when it is added again.
func (h *host) clearRefusal(addr netip.Addr) {
	if len(h.ended)+len(h.refused) == 0 {
		return
	}
	text := addr.String()
	maps.DeleteFunc(h.ended, func(key wire.Key, _ bool) bool { return key.Address == text })
	maps.DeleteFunc(h.refused, func(key wire.Key, _ time.Duration) bool { return key.Address == text })
}

func (h *host) admitSoon() {
	if h.admitAt == 0 {
		h.admitAt = wire.Now() + admitIn
	}
}

// dropped removes what the host keeps of a session, and looks for its address, which may have been added again.
func (h *host) dropped(s *session) {
	h.removeOrder(s)
	h.dropSettings(s)
	switch {
	case len(s.enders) > 0:
		h.ended[s.lease.uplink.Key] = true
	case s.inst.Present: // the server has no table for it, and will not have one soon
		h.refused[s.lease.uplink.Key] = wire.Now() + refusedFor
	}
	h.admitSoon()
}

// changedSessions are the sessions whose address, link or routes differ from what is noted of them, by one read of
// the host; if events were lost, all.
func (h *host) changedSessions() []*session {
	names, addresses, err := h.kernel.HostAddresses()
	routes := make(map[int]map[uint32]int) // how many routes of ours each table has
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		have, familyErr := h.kernel.OurRoutes(family)
		err = errors.Join(err, familyErr)
		routes[family] = make(map[uint32]int)
		for _, r := range have {
			routes[family][r.Table]++
		}
	}
	if err != nil || h.blind {
		return h.all()
	}
	there := make(map[onLink]route.Address, len(addresses))
	for _, a := range addresses {
		there[onLink{a.Addr, a.Index}] = a
	}
	return slices.DeleteFunc(h.all(), func(s *session) bool {
		a, ok := there[onLink{s.addr, s.inst.Index}]
		return ok && a.Created == s.created && names[s.inst.Index] == s.lease.uplink.Key.Ifname && a.Tentative() != s.inst.Usable && !a.DADFailed() &&
			(s.lease.state != held || s.inst.Installed && routes[s.family()][s.lease.table] == s.inst.Routes())
	})
}

// admit starts a session for each address that has none.
func (h *host) admit() {
	h.admitAt = 0
	links, addresses, err := h.kernel.HostAddresses()
	if err != nil {
		h.log.Error("cannot read the addresses of the host", "err", err)
		return
	}
	sessions := make(map[wire.Key]bool, len(h.sessions))
	for _, s := range h.sessions {
		sessions[s.lease.uplink.Key] = true
	}
	now := wire.Now()
	maps.DeleteFunc(h.refused, func(_ wire.Key, until time.Duration) bool { return now >= until })
	foreign, ended := make(map[wire.Key]bool), make(map[wire.Key]bool)
	before := len(h.sessions)
	for _, a := range addresses {
		u, ok := h.config.Uplink(a, links[a.Index])
		switch key := u.Key; {
		case !ok || sessions[key] || h.refused[key] != 0:
		case h.ended[key]:
			ended[key] = true
		case !h.startSession(u, a):
			foreign[key] = true
		}
	}
	h.foreign, h.ended = foreign, ended
	if len(h.sessions)-before >= burst {
		h.reconcileAt = min(h.reconcileAt, now+afterBurst)
	}
}

// startSession starts a session, and reports false if another client has the address.
func (h *host) startSession(u uplink.Uplink, a route.Address) (ours bool) {
	log := h.log.With("ifname", u.Key.Ifname, "addr", u.Key.Address, "family", u.Key.Family.String())
	conn, err := peer.Open(u.Key, peer.AsHolder)
	switch {
	case err == nil:
	case !errors.Is(err, syscall.EADDRINUSE):
		log.Error("cannot hold an address", "err", err)
		return false
	case h.foreign[u.Key]:
		return false
	default:
		log.Info("another client serves this address", "holder", ownerOf(u.Key))
		return false
	}
	u, saved := h.loadSettings(u, a, log)
	s := h.add(newMachine(u, false, true), conn)
	s.inst.Index, s.inst.Present, s.inst.Usable, s.created = a.Index, true, !a.Tentative(), a.Created
	s.again, s.hooked, s.saved = h.retried[u.Key], saved != remembered{}, saved
	if file := u.Settings.ServersFile; file != "" {
		if _, err := os.Stat(file); err == nil {
			s.inst.ServersFile = file // which may have lines of the last holder
		}
	}
	h.feed(s, event{kind: start})
	h.feed(s, event{kind: addressSeen})
	return true
}

// ownerOf describes the process that holds a key, or says why it is not known.
func ownerOf(key wire.Key) string {
	addr, err := wire.Padded(key.String())
	if err != nil {
		return err.Error()
	}
	owner, err := wire.FindOwner(addr)
	if err != nil {
		return err.Error()
	}
	return owner.String()
}
