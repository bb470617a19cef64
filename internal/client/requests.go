package client

import (
	"cmp"
	"fmt"
	"os"
	"reflect"
	"strings"
	"time"

	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// maxServersText is how much room name servers have in a reply, but for the last.
const maxServersText = 200

// strangersShare is the part of the send buffer that may hold answers to users who may not ask.
const strangersShare = 0.5

// receive takes a datagram that arrived at a session.
func (l *loop) receive(p packet) {
	if p.to.lease.state == done {
		return
	}
	switch {
	case p.isReply:
		l.receiveReply(p)
	case p.err != nil:
		l.noise(p, "malformed datagram ignored")
		if p.cut && l.peers.Believes(p.cred) { // else its sender waits, and takes this process for one that hangs
			l.reply(p.to, p.from, wire.Refuse(wire.Malformed, p.err.Error()))
		}
	case !l.peers.Believes(p.cred):
		l.noise(p, "request refused, since its sender is neither root with CAP_NET_ADMIN nor this user")
		// Answers that a stranger does not read fill this socket's send buffer, which requests to the server need.
		if taken, size := p.to.conn.Backlog(); float64(taken) > strangersShare*float64(size) {
			return
		}
		l.reply(p.to, p.from, wire.Refuse(wire.Denied, "only root with CAP_NET_ADMIN and the holder's own user may ask it"))
	default:
		l.serve(p)
	}
}

// receiveReply takes a reply, if the server sent it.
func (l *loop) receiveReply(p packet) {
	if !l.server.Believes(p.cred) {
		l.noise(p, "reply ignored, since its sender is not trusted (see --server-user)")
		return
	}
	// The server also answers from sockets without a name, while others leave its answers unread.
	if p.from.Bound() && !l.server.Is(p.from) {
		return // of a holder, which answers too late
	}
	l.learn(p.to, p.reply.Marking)
	ev := event{kind: replied, reply: p.reply}
	if p.reply.Code == wire.Exhausted && !p.to.lease.queued { // else it was asked for twice, and has its turn
		ev.turn = l.nextTurn(wire.Now())
	}
	l.feed(p.to, ev)
}

// noise logs a datagram that any user can send.
func (l *loop) noise(p packet, msg string) {
	if l.clamour.Allow() {
		if err := wire.Unread(p.cred); p.err == nil && p.cred.UID == 0 && err != nil {
			p.err, msg = err, "datagram ignored, since it cannot be found out now whether its sender is root of this host"
		}
		args := []any{"uid", p.cred.UID, "pid", p.cred.PID, "from", p.from.String()}
		if p.err != nil {
			args = append(args, "err", p.err)
		}
		p.to.log.Warn(msg, args...)
	}
}

// serve answers a request to a holder.
func (l *loop) serve(p packet) {
	s := p.to
	switch {
	case p.request.Key != s.lease.uplink.Key:
		l.reply(s, p.from, wire.Refuse(wire.Mismatch, "this is the holder of "+s.lease.uplink.Key.String()))
	case p.request.Cmd == wire.End:
		s.enders = append(s.enders, p.from) // drop answers, when everything is taken back
		l.hearFirst()
		l.feed(s, event{kind: end, why: fmt.Sprintf("ended by a command (pid %d)", p.cred.PID)})
	case s.lease.state == releasing:
		l.reply(s, p.from, wire.Refuse(wire.Ending, "the holder is taking everything back"))
	case p.request.Cmd == wire.Replace:
		l.replace(p)
	case p.request.Cmd == wire.Reexec:
		l.makeWay(p)
	case p.request.Cmd == wire.Query && p.request.Marking != wire.Marking{}:
		answer := s.answer()
		l.learn(s, p.request.Marking)
		l.serveBound(s)
		answer.Marking, answer.Missing = s.inst.Rules.Marking, cmp.Or(s.warned[serveWhatIsBound], s.warned[keepLock])
		l.reply(s, p.from, answer)
	case p.request.Cmd == wire.Query:
		answer := s.answer()
		if answer.Table != 0 {
			answer.Missing = s.missing(answer.Table)
		}
		l.reply(s, p.from, answer)
	default:
		l.reply(s, p.from, wire.Refuse(wire.Malformed, fmt.Sprintf("cmd %d: for the server, not for a holder", p.request.Cmd)))
	}
}

// missing compares the table with what it has to have, which takes a second if main is large. An asker asks again meanwhile:
// what was found counts for twice as long as it took to find, and a second at most.
func (s *session) missing(table uint32) string {
	began := wire.Now()
	if s.compared.table != table || began >= s.compared.until {
		text := s.inst.Missing(table)
		now := wire.Now()
		s.compared = comparison{table, text, now + min(2*(now-began), time.Second)}
	}
	return s.compared.missing
}

// comparison is what a session found when it compared its table with what that has to have.
type comparison struct {
	table   uint32
	missing string
	until   time.Duration // that it counts
}

// answer is what a holder says about its lease.
func (s *session) answer() wire.Reply {
	r := wire.Reply{PID: os.Getpid(), Mode: string(s.lease.uplink.Settings.Routes)}
	for _, server := range s.lease.uplink.Nameservers() {
		if len(r.Nameservers) < maxServersText {
			r.Nameservers = strings.TrimPrefix(r.Nameservers+" "+server.String(), " ")
		}
	}
	if s.lease.state == held {
		r.Table, r.Expires = s.lease.table, wire.Seconds(s.lease.expires)
		r.Left = max(wire.Seconds(s.lease.expires-wire.Now()), 1) // for who has another clock; 0 would say nothing
	} else {
		r.Error = s.lease.why
	}
	return r
}

// replace answers a newer call as it answers a query, and then takes over the tag and settings of the call.
func (l *loop) replace(p packet) {
	s := p.to
	u, err := s.lease.uplink.Updated(p.request)
	if err != nil {
		l.reply(s, p.from, wire.Refuse(wire.Malformed, err.Error()))
		return
	}
	answer := s.answer()
	if err := l.restoreRules(s); err != nil {
		answer.Table, answer.Expires, answer.Left, answer.Error = 0, 0, 0, "the rules cannot be restored: "+err.Error()
	}
	l.reply(s, p.from, answer)
	if s.lease.watched && u.Tag == "" {
		u.Tag = s.lease.uplink.Tag // the tag of its profile stays
	}
	s.warnOfFile(p)
	s.hooked = s.hooked || p.request.Settings != ""
	l.update(s, u)
	l.feed(s, event{kind: called})
}

// warnOfFile warns of a call with another file for resolver lines: it stays with the one of this process.
func (s *session) warnOfFile(p packet) {
	asked, err := uplink.DecodeSettings([]byte(p.request.Settings))
	file := s.lease.uplink.Settings.ServersFile
	if err == nil && asked.ServersFile != file && asked.ServersFile != "" && asked.ServersFile != uplink.DefaultServersFile {
		s.log.Warn("a call names another file for resolver lines; they stay in the one of this process",
			"file", file, "named", asked.ServersFile, "pid", p.cred.PID)
	}
}

// update makes u the uplink of a session, which differs from the one before in tag and settings.
func (l *loop) update(s *session, u uplink.Uplink) {
	if !reflect.DeepEqual(s.lease.uplink, u) {
		s.log.Info("new settings", "tag", u.Tag, "settings", u.Settings.String())
		actions := s.lease.step(wire.Now(), event{kind: replaced, newer: u})
		s.inst.Update(u, s.leased(), s.inMain())
		for _, a := range actions {
			l.do(s, a)
		}
	}
	l.scope.settled(s)
}

func (l *loop) reply(s *session, to wire.Addr, r wire.Reply) {
	if !to.Bound() {
		return
	}
	if errs := s.conn.Send(wire.Message{Data: r.Append(nil), To: to}); errs != nil {
		s.log.Debug("reply not delivered", "err", errs[0])
	}
}
