package client

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Handover is what a holder hands to the program that goes on with its lease, and the error by which Run ends then.
// Lease, rules and routes are in place, and nobody renews the lease meanwhile. The socket has the holder's name all the
// time, so that no other client takes the address for free; what is asked meanwhile waits in it.
type Handover struct {
	Ifname   string          `json:"ifname"`  // of the link, which may have another name than at the start
	Index    int             `json:"index"`   // of the link; 0: there is none
	Network  netip.Prefix    `json:"network"` // the address, which may be gone, with its prefix length; of what is no address: none
	Tag      string          `json:"tag,omitempty"`
	Settings json.RawMessage `json:"settings"`
	Asker    wire.Addr       `json:"asker"` // who asked for it, and waits for an answer of the program that goes on
	Socket   *os.File        `json:"-"`     // at the holder's name; nil: there is none, and the name is to be taken
}

func (Handover) Error() string { return "another program goes on with the lease" }

// Accept makes an uplink what it was for the program before.
func (h Handover) Accept(u uplink.Uplink) (uplink.Uplink, error) {
	u.Key.Ifname, u.Network = h.Ifname, h.Network
	return u.Updated(wire.Request{Key: u.Key, Tag: h.Tag, Settings: string(h.Settings)})
}

// Answer tells who asked for the handover which table the program that goes on has, or why none.
func (h Handover) Answer(table uint32, why string) error {
	answer := wire.Reply{PID: os.Getpid(), Table: table, Error: why}
	return wire.SendApart(wire.Message{Data: answer.Append(nil), To: h.Asker})
}

// makeWay begins to look whether the installed program can go on, or says why it is not looked.
func (l *loop) makeWay(p packet) {
	s := p.to
	if p.from == l.executedFor { // it asked again before it had the answer, which comes as soon as there is a lease
		if s.lease.state == held {
			l.reply(s, p.from, s.answer())
		}
		return
	}
	if l.makingWay || slices.ContainsFunc(l.sessions, func(s *session) bool { return s.lease.state == releasing }) {
		return // the asker asks again, and what is left of the link's former name is gone then
	}
	to, err := l.mayMakeWay(p)
	if err != nil {
		l.stay(s, p.from, err)
		return
	}
	l.makingWay = true
	go func() { // it executes a program
		err := l.successor(to)
		l.hand(func() {
			l.makingWay = false
			l.finishMakingWay(p, err)
		})
	}()
}

// finishMakingWay ends the loop, unless the installed program cannot go on.
func (l *loop) finishMakingWay(p packet, err error) {
	s := p.to
	to := Handover{}
	if err == nil {
		to, err = l.mayMakeWay(p) // also now
	}
	if err == nil {
		to.Socket, err = s.conn.File()
	}
	if err != nil {
		l.stay(s, p.from, err)
		return
	}
	s.log.Info("executing the installed program, which goes on with the lease", "table", s.lease.table, "pid", p.cred.PID)
	l.handover = to
}

// stay answers that this program goes on.
func (l *loop) stay(s *session, asker wire.Addr, err error) {
	answer := s.answer()
	answer.Table, answer.Expires, answer.Left, answer.Error = 0, 0, 0, err.Error()
	l.reply(s, asker, answer)
}

// mayMakeWay returns what another program would go on with, or says why none may.
func (l *loop) mayMakeWay(p packet) (Handover, error) {
	lease := p.to.lease
	switch {
	case p.cred.UID != 0:
		return Handover{}, errors.New("only root may ask for this")
	case lease.watched:
		return Handover{}, errors.New("a watch serves it, which a restart replaces: " + outside.Service("restart", "table-allocator-watch"))
	case l.successor == nil:
		return Handover{}, errors.New("the holder has no program to execute")
	case len(l.sessions) > 1:
		return Handover{}, errors.New("its link has another name now, under which it does not have its lease yet: ask again")
	case lease.state != held:
		return Handover{}, fmt.Errorf("it has no lease now: %s", lease.why)
	case lease.away:
		return Handover{}, errors.New("the server does not answer, and the new program could not renew the lease: start the server first")
	}
	u := lease.uplink
	settings, err := u.Settings.Encode()
	return Handover{u.Key.Ifname, p.to.inst.Index, u.Network, u.Tag, settings, p.from, nil}, err
}
