package client

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/time/rate"

	"github.com/table-allocator/table-allocator/internal/events"
	"github.com/table-allocator/table-allocator/internal/install"
	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// loop drives a set of machines: it alone touches sockets, kernel, clock and log for them. One goroutine runs it. Two
// more read, one kernel events and one datagrams, and hand over what they read.
type loop struct {
	server   peer.Server
	peers    peer.Trust // who may ask a holder
	report   Report
	log      *slog.Logger
	clamour  *rate.Limiter // of log lines that any user can cause
	foreign  *rate.Limiter // of comparisons of the rules for bound traffic that has addresses of other interfaces
	locks    *rate.Limiter // of looks at rules and routes for the lock of bound programs
	env      *install.Env
	kernel   *route.Conn // of env
	watcher  *route.Watcher
	where    route.Whereabouts
	sessions []*session
	conns    *wire.Set // of the sessions
	rests    rests
	inbox    chan packet
	changes  chan []route.Event
	failures chan error
	readers  sync.WaitGroup
	stopped  chan struct{}
	absent   string // why the server cannot be reached; empty: it can
	scope    scope
	read     map[linkOf][]route.Address // while many sessions are looked at; nil else
	ending   bool                       // everything is being taken back
	reloads  <-chan Reload
	reload   func(Reload) // for each value of reloads
	calls    chan func()  // what runs beside the loop hands in
	late     []func()     // what was handed in to be called at the end, under lateLock
	lateLock sync.Mutex
	events   *events.Writer
	away     bool // the server does not answer, which was told
	scarce   scarcity
	lastTurn time.Duration // of an address that waits for a table, when the server has none left
	exitsAt  time.Duration // when it is looked at where packets leave; 0: nothing is doubtful
	front    front
	prefixAt time.Duration // when delegated prefixes are compared with other uplinks; 0: nothing has changed
	prefixes bool          // there were some at the last comparison
	renewAt  time.Duration // when it is looked next whether a lease is due
	former   former
	// successor looks for the program that Reexec asks for; nil: there is none.
	successor   func(Handover) error
	makingWay   bool      // successor runs
	handover    error     // a Handover, which ends the loop
	executedFor wire.Addr // who asked for the execution of this program; the zero value: nobody
}

