package peer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// Holder is a client that has the holder's name of a key.
type Holder struct {
	Key   wire.Key
	Reply wire.Reply
	// Silent says that a process has the name, and did not answer.
	Silent bool
}

// Holders returns the holders of this network namespace, found by their sockets. A name that does not answer counts as
// that of a holder if it has an address. ErrNotAsked says that holders refuse to answer.
func Holders(ctx context.Context) ([]Holder, error) {
	names, err := HolderNames()
	if err != nil {
		return nil, err
	}
	conn, err := Open(wire.Key{Ifname: "holders"}, AsAsker)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	var all []Holder
	for _, name := range slices.Compact(slices.Sorted(slices.Values(names))) {
		for _, key := range KeysOf(name) {
			reply, err := Ask(ctx, conn, wire.Request{Key: key, Cmd: wire.Query}, HolderPatience)
			switch {
			case reply.Code == wire.Denied:
				return all, ErrNotAsked
			case errors.Is(err, syscall.ECONNREFUSED), err != nil && key.Family == wire.Unspec:
				continue
			}
			all = append(all, Holder{key, reply, err != nil})
			break
		}
	}
	return all, ctx.Err()
}

// KeysOf are the keys that the name of a holder, IFNAME-ADDRESS-FAMILY, may stand for.
func KeysOf(name string) (keys []wire.Key) {
	for _, family := range []wire.Family{wire.Unspec, wire.Inet, wire.Inet6} {
		both, ok := strings.CutSuffix(name, fmt.Sprintf("-%d", family))
		if !ok {
			continue
		}
		for i, c := range both {
			key := wire.Key{Family: family, Ifname: both[:i], Address: both[min(i+1, len(both)):]}
			if canonical, err := key.Canonical(); c == '-' && err == nil && canonical == key {
				keys = append(keys, key)
			}
		}
	}
	return keys
}

// watchKey stands for a watch in the names of its sockets. No link has a colon in its name.
var watchKey = wire.Key{Ifname: ":watch"}

// OpenWatch binds a name by which Watches finds the calling process.
func OpenWatch() (*wire.Conn, error) { return Open(watchKey, AsAsker) }

// Watch is a watch that runs.
type Watch struct {
	PID  int
	Unit string // of systemd, which starts it again when it ends; empty: none
}

// Watches returns the watches of this network namespace, found by their sockets. A name that root of a container took
// is none: nobody is to end what its owner makes look like a watch, or to wait for its end.
func Watches() ([]Watch, error) {
	names, err := wire.PaddedNames(ours().Has)
	if err != nil {
		return nil, err
	}
	var addrs []wire.Addr
	for _, name := range names {
		if strings.HasPrefix(name, watchKey.String()+AsAsker) {
			addr, err := wire.Padded(name)
			if err != nil {
				return nil, err
			}
			addrs = append(addrs, addr)
		}
	}
	if len(addrs) == 0 {
		return nil, nil
	}
	owners, err := wire.FindOwners(addrs...)
	var watches []Watch
	for _, owner := range owners {
		if ours().believesOwner(owner) {
			watches = append(watches, Watch{owner.PID, unitOf(owner.PID)})
		}
	}
	return watches, err
}

// unitOf returns the unit of systemd that a process is the main process of; empty: it is none.
func unitOf(pid int) string {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return ""
	}
	_, rest, _ := strings.Cut(string(status), "\nPPid:")
	parent, _, _ := strings.Cut(strings.TrimSpace(rest), "\n")
	comm, err := os.ReadFile("/proc/" + parent + "/comm")
	if err != nil || string(comm) != "systemd\n" {
		return ""
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(text)) {
		if unit := path.Base(strings.TrimSpace(line)); strings.HasSuffix(unit, ".service") {
			return unit
		}
	}
	return ""
}
