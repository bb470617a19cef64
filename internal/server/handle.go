package server

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"syscall"
	"time"

	"github.com/table-allocator/table-allocator/internal/allocator"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// usersShare is the part of the send buffer up to which users other than root and our own
// get an answer. The kernel charges a reply to the server until it is read, so that a user
// with many sockets that he does not read would otherwise leave none for the others.
const usersShare = 0.5

// roundMost ends a round that would go on for as long as datagrams come.
const roundMost = 256

// round is what the server does in one go: the datagrams that wait, the transaction that
// they share, and the replies. Its memory serves one round after the other.
type round struct {
	conn    *wire.Conn
	now     time.Duration
	backlog float64 // of conn; below 0: not looked at
	texts   texts
	ops     []allocator.Op
	askers  []asker // of ops, by index; the data of their datagrams is gone
	pending []int   // ops that wait for the commit
	replies []wire.Message
	out     []byte   // data of replies
	records []record // for the log
}

// handle answers one batch of datagrams: refusals and renewals at once, what creates or
// ends a lease after the one transaction that writes all of it. A transaction costs much the
// same whatever is in it, so it takes what has come in the meantime, too.
func (s *server) handle(c *wire.Conn, datagrams []wire.Datagram) {
	r := &s.round
	r.conn, r.now = c, wire.Now()
	r.ops, r.askers, r.pending = r.ops[:0], r.askers[:0], r.pending[:0]
	s.rules.begin(r.now)
	batch := s.leases.Decide(wire.Seconds(r.now), nil)
	for len(datagrams) > 0 {
		s.decide(r, batch, datagrams)
		s.send(r)
		if len(r.pending) == 0 || len(r.ops) >= roundMost {
			break
		}
		var err error
		if datagrams, err = c.ReceiveNow(); err != nil {
			break // as the next Receive will say
		}
	}
	if len(r.pending) > 0 {
		if err := s.leases.Commit(batch); err != nil {
			s.faults.write(slog.LevelError, "cannot write to the database, refusing new leases", "err", err)
		}
		for _, i := range r.pending {
			s.settle(r, i, batch.Results()[i])
		}
		s.send(r)
	}
	if len(r.records) > 0 {
		r.records = s.recorder.take(r.records)
	}
}

// decide puts datagrams into the batch, and settles what need not wait for its commit.
func (s *server) decide(r *round, batch *allocator.Batch, datagrams []wire.Datagram) {
	r.backlog = -1
	from := len(r.ops)
	for _, d := range datagrams {
		stranger := s.access.check(r.now, d.Cred)
		switch req, atOnce, ok := s.judge(d, r.texts.keep(d.Data), stranger); {
		case ok:
			r.ops = append(r.ops, operation(req, d.Cred.UID))
			r.askers = append(r.askers, asker{d, req.Marks})
		case atOnce != nil:
			s.answer(r, d, *atOnce)
		}
	}
	s.leases.Extend(batch, r.ops[from:])
	for i, result := range batch.Results()[from:] {
		if result.Pending {
			r.pending = append(r.pending, from+i)
		} else {
			s.settle(r, from+i, result)
		}
	}
}

// settle answers an operation, and has it recorded.
func (s *server) settle(r *round, i int, result allocator.Result) {
	asker := &r.askers[i]
	if s.recorder.wants(result.Outcome) {
		r.records = append(r.records, record{asker.Cred, r.ops[i], result})
	}
	answer := reply(result)
	if asker.marks && answer.Table != 0 {
		answer.Marking = s.markingOf(r.ops[i].Key.Ifname)
	}
	s.answer(r, asker.Datagram, answer)
}

func (s *server) answer(r *round, d wire.Datagram, reply wire.Reply) {
	switch {
	case !d.From.Bound():
	case !s.access.first(d.Cred) && r.crowded():
		s.noise.write(slog.LevelWarn, "reply not sent: too many that nobody reads", "uid", d.Cred.UID, "pid", d.Cred.PID)
	default:
		from := len(r.out)
		r.out = reply.Append(r.out)
		r.replies = append(r.replies, wire.Message{Data: r.out[from:], To: d.From})
	}
}

// crowded tells whether too many replies are not read yet.
func (r *round) crowded() bool {
	if r.backlog < 0 {
		r.backlog = r.conn.Backlog()
	}
	return r.backlog > usersShare
}

// send answers whoever reads: a peer whose queue is full or who is gone asks again. If it is
// the room for all replies together that is used up, as when a thousand callers ask at once
// and have not come to read yet, it waits for them a little.
func (s *server) send(r *round) {
	const step, most = time.Millisecond, 100 * time.Millisecond
	replies := r.replies
	for waited := time.Duration(0); len(replies) > 0; waited += step {
		errs := r.conn.Send(replies...)
		again := replies[:0]
		for i, err := range errs {
			if errors.Is(err, syscall.EAGAIN) {
				again = append(again, replies[i])
			} else if err != nil {
				s.log.Debug("reply not delivered", "err", err)
			}
		}
		replies = again
		if len(replies) == 0 || waited >= most || r.conn.Backlog() <= usersShare {
			break
		}
		time.Sleep(step)
	}
	if len(replies) > 0 {
		s.log.Debug("replies not delivered: queues are full", "replies", len(replies))
	}
	r.replies, r.out = r.replies[:0], r.out[:0]
}

// texts turns datagrams into strings with a memory for many of them. Whoever keeps a part
// of one for long copies it.
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

// asker is who waits for what becomes of an operation.
type asker struct {
	wire.Datagram
	marks bool // wants to know the mark of the interface
}

// judge turns a datagram into a request for a lease, or into what can be said at once, or
// into nothing: what carries no sender is dropped so that the sender tries again, and a
// response is never answered, lest two programs answer each other for ever. text is the
// datagram's data; stranger says why the sender may not lease, and is nil for one who may.
func (s *server) judge(d wire.Datagram, text string, stranger error) (req wire.Request, atOnce *wire.Reply, ok bool) {
	say := func(r wire.Reply) (wire.Request, *wire.Reply, bool) { return req, &r, false }
	if d.Cred.Anonymous() {
		s.noise.write(slog.LevelInfo, "datagram without credentials dropped", "from", d.From.String())
		return req, nil, false
	}
	req, err := wire.ParseRequestText(text)
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
