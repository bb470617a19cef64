package client

import (
	"context"
	"errors"
	"log/slog"
	"syscall"
	"time"

	"github.com/table-allocator/table-allocator/internal/install"
	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

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
	env := install.Env{Kernel: kernel, Log: log, OtherHolder: peer.OtherHolder}
	defer env.Close()
	return env.RemoveLeftovers(u)
}
