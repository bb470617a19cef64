package client

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// boundAt is where rules of bindings are.
type boundAt struct {
	family   int
	priority uint32
}

// noteBound sorts an event into the news of guards, and of lookups that are gone.
func (n *news) noteBound(e route.Event) {
	if e.Protocol != route.Protocol {
		return
	}
	if n.ours == nil {
		n.ours = make(map[boundAt]bool)
	}
	n.ours[boundAt{e.Family, e.Priority}] = n.ours[boundAt{e.Family, e.Priority}] || e.Deleted
}

// packet is one datagram, parsed by the reader of its session.
type packet struct {
	to      *session
	from    wire.Addr
	cred    wire.Cred
	reply   wire.Reply
	request wire.Request
	isReply bool
	err     error
}

// changed looks again at what the events concern; they are hints, not news.
func (l *loop) changed(events []route.Event) {
	n := digest(events)
	if n.overrun || n.main || len(n.addresses)+len(n.links) > 0 {
		l.env.Glance.Invalidate()
	}
	l.hearBound(n)
	for _, s := range l.all() {
		switch {
		case n.overrun || n.concerns(s):
			s.noteLeaving(events)
			l.look(s)
		case n.routes == nil:
		case n.routes[routesOf{s.lease.uplink.Family(), s.inst.Index}] || n.routes[routesOf{s.lease.uplink.Family(), 0}]:
			s.hear(events)
		}
	}
}

// news is what a batch of events is about, so that a thousand sessions do not each go
// through a thousand events.
type news struct {
	overrun   bool
	main      bool // of its routes
	addresses map[netip.Addr]bool
	links     map[int]bool
	names     map[string]bool
	routes    map[routesOf]bool
	ours      map[boundAt]bool // rules, and whether any of them was deleted
}

type routesOf struct{ family, index int }

func digest(events []route.Event) news {
	n := news{addresses: make(map[netip.Addr]bool), links: make(map[int]bool), names: make(map[string]bool)}
	for _, e := range events {
		switch e.Kind {
		case route.Overrun:
			n.overrun = true
		case route.AddressChanged:
			n.addresses[e.Addr] = true
		case route.LinkChanged, route.LinkGone:
			n.links[e.Index], n.names[e.Name] = true, true
		case route.RouteChanged:
			n.main = n.main || e.Table == unix.RT_TABLE_MAIN
			if n.routes == nil {
				n.routes = make(map[routesOf]bool)
			}
			n.routes[routesOf{e.Family, e.Index}] = true
		case route.RuleChanged:
			n.noteBound(e)
		}
	}
	return n
}

// concerns goes by address, so that a thousand others on the link cost nothing.
func (n news) concerns(s *session) bool {
	return n.addresses[s.addr] || n.links[s.inst.Index] || s.inst.Index == 0 && n.names[s.lease.uplink.Key.Ifname]
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
	if d.Truncated {
		p.err = fmt.Errorf("longer than %d bytes", wire.MaxReplace)
	}
	return p
}
