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
	socket  *socket
	now     time.Duration
	backlog float64 // of the socket; below 0: not looked at
	texts   texts
	asks    []ask
	ops     []allocator.Op // what they ask for, by index
	pending []int          // that wait for the commit
	marks   []ask          // which come after it
	replies []wire.Message
	out     []byte   // data of replies
	records []record // for the log
}

// ask is a request and who waits for the answer.
type ask struct {
	socket *socket
	from   wire.Addr
	cred   wire.Cred
	req    wire.Request
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

func (s *server) begin(c *socket) *round {
	r := s.spare
	if s.spare = nil; r == nil { // it waits for the disk
		r = &round{}
	}
	r.socket, r.now, r.backlog = c, wire.Now(), -1
	r.asks, r.ops, r.pending, r.marks = r.asks[:0], r.ops[:0], r.pending[:0], r.marks[:0]
	s.rules.begin(r.now)
	return r
}

func (s *server) end(r *round) {
	s.send(r)
	for i := range r.records {
		s.recorder.write(&r.records[i])
	}
	r.records = r.records[:0]
	s.spare = r
}

// handle answers one batch of datagrams: refusals and renewals at once, what creates or
// ends a lease after the one transaction that writes all of it. A transaction costs much the
// same whatever is in it, so it takes what has come in the meantime, too.
func (s *server) handle(c *socket, datagrams []wire.Datagram) {
	r := s.begin(c)
	defer s.end(r)
	if s.leases.Busy() {
		s.putOff(r, datagrams)
		return
	}
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
	s.commit(r, batch)
}

// decide puts datagrams into the batch, and settles what need not wait for its commit.
func (s *server) decide(r *round, batch *allocator.Batch, datagrams []wire.Datagram) {
	r.backlog = -1
	from := len(r.ops)
	for _, d := range datagrams {
		if req, ok := s.judge(r, d); ok {
			r.add(ask{r.socket, d.From, d.Cred, req})
		}
	}
	s.extend(r, batch, from)
}

func (r *round) add(a ask) {
	if a.req.Cmd == wire.Mark {
		r.marks = append(r.marks, a)
		return
	}
	r.asks, r.ops = append(r.asks, a), append(r.ops, a.op())
}

// extend puts the operations from an index on into the batch.
func (s *server) extend(r *round, batch *allocator.Batch, from int) {
	s.leases.Extend(batch, r.ops[from:])
	for i, result := range batch.Results()[from:] {
		if result.Pending {
			r.pending = append(r.pending, from+i)
		} else {
			s.settle(r, from+i, result)
		}
	}
}

// commit settles what had to wait. It may give up mu, and the turn to receive.
func (s *server) commit(r *round, batch *allocator.Batch) {
	if len(r.pending) > 0 {
		if err := s.leases.Commit(batch); err != nil {
			s.faults.write(slog.LevelError, "cannot write to the database, refusing new leases", "err", err)
		}
		for _, i := range r.pending {
			s.settle(r, i, batch.Results()[i])
		}
		s.send(r)
	}
	for _, a := range r.marks {
		s.answer(r, a.from, a.cred, s.takeMark(a.req.Ifname, a.cred))
	}
}

// putOff is decide while the database is written to.
func (s *server) putOff(r *round, datagrams []wire.Datagram) {
	for _, d := range datagrams {
		req, ok := s.judge(r, d)
		if !ok {
			continue
		}
		most := queueMost
		if !s.access.first(d.Cred) {
			most = usersQueue
		}
		if a := (ask{r.socket, d.From, d.Cred, req}); s.renew(r, a) || s.later.add(a, most) {
			continue
		}
		s.noise.write(slog.LevelWarn, "request dropped: too many wait for the disk", "uid", d.Cred.UID, "pid", d.Cred.PID)
	}
}

// renew answers what needs no write, unless something about the key is put off already.
func (s *server) renew(r *round, a ask) (ok bool) {
	op := a.op()
	if a.req.Cmd == wire.Mark || s.later.has(op.Key) {
		return false
	}
	result, ok := s.leases.Renew(wire.Seconds(r.now), op)
	if ok {
		r.add(a)
		s.settle(r, len(r.ops)-1, result)
	}
	return ok
}

// catchUp decides what was put off, if the database can be written again. While there is
// more, nobody else comes to what is due.
func (s *server) catchUp() {
	for !s.leases.Busy() {
		s.advance()
		asks := s.later.take(roundMost)
		if len(asks) == 0 {
			return
		}
		r := s.begin(asks[0].socket)
		batch := s.leases.Decide(wire.Seconds(r.now), nil)
		for _, a := range asks {
			r.add(a)
		}
		s.extend(r, batch, 0)
		s.send(r)
		s.commit(r, batch)
		s.end(r)
	}
}

// settle answers an operation, and has it recorded.
func (s *server) settle(r *round, i int, result allocator.Result) {
	a := &r.asks[i]
	if s.recorder.wants(result.Outcome) {
		r.records = append(r.records, record{a.cred, r.ops[i], result})
	}
	answer := reply(result)
	if a.req.Marks && answer.Table != 0 {
		answer.Marking = s.markingOf(a.req.Ifname)
	}
	s.answer(r, a.from, a.cred, answer)
}

func (s *server) answer(r *round, to wire.Addr, cred wire.Cred, reply wire.Reply) {
	const some = 64
	if len(r.replies) >= some { // after which the backlog may be another
		s.send(r)
		r.backlog = -1
	}
	switch {
	case !to.Bound():
	case !s.access.first(cred) && r.crowded():
		s.noise.write(slog.LevelWarn, "reply not sent: too many that nobody reads", "uid", cred.UID, "pid", cred.PID)
	default:
		from := len(r.out)
		r.out = reply.Append(r.out)
		r.replies = append(r.replies, wire.Message{Data: r.out[from:], To: to})
	}
}

// crowded tells whether too many replies are not read yet.
func (r *round) crowded() bool {
	if r.backlog < 0 {
		r.backlog = r.socket.Backlog()
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
		errs := r.socket.Send(replies...)
		again := replies[:0]
		for i, err := range errs {
			if errors.Is(err, syscall.EAGAIN) {
				again = append(again, replies[i])
			} else if err != nil {
				s.log.Debug("reply not delivered", "err", err)
			}
		}
		replies = again
		if len(replies) == 0 || waited >= most || r.socket.Backlog() <= usersShare {
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

// judge turns a datagram into a request to decide, or answers it: what carries no sender is
// dropped so that the sender tries again, and a response is never answered, lest two programs
// answer each other for ever.
func (s *server) judge(r *round, d wire.Datagram) (req wire.Request, ok bool) {
	if d.Cred.Anonymous() {
		s.noise.write(slog.LevelInfo, "datagram without credentials dropped", "from", d.From.String())
		return req, false
	}
	req, err := wire.ParseRequestText(r.texts.keep(d.Data))
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
		if req.Cmd != wire.Response {
			s.answer(r, d.From, d.Cred, wire.Refuse(wire.Malformed, err.Error()))
		}
		return req, false
	}
	err = s.access.check(r.now, d.Cred)
	if req.Cmd == wire.Mark && !s.access.first(d.Cred) {
		// What is bound by it takes rights that only root has.
		err = errors.New("only root and the server's own user may ask for marks")
	}
	switch {
	case err != nil:
		s.noise.write(slog.LevelWarn, "lease refused", "ifname", req.Ifname, "addr", req.Address,
			"family", req.Family.String(), "uid", d.Cred.UID, "pid", d.Cred.PID, "err", err)
		s.answer(r, d.From, d.Cred, wire.Refuse(wire.Denied, err.Error()))
		return req, false
	case req.Cmd == wire.Mark && req.Known:
		s.answer(r, d.From, d.Cred, wire.Reply{Marking: s.markingOf(req.Ifname)})
		return req, false
	}
	return req, true
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
