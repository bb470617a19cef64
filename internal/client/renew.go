package client

import (
	"errors"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// To read or fill a table with very many routes takes longer than a lease may last, if the machine is slow or the process
// may use little of it. So leases that are due are renewed amid that work, whenever the kernel is asked for something.

// renewLook is how often it is looked whether a lease is due.
const renewLook = 100 * time.Millisecond

// former is what rules of an earlier watch say was leased, while a watch begins and has no sessions for it yet.
type former struct {
	requests []wire.Request
	next     int // of requests, if the server's queue was full there
	sentAt   time.Duration
}

// send asks for all of them, or for as many as the server's queue has room for, and goes on there the next time: else
// those behind would never have their turn.
func (f *former) send(now time.Duration, send func(wire.Request) error) {
	if len(f.requests) == 0 || now < f.sentAt+awayEvery && f.next == 0 {
		return // the first ones do not wait for what there was before they were found
	}
	for ; f.next < len(f.requests); f.next++ {
		if errors.Is(send(f.requests[f.next]), syscall.EAGAIN) {
			return
		}
	}
	f.next, f.sentAt = 0, now
}

// drop leaves out a key whose lease is released: a renewal behind the release would lease it anew, for nobody.
func (f *former) drop(key wire.Key) {
	f.requests = slices.DeleteFunc(f.requests, func(r wire.Request) bool { return r.Key == key })
}

// renewFirst renews leases at the begin of a turn.
func (l *loop) renewFirst() { l.renewDue(timer) }

// renewAmid renews leases amid the work of one turn of the loop.
func (l *loop) renewAmid() { l.renewDue(busy) }

// renewDue renews the leases that are due. It asks the kernel for nothing and makes no other step than a renewal.
func (l *loop) renewDue(kind eventKind) {
	now := wire.Now()
	if now < l.renewAt {
		return
	}
	l.renewAt = now + renewLook
	for _, s := range l.sessions {
		if s.lease.state != held && s.lease.state != placing || s.lease.grace != 0 {
			continue
		}
		if s.retryAt != 0 && now >= s.retryAt {
			l.deliver(s, s.retry)
		}
		l.feed(s, event{kind: kind})
	}
	l.renewFormer()
}

// renew renews a lease that is due amid other work. That its answer is not heard meanwhile says nothing of the server.
func (m *machine) renew(now time.Duration) []action {
	if m.state == placing && m.due == 0 { // a table may be filled for longer than its lease lasts
		m.due = m.renewal(now)
	}
	if m.state != held && m.state != placing || m.due == 0 || now < m.due {
		return nil
	}
	if m.sends == 0 {
		m.sends, m.asked = 1, now
	}
	m.due, m.unheard = now+awayEvery, true
	return []action{m.request(wire.Acquire)}
}

// renewal is half the lease from now, within bounds.
func (m *machine) renewal(now time.Duration) time.Duration {
	half := (m.expires - now) / 2
	return now + min(max(half, renewFloor), renewCeiling)
}

// renewFormer renews what was leased. Nobody waits for the answers: sessions ask for themselves later.
func (l *loop) renewFormer() {
	l.former.send(wire.Now(), func(req wire.Request) error {
		err := l.sendOnce(req)
		if err != nil {
			l.log.Debug("former lease not renewed", "key", req.Key.String(), "err", err)
		}
		return err
	})
}

// sendOnce sends a request of no session, and does not wait for the answer.
func (l *loop) sendOnce(req wire.Request) error {
	conn, err := peer.Open(req.Key, peer.AsAsker)
	if err != nil {
		return err
	}
	defer conn.Close()
	return l.server.Send(conn, req.Append(nil))
}

// findFormer finds what an earlier watch had leased, before the routes of the host are read: addresses that the
// configuration selects, that a rule of ours leads to a table, and that no process holds.
func (h *host) findFormer() (all []wire.Request, err error) {
	names, err := peer.HolderNames()
	if err != nil {
		return nil, err
	}
	holds := make(map[string]bool, len(names))
	for _, name := range names {
		holds[name] = true
	}
	links, addresses, err := h.kernel.HostAddresses()
	if err != nil {
		return nil, err
	}
	rules, err := h.sourceRules()
	if err != nil {
		return nil, err
	}
	tables := make(map[netip.Addr]uint32)
	for _, r := range rules {
		tables[r.Src.Addr()] = r.Table
	}
	selection := h.config.Selection
	selection.Others = uplink.OthersOf(links)
	for _, a := range addresses {
		u, ok := selection.Uplink(a, links[a.Index].Name)
		if !ok || tables[a.Addr] == 0 || holds[u.Key.String()] {
			continue
		}
		var t remembered
		if h.memory.Read(u.Key.String(), &t) == nil && wire.CheckTag(t.Tag) == nil {
			u.Tag = t.Tag
		}
		u.Want = tables[a.Addr]
		all = append(all, newMachine(u, false, true).request(wire.Acquire).request)
	}
	return all, nil
}

// sourceRules are the rules of ours that lead an address to a table, whatever process added them.
func (h *host) sourceRules() (all []route.Rule, err error) {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := h.kernel.RulesWhere(family, func(r *route.Rule) bool {
			return r.Protocol == route.Protocol && uplink.IsHost(*r) && !uplink.LeavesTable(*r)
		})
		if err != nil {
			return nil, err
		}
		all = append(all, rules...)
	}
	return all, nil
}
