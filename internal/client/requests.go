package client

import (
	"fmt"
	"os"
	"reflect"
	"slices"

	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// strangersShare is the part of the send buffer up to which those who may not ask get an answer.
const strangersShare = 0.5

// receive takes a datagram that arrived at a session.
func (l *loop) receive(p packet) {
	if p.to.lease.state == done {
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
	answer := wire.Reply{PID: os.Getpid(), Mode: string(s.lease.uplink.Settings.Routes)}
	if s.lease.state == held {
		answer.Table, answer.Expires = s.lease.table, wire.Seconds(s.lease.expires)
		if p.request.Cmd == wire.Query && p.request.Marking == (wire.Marking{}) {
			answer.Missing = s.inst.Missing(s.lease.table)
		}
	} else {
		answer.Error = s.lease.why
	}
	switch {
	case p.request.Key != s.lease.uplink.Key:
		answer = wire.Refuse(wire.Mismatch, "this is the holder of "+s.lease.uplink.Key.String())
	case p.request.Cmd == wire.End:
		s.enders = append(s.enders, p.from)
		l.feed(s, event{kind: end, why: fmt.Sprintf("ended by pid %d", p.cred.PID)})
		return // answered when everything is taken back
	case s.lease.state == releasing:
		answer = wire.Refuse(wire.Ending, "the holder is taking everything back")
	case p.request.Cmd == wire.Replace:
		told, err := s.lease.uplink.Updated(p.request)
		if err != nil {
			answer = wire.Refuse(wire.Malformed, err.Error())
			break
		}
		if l.watch != nil && told.Tag == "" {
			told.Tag = s.lease.uplink.Tag // that of its profile
		}
		s.hooked = s.hooked || p.request.Settings != ""
		defer func() {
			l.retell(s, told)
			l.keep(s)
			l.feed(s, event{kind: called})
		}()
	case p.request.Marking != wire.Marking{}:
		l.learn(s, p.request.Marking)
		answer.Marking = s.inst.Rules.Marking
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
	if reflect.DeepEqual(s.lease.uplink, told) {
		return
	}
	s.log.Info("told anew", "tag", told.Tag, "settings", fmt.Sprintf("%+v", told.Settings))
	actions := s.lease.step(wire.Now(), event{kind: replaced, newer: told})
	s.inst.Update(told, s.leased(), s.inMain())
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
