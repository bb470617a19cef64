package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"golang.org/x/time/rate"

	"github.com/table-allocator/table-allocator/internal/allocator"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// usersShare is the part of the send buffer up to which users other than root and our own
// get an answer. The kernel charges a reply to the server until it is read, so that a user
// with many sockets that he does not read would otherwise leave none for the others.
const usersShare = 0.5

// handle answers one batch of datagrams: refusals and renewals at once, what creates or
// ends a lease after the one transaction that writes all of it.
func (s *server) handle(c *wire.Conn, datagrams []wire.Datagram) {
	now := wire.Now()
	s.rules.begin(now)
	crowded := c.Backlog() > usersShare
	var (
		replies []wire.Message
		ops     []allocator.Op
		askers  []asker // of ops, by index
	)
	answer := func(d wire.Datagram, r wire.Reply) {
		switch {
		case !d.From.Bound():
		case crowded && !s.access.first(d.Cred):
			s.noise.write(slog.LevelWarn, "reply not sent: too many that nobody reads", "uid", d.Cred.UID, "pid", d.Cred.PID)
		default:
			replies = append(replies, wire.Message{Data: r.Append(nil), To: d.From})
		}
	}
	for _, d := range datagrams {
		stranger := s.access.check(now, d.Cred)
		switch req, atOnce, ok := s.judge(d, stranger); {
		case ok:
			ops = append(ops, operation(req, d.Cred.UID))
			askers = append(askers, asker{d, req.Marks})
		case atOnce != nil:
			answer(d, *atOnce)
		}
	}
	batch := s.leases.Decide(wire.Seconds(now), ops)
	settle := func(i int, result allocator.Result) {
		s.record(askers[i].Cred, ops[i], result)
		r := reply(result)
		if askers[i].marks && r.Table != 0 {
			r.Marking = s.markingOf(ops[i].Key.Ifname)
		}
		answer(askers[i].Datagram, r)
	}
	var pending []int
	for i, result := range batch.Results() {
		if result.Pending {
			pending = append(pending, i)
		} else {
			settle(i, result)
		}
	}
	s.send(c, replies)
	if len(pending) == 0 {
		return
	}
	if err := s.leases.Commit(batch); err != nil {
		s.faults.write(slog.LevelError, "cannot write to the database, refusing new leases", "err", err)
	}
	replies = replies[:0]
	for _, i := range pending {
		settle(i, batch.Results()[i])
	}
	s.send(c, replies)
}

// asker is who waits for what becomes of an operation.
type asker struct {
	wire.Datagram
	marks bool // wants to know the mark of the interface
}

// judge turns a datagram into a request for a lease, or into what can be said at once, or
// into nothing: what carries no sender is dropped so that the sender tries again, and a
// response is never answered, lest two programs answer each other for ever. stranger says
// why the sender may not lease; it is nil for one who may.
func (s *server) judge(d wire.Datagram, stranger error) (req wire.Request, atOnce *wire.Reply, ok bool) {
	say := func(r wire.Reply) (wire.Request, *wire.Reply, bool) { return req, &r, false }
	if d.Cred.Anonymous() {
		s.noise.write(slog.LevelInfo, "datagram without credentials dropped", "from", d.From.String())
		return req, nil, false
	}
	req, err := wire.ParseRequest(d.Data)
	switch {
	case d.Truncated:
		err = fmt.Errorf("longer than %d bytes", wire.MaxRequest)
	case err == nil && req.Cmd != wire.Acquire && req.Cmd != wire.Release && req.Cmd != wire.Mark:
		err = fmt.Errorf("cmd %d: for the holder of a lease, not for the server", req.Cmd)
	case err == nil && req.Cmd != wire.Release && !d.From.Bound():
		err = errors.New("sender is not bound, so nobody would hear of the lease")
	}
	if err != nil {
		s.noise.write(slog.LevelWarn, "malformed datagram", "uid", d.Cred.UID, "pid", d.Cred.PID,
			"from", d.From.String(), "err", err)
		if req.Cmd == wire.Response {
			return req, nil, false
		}
		return say(wire.Refuse(wire.Malformed, err.Error()))
	}
	if req.Cmd == wire.Mark && !s.access.first(d.Cred) {
		// What is bound by it takes rights that only root has.
		stranger = errors.New("only root and the server's own user may ask for marks")
	}
	switch {
	case stranger != nil:
		s.noise.write(slog.LevelWarn, "lease refused", "ifname", req.Ifname, "addr", req.Address,
			"family", req.Family.String(), "uid", d.Cred.UID, "pid", d.Cred.PID, "err", stranger)
		return say(wire.Refuse(wire.Denied, stranger.Error()))
	case req.Cmd == wire.Mark:
		return say(s.answerMark(req.Ifname, req.Known, d.Cred))
	}
	return req, nil, true
}

