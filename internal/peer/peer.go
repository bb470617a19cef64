// Package peer asks the server and the holders of leases, and finds out who they are. It hides the names that
// processes of ours bind, whom to believe, how long to wait, and what stands in for a holder whose name
// somebody else has.
package peer

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

// How often, and how fast, the server is asked for a lease and told of its end, as callers know it from the
// original.
const (
	Tries        = 5
	TryEvery     = 2 * time.Second
	ReleaseTries = 10
	ReleaseEvery = 300 * time.Millisecond
)

const (
	// HolderPatience is how long a holder of ours may take to answer. Whoever is silent for longer is a client of
	// the original, or somebody who took the name.
	HolderPatience = 200 * time.Millisecond
	busyPatience   = Tries * TryEvery // for one of ours all the same

	// AskAgain is the pause before somebody who has no answer yet is asked again.
	AskAgain = 50 * time.Millisecond
)

// ErrNotAsked says that holders answer root and their own user only.
var ErrNotAsked = errors.New("the holders of leases answer root and their own user only")

var errSilent = errors.New("no answer")

// Trust is whom to believe: abstract names can be taken by any user.
type Trust struct{ uids []uint32 }

// NewTrust believes root, the own user, and more.
func NewTrust(more []uint32) Trust {
	return Trust{append([]uint32{0, uint32(os.Geteuid())}, more...)}
}

// Has reports whether a user is believed.
func (t Trust) Has(uid uint32) bool {
	return uid != wire.OverflowID() && slices.Contains(t.uids, uid)
}

// What a process is to a key, as its name tells. All names are padded, since the original
// answers no other.
const (
	AsHolder  = ""  // the name that everybody knows
	AsStandIn = "+" // the holder, while somebody else has that name
	AsAsker   = "-" // not the holder
)

// Open binds a name for key.
func Open(key wire.Key, as string) (*wire.Conn, error) {
	name := wire.HolderName(key)
	if as != AsHolder {
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

// HolderNames are the names of the holders of our kind that live, those that stand in by
// the name they stand in for.
func HolderNames() ([]string, error) {
	names, err := wire.PaddedNames(NewTrust(nil).Has)
	for i := range names {
		names[i] = standInSuffix.ReplaceAllString(names[i], "")
	}
	return names, err
}

// StandIns are the addresses of those who stand in for the holder of key.
func StandIns(key wire.Key) ([]wire.Addr, error) {
	names, err := wire.PaddedNames(NewTrust(nil).Has)
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

// AskStandIns is Exchange with the first who stands in for the holder of key and answers;
// an error if there is none.
func AskStandIns(conn *wire.Conn, req wire.Request, patience time.Duration) (wire.Reply, error) {
	addrs, err := StandIns(req.Key)
	if err != nil {
		return wire.Reply{}, err
	}
	for _, to := range addrs {
		if reply, err := Exchange(conn, to, req, NewTrust(nil), patience); err == nil && reply.Code != wire.Mismatch {
			return reply, nil
		}
	}
	return wire.Reply{}, errSilent
}

// Exchange sends req to a peer and waits for the reply of somebody trusted.
func Exchange(conn *wire.Conn, to wire.Addr, req wire.Request, trusted Trust, patience time.Duration) (wire.Reply, error) {
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
			if d.From != to || !trusted.Has(d.Cred.UID) {
				continue
			}
			if reply, err := wire.ParseReply(d.Data); err == nil {
				return reply, nil
			}
		}
	}
}

// AskHolder is Exchange with the holder of a key, ECONNREFUSED if there is none. A holder
// of ours answers at once, but for on a host that is out of breath: where the owner of the
// name looks like this process, it is asked again. The error names the owner else.
func AskHolder(ctx context.Context, conn *wire.Conn, to wire.Addr, req wire.Request, patience time.Duration) (wire.Reply, error) {
	peers := NewTrust(nil)
	for until := time.Now().Add(busyPatience); ; {
		reply, err := Exchange(conn, to, req, peers, patience)
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
		case !peers.Has(owner.UID) || !sameCommand(owner.Command) || time.Now().After(until):
			return reply, fmt.Errorf("%s: %w", owner, err)
		}
		select {
		case <-ctx.Done():
			return reply, ctx.Err()
		case <-time.After(AskAgain):
		}
	}
}

// sameCommand reports whether a process may be another call of this program, which has two
// names: the original's is spelled with underscores.
func sameCommand(comm string) bool {
	own, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		return false
	}
	same := strings.NewReplacer("_", "-", "\n", "")
	return same.Replace(comm) == same.Replace(string(own))
}

// OtherHolder reports whether a process holds the address of key on another link, so that
// rules from that address may be its own.
func OtherHolder(key wire.Key) (bool, error) {
	names, err := HolderNames()
	if err != nil {
		return false, err
	}
	suffix := strings.TrimPrefix(wire.HolderName(key), key.Ifname)
	return slices.ContainsFunc(names, func(name string) bool {
		return name != wire.HolderName(key) && strings.HasSuffix(name, suffix)
	}), nil
}
