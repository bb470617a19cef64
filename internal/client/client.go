// Package client turns a lease into kernel state and takes it back: one pure state
// machine for each address, and the loop that drives a set of them with datagrams,
// kernel events and timers. It hides how a lease is asked for, kept and given back,
// which rules belong to it, and how the processes that hold leases find each other.
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
	Server     string   // text of the server's abstract name
	ServerUIDs []uint32 // believed beside root and the own uid
}

// Report hears once which table is in force: 0 is none, and why says the reason.
type Report func(table uint32, why string)

// Run gets a lease for the uplink, reports the table once its rules stand, and keeps
// both until the address or its link goes or ctx ends; then it takes them back. If
// another process of ours holds the key, it reports that one's table and returns.
func Run(ctx context.Context, cfg Config, report Report, log *slog.Logger) error {
	conn, err := becomeHolder(ctx, cfg, report, log)
	if conn == nil {
		return err
	}
	l, err := newLoop(cfg.Server, cfg.ServerUIDs, report, log)
	if err != nil {
		conn.Close()
		return err
	}
	defer l.close()
	l.scope = lone{l}
	s := l.add(newMachine(cfg.Uplink, true, false), conn)
	l.feed(s, event{kind: start})
	l.look(s)
	return l.run(ctx)
}

// becomeHolder binds the holder's name of the key. If a holder of ours lives, it is
// asked instead, the answer reported, and no connection comes back; beside a holder that
// cannot be asked the caller works from a name of its own.
func becomeHolder(ctx context.Context, cfg Config, report Report, log *slog.Logger) (*wire.Conn, error) {
	key := cfg.Uplink.Key
	req, patience, err := introduction(cfg.Uplink)
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
		case ctx.Err() != nil, errors.Is(other.err, syscall.ECONNREFUSED): // it went in between
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
		case <-time.After(peer.AskAgain): // it waits for the server, or is about to go
		}
	}
}

// introduction is what a call asks a holder of its key, which takes over the settings that it brings, and how long
// the holder has for a table.
func introduction(u uplink.Uplink) (wire.Request, time.Duration, error) {
	req := wire.Request{Key: u.Key, Tag: u.Tag, Cmd: wire.Replace}
	if !u.Settings.PlacesRoutes() {
		return req, peer.Tries * peer.TryEvery, nil
	}
	settings, err := u.Settings.Encode()
	req.Settings = string(settings)
	return req, fallBackIn, err
}

// occupant is whoever has the holder's name: one of ours that answered, or somebody who did not.
type occupant struct {
	reply wire.Reply
	err   error // ECONNREFUSED: it is not there any more
}

// meetHolder takes the holder's name of the key, or asks whoever has it.
func meetHolder(ctx context.Context, asker *wire.Conn, req wire.Request) (*wire.Conn, occupant, error) {
	conn, err := peer.Open(req.Key, peer.AsHolder)
	if errors.Is(err, syscall.EADDRINUSE) {
		reply, err := peer.Ask(ctx, asker, req, peer.HolderPatience)
		return nil, occupant{reply, err}, nil
	}
	if err != nil {
		return nil, occupant{}, err
	}
	// While the name was somebody else's, one of ours may have begun to stand in.
	reply, err := peer.AskStandIns(asker, req, peer.HolderPatience)
	if err != nil {
		return conn, occupant{}, nil
	}
	conn.Close()
	return nil, occupant{reply: reply}, nil
}
