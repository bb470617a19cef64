package client

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"syscall"
	"time"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Config is what a call of the client asks for.
type Config struct {
	Uplink     Uplink
	Server     string   // text of the server's abstract name
	ServerUIDs []uint32 // believed beside root and the own uid
}

// Report hears once which table is in force: 0 is none, and why says the reason.
type Report func(table uint32, why string)

// Run gets a lease for the uplink, reports the table once its rules stand, and keeps
// both until the address or its link goes or ctx ends; then it takes them back. If
// another process of ours holds the key, it reports that one's table and returns.
func Run(ctx context.Context, cfg Config, report Report, log *slog.Logger) error {
	servers, err := serverAddrs(cfg.Server)
	if err != nil {
		return err
	}
	trusted := newTrust(cfg.ServerUIDs)
	conn, err := becomeHolder(ctx, cfg, report, log)
	if conn == nil {
		return err
	}
	l, err := newLoop(servers, trusted, report, log)
	if err != nil {
		conn.Close()
		return err
	}
	defer l.close()
	return l.run(ctx, l.add(newMachine(cfg.Uplink, false), conn))
}

// becomeHolder binds the holder's name of the key. If a holder of ours lives, it is
// asked instead, the answer reported, and no connection comes back; beside a holder that
// cannot be asked the caller works from a name of its own.
func becomeHolder(ctx context.Context, cfg Config, report Report, log *slog.Logger) (*wire.Conn, error) {
	key := cfg.Uplink.Key
	var asker *wire.Conn
	defer func() {
		if asker != nil {
			asker.Close()
		}
	}()
	const again = 50 * time.Millisecond // the holder waits for the server, or is about to go
	for until := time.Now().Add(tries * tryEvery); ; {
		conn, err := open(key, true)
		if !errors.Is(err, syscall.EADDRINUSE) {
			return conn, err
		}
		if asker == nil {
			if asker, err = open(key, false); err != nil {
				return nil, err
			}
		}
		holder := newTrust(nil)
		to, err := wire.Padded(wire.HolderName(key))
		if err != nil {
			return nil, err
		}
		// A Replace is answered like a Query, and brings the holder what is new.
		req := wire.Request{Key: key, Tag: cfg.Uplink.Tag, Cmd: wire.Replace}
		reply, err := exchange(asker, to, req, holder, holderPatience)
		switch {
		case errors.Is(err, syscall.ECONNREFUSED):
			continue // it went in between
		case errors.Is(err, errSilent), errors.Is(err, syscall.EAGAIN):
			owner, err := wire.FindOwner(to)
			if errors.Is(err, wire.ErrNobody) {
				continue
			}
			log.Warn("another process has the name of this key and does not answer; working from a name of my own",
				"ifname", key.Ifname, "addr", key.Address, "family", key.Family.String(), "owner", owner.String(), "err", err)
			conn, asker = asker, nil
			return conn, conn.SetReadDeadline(time.Time{})
		case err != nil:
			return nil, err
		case reply.Table != 0:
			report(reply.Table, "")
			return nil, nil
		case time.Now().After(until):
			report(0, fmt.Sprintf("pid %d holds the key and has no table yet: %s", reply.PID, reply.Error))
			return nil, nil
		}
		select {
		case <-ctx.Done():
			report(0, "stopped")
			return nil, nil
		case <-time.After(again):
		}
	}
}

// Release ends the holder of the key, removes the rules that it or a holder that was
// killed left behind, and releases the lease.
func Release(cfg Config, log *slog.Logger) error {
	conn, err := open(cfg.Uplink.Key, false)
	if err != nil {
		return err
	}
	defer conn.Close()
	endHolder(conn, cfg, log)
	return errors.Join(removeLeftovers(cfg.Uplink, log), releaseLease(conn, cfg))
}

func endHolder(conn *wire.Conn, cfg Config, log *slog.Logger) {
	const patience = 5 * time.Second // it gives its lease back before it confirms
	key := cfg.Uplink.Key
	to, err := wire.Padded(wire.HolderName(key))
	if err != nil {
		return // open has been through this
	}
	holder := newTrust(nil)
	_, err = exchange(conn, to, wire.Request{Key: key, Cmd: wire.Query}, holder, holderPatience)
	if err == nil {
		_, err = exchange(conn, to, wire.Request{Key: key, Cmd: wire.End}, holder, patience)
	}
	if err == nil || errors.Is(err, syscall.ECONNREFUSED) {
		return
	}
	owner, findErr := wire.FindOwner(to)
	if findErr != nil {
		return // it is gone by now
	}
	log.Warn("the process that has the name of this key does not answer: end it yourself",
		"ifname", key.Ifname, "addr", key.Address, "family", key.Family.String(), "owner", owner.String(), "err", err)
}

func removeLeftovers(u Uplink, log *slog.Logger) error {
	if !u.wantsRules() {
		return nil
	}
	kernel, err := route.Dial()
	if err != nil {
		return err
	}
	defer kernel.Close()
	r := ruleset{uplink: u, kernel: kernel, log: log}
	if err := r.adopt(); err != nil {
		return err
	}
	return r.clear()
}

func releaseLease(conn *wire.Conn, cfg Config) error {
	trusted := newTrust(cfg.ServerUIDs)
	servers, err := serverAddrs(cfg.Server)
	if err != nil {
		return err
	}
	req := wire.Request{Key: cfg.Uplink.Key, Cmd: wire.Release}
	for range tries {
		for _, to := range servers {
			var reply wire.Reply
			reply, err = exchange(conn, to, req, trusted, releaseEvery)
			if err == nil && reply.Error != "" {
				return fmt.Errorf("release the lease: %s", reply.Error)
			}
			if err == nil {
				return nil
			}
		}
		if errors.Is(err, syscall.ECONNREFUSED) {
			break
		}
		time.Sleep(10 * time.Millisecond) // its queue is full
	}
	if stranger := explain(servers, trusted); stranger != nil {
		err = stranger
	}
	return fmt.Errorf("release the lease, which ends by itself: %w", err)
}
