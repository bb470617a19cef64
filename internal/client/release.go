package client

import (
	"errors"
	"log/slog"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/install"
	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/remember"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
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
	if dir, err := remember.OfLink(cfg.Uplink.Key.Ifname); err == nil { // else nothing was remembered
		_ = dir.Remove(remember.Said) // or else what the next lease tells is not said again
	}
	return errors.Join(removeLeftovers(cfg.Uplink, log), server.Release(conn, cfg.Uplink.Key))
}

// Collect takes back what clients left in this network namespace that do not run any more: rules, routes, resolver lines,
// and the leases of addresses with a rule. Then it deletes every rule that is ours, unless a client has started meanwhile:
// some are of several addresses.
func Collect(server string, uids []uint32, log *slog.Logger) error {
	l, err := newLoop(server, uids, func(uint32, string) {}, log)
	if err != nil {
		return err
	}
	defer l.close()
	h := newHost(l, WatchConfig{}, true)
	l.scope = h
	if h.memory, err = remember.Own("told"); err != nil {
		return err
	}
	if h.order, err = h.unboundOrder(uplink.Loopback); err != nil {
		return err
	}
	_, repliesErr := placeReplies(newReplies(h).note, nil)
	errs := []error{h.collect(), repliesErr}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		// The guards of a namespace with programs in it stay: without them its packets could leave by any uplink.
		rules, err := l.kernel.RulesWhere(family, func(r *route.Rule) bool {
			return r.Protocol == route.Protocol && (r.Iif == "" || r.Iif == uplink.Loopback) && !uplink.IsNamespace(*r)
		})
		if family == unix.AF_INET6 && errors.Is(err, unix.EAFNOSUPPORT) {
			continue
		}
		names, namesErr := peer.HolderNames() // now: a holder has its name before it has rules
		if err = errors.Join(err, namesErr); err != nil {
			return errors.Join(append(errs, err)...)
		}
		if len(servedBy(names)) > 0 {
			log.Warn("a client runs, so rules that clients share stay", "holders", names)
			break
		}
		_, _, err = l.kernel.SyncRules(family, func(r route.Rule) bool { return slices.Contains(rules, r) }, nil)
		_, choiceErr := l.env.SyncChoice(family, install.Choice{})
		routes, _, readErr := h.ourRoutes(family)
		errs = append(errs, err, choiceErr, readErr, h.flushStale(family, routes, nil))
	}
	return errors.Join(errs...)
}

// Leftovers are the keys of addresses that have a rule of ours to a table, and whose link has the address.
func Leftovers() (keys []wire.Key, err error) {
	kernel, err := route.Dial()
	if err != nil {
		return nil, err
	}
	defer kernel.Close()
	links, addresses, err := kernel.HostAddresses()
	if err != nil {
		return nil, err
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := kernel.RulesWhere(family, func(r *route.Rule) bool {
			return r.Protocol == route.Protocol && uplink.IsHost(*r) && !uplink.LeavesTable(*r)
		})
		if family == unix.AF_INET6 && errors.Is(err, unix.EAFNOSUPPORT) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, a := range addresses {
			if slices.ContainsFunc(rules, func(r route.Rule) bool { return r.Src.Addr() == a.Addr }) {
				keys = append(keys, wire.Key{Family: wire.Family(family), Ifname: links[a.Index].Name, Address: a.Addr.String()})
			}
		}
	}
	return keys, nil
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
