// Package client leads an address from a lease to kernel state and back: one pure state machine for each address, and
// one loop that drives a set of them with datagrams, kernel events and timers. It hides how a lease is acquired, renewed
// and released, and how a watch keeps a whole host.
package client

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"syscall"
	"time"

	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Config is what a call of the client asks for.
type Config struct {
	Uplink     uplink.Uplink
	Tells      bool     // another client that serves the address takes over the settings; else the call only asks for the table
	Server     string   // text of the server's abstract name
	ServerUIDs []uint32 // trusted, and root and the own uid are, too
	// Successor says why the program that is to go on with the lease, when root asks for that, cannot. It runs beside
	// the loop.
	Successor func(Handover) error
	// From is what the program before has handed over.
	From *Handover
}

// Report is called once, with the table that is in force, or with 0 and why there is none.
type Report func(table uint32, why string)

// Run acquires a lease for the uplink and installs it, reports the table, and keeps both until the address or its link
// is deleted or ctx ends; then it takes both back. If another client serves the address, Run reports the table of that
// one and returns. If root asks for it, Run leaves all in place and returns a Handover.
func Run(ctx context.Context, cfg Config, report Report, log *slog.Logger) error {
	conn, err := holderSocket(ctx, cfg, report, log)
	if conn == nil {
		return err
	}
	l, err := newLoop(cfg.Server, cfg.ServerUIDs, report, log)
	if err != nil {
		conn.Close()
		return err
	}
	defer l.close()
	l.scope, l.successor = lone{l}, cfg.Successor
	if cfg.From != nil {
		l.executedFor = cfg.From.Asker
	}
	s := l.add(newMachine(cfg.Uplink, true, false), conn)
	l.feed(s, event{kind: start})
	l.look(s)
	return l.run(ctx)
}

// holderSocket returns the socket of the program before, or one of its own.
func holderSocket(ctx context.Context, cfg Config, report Report, log *slog.Logger) (*wire.Conn, error) {
	if cfg.From != nil && cfg.From.Socket != nil {
		conn, err := wire.FromFile(cfg.From.Socket, wire.MaxReplace)
		if err == nil {
			return conn, nil
		}
		log.Error("the socket of the program before cannot be used; taking its name again", "err", err)
	}
	return becomeHolder(ctx, cfg, report, log)
}

// becomeHolder returns a socket at the holder's name of the key. If another client has the name, becomeHolder asks it,
// reports the answer, and returns no socket. If a process has the name that does not answer, the socket has a name of
// its own.
func becomeHolder(ctx context.Context, cfg Config, report Report, log *slog.Logger) (*wire.Conn, error) {
	key := cfg.Uplink.Key
	req, patience, err := introduction(cfg.Uplink, cfg.Tells)
	if err != nil {
		return nil, err
	}
	asker, err := peer.Open(key, peer.AsAsker)
	if err != nil {
		return nil, err
	}
	defer asker.Close()
	for until := time.Now().Add(patience); ; {
		conn, other, err := meetHolder(ctx, asker, req)
		switch {
		case conn != nil || err != nil:
			return conn, err
		case ctx.Err() != nil, errors.Is(other.err, syscall.ECONNREFUSED): // the other one has just ended
		case other.err != nil:
			log.Warn("a process that does not answer has the holder's name of this address; serving the address from another name",
				"ifname", key.Ifname, "addr", key.Address, "family", key.Family.String(), "err", other.err)
			return peer.Open(key, peer.AsStandIn)
		case other.reply.Table != 0:
			report(other.reply.Table, "")
			return nil, nil
		case other.reply.Code.Final():
			report(0, "another client serves the address, and refuses: "+other.reply.Error)
			return nil, nil
		case time.Now().After(until):
			report(0, fmt.Sprintf("another client (pid %d) serves the address, and has no table yet: %s", other.reply.PID, other.reply.Error))
			return nil, nil
		}
		select {
		case <-ctx.Done():
			report(0, "stopped")
			return nil, nil
		case <-time.After(peer.AskAgain): // the other one waits for the server, or is about to end
		}
	}
}

// introduction is the request of this call to another client of the address, which takes over tag and settings, and
// how long that one has to get a table.
func introduction(u uplink.Uplink, tells bool) (wire.Request, time.Duration, error) {
	req := wire.Request{Key: u.Key, Tag: u.Tag, Cmd: wire.Replace}
	patience := fallBackIn
	if !u.Settings.PlacesRoutes() {
		patience = peer.Tries * peer.TryEvery
	}
	if !tells {
		return req, patience, nil
	}
	settings, err := u.Settings.Encode()
	req.Settings = string(settings)
	if size := len(req.Append(nil)); err == nil && size > wire.MaxReplace {
		err = fmt.Errorf("settings of %d bytes: a later call could not hand them to the holder, which takes %d bytes: give fewer routes", size, wire.MaxReplace)
	}
	return req, patience, err
}

// occupant is the process that has the holder's name: another client, and its answer, or why it did not answer.
type occupant struct {
	reply wire.Reply
	err   error // ECONNREFUSED: it has ended
}

// meetHolder takes the holder's name of the key, or asks the process that has it.
func meetHolder(ctx context.Context, asker *wire.Conn, req wire.Request) (*wire.Conn, occupant, error) {
	conn, err := peer.Open(req.Key, peer.AsHolder)
	if errors.Is(err, syscall.EADDRINUSE) {
		reply, err := peer.Ask(ctx, asker, req, peer.HolderPatience)
		return nil, occupant{reply, err}, nil
	}
	if err != nil {
		return nil, occupant{}, err
	}
	// Another client may serve the address from a name of its own, since before the holder's name was free.
	reply, err := peer.AskStandIns(asker, req, peer.HolderPatience)
	if err != nil {
		return conn, occupant{}, nil
	}
	conn.Close()
	return nil, occupant{reply: reply}, nil
}
