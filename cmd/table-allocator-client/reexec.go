package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/wire"
)

const reexecUsage = `Usage: table-allocator-client reexec [IFNAME|ADDR...] [options]

Makes the holders of this network namespace execute the program that is
installed now, after an upgrade. Each goes on as it is: leases, rules, routes
and resolver lines stay. The program is that at the path from which the holder
was started; the file and its directories must be root's, and writable for
root alone. A watch is replaced by a restart. Needs root.

  -i, --ifname IFNAME...    only holders of these links, also as arguments
`

func reexec(f *flags) action {
	var names []string // links and addresses; none: all
	f.StringSliceVarP(&names, "ifname", "i", nil, "")
	return func(args []string) error {
		names = append(names, args...)
		for i, name := range names {
			names[i] = asHeld(linkName(name))
		}
		if os.Geteuid() != 0 {
			return exitWith(2, errors.New("reexec needs root"))
		}
		holders, err := peer.Holders(context.Background())
		if err != nil {
			return err
		}
		watches, err := peer.Watches()
		if err != nil {
			return err
		}
		found := make(map[string]bool)
		failed := false
		for _, h := range holders {
			if len(names) > 0 && !slices.Contains(names, h.Key.Ifname) && !slices.Contains(names, h.Key.Address) {
				continue
			}
			found[h.Key.Ifname], found[h.Key.Address] = true, true
			if slices.ContainsFunc(watches, func(w peer.Watch) bool { return w.PID == h.Reply.PID }) {
				continue // a restart replaces it
			}
			what := fmt.Sprintf("%s on %s", h.Key.Address, h.Key.Ifname)
			reply, err := askReexec(h.Key)
			if err != nil {
				warn(fmt.Errorf("%s (pid %d) is not served by the installed program: %w", what, h.Reply.PID, err))
				failed = true
				continue
			}
			exe, _ := os.Readlink(filepath.Join("/proc", fmt.Sprint(reply.PID), "exe")) // it may run where this process cannot see it
			fmt.Printf("%s: pid %d executes the installed program %s\n", quoted(what), reply.PID, quoted(exe))
		}
		for _, name := range names {
			if !found[name] {
				return exitWith(2, fmt.Errorf("%s: no holder serves an address or a link of this name", name))
			}
		}
		if failed {
			return errMissing
		}
		return nil
	}
}

// askReexec has the holder of a key execute the installed program, which answers. Each is asked from a socket of its own, so that a
// late answer is not taken for that of the next one.
func askReexec(key wire.Key) (wire.Reply, error) {
	const patience = 5 * time.Second // the program has to start
	conn, err := peer.Open(wire.Key{Ifname: "reexec"}, peer.AsAsker)
	if err != nil {
		return wire.Reply{}, err
	}
	defer conn.Close()
	reply, err := peer.Ask(context.Background(), conn, wire.Request{Key: key, Cmd: wire.Reexec}, patience)
	if err == nil && reply.Table == 0 {
		err = errors.New(reply.Error)
	}
	return reply, err
}
