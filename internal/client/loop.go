package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// loop drives a set of machines: it alone touches sockets, kernel, clock and log for
// them. One goroutine runs it; others only read and hand in what they read.
type loop struct {
	servers  []wire.Addr
	trusted  peer.Trust
	peers    peer.Trust // who may ask a holder: root and the own uid
	report   Report
	log      *slog.Logger
	clamour  *rate.Limiter // of log lines that anybody can cause
	kernel   *route.Conn
	glance   *glance // in a watch
	watcher  *route.Watcher
	sessions []*session
	conns    *wire.Set // of the sessions
	rests    rests
	inbox    chan packet
	changes  chan []route.Event
	failures chan error
	readers  sync.WaitGroup
	stopped  chan struct{}
	absent   string // why the server cannot be reached, as long as it is so
	watch    *watch // nil for the client of one address
}

// strangersShare is the part of the send buffer up to which those who may not ask get an
// answer, and lookAgain when a look that failed is tried again.
const (
	strangersShare = 0.5
	lookAgain      = time.Second
)

// Routes that others delete come back at once, but for those that are deleted for ever.
const (
	repairEvery = time.Second
	repairBurst = 10
)

// session is a machine with what it needs of the world.
type session struct {
	*machine
	conn      *wire.Conn
	addr      netip.Addr // of the uplink
	rules     ruleset
	routes    placer
	servers   string // the file that has resolver lines of the address; empty: none
	warned    map[string]string
	log       *slog.Logger
	index     int  // of the link; 0: not seen yet
	present   bool // the address is on the link, as far as we know
	usable    bool // and no duplicate check of it is under way
	created   uint32
	installed bool // kernel and resolver have what a lease means
	filled    bool // the table has had its routes since then
	left      int  // the link that the address was deleted from since we looked; 0: none
	retry     wire.Message
	retryAt   time.Duration // 0: nothing waits for room in the server's queue
	retries   int
	// refreshAt is when routes that expire are followed again; 0: none does.
	refreshAt time.Duration
	enders    []wire.Addr   // who waits to hear that everything is taken back
	repairs   *rate.Limiter // of routes that others delete
	ordered   uint32        // the table whose unbound rule has a place in the watch's order; 0: none has
	orderedIn lane
	hooked    bool // a call brought settings of its own
	again     bool // the server refused the address before
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

func newLoop(servers []wire.Addr, trusted peer.Trust, report Report, log *slog.Logger) (*loop, error) {
	// Listen before looking, so that nothing is missed in between.
	watcher, err := route.Watch(route.Links | route.Addresses4 | route.Addresses6)
	if err != nil {
		return nil, err
	}
	kernel, err := route.Dial()
	if err != nil {
		watcher.Close()
		return nil, err
	}
	conns, err := wire.NewSet()
	if err != nil {
		watcher.Close()
		kernel.Close()
		return nil, err
	}
	l := &loop{
		conns:    conns,
		servers:  servers,
		trusted:  trusted,
		peers:    peer.NewTrust(nil),
		report:   report,
		log:      log,
		clamour:  rate.NewLimiter(rate.Every(10*time.Second), 3),
		kernel:   kernel,
		watcher:  watcher,
		inbox:    make(chan packet),
		changes:  make(chan []route.Event),
		failures: make(chan error, 1),
		stopped:  make(chan struct{}),
	}
	l.readers.Go(l.readKernel)
	l.readers.Go(l.readPeers)
	return l, nil
}

func (l *loop) close() {
	close(l.stopped)
	l.watcher.Close()
	l.conns.Close()
	l.readers.Wait()
	for _, s := range l.sessions {
		s.conn.Close()
	}
	l.kernel.Close()
}

// add puts a machine into the set.
func (l *loop) add(m *machine, conn *wire.Conn) *session {
	key := m.uplink.Key
	log := l.log.With("ifname", key.Ifname, "addr", key.Address, "family", key.Family.String())
	s := &session{
		machine: m,
		conn:    conn,
		addr:    m.uplink.Addr(),
		repairs: rate.NewLimiter(rate.Every(repairEvery), repairBurst),
		rules:   ruleset{uplink: m.uplink, kernel: l.kernel, log: l.log},
		routes:  placer{kernel: l.kernel, glance: l.glance, log: l.log},
		log:     log,
	}
	l.sessions = append(l.sessions, s)
	if err := l.conns.Add(conn, s); err != nil {
		l.fail(err)
	}
	return s
}

// run drives the set until nothing is left of it.
func (l *loop) run(ctx context.Context, first *session) error {
	l.feed(first, event{kind: start})
	l.look(first)
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	stop := ctx.Done()
	var failure error
	for len(l.sessions) > 0 {
		timer.Reset(l.wait(wire.Now()))
		select {
		case <-stop:
			stop = nil // once
			l.end("stopped")
		case <-timer.C:
			if l.rests.due(wire.Now()) {
				continue
			}
			l.fire(wire.Now())
		case p := <-l.inbox:
			l.receive(p)
		case events := <-l.changes:
			l.changed(events)
		case failure = <-l.failures:
			l.end(failure.Error())
		}
		l.rests.stir(wire.Now())
	}
	return failure
}

func (l *loop) end(why string) {
	for _, s := range l.all() {
		l.feed(s, event{kind: end, why: why})
	}
}

// all is the set as it is now: steps change it.
func (l *loop) all() []*session { return append([]*session(nil), l.sessions...) }

// wait is how long nothing is due. A deadline that has passed gives a moment all the
// same, as a floor under whatever the machines do.
func (l *loop) wait(now time.Duration) time.Duration {
	next := now + time.Hour
	if l.rests.at != 0 {
		next = min(next, l.rests.at)
	}
	if w := l.watch; w != nil {
		for _, at := range []time.Duration{w.next, w.admitAt, w.healAt} {
			if at != 0 {
				next = min(next, at)
			}
		}
	}
	for _, s := range l.sessions {
		for _, at := range []time.Duration{s.deadline(), s.retryAt, s.refreshAt} {
			if at != 0 {
				next = min(next, at)
			}
		}
	}
	return max(next-now, time.Millisecond)
}

func (l *loop) fire(now time.Duration) {
	for _, s := range l.all() {
		if s.retryAt != 0 && now >= s.retryAt {
			l.deliver(s, s.retry)
		}
		if s.refreshAt != 0 && now >= s.refreshAt {
			s.refreshAt = 0
			l.look(s)
			_ = l.serveBound(s) // it tells
		}
		if at := s.deadline(); at != 0 && now >= at {
			l.feed(s, event{kind: timer, full: s.retryAt != 0})
		}
	}
}

// feed steps a machine and does what it wants.
func (l *loop) feed(s *session, ev event) {
	before, away := s.state, s.away
	actions := s.step(wire.Now(), ev)
	if away != s.away {
		if s.away {
			s.log.Warn("the server is away; keeping the rules", "table", s.table)
		} else {
			s.log.Info("the server is back", "table", s.table)
		}
	}
	switch {
	case ev.kind == unreachable && s.patient() && l.absent != ev.err.Error():
		l.absent = ev.err.Error()
		l.log.Warn("cannot reach the server; asking again", "err", ev.err)
	case ev.kind == replied:
		l.absent = ""
	}
	if ev.kind == replied && ev.reply.Table == 0 && ev.reply.Error != "" && before != releasing {
		level := slog.LevelWarn
		if s.again { // it has been said
			level = slog.LevelDebug
		}
		s.log.Log(context.Background(), level, "refused by the server", "code", string(ev.reply.Code), "err", ev.reply.Error)
	}
	for _, a := range actions {
		l.do(s, a)
	}
}

func (l *loop) do(s *session, a action) {
	switch a.kind {
	case send:
		s.retries = 0
		l.deliver(s, wire.Message{Data: a.request.Append(nil)})
	case placeRules:
		if l.place(s, a.table) {
			l.lookBeside(s)
		}
		l.remember(s)
		l.welcome(s)
	case clearRules:
		var keep []route.Rule
		if l.watch != nil && !s.present { // which looks after it
			keep = s.gone()
		}
		if len(keep) > 0 {
			l.watch.blocked[s.addr] = true
		}
		if err := s.clear(keep...); err != nil {
			s.log.Error("cannot remove the rules", "table", a.table, "err", err)
		}
	case guard:
		if err := s.clear(s.uplink.Strict(s.rules.guards).BlockOnLoss()...); err != nil {
			s.log.Error("cannot remove the rules", "table", a.table, "err", err)
		}
	case fallBack:
		s.makeDo()
	case report:
		why := a.why
		if a.table == 0 {
			if stranger := peer.Explain(l.servers, l.trusted); stranger != nil {
				why = stranger.Error()
			}
			defer s.log.Error("no table", "err", why) // behind the answer, which says it too
		}
		l.report(a.table, why)
	case finish:
		s.log.Info("finished", "table", s.table, "why", s.why, "lease", a.why)
		l.drop(s)
	}
}

// place installs what a lease means, and tells the machine if it asks.
func (l *loop) place(s *session, table uint32) bool {
	if s.uplink.Settings.PlacesRoutes() && l.watch == nil { // a watch hears of them anyway
		s.warn("hear of routes", l.watcher.Join(route.Routes4|route.Routes6))
	}
	if s.index == 0 {
		l.look(s)
	}
	err := s.install(table)
	if s.state != placing { // other settings for a lease that stands
		s.warn("place the rules", err)
		return false
	}
	if err == nil {
		s.log.Info("lease granted", "table", table, "tag", s.uplink.Tag, "expires", wire.Seconds(s.expires))
	}
	l.feed(s, event{kind: rulesPlaced, err: err})
	return true
}

func (l *loop) drop(s *session) {
	s.unresolve()
	for _, to := range s.enders {
		l.reply(s, to, wire.Reply{PID: os.Getpid()})
	}
	s.warn("let go of the socket", l.conns.Remove(s.conn))
	s.conn.Close()
	if at := slices.Index(l.sessions, s); at >= 0 {
		l.sessions = slices.Delete(l.sessions, at, at+1)
	}
	l.lookBeside(s)
	for _, other := range l.sessions {
		if other.addr == s.addr && other.state == held && other.installed {
			other.warn("remove the rules of the other holder", other.rules.unshare(other.table))
		}
	}
	l.dropped(s)
}

// lookBeside looks again at those that have the address under another name of the link
// than s has.
func (l *loop) lookBeside(s *session) {
	for i := 0; i < len(l.sessions); i++ {
		other := l.sessions[i]
		if other != s && s.index != 0 && other.index == s.index && other.addr == s.addr {
			l.look(other)
		}
	}
}

// deliver sends to the server. Its queue holds ten datagrams by default, which a boot
// fills at once: that is no failure, and goes away within milliseconds.
func (l *loop) deliver(s *session, m wire.Message) {
	s.retryAt = 0
	err := peer.SendToServer(s.conn, l.servers, m.Data)
	if errors.Is(err, syscall.EAGAIN) {
		const longest = 5 // 32 ms
		window := time.Millisecond << min(s.retries, longest)
		s.retries++
		s.retry = m
		s.retryAt = wire.Now() + window/2 + rand.N(window)
		return
	}
	if err != nil {
		l.feed(s, event{kind: unreachable, err: err})
	}
}

// receive takes a datagram that arrived at a session.
func (l *loop) receive(p packet) {
	if p.to.state == done {
		return
	}
	switch {
	case p.isReply:
		if !l.trusted.Has(p.cred.UID) {
			l.noise(p, "reply of somebody who is not trusted ignored (see --server-user)")
			return
		}
		if !slices.Contains(l.servers, p.from) {
			return // a holder's, later than it was waited for
		}
		l.learn(p.to, p.reply.Marking)
		l.feed(p.to, event{kind: replied, reply: p.reply})
	case p.err != nil:
		l.noise(p, "malformed datagram ignored")
	case !l.peers.Has(p.cred.UID):
		l.noise(p, "request of somebody else refused")
		// What a stranger does not read is charged to this socket, and would leave no room for
		// the requests to the server.
		if p.to.conn.Backlog() > strangersShare {
			return
		}
		l.reply(p.to, p.from, wire.Refuse(wire.Denied, "only root and the holder's own user may ask it"))
	default:
		l.serve(p)
	}
}

func (l *loop) noise(p packet, msg string) {
	if l.clamour.Allow() {
		args := []any{"uid", p.cred.UID, "pid", p.cred.PID, "from", p.from.String()}
		if p.err != nil {
			args = append(args, "err", p.err)
		}
		p.to.log.Warn(msg, args...)
	}
}

// serve answers a holder's requests.
func (l *loop) serve(p packet) {
	s := p.to
	answer := wire.Reply{PID: os.Getpid(), Mode: string(s.uplink.Settings.Routes)}
	if s.state == held {
		answer.Table, answer.Expires = s.table, wire.Seconds(s.expires)
		if p.request.Cmd == wire.Query && p.request.Marking == (wire.Marking{}) {
			answer.Missing = s.missing()
		}
	} else {
		answer.Error = s.why
	}
	switch {
	case p.request.Key != s.uplink.Key:
		answer = wire.Refuse(wire.Mismatch, "this is the holder of "+s.uplink.Key.String())
	case p.request.Cmd == wire.End:
		s.enders = append(s.enders, p.from)
		l.feed(s, event{kind: end, why: fmt.Sprintf("ended by pid %d", p.cred.PID)})
		return // answered when everything is taken back
	case s.state == releasing:
		answer = wire.Refuse(wire.Ending, "the holder is taking everything back")
	case p.request.Cmd == wire.Replace:
		told, err := s.uplink.Updated(p.request)
		if err != nil {
			answer = wire.Refuse(wire.Malformed, err.Error())
			break
		}
		if l.watch != nil && told.Tag == "" {
			told.Tag = s.uplink.Tag // that of its profile
		}
		s.hooked = s.hooked || p.request.Settings != ""
		defer func() {
			l.retell(s, told)
			l.keep(s)
			l.feed(s, event{kind: called})
		}()
	case p.request.Marking != wire.Marking{}:
		l.learn(s, p.request.Marking)
		answer.Marking = s.rules.marking
		if err := l.serveBound(s); err != nil {
			answer.Missing = err.Error()
		}
	case p.request.Cmd != wire.Query:
		answer = wire.Refuse(wire.Malformed, fmt.Sprintf("cmd %d: for the server, not for a holder", p.request.Cmd))
	}
	l.reply(s, p.from, answer)
}

// retell lets a holder take over what a newer call was told.
func (l *loop) retell(s *session, told uplink.Uplink) {
	old := s.uplink
	if reflect.DeepEqual(old, told) {
		return
	}
	s.log.Info("told anew", "tag", told.Tag, "settings", fmt.Sprintf("%+v", told.Settings))
	actions := s.step(wire.Now(), event{kind: replaced, told: told})
	s.retell(old)
	for _, a := range actions {
		l.do(s, a)
	}
	l.remember(s)
}

func (l *loop) reply(s *session, to wire.Addr, r wire.Reply) {
	if !to.Bound() {
		return
	}
	if errs := s.conn.Send(wire.Message{Data: r.Append(nil), To: to}); errs != nil {
		s.log.Debug("reply not delivered", "err", errs[0])
	}
}

// changed looks again at what the events concern; they are hints, not news.
func (l *loop) changed(events []route.Event) {
	n := digest(events)
	if n.overrun || n.main || len(n.addresses)+len(n.links) > 0 {
		l.glance.forget()
	}
	l.hearBound(n)
	for _, s := range l.all() {
		switch {
		case n.overrun || n.concerns(s):
			s.noteLeaving(events)
			l.look(s)
		case n.routes == nil:
		case n.routes[routesOf{s.uplink.Family(), s.index}] || n.routes[routesOf{s.uplink.Family(), 0}]:
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
	return n.addresses[s.addr] || n.links[s.index] || s.index == 0 && n.names[s.uplink.Key.Ifname]
}

// hear follows what changed in main, and puts back what others took out of the table. Those
// who do so again and again have to wait, and so does the address.
func (s *session) hear(events []route.Event) {
	followed := slices.ContainsFunc(events, func(e route.Event) bool { return e.Table == unix.RT_TABLE_MAIN && s.concernsRoutes(e) })
	if !followed && !slices.ContainsFunc(events, s.concernsRoutes) {
		return
	}
	if !followed && !s.repairs.Allow() {
		s.warn("keep the routes", errors.New("they are deleted again and again; what is missing is put back once a second"))
		s.lookSoon(repairEvery)
		return
	}
	s.follow()
}

// lookSoon makes the next look come in time at the latest.
func (s *session) lookSoon(in time.Duration) {
	if at := wire.Now() + in; s.refreshAt == 0 || at < s.refreshAt {
		s.refreshAt = at
	}
}

// noteLeaving finds out that the address was there, though no look has found it.
func (s *session) noteLeaving(events []route.Event) {
	for _, e := range events {
		if e.Kind == route.AddressChanged && e.Deleted && e.Addr == s.addr && (e.Index == s.index || s.index == 0) {
			s.left = e.Index
		}
	}
}

// look compares the link and its addresses with what the machine believes.
func (l *loop) look(s *session) {
	if !s.uplink.IsAddress() || s.state == releasing || s.state == done {
		return
	}
	link, found, err := l.link(s)
	if err != nil {
		s.warn("read the link", err)
		s.refreshAt = wire.Now() + lookAgain
		return
	}
	switch {
	case !found && s.index != 0:
		s.present = false
		l.feed(s, event{kind: linkGone, why: "the link is gone"})
		return
	case !found:
		return // it may come yet
	}
	s.index = link.Index
	s.present = s.present || s.left == s.index
	s.left = 0
	addresses, err := l.kernel.AddressesOn(s.uplink.Family(), s.index)
	if err != nil {
		s.warn("read the addresses", err)
		s.refreshAt = wire.Now() + lookAgain
		return
	}
	at := slices.IndexFunc(addresses, func(a route.Address) bool { return a.Addr == s.uplink.Addr() })
	s.usable = at >= 0 && !addresses[at].Tentative()
	switch {
	case at >= 0 && addresses[at].DADFailed():
		s.present = false // as long as it is like this; put on the link again, it is another
		l.feed(s, event{kind: end, why: "another host has the address (duplicate address detection failed)"})
		return
	case at >= 0:
		s.present = true
		if created := addresses[at].Created; created != s.created {
			s.created = created
			l.keep(s)
		}
		l.feed(s, event{kind: addressSeen})
		if s.state == held && !s.installed {
			s.warn("place rules and routes", s.install(s.table))
			l.remember(s)
		} else {
			s.follow()
		}
	case s.present:
		s.present = false
		l.feed(s, event{kind: addressGone, why: "the address is gone"})
		return
	case s.guarding:
		s.yieldAddress()
	}
	if link.Name != s.uplink.Key.Ifname {
		l.rename(s, link.Name)
	}
}

func (l *loop) link(s *session) (route.Link, bool, error) {
	if s.index != 0 {
		return l.kernel.LinkByIndex(s.index)
	}
	return l.kernel.LinkByName(s.uplink.Key.Ifname)
}

// rename puts a machine for the new name beside the one for the old: the name is part of
// the key, and the old lease ends only once the new one stands.
func (l *loop) rename(s *session, name string) {
	u := s.uplink
	u.Key.Ifname = name
	if l.watch != nil {
		var ok bool
		if u, ok = l.watch.renamed(s, name); !ok {
			l.feed(s, event{kind: end, why: "the link is now called " + name + ", which the configuration does not select"})
			return
		}
	}
	for _, other := range l.sessions {
		if other.uplink.Key != u.Key {
			continue
		}
		if other.state == held {
			l.feed(s, event{kind: end, why: "the link is now called " + name})
		}
		return // else it is under way
	}
	conn, err := peer.Open(u.Key, peer.AsHolder)
	if err != nil {
		s.log.Error("the link was renamed, and its new name cannot be held; keeping the old lease", "name", name, "err", err)
		return
	}
	s.log.Info("the link was renamed", "name", name)
	m := newMachine(u, s.reported) // a caller does not wait for ever
	m.watched = s.watched
	m.reported, s.reported = s.reported, true
	next := l.add(m, conn)
	next.index, next.created, next.hooked = s.index, s.created, s.hooked
	l.keep(next)
	l.feed(next, event{kind: start})
	l.look(next)
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
