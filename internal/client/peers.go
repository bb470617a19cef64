package client

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// holderPatience is how long a holder of ours may take to answer. Whoever is silent for
// longer is a client of the original, or somebody who took the name.
const (
	holderPatience = 200 * time.Millisecond
	busyPatience   = tries * tryEvery // for one of ours all the same
	askAgain       = 50 * time.Millisecond
)

var errSilent = errors.New("no answer")

// trust is whom to believe: abstract names can be taken by any user.
type trust struct{ uids []uint32 }

func newTrust(more []uint32) trust {
	return trust{append([]uint32{0, uint32(os.Geteuid())}, more...)}
}

func (t trust) has(uid uint32) bool {
	return uid != wire.OverflowID() && slices.Contains(t.uids, uid)
}

// What a process is to a key, as its name tells. All names are padded, since the original
// answers no other.
const (
	asHolder  = ""  // the name that everybody knows
	asStandIn = "+" // the holder, while somebody else has that name
	asAsker   = "-" // not the holder
)

// open binds a name for key.
func open(key wire.Key, as string) (*wire.Conn, error) {
	name := wire.HolderName(key)
	if as != asHolder {
		// Nobody can take it first, nor is it the name of an equal pid in another container.
		name += fmt.Sprintf("%s%d-%x", as, os.Getpid(), rand.Uint64())
	}
	addr, err := wire.Padded(name)
	if err != nil {
		return nil, err
	}
	return wire.Listen(addr, wire.MaxReplace)
}

var standInSuffix = regexp.MustCompile(`\+[0-9]+-[0-9a-f]+$`)

// holderNames are the names of the holders of our kind that live, those that stand in by
// the name they stand in for.
func holderNames() ([]string, error) {
	names, err := wire.PaddedNames(newTrust(nil).has)
	for i := range names {
		names[i] = standInSuffix.ReplaceAllString(names[i], "")
	}
	return names, err
}

// standIns are the addresses of those who stand in for the holder of key.
func standIns(key wire.Key) ([]wire.Addr, error) {
	names, err := wire.PaddedNames(newTrust(nil).has)
	var addrs []wire.Addr
	for _, name := range names {
		if loc := standInSuffix.FindStringIndex(name); loc == nil || name[:loc[0]] != wire.HolderName(key) {
			continue
		}
		addr, err := wire.Padded(name)
		if err != nil {
			return nil, err
		}
		addrs = append(addrs, addr)
	}
	return addrs, err
}

// askStandIns is exchange with the first who stands in for the holder of key and answers;
// errSilent if there is none.
func askStandIns(conn *wire.Conn, req wire.Request, patience time.Duration) (wire.Reply, error) {
	addrs, err := standIns(req.Key)
	if err != nil {
		return wire.Reply{}, err
	}
	for _, to := range addrs {
		if reply, err := exchange(conn, to, req, newTrust(nil), patience); err == nil && reply.Code != wire.Mismatch {
			return reply, nil
		}
	}
	return wire.Reply{}, errSilent
}

// exchange sends req to a peer and waits for the reply of somebody trusted.
func exchange(conn *wire.Conn, to wire.Addr, req wire.Request, trusted trust, patience time.Duration) (wire.Reply, error) {
	deadline := time.Now().Add(patience)
	if errs := conn.Send(wire.Message{Data: req.Append(nil), To: to}); errs != nil {
		return wire.Reply{}, errs[0]
	}
	if err := conn.SetReadDeadline(deadline); err != nil {
		return wire.Reply{}, err
	}
	for {
		datagrams, err := conn.Receive()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return wire.Reply{}, errSilent
		}
		if err != nil {
			return wire.Reply{}, err
		}
		for _, d := range datagrams {
			// An older exchange's answer, or a stranger's, is not what is waited for.
			if d.From != to || !trusted.has(d.Cred.UID) {
				continue
			}
			if reply, err := wire.ParseReply(d.Data); err == nil {
				return reply, nil
			}
		}
	}
}

// askHolder is exchange with the holder of a key, ECONNREFUSED if there is none. A holder
// of ours answers at once, but for on a host that is out of breath: where the owner of the
// name looks like this process, it is asked again. The error names the owner else.
func askHolder(ctx context.Context, conn *wire.Conn, to wire.Addr, req wire.Request, patience time.Duration) (wire.Reply, error) {
	peers := newTrust(nil)
	for until := time.Now().Add(busyPatience); ; {
		reply, err := exchange(conn, to, req, peers, patience)
		if err == nil && reply.Code == wire.Mismatch {
			return reply, errors.New(reply.Error)
		}
		if err == nil || errors.Is(err, syscall.ECONNREFUSED) {
			return reply, err
		}
		owner, findErr := wire.FindOwner(to)
		switch {
		case errors.Is(findErr, wire.ErrNobody):
			return reply, syscall.ECONNREFUSED
		case findErr != nil:
			return reply, errors.Join(err, findErr)
		case !peers.has(owner.UID) || !sameCommand(owner.Command) || time.Now().After(until):
			return reply, fmt.Errorf("%s: %w", owner, err)
		}
		select {
		case <-ctx.Done():
			return reply, ctx.Err()
		case <-time.After(askAgain):
		}
	}
}

// sameCommand tells whether a process may be another call of this program, which has two
// names: the original's is spelled with underscores.
func sameCommand(comm string) bool {
	own, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		return false
	}
	same := strings.NewReplacer("_", "-", "\n", "")
	return same.Replace(comm) == same.Replace(string(own))
}

// serverAddrs are both forms of the server's name: the original holds only the padded
// one, another program perhaps only the exact one.
func serverAddrs(name string) ([]wire.Addr, error) {
	padded, err := wire.Padded(name)
	if err != nil {
		return nil, err
	}
	exact, err := wire.Exact(name)
	return []wire.Addr{padded, exact}, err
}

// sendToServer sends to the first form of the name that somebody is bound to.
func sendToServer(conn *wire.Conn, addrs []wire.Addr, data []byte) error {
	var first error
	for _, addr := range addrs {
		errs := conn.Send(wire.Message{Data: data, To: addr})
		if errs == nil {
			return nil
		}
		if !errors.Is(errs[0], syscall.ECONNREFUSED) {
			return errs[0]
		}
		if first == nil {
			first = fmt.Errorf("nobody serves %s", addr)
		}
	}
	return first
}

// explain says why nobody trusted answers at the server's name, if a stranger has it.
func explain(addrs []wire.Addr, trusted trust) error {
	for _, addr := range addrs {
		owner, err := wire.FindOwner(addr)
		switch {
		case err != nil: // nobody there, so requests went to the other form
		case trusted.has(owner.UID):
			return nil
		case owner.UID == wire.OverflowID():
			return fmt.Errorf("%s is taken by a user whom this user namespace does not map: the client has to run in that of the server", addr)
		default:
			return fmt.Errorf("%s is taken by %s, who is not trusted to lease tables (see --server-user)", addr, owner)
		}
	}
	return nil
}

// otherHolder tells whether a process holds the address of key on another link, so that
// rules from that address may be its own.
func otherHolder(key wire.Key) (bool, error) {
	names, err := holderNames()
	if err != nil {
		return false, err
	}
	suffix := strings.TrimPrefix(wire.HolderName(key), key.Ifname)
	return slices.ContainsFunc(names, func(name string) bool {
		return name != wire.HolderName(key) && strings.HasSuffix(name, suffix)
	}), nil
}
