package client

import (
	"encoding/json"
	"fmt"
	"net/netip"

	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Handover is what a holder hands to the program that goes on with its lease, and the error by which Run ends then.
// Lease, rules and routes are in place, and nobody renews the lease meanwhile.
type Handover struct {
	Ifname   string          `json:"ifname"`  // of the link, which may have another name than at the start
	Index    int             `json:"index"`   // of the link; 0: there is none
	Network  netip.Prefix    `json:"network"` // the address, which may be gone, with its prefix length; of what is no address: none
	Tag      string          `json:"tag,omitempty"`
	Settings json.RawMessage `json:"settings"`
}

func (Handover) Error() string { return "another program goes on with the lease" }

// Accept makes an uplink what it was for the program before.
func (h Handover) Accept(u uplink.Uplink) (uplink.Uplink, error) {
	u.Key.Ifname, u.Network = h.Ifname, h.Network
	return u.Updated(wire.Request{Key: u.Key, Tag: h.Tag, Settings: string(h.Settings)})
}

// makeWay answers a Reexec and ends the loop, or says why not.
func (l *loop) makeWay(p packet) {
	s, answer := p.to, p.to.answer()
	err := l.mayMakeWay(p)
	if err == nil {
		var settings []byte
		if settings, err = s.lease.uplink.Settings.Encode(); err == nil {
			l.handover = Handover{s.lease.uplink.Key.Ifname, s.inst.Index, s.lease.uplink.Network, s.lease.uplink.Tag, settings}
			s.log.Info("executing the installed program, which goes on with the lease", "table", s.lease.table, "pid", p.cred.PID)
		}
	}
	if err != nil {
		answer.Table, answer.Expires, answer.Error = 0, 0, err.Error()
	}
	l.reply(s, p.from, answer)
}

func (l *loop) mayMakeWay(p packet) error {
	switch lease := p.to.lease; {
	case p.cred.UID != 0:
		return fmt.Errorf("only root may ask for this")
	case lease.watched:
		return fmt.Errorf("a watch serves it, which a restart replaces: systemctl restart table-allocator-watch")
	case l.successor == nil:
		return fmt.Errorf("the holder has no program to execute")
	case lease.state != held:
		return fmt.Errorf("it has no lease now: %s", lease.why)
	case lease.away:
		return fmt.Errorf("the server does not answer, and the new program could not renew the lease: start the server first")
	}
	return l.successor()
}