func operation(r wire.Request, uid uint32) allocator.Op {
	return allocator.Op{
		Release: r.Cmd == wire.Release,
		Key:     allocator.Key{Family: allocator.Family(r.Family), Ifname: r.Ifname, Addr: r.Address},
		Tag:     r.Tag,
		UID:     uid,
		Want:    r.Want,
	}
}

// reply is the answer that a result means.
func reply(r allocator.Result) wire.Reply {
	switch {
	case r.Outcome == allocator.Granted, r.Outcome == allocator.Renewed:
		return wire.Reply{Table: r.Lease.Table, Expires: r.Lease.Expires}
	case r.Outcome != allocator.Refused:
		return wire.Reply{} // what was released has neither table nor end
	case errors.Is(r.Err, allocator.ErrExhausted):
		return wire.Refuse(wire.Exhausted, r.Err.Error())
	case errors.Is(r.Err, allocator.ErrFamily):
		return wire.Refuse(wire.NotServed, r.Err.Error())
	case errors.Is(r.Err, allocator.ErrNotOwner):
		return wire.Refuse(wire.Denied, r.Err.Error())
	}
	return wire.Refuse(wire.Storage, r.Err.Error())
}

// record writes the line of the log that each lease's change has.
func (s *server) record(cred wire.Cred, op allocator.Op, r allocator.Result) {
	attrs := leaseAttrs(r.Lease)
	asker := []slog.Attr{slog.Int("pid", int(cred.PID)), slog.Uint64("uid", uint64(cred.UID))}
	switch r.Outcome {
	case allocator.Granted:
		s.log.LogAttrs(context.Background(), slog.LevelInfo, "lease granted", append(attrs, asker...)...)
	case allocator.Released:
		s.log.LogAttrs(context.Background(), slog.LevelInfo, "lease released", append(attrs, asker...)...)
	case allocator.Refused:
		s.log.Warn("lease refused", "ifname", op.Key.Ifname, "addr", op.Key.Addr,
			"family", op.Key.Family.String(), "tag", op.Tag, "uid", cred.UID, "pid", cred.PID, "err", r.Err)
	case allocator.Renewed:
		s.log.LogAttrs(context.Background(), slog.LevelDebug, "lease renewed", append(attrs, asker...)...)
	}
}

func leaseAttrs(l allocator.Lease) []slog.Attr {
	return []slog.Attr{
		slog.String("ifname", l.Key.Ifname),
		slog.String("addr", l.Key.Addr),
		slog.String("family", l.Key.Family.String()),
		slog.Uint64("table", uint64(l.Table)),
		slog.String("tag", l.Tag),
		slog.Uint64("owner", uint64(l.Owner)),
		slog.Int64("expires", l.Expires),
	}
}

// throttle bounds the rate of log lines that somebody else can cause as fast as he likes.
type throttle struct {
	log    *slog.Logger
	rate   *rate.Limiter
	hidden int // lines that were not written
}

func newThrottle(log *slog.Logger) *throttle {
	return &throttle{log: log, rate: rate.NewLimiter(1, 10)}
}

func (t *throttle) write(level slog.Level, msg string, args ...any) {
	if !t.rate.Allow() {
		t.hidden++
		return
	}
	if t.hidden > 0 {
		args = append(args, "hidden", t.hidden) // lines like this before it
		t.hidden = 0
	}
	t.log.Log(context.Background(), level, msg, args...)
}

// send answers whoever reads: a peer whose queue is full or who is gone asks again.
func (s *server) send(c *wire.Conn, replies []wire.Message) {
	for _, err := range c.Send(replies...) {
		if err != nil {
			s.log.Debug("reply not delivered", "err", err)
		}
	}
}
