package client

import (
	"errors"
	"log/slog"

	"github.com/table-allocator/table-allocator/internal/install"
	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// Release ends the client of the address, removes the rules and routes that a client which was killed left behind, and
// releases the lease.
func Release(cfg Config, log *slog.Logger) error {
	server, err := peer.NewServer(cfg.Server, cfg.ServerUIDs)
	if err != nil {
		return err
	}
	conn, err := peer.Open(cfg.Uplink.Key, peer.AsAsker)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := peer.End(conn, cfg.Uplink.Key); err != nil {
		log.Warn("another client of this address may still run", "err", err)
	}
	return errors.Join(removeLeftovers(cfg.Uplink, log), server.Release(conn, cfg.Uplink.Key))
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
	env := install.Env{Kernel: kernel, Log: log, OtherHolder: peer.OtherHolder}
	defer env.Close()
	return env.RemoveLeftovers(u)
}
