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
	// A Replace is answered like a Query, and brings the holder what is new.
	req := wire.Request{Key: key, Tag: cfg.Uplink.Tag, Cmd: wire.Replace}
	patience := peer.Tries * peer.TryEvery
	if cfg.Uplink.Settings.PlacesRoutes() {
		settings, err := cfg.Uplink.Settings.Encode()
		if err != nil {
			return nil, err
		}
		req.Settings = string(settings)
		patience = fallBackIn
	}
	asker, err := peer.Open(key, peer.AsAsker)
	if err != nil {
		return nil, err
	}
	defer asker.Close()
	to, err := wire.Padded(wire.HolderName(key))
	if err != nil {
		return nil, err
	}
	for until := time.Now().Add(patience); ; {
		conn, err := peer.Open(key, peer.AsHolder)
		if err != nil && !errors.Is(err, syscall.EADDRINUSE) {
			return nil, err
		}
		var reply wire.Reply
		squatted := error(nil)
		if conn == nil {
			if reply, err = peer.AskHolder(ctx, asker, to, req, peer.HolderPatience); err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
				squatted = err
			}
		}
		if conn != nil || squatted != nil {
			// While the name was somebody else's, one of ours may have begun to stand in.
			if reply, err = peer.AskStandIns(asker, req, peer.HolderPatience); err != nil && conn != nil {
				return conn, nil
			}
			if conn != nil {
				conn.Close()
			}
		}
		switch {
		case ctx.Err() != nil, errors.Is(err, syscall.ECONNREFUSED): // it went in between
		case err != nil:
			log.Warn("another process has the name of this key and does not answer; working from a name of my own",
				"ifname", key.Ifname, "addr", key.Address, "family", key.Family.String(), "err", squatted)
			return peer.Open(key, peer.AsStandIn)
		case reply.Table != 0:
			report(reply.Table, "")
			return nil, nil
		case reply.Code.Final():
			report(0, "the holder of the key refuses: "+reply.Error)
			return nil, nil
		case time.Now().After(until):
			report(0, fmt.Sprintf("pid %d holds the key and has no table yet: %s", reply.PID, reply.Error))
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
