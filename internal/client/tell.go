package client

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/events"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// tellIn is how long after a change it is looked at where packets leave, so that a burst of changes is one event.
const tellIn = 100 * time.Millisecond

// tell notes what happened to an address, in the log and for history.
func (l *loop) tell(s *session, what events.What, text string) {
	l.tellAt(slog.LevelInfo, s, what, text, "table", s.lease.table)
}

// tellAt is tell with a level and other attributes.
func (l *loop) tellAt(level slog.Level, s *session, what events.What, text string, attrs ...any) {
	key := s.lease.uplink.Key
	s.log.Log(context.Background(), level, key.Ifname+" "+key.Address+": "+text, attrs...)
	l.events.Append(events.Event{What: what, Ifname: key.Ifname, Address: key.Address, Family: key.Family.String(), Table: s.lease.table, Text: text})
}

// tellHost notes what concerns no single address.
func (l *loop) tellHost(what events.What, text string) {
	l.events.Append(events.Event{What: what, Text: text})
}

// tellServer notes once that the server does not answer, or that it answers again.
func (l *loop) tellServer(away bool) {
	if away == l.away {
		return
	}
	l.away = away
	if away {
		l.tellHost(events.ServerAway, "the server does not answer; rules and routes stay")
	} else {
		l.tellHost(events.ServerBack, "the server answers again")
	}
}

// exit is where packets from an address leave.
type exit struct {
	known bool
	own   bool   // by the link of the address
	once  bool   // they left by it before
	table uint32 // that leads there; 0: nothing leaves
	text  string
}

// same reports whether nothing has to be told: of packets that leave by their own link the table is of no interest.
func (e exit) same(o exit) bool {
	return e.known == o.known && e.own == o.own && e.text == o.text && (e.own || e.table == o.table)
}

// farFrom is an address in the Internet, of the family of addr. Nothing is sent there.
func farFrom(addr netip.Addr) netip.Addr {
	if addr.Is6() {
		return netip.MustParseAddr("2606:4700:4700::1111")
	}
	return netip.MustParseAddr("1.1.1.1")
}

// exitOf asks the kernel where packets from the address of a session leave.
func (l *loop) exitOf(s *session) exit {
	if !s.serves() || !s.inst.Present || !s.lease.uplink.Settings.PlacesRoutes() {
		return exit{}
	}
	q := route.Question{Dst: farFrom(s.addr), Src: s.addr}
	r, err := l.kernel.Resolve(q)
	if err != nil {
		return exit{known: true, text: "nothing leaves"}
	}
	found, err := l.kernel.Match(q)
	if err != nil {
		return exit{known: true, text: "nothing leaves"} // the rules have changed in between
	}
	name := s.lease.uplink.Key.Ifname
	if link, exists, err := l.kernel.LinkByIndex(r.Index); err == nil && exists {
		name = link.Name
		if !link.Carrier { // the kernel answers with such a link
			return exit{known: true, text: "nothing leaves"}
		}
	}
	return exit{known: true, own: r.Index == s.inst.Index, table: found.Table, text: leaves(name, r.Gateway)}
}

func leaves(ifname string, gateway netip.Addr) string {
	if gateway.IsValid() {
		return "leaves by " + ifname + " through " + gateway.String()
	}
	return "leaves by " + ifname
}

// tellSoon has it looked at where packets of a session leave.
func (l *loop) tellSoon(s *session) {
	if !s.told.known {
		return // it is told when the lease stands
	}
	s.doubtful = true
	if l.exitsAt == 0 {
		l.exitsAt = wire.Now() + tellIn
	}
}

// tellExits notes which addresses leave by another link than before.
func (l *loop) tellExits() {
	l.exitsAt = 0
	l.tellFronts()
	for _, s := range l.sessions {
		if !s.doubtful {
			continue
		}
		s.doubtful = false
		now := l.exitOf(s)
		if !now.known || now.same(s.told) {
			continue
		}
		before := s.told
		now.once = before.once || before.own
		s.told = now
		switch {
		case now.own && (before.own || !now.once):
			l.tell(s, events.RouteBack, now.text)
		case now.own:
			l.tell(s, events.RouteBack, now.text+" again")
		default:
			l.tell(s, events.RouteLost, l.lossOf(s, now)+", "+now.text)
		}
	}
}

// lossOf says why packets do not leave by the link of an address.
func (l *loop) lossOf(s *session, now exit) string {
	link, found, err := l.kernel.LinkByIndex(s.inst.Index)
	switch {
	case err == nil && found && !link.Up:
		return "its link is down"
	case err == nil && found && !link.Carrier:
		return "its link has no carrier"
	case now.table == s.lease.table:
		return fmt.Sprintf("another program has a default route in table %d", now.table)
	}
	foreign := l.foreignRoute(s)
	switch {
	case foreign != "":
		return fmt.Sprintf("another program has %q", foreign)
	case s.inst.Leads():
		return ledBy(now.table)
	case !now.once: // as of a link behind this host, which never has one
		return "has no default route"
	}
	return "lost its default route"
}

// ledBy says that a rule of another program comes first, which leads to a table; 0: to none.
func ledBy(table uint32) string {
	switch table {
	case 0:
		return "another rule comes first"
	case unix.RT_TABLE_MAIN:
		return "another rule comes first and leads to main"
	}
	return fmt.Sprintf("another rule comes first and leads to table %d", table)
}

// foreignRoute is the route that packets from an address find in its table, if another program added that, and it answers with an
// error or sends the packet on to the next rule; else "".
func (l *loop) foreignRoute(s *session) string {
	const most = 1000 // a table with more is ours, a copy of a large main
	far := farFrom(s.addr)
	routes, all, err := l.kernel.RoutesAtMost(s.lease.uplink.Family(), s.lease.table, most)
	if err != nil || !all {
		return ""
	}
	first := firstTo(far, routes)
	if first == nil || first.Protocol == route.Protocol || first.Type == unix.RTN_UNICAST {
		return ""
	}
	return first.String()
}

// firstTo is the route of a table that packets to an address take; nil: there is none.
func firstTo(dst netip.Addr, routes []route.Route) (first *route.Route) {
	for i, r := range routes {
		if r.Dead || r.TOS != 0 || r.From.IsValid() || !r.Dst.Contains(dst) {
			continue
		}
		if first == nil || r.Dst.Bits() > first.Dst.Bits() || r.Dst.Bits() == first.Dst.Bits() && r.Metric < first.Metric {
			first = &routes[i]
		}
	}
	return first
}

// tellServed notes that the lease of a session stands.
func (l *loop) tellServed(s *session) {
	s.served, s.told = true, l.exitOf(s)
	if known, has := l.front.rules[s.family()]; !has || known.upTo < s.lease.uplink.Priorities.Source {
		l.tellFront(s.family())
	}
	text := fmt.Sprintf("has table %d", s.lease.table)
	if s.told.known {
		text += ", " + s.told.text
	} else {
		s.told.known = s.lease.uplink.Settings.PlacesRoutes() // what comes next is a change
	}
	l.tell(s, events.Served, text)
}

// tellEnded notes that a session that was served is so no more.
func (l *loop) tellEnded(s *session) {
	if s.served {
		s.served, s.told = false, exit{}
		l.tell(s, events.Ended, "is served no more: "+s.lease.why)
	}
}

// when is a moment of the lease clock as the time of day.
func when(at time.Duration) time.Time {
	return time.Now().Add(at - wire.Now()).Round(time.Second)
}