func newLoop(server string, uids []uint32, report Report, log *slog.Logger) (*loop, error) {
	to, err := peer.NewServer(server, uids)
	if err != nil {
		return nil, err
	}
	// Subscribe before reading, so that no event is missed in between.
	watcher, err := route.Watch(route.Links | route.Addresses4 | route.Addresses6)
	if err != nil {
		return nil, err
	}
	if err := watcher.AllRules(); err != nil {
		watcher.Close()
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
	where, err := kernel.Whereabouts()
	if err != nil {
		watcher.Close()
		kernel.Close()
		return nil, errors.Join(err, conns.Close())
	}
	l := &loop{
		conns:    conns,
		server:   to,
		peers:    peer.NewTrust(nil),
		report:   report,
		log:      log,
		clamour:  rate.NewLimiter(rate.Every(10*time.Second), 3),
		foreign:  rate.NewLimiter(rate.Every(repairEvery), repairBurst),
		locks:    rate.NewLimiter(rate.Every(repairEvery), repairBurst),
		env:      &install.Env{Kernel: kernel, Log: log, OtherHolder: peer.OtherHolder},
		kernel:   kernel,
		events:   events.NewWriter(log),
		front:    newFront(),
		watcher:  watcher,
		where:    where,
		inbox:    make(chan packet),
		changes:  make(chan []route.Event),
		calls:    make(chan func()),
		failures: make(chan error, 1),
		stopped:  make(chan struct{}),
	}
	kernel.Meanwhile = l.renewAmid
	l.readers.Go(l.readKernel)
	l.readers.Go(l.readPeers)
	return l, nil
}

func (l *loop) close() {
	close(l.stopped)
	l.watcher.Close()
	l.conns.Close()
	l.readers.Wait()
	for _, f := range l.late {
		f()
	}
	for _, s := range l.sessions {
		s.conn.Close()
	}
	l.kernel.Close()
	l.env.Close()
	l.events.Close()
}

// hand has the loop call f, unless the loop has ended.
func (l *loop) hand(f func()) {
	select {
	case l.calls <- f:
	case <-l.stopped:
	}
}

// handLast has the loop call f, at its end if it has ended.
func (l *loop) handLast(f func()) {
	select {
	case l.calls <- f:
	case <-l.stopped:
		l.lateLock.Lock()
		defer l.lateLock.Unlock()
		l.late = append(l.late, f)
	}
}

// add puts a machine into the set.
func (l *loop) add(m *machine, conn *wire.Conn) *session {
	key := m.uplink.Key
	log := l.log.With("ifname", key.Ifname, "addr", key.Address, "family", key.Family.String())
	s := &session{
		lease:   m,
		conn:    conn,
		addr:    m.uplink.Addr(),
		repairs: rate.NewLimiter(rate.Every(repairEvery), repairBurst),
		log:     log,
	}
	s.inst = l.env.New(m.uplink, log, s.warn)
	l.sessions = append(l.sessions, s)
	l.rests.grow()
	if err := l.conns.Add(conn, s); err != nil {
		l.fail(err)
	}
	return s
}

// run drives the set until it is empty, and no address may come.
func (l *loop) run(ctx context.Context) error {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	stop := ctx.Done()
	var failure error
	for l.handover == nil && (len(l.sessions) > 0 || l.scope.awaits()) {
		l.renewFirst() // whatever else goes on without end
		timer.Reset(l.wait(wire.Now()))
		select {
		case <-stop:
			stop = nil // once
			if l.scope.leaves(nil) {
				return nil
			}
			l.end("stopped")
		case r := <-l.reloads:
			l.reload(r)
		case <-timer.C:
			if l.rests.due(wire.Now(), l.kernel.ForgetRules) {
				continue
			}
			l.fire(wire.Now())
		case p := <-l.inbox:
			l.receive(p)
		case call := <-l.calls:
			call()
		case events := <-l.changes:
			l.changed(events)
		case failure = <-l.failures:
			if l.scope.leaves(failure) {
				return failure
			}
			l.end(failure.Error())
		}
		l.rests.stir(wire.Now())
		l.scope.runDue(wire.Now())
	}
	l.hearLast()
	return errors.Join(failure, l.handover)
}

func (l *loop) end(why string) {
	l.hearFirst()
	l.ending = true
	all := l.all()
	slices.SortStableFunc(all, func(a, b *session) int { return a.inst.Stood() - b.inst.Stood() })
	for _, s := range all {
		l.feed(s, event{kind: end, why: why})
	}
}

// all is a copy of the set, which steps change.
func (l *loop) all() []*session { return append([]*session(nil), l.sessions...) }

// wait is how long nothing is due, and 1 ms at least: a machine whose deadline has passed must not keep the loop busy.
func (l *loop) wait(now time.Duration) time.Duration {
	next := earliest(now+time.Hour, l.rests.at, l.env.RetryAt, l.exitsAt, l.scarce.at, l.prefixAt, l.scope.next())
	for _, s := range l.sessions {
		next = earliest(next, s.lease.deadline(), s.retryAt, s.inst.RefreshAt)
	}
	return max(next-now, time.Millisecond)
}

// earliest is the first of moments, of which 0 is none.
func earliest(moments ...time.Duration) (first time.Duration) {
	for _, at := range moments {
		if at != 0 && (first == 0 || at < first) {
			first = at
		}
	}
	return first
}

func (l *loop) fire(now time.Duration) {
	if at := l.env.RetryAt; at != 0 && now >= at {
		l.env.Retry()
	}
	if l.scarce.at != 0 && now >= l.scarce.at {
		l.tellScarce()
	}
	if l.exitsAt != 0 && now >= l.exitsAt {
		l.tellExits()
	}
	if l.prefixAt != 0 && now >= l.prefixAt {
		l.checkPrefixes()
	}
	for _, s := range l.all() {
		l.fireSession(s, now)
	}
}

func (l *loop) fireSession(s *session, now time.Duration) {
	if s.retryAt != 0 && now >= s.retryAt {
		l.deliver(s, s.retry)
	}
	if s.inst.RefreshAt != 0 && now >= s.inst.RefreshAt {
		s.inst.RefreshAt = 0
		l.look(s)
		l.tellSoon(s)
		l.serveBound(s)
		_ = l.restoreRules(s) // which warns
	}
	if at := s.lease.deadline(); at != 0 && now >= at {
		l.feed(s, event{kind: timer, full: s.retryAt != 0})
	}
}

// feed steps a machine and does what it wants.
func (l *loop) feed(s *session, ev event) {
	if ev.kind == unreachable || ev.kind == timer {
		l.inherit(s, ev.kind == unreachable)
	}
	before, away := s.lease.state, s.lease.away
	actions := s.lease.step(wire.Now(), ev)
	l.tellAway(s, away)
	switch ev.kind {
	case unreachable:
		l.tellUnreachable(s, ev.err)
	case replied:
		l.answered(s, ev.reply, before)
	}
	for _, a := range actions {
		l.do(s, a)
	}
	if ev.kind == replied && before == held && !s.lease.away {
		_ = l.restoreRules(s) // at each renewal, in case that an event was lost. It warns
	}
}

// answered notes that the server answered a session, which was in the state before.
func (l *loop) answered(s *session, r wire.Reply, before state) {
	l.absent = ""
	l.tellServer(false)
	if before != releasing {
		l.tellRefusal(s, r)
	}
	if r.Code == wire.Exhausted {
		l.scope.exhausted(s)
	}
	if (before == asking || before == fallenBack) && s.lease.state == placing {
		l.hasten(s.family())
	}
}

// tellAway logs that the server answers a session no more, or again. away is how it was before.
func (l *loop) tellAway(s *session, away bool) {
	switch {
	case s.lease.away && !away:
		s.log.Warn("the server does not answer; the rules stay", "table", s.lease.table)
		l.tellServer(true)
	case away && !s.lease.away:
		s.log.Info("the server answers again", "table", s.lease.table)
	}
}

// tellUnreachable says once for all sessions why the server cannot be reached.
func (l *loop) tellUnreachable(s *session, err error) {
	l.tellServer(true)
	if s.lease.patient() && l.absent != err.Error() {
		l.absent = err.Error()
		l.log.Warn("cannot reach the server; asking again", "err", err)
	}
}

func (l *loop) tellRefusal(s *session, r wire.Reply) {
	if r.Table != 0 {
		s.refusal = ""
	}
	if r.Table != 0 || r.Error == "" {
		return
	}
	scarce := r.Code == wire.Exhausted && s.lease.watched
	if s.again || s.refusal == r.Error || scarce && (s.refusal != "" || l.scarce.counts(s)) { // it was logged before, or is with others
		s.log.Debug("gets no table", "code", string(r.Code), "err", r.Error)
	} else {
		l.tellAt(slog.LevelWarn, s, events.Refused, "gets no table: "+r.Error, "code", string(r.Code))
	}
	s.refusal = r.Error
}

func (l *loop) do(s *session, a action) {
	switch a.kind {
	case send:
		s.retries = 0
		if a.request.Cmd == wire.Release {
			l.former.drop(a.request.Key)
		}
		if a.request.Marks { // in case that the server has lost it
			a.request.Marking = s.inst.Rules.Marking
		}
		l.deliver(s, wire.Message{Data: a.request.Append(nil)})
	case placeRules:
		if l.place(s, a.table) {
			l.lookAtTwins(s)
		}
		l.scope.settled(s)
	case clearRules:
		s.clear(a.table, nil)
	case block:
		s.clear(a.table, s.lease.uplink.BlockOnLoss())
		l.tellEnded(s)
		s.inst.YieldAddress()
	case fallBack:
		s.inst.MakeDo()
	case report:
		l.answerCaller(s, a.table, a.why)
	case finish:
		l.tellEnded(s)
		s.log.Debug("finished", "table", s.lease.table, "why", s.lease.why, "lease", a.why)
		l.drop(s)
	}
}

func (l *loop) answerCaller(s *session, table uint32, why string) {
	if table == 0 {
		if stranger := l.server.Stranger(); stranger != nil {
			why = stranger.Error()
		}
	}
	l.report(table, why)
	if table == 0 {
		s.log.Error("no table", "err", why) // after the answer, which the caller waits for
	}
}

func (l *loop) drop(s *session) {
	s.inst.Unresolve()
	for _, to := range s.enders {
		l.reply(s, to, wire.Reply{PID: os.Getpid()})
	}
	s.warn("stop reading the socket", l.conns.Remove(s.conn))
	s.conn.Close()
	if at := slices.Index(l.sessions, s); at >= 0 {
		l.sessions = slices.Delete(l.sessions, at, at+1)
	}
	s.warn("remove the rules of the other holder", s.inst.Rules.Unshare(0))
	l.lookAtTwins(s)
	for _, other := range l.sessions {
		if other.addr == s.addr && other.serves() {
			other.warn("remove the rules of the other holder", other.inst.Rules.Unshare(other.lease.table))
			other.inst.SyncEndpoint() // which this one may have deleted
		}
	}
	l.scope.dropped(s)
}

// deliver sends to the server. The queue of the server's socket holds ten datagrams by default. A boot fills it at
// once, and the server empties it within milliseconds, so a full queue is no failure: the request is sent again, as
// when memory is short.
func (l *loop) deliver(s *session, m wire.Message) {
	s.retryAt = 0
	err := l.server.Send(s.conn, m.Data)
	if errors.Is(err, syscall.EAGAIN) || outside.Passes(err) {
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
