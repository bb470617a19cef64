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
	"math/rand/v2"
	"os"
	"slices"
	"syscall"
	"time"

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
	// A Replace is answered like a Query, and brings the holder what is new.
	req := wire.Request{Key: key, Tag: cfg.Uplink.Tag, Cmd: wire.Replace}
	patience := tries * tryEvery
	if cfg.Uplink.Settings.PlacesRoutes() {
		settings, err := cfg.Uplink.Settings.Encode()
		if err != nil {
			return nil, err
		}
		req.Settings = string(settings)
		patience = fallBackIn
	}
	asker, err := open(key, asAsker)
	if err != nil {
		return nil, err
	}
	defer asker.Close()
	to, err := wire.Padded(wire.HolderName(key))
	if err != nil {
		return nil, err
	}
	for until := time.Now().Add(patience); ; {
		conn, err := open(key, asHolder)
		if err != nil && !errors.Is(err, syscall.EADDRINUSE) {
			return nil, err
		}
		var reply wire.Reply
		squatted := error(nil)
		if conn == nil {
			if reply, err = askHolder(ctx, asker, to, req, holderPatience); err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
				squatted = err
			}
		}
		if conn != nil || squatted != nil {
			// While the name was somebody else's, one of ours may have begun to stand in.
			if reply, err = askStandIns(asker, req, holderPatience); err != nil && conn != nil {
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
			return open(key, asStandIn)
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
		case <-time.After(askAgain): // it waits for the server, or is about to go
		}
	}
}

// ErrNoServer says that Release has taken back all but the lease, which ends by itself.
var ErrNoServer = errors.New("no server")

// Release ends the holder of the key, removes the rules that it or a holder that was
// killed left behind, and releases the lease.
func Release(cfg Config, log *slog.Logger) error {
	conn, err := open(cfg.Uplink.Key, asAsker)
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
	_, err = askHolder(context.Background(), conn, to, wire.Request{Key: key, Cmd: wire.Query}, holderPatience)
	if err == nil {
		_, err = exchange(conn, to, wire.Request{Key: key, Cmd: wire.End}, newTrust(nil), patience)
	}
	if err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
		log.Warn("the process that has the name of this key does not answer: end it yourself",
			"ifname", key.Ifname, "addr", key.Address, "family", key.Family.String(), "err", err)
	}
	others, err := standIns(key)
	for _, to := range others {
		_, endErr := exchange(conn, to, wire.Request{Key: key, Cmd: wire.End}, newTrust(nil), patience)
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

func releaseLease(conn *wire.Conn, cfg Config) error {
	trusted := newTrust(cfg.ServerUIDs)
	servers, err := serverAddrs(cfg.Server)
	if err != nil {
		return err
	}
	req := wire.Request{Key: cfg.Uplink.Key, Cmd: wire.Release}
	for until := time.Now().Add(releaseTries * releaseEvery); ; {
		var reply wire.Reply
		for _, to := range servers { // the first form of the name that somebody is bound to
			reply, err = exchange(conn, to, req, trusted, releaseEvery)
			if !errors.Is(err, syscall.ECONNREFUSED) {
				break
			}
		}
		switch {
		case err == nil && reply.Error != "":
			return fmt.Errorf("release the lease: %s", reply.Error)
		case err == nil:
			return nil
		case errors.Is(err, syscall.ECONNREFUSED):
			return fmt.Errorf("release the lease, which ends by itself: %w: nobody serves %s", ErrNoServer, servers[0])
		case time.Now().After(until):
			if stranger := explain(servers, trusted); stranger != nil {
				err = stranger
			}
			return fmt.Errorf("release the lease, which ends by itself: %w", err)
		case errors.Is(err, syscall.EAGAIN): // its queue is full
			time.Sleep(rand.N(20 * time.Millisecond))
		}
	}
}
