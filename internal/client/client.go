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
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/route"
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
	servers, err := peer.ServerAddrs(cfg.Server)
	if err != nil {
		return err
	}
	trusted := peer.NewTrust(cfg.ServerUIDs)
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

// Release ends the holder of the key, removes the rules that it or a holder that was
// killed left behind, and releases the lease.
func Release(cfg Config, log *slog.Logger) error {
	conn, err := peer.Open(cfg.Uplink.Key, peer.AsAsker)
	if err != nil {
		return err
	}
	defer conn.Close()
	endHolder(conn, cfg, log)
	return errors.Join(removeLeftovers(cfg.Uplink, log), peer.ReleaseLease(conn, cfg.Server, cfg.ServerUIDs, cfg.Uplink.Key))
}

func endHolder(conn *wire.Conn, cfg Config, log *slog.Logger) {
	const patience = 5 * time.Second // it gives its lease back before it confirms
	key := cfg.Uplink.Key
	to, err := wire.Padded(wire.HolderName(key))
	if err != nil {
		return // open has been through this
	}
	_, err = peer.AskHolder(context.Background(), conn, to, wire.Request{Key: key, Cmd: wire.Query}, peer.HolderPatience)
	if err == nil {
		_, err = peer.Exchange(conn, to, wire.Request{Key: key, Cmd: wire.End}, peer.NewTrust(nil), patience)
	}
	if err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
		log.Warn("the process that has the name of this key does not answer: end it yourself",
			"ifname", key.Ifname, "addr", key.Address, "family", key.Family.String(), "err", err)
	}
	others, err := peer.StandIns(key)
	for _, to := range others {
		_, endErr := peer.Exchange(conn, to, wire.Request{Key: key, Cmd: wire.End}, peer.NewTrust(nil), patience)
		err = errors.Join(err, endErr)
	}
	if err != nil {
		log.Warn("a process that stands in for the holder of this key does not end",
			"ifname", key.Ifname, "addr", key.Address, "family", key.Family.String(), "err", err)
	}
}

func removeLeftovers(u uplink.Uplink, log *slog.Logger) error {
	if !u.IsAddress() {
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
	return errors.Join(returnRoutes(u, &r, log), r.clear(), removeServers(u))
}

// returnRoutes gives main what a holder that was killed had moved into its table.
func returnRoutes(u uplink.Uplink, r *ruleset, log *slog.Logger) error {
	link, found, err := r.kernel.LinkByName(u.Key.Ifname)
	if err != nil || !found {
		return err
	}
	u.Settings.Routes = uplink.MoveRoutes // as far as anybody knows
	p := placer{kernel: r.kernel, log: log}
	v, ready, err := p.look(u, link)
	if err != nil || !ready {
		return err
	}
	for table, whole := range r.tables {
		if !whole {
			continue
		}
		if err := p.adopt(u, v, table); err != nil {
			return err
		}
		p.taken = slices.DeleteFunc(p.taken, func(r route.Route) bool {
			return slices.ContainsFunc(v.Main, func(m route.Route) bool { return uplink.SameWay(m, r) })
		})
		p.table = table
		err = errors.Join(err, p.putBack(u, v))
		p.drop()
	}
	return err
}

func removeServers(u uplink.Uplink) error {
	file := u.Settings.ServersFile
	if _, err := os.Stat(file); file == "" || err != nil {
		return nil // no lines in it
	}
	changed, err := setServers(file, u.Addr(), nil)
	if changed {
		err = errors.Join(err, tellDnsmasq(u.Settings.PIDFile))
	}
	return err
}
