package server

import (
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"math"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/table-allocator/table-allocator/internal/allocator"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// The kernel charges a reply to the send buffer of the server's socket until the peer reads it, so
// peers that do not read would leave no room for replies to others. Users other than root and the
// server's own user may take half of the buffer. When nine tenths are taken, each reply to root goes
// out from a new socket, which has a send buffer of its own. A peer that connected its socket takes
// no reply from a new socket: the last tenth is for such peers.
const (
	usersShare = 0.5
	rootsShare = 0.9
)

const (
	repliesMost = 64  // that are sent in one go
	roundMost   = 256 // requests in a transaction, so that a round ends while datagrams still come
)

// socket is one form of the name that is served.
type socket struct {
	*wire.Conn
	taken  int             // bytes of the send buffer, as if no peer had read anything since the last look
	queued int             // bytes of these that are not sent yet
	size   int             // of the send buffer; 0 before the first look
	ready  []wire.Datagram // which waited for the groups of their senders
}

// queue counts a reply that is about to be sent.
func (c *socket) queue(reply []byte) {
	n := wire.Charge(len(reply))
	c.taken += n
	c.queued += n
}

// crowded reports whether more than a share of the send buffer is taken, or will be once the replies
// that are queued are sent. It looks at the buffer only if that may be so: a look is two system calls.
func (c *socket) crowded(share float64) bool {
	over := func() bool { return float64(c.taken) > share*float64(c.size) }
	if over() {
		c.taken, c.size = c.Backlog()
		c.taken += c.queued
	}
	return over()
}

// round is one turn of a loop: the datagrams that wait, the transaction that they share, and the
// replies. All rounds use the same memory.
type round struct {
	socket  *socket
	now     time.Duration
	texts   texts
	pending []pending // requests that wait for the commit
	marks   []ask     // requests for marks, which are answered after it
	replies []wire.Message
	out     []byte   // data of replies
	records []record // for the log
}

// ask is a request and who waits for the answer.
type ask struct {
	from wire.Addr
	cred wire.Cred
	req  wire.Request
}

type pending struct {
	ask
	result allocator.Result
}

func (a *ask) op() allocator.Op {
	return allocator.Op{
		Release: a.req.Cmd == wire.Release,
		Key:     allocator.Key{Family: allocator.Family(a.req.Family), Ifname: a.req.Ifname, Addr: a.req.Address},
		Tag:     a.req.Tag,
		UID:     a.cred.UID,
		Want:    a.req.Want,
	}
}

// sign says in an operation who asks.
func (s *server) sign(op *allocator.Op, a *ask) {
	op.UID = s.access.owner(a.cred)
	op.Gone = a.cred.UID == 0 && s.access.standing(a.cred) == wire.Gone
	op.Sender = allocator.Sender{PID: a.cred.PID}
	if a.from.Bound() {
		op.Sender.Name = maphash.Comparable(s.seed, a.from)
	}
}

// handle answers datagrams: it refuses and renews at once. What creates or ends a lease it answers
// after one transaction for all of it. A transaction costs much the same whatever is in it, so the
// datagrams that come until then are part of it.
func (s *server) handle(c *socket, datagrams []wire.Datagram, now time.Duration) {
	r := &s.round
	r.socket, r.now = c, now
	s.rules.begin(r.now)
	s.access.now = now
	if len(c.ready) > 0 {
		datagrams = slices.Concat(c.ready, datagrams)
		c.ready = nil
	}
	for len(datagrams) > 0 {
		for _, d := range datagrams {
			if req, ok := s.judge(r, d); ok {
				s.decide(r, ask{d.From, d.Cred, req})
			}
		}
		s.send(r)
		if len(r.pending) == 0 || len(r.pending) >= roundMost {
			break
		}
		var err error
		if datagrams, err = c.ReceiveNow(); err != nil {
			break // the next Receive returns the error
		}
	}
	s.startLookUp()
	s.commit(r)
	for _, a := range r.marks {
		s.answer(r, a.from, a.cred, s.takeMark(a.req.Ifname, a.cred))
	}
	s.send(r)
	for i := range r.records { // now that the replies are out
		s.recorder.write(&r.records[i])
	}
	r.pending, r.marks, r.records = r.pending[:0], r.marks[:0], r.records[:0]
}

// decide has the allocator decide a request, and answers it unless it has to wait for the commit.
func (s *server) decide(r *round, a ask) {
	if a.req.Cmd == wire.Mark {
		r.marks = append(r.marks, a)
		return
	}
	op := a.op()
	s.sign(&op, &a)
	s.rules.left = s.rules.left[:0]
	result := s.leases.Decide(wire.Seconds(r.now), &op)
	if result.Outcome == allocator.Released {
		s.rules.forgetRoutes(result.Lease.Family, result.Lease.Table)
	}
	if left := s.rules.sayLeft(); left != "" && result.Err == allocator.ErrExhausted {
		result.Err = fmt.Errorf("%w%s", result.Err, left)
	}
	if result.Pending {
		r.pending = append(r.pending, pending{a, result})
	} else {
		s.answerOp(r, &a, result)
	}
}

func (s *server) commit(r *round) {
	err := s.leases.Commit(wire.Seconds(r.now))
	if err != nil {
		s.faults.write(slog.LevelError, "cannot write to the database, refusing new leases", "err", err)
	}
	if len(r.pending) > 0 {
		s.changeNames()
	}
	for i := range r.pending {
		p := &r.pending[i]
		if err != nil {
			p.result = allocator.Result{Lease: allocator.Lease{Key: p.result.Lease.Key}, Err: err}
		}
		s.answerOp(r, &p.ask, p.result)
	}
}

// answerOp answers an operation, and notes what the log says about it.
func (s *server) answerOp(r *round, a *ask, result allocator.Result) {
	if s.recorder.wants(result.Outcome) {
		r.records = append(r.records, record{a.cred, a.op(), result})
	}
	answer := reply(result)
	if a.req.Left && answer.Table != 0 {
		answer.Left = max(answer.Expires-wire.Seconds(r.now), 1)
	}
	if a.req.Marks && answer.Table != 0 {
		if answer.Marking = s.markingOf(a.req.Ifname); answer.Marking == (wire.Marking{}) && s.access.first(a.cred) {
			s.restoreMark(r.now, a.req.Ifname, a.req.Marking)
			answer.Marking = s.markingOf(a.req.Ifname)
		}
	}
	s.answer(r, a.from, a.cred, answer)
}

func (s *server) answer(r *round, to wire.Addr, cred wire.Cred, reply wire.Reply) {
	if !to.Bound() {
		return
	}
	if len(r.replies) >= repliesMost {
		s.send(r)
	}
	from := len(r.out)
	r.out = reply.Append(r.out)
	m := wire.Message{Data: r.out[from:], To: to}
	first := s.access.first(cred)
	switch {
	case !first && r.socket.crowded(usersShare):
		s.noise.write(slog.LevelWarn, "reply dropped: too many replies are not read", "uid", cred.UID, "pid", cred.PID)
	case first && r.socket.crowded(rootsShare) && wire.SendApart(m) == nil:
	default:
		r.socket.queue(m.Data)
		r.replies = append(r.replies, m)
	}
}

// send sends the replies of the round. A peer whose queue is full gets none, and asks again.
func (s *server) send(r *round) {
	errs := r.socket.Send(r.replies...)
	r.socket.queued = 0
	for i, err := range errs {
		if errors.Is(err, syscall.EAGAIN) {
			r.socket.taken = math.MaxInt // to look again
			if r.socket.crowded(rootsShare) {
				err = wire.SendApart(r.replies[i])
			}
		}
		if err != nil {
			s.log.Debug("reply not delivered", "err", err)
		}
	}
	r.replies, r.out = r.replies[:0], r.out[:0]
}

// texts turns datagrams into strings, many of which share one piece of memory. Code that keeps a part
// of such a string for long has to copy it.
type texts struct{ b strings.Builder }

func (t *texts) keep(data []byte) string {
	const size = 16 << 10
	if t.b.Cap()-t.b.Len() < len(data) {
		t.b.Reset()
		t.b.Grow(size)
	}
	from := t.b.Len()
	t.b.Write(data)
	return t.b.String()[from:]
}

// judge turns a datagram into a request to decide, or answers it. A datagram without credentials is
// dropped, so that its sender tries again. A response is never answered, or two programs could answer
// each other for ever.
func (s *server) judge(r *round, d wire.Datagram) (req wire.Request, ok bool) {
	if len(d.Data) == 0 && d.Cred.PID == int32(os.Getpid()) { // of Wake
		return req, false
	}
	if d.Cred.Anonymous() {
		s.noise.write(slog.LevelInfo, "datagram without credentials dropped", "from", d.From.String())
		return req, false
	}
	req, err := wire.ParseRequestText(r.texts.keep(d.Data))
	switch {
	case d.Truncated:
		err = fmt.Errorf("longer than %d bytes", wire.MaxRequest)
	case err == nil && req.Cmd != wire.Acquire && req.Cmd != wire.Release && req.Cmd != wire.Mark && req.Cmd != wire.Health:
		err = fmt.Errorf("cmd %d: for the holder of a lease, not for the server", req.Cmd)
	case err == nil && req.Cmd != wire.Release && !d.From.Bound():
		err = errors.New("the sender is not bound, so it cannot be answered")
	}
	if err != nil {
		s.noise.write(slog.LevelWarn, "malformed datagram", "uid", d.Cred.UID, "pid", d.Cred.PID,
			"from", d.From.String(), "err", err)
		if req.Cmd != wire.Response {
			s.answer(r, d.From, d.Cred, wire.Refuse(wire.Malformed, err.Error()))
		}
		return req, false
	}
	err = s.access.check(d.Cred)
	if req.Cmd == wire.Release && d.Cred.UID == 0 && s.access.standing(d.Cred) == wire.Gone {
		err = nil // it may be its own lease
	}
	if s.access.hidden {
		s.warnHidden.Do(func() {
			s.log.Warn("/proc does not show the processes that ask (hidepid, or another pid namespace), so every uid 0 counts as root")
		})
	}
	if (req.Cmd == wire.Mark || req.Cmd == wire.Health) && !s.access.first(d.Cred) {
		// Only root may add the rules for a mark. How many leases others hold concerns no user.
		err = errors.New("only root and the server's own user may ask for marks and for the state of the server")
	}
	switch {
	case errors.Is(err, errAwaited) && s.park(r.socket, d):
		return req, false
	case err != nil:
		s.noise.write(slog.LevelWarn, "lease refused", "ifname", req.Ifname, "addr", req.Address,
			"family", req.Family.String(), "uid", d.Cred.UID, "pid", d.Cred.PID, "err", err)
		code := wire.Denied
		if errors.Is(err, errAwaited) || errors.Is(err, errGroups) || errors.Is(err, errSilent) {
			code = wire.Storage
		}
		s.answer(r, d.From, d.Cred, wire.Refuse(code, err.Error()))
		return req, false
	case req.Cmd == wire.Mark && req.Known:
		answer := wire.Reply{Marking: s.markingOf(req.Ifname)}
		if req.Priority != 0 {
			answer.Ifname = s.interfaceAt(req.Priority)
		}
		s.answer(r, d.From, d.Cred, answer)
		return req, false
	case req.Cmd == wire.Health:
		s.answer(r, d.From, d.Cred, s.health(req.Family))
		return req, false
	}
	return req, true
}

// health is how the server and its pool of a family stand.
func (s *server) health(family wire.Family) wire.Reply {
	leased, tables := s.leases.Pool(allocator.Family(family))
	if tables == 0 {
		return wire.Refuse(wire.NotServed, allocator.ErrFamily.Error())
	}
	answer := wire.Reply{Leased: int64(leased), Tables: int64(tables)}
	if err := s.leases.Fault(); err != nil {
		answer.Code, answer.Error = wire.Storage, err.Error()
	}
	return answer
}

// codes are the codes of refusals. Any other error is about storage.
var codes = map[error]wire.Code{
	allocator.ErrExhausted: wire.Exhausted,
	allocator.ErrFamily:    wire.NotServed,
	allocator.ErrNotOwner:  wire.Denied,
}

// reply returns the answer to an operation.
func reply(r allocator.Result) wire.Reply {
	switch r.Outcome {
	case allocator.Granted, allocator.Renewed:
		return wire.Reply{Table: r.Lease.Table, Expires: r.Lease.Expires}
	case allocator.Refused:
		return wire.Refuse(codeOf(r.Err), r.Err.Error())
	}
	return wire.Reply{} // a lease that was released
}

func codeOf(err error) wire.Code {
	for cause, code := range codes {
		if errors.Is(err, cause) {
			return code
		}
	}
	return wire.Storage
}
