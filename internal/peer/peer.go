// Package peer asks the server and the holders of leases. It hides the names of sockets, which users are trusted, how
// long to wait, and that a client stands in for the holder where another process has taken the holder's name.
package peer

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// How often, and how fast, a client asks for a lease and releases it. Callers know these times from the original.
const (
	Tries        = 5
	TryEvery     = 2 * time.Second
	ReleaseTries = 10
	ReleaseEvery = 300 * time.Millisecond
)

const (
	// HolderPatience is how long a holder may take to answer. A client of the original is silent, and so may be
	// another process that has taken the name.
	HolderPatience = 200 * time.Millisecond
	busyPatience   = Tries * TryEvery // for a process that looks like a client of ours

	// AskAgain is the pause before a holder is asked again.
	AskAgain = 50 * time.Millisecond
)

// ErrNotAsked says that holders answer root and their own user only.
var ErrNotAsked = errors.New("the holders of leases answer root and their own user only")

var errSilent = errors.New("no answer")

// Trust is the users whose answers count, since any user can take an abstract name.
type Trust struct {
	uids    []uint32
	server  bool // it is for answers of servers
	anyRoot bool // uid 0 was named
}

// ours is the trust between holders and those who ask them.
func ours() Trust { return NewTrust(nil) }

// NewTrust trusts root, the own user, and more.
func NewTrust(more []uint32) Trust {
	return Trust{uids: append([]uint32{0, uint32(os.Geteuid())}, more...), anyRoot: slices.Contains(more, 0)}
}

// Has reports whether a user is trusted, by uid alone: of the owner of a name.
func (t Trust) Has(uid uint32) bool {
	return uid != wire.OverflowID() && slices.Contains(t.uids, uid)
}

// Believes reports whether a sender is trusted. Of uid 0 that is root with CAP_NET_ADMIN, and not root of a container.
// A server runs without any capability: its uid 0 counts unless it is in a pid namespace below this one.
func (t Trust) Believes(cred wire.Cred) bool {
	if cred.UID != 0 || t.anyRoot || !t.Has(0) {
		return t.Has(cred.UID)
	}
	if t.server && wire.InOwnPIDNamespace(cred) {
		return true
	}
	standing := wire.StandingOf(cred)
	return standing == wire.Root || standing == wire.Hidden
}

// believesOwner is Believes for the owner of a socket; of an unknown process its uid has to do.
func (t Trust) believesOwner(o wire.Owner) bool {
	return t.Has(o.UID) && (o.PID == 0 || t.Believes(wire.Cred{PID: int32(o.PID), UID: o.UID}))
}

// What a process is to a key: the suffix of its name. All names are padded, since the original answers no others.
const (
	AsHolder  = ""  // the name that everybody knows
	AsStandIn = "+" // the holder, while another process has that name
	AsAsker   = "-" // not the holder
)

// Open binds a name for key.
func Open(key wire.Key, as string) (*wire.Conn, error) {
	name := key.String()
	if as != AsHolder {
		// No other process can take this name first, and no equal pid in another container has it.
		name += fmt.Sprintf("%s%d-%x", as, os.Getpid(), rand.Uint64())
	}
	addr, err := wire.Padded(name)
	if err != nil {
		return nil, err
	}
	return wire.Listen(addr, wire.MaxReplace)
}

// holderName is the holder's name in name, which Open made, and whether name is that of a stand-in. Names without the
// process and the number of a stand-in are none of Open's, and are returned as they are.
func holderName(name string) (holder string, standIn bool) {
	at := strings.LastIndex(name, AsStandIn)
	if at < 0 {
		return name, false
	}
	pid, number, _ := strings.Cut(name[at+len(AsStandIn):], "-")
	if pid == "" || number == "" || strings.Trim(pid, "0123456789") != "" || strings.Trim(number, "0123456789abcdef") != "" {
		return name, false
	}
	return name[:at], true
}

// HolderNames are the holders' names that clients of ours have now, or stand in for.
func HolderNames() ([]string, error) {
	names, err := wire.PaddedNames(ours().Has)
	for i := range names {
		names[i], _ = holderName(names[i])
	}
	return names, err
}

// standIns are the addresses of the clients that stand in for the holder of key.
func standIns(key wire.Key) ([]wire.Addr, error) {
	names, err := wire.PaddedNames(ours().Has)
	var addrs []wire.Addr
	for _, name := range names {
		if holder, standIn := holderName(name); !standIn || holder != key.String() {
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

// Occupant is the owner of a holder's name.
type Occupant struct {
	wire.Owner
	Stranger bool // it is not trusted, and no client of ours stands in for the holder
}

// Occupants returns the owners of the holders' names of keys that are taken.
func Occupants(keys []wire.Key) (map[wire.Key]Occupant, error) {
	byText := make(map[string]wire.Key, len(keys))
	named, standIns := make(map[wire.Addr]wire.Key), make(map[wire.Addr]wire.Key)
	var addrs []wire.Addr
	note := func(name string, key wire.Key, in map[wire.Addr]wire.Key) error {
		addr, err := wire.Padded(name)
		in[addr] = key
		addrs = append(addrs, addr)
		return err
	}
	for _, key := range keys {
		byText[key.String()] = key
		if err := note(key.String(), key, named); err != nil {
			return nil, err
		}
	}
	names, err := wire.PaddedNames(ours().Has)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		holder, standIn := holderName(name)
		key, ok := byText[holder]
		if !ok || !standIn {
			continue
		}
		if err := note(name, key, standIns); err != nil {
			return nil, err
		}
	}
	owners, err := wire.FindOwners(addrs...)
	occupants := make(map[wire.Key]Occupant)
	for addr, key := range named {
		if owner, found := owners[addr]; found {
			occupants[key] = Occupant{owner, !ours().believesOwner(owner)}
		}
	}
	for addr, key := range standIns {
		if owner, found := owners[addr]; found && ours().believesOwner(owner) {
			occupants[key] = Occupant{owner, false}
		}
	}
	return occupants, err
}

// exchange sends req to an address and waits for a reply from there, of a trusted user.
func exchange(conn *wire.Conn, to wire.Addr, req wire.Request, trusted Trust, patience time.Duration) (wire.Reply, error) {
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
			// It may be the late answer of an earlier exchange. The server also answers from sockets
			// without a name, while others leave its answers unread.
			if d.From != to && d.From.Bound() {
				continue
			}
			if !trusted.Believes(d.Cred) {
				if d.From == to && trusted.Has(d.Cred.UID) && hasEnded(d.Cred, to) {
					return wire.Reply{}, syscall.ECONNREFUSED
				}
				continue
			}
			if reply, err := wire.ParseReply(d.Data); err == nil {
				return reply, nil
			}
		}
	}
}

// hasEnded reports whether the process that answered from a name has ended since, and the name is nobody's: a holder
// that is told to end answers as the last thing it does.
func hasEnded(sender wire.Cred, name wire.Addr) bool {
	_, err := wire.FindOwner(name)
	return wire.StandingOf(sender) == wire.Gone && errors.Is(err, wire.ErrNobody)
}

// Ask asks the holder of req.Key or, if that does not answer, a client that stands in for it. The error is ECONNREFUSED
// if there is neither; else it names the owner of the holder's name. patience is for one answer.
func Ask(ctx context.Context, conn *wire.Conn, req wire.Request, patience time.Duration) (wire.Reply, error) {
	if err := ctx.Err(); err != nil {
		return wire.Reply{}, err
	}
	reply, err := askHolder(ctx, conn, req, patience)
	if err != nil { // another process may have the holder's name
		if standIn, standInErr := AskStandIns(conn, req, patience); standInErr == nil {
			return standIn, nil
		}
	}
	return reply, err
}

// AskStandIns asks the clients that stand in for the holder of req.Key, until one answers. It fails if none does.
func AskStandIns(conn *wire.Conn, req wire.Request, patience time.Duration) (wire.Reply, error) {
	addrs, err := standIns(req.Key)
	if err != nil {
		return wire.Reply{}, err
	}
	for _, to := range addrs {
		if reply, err := exchange(conn, to, req, ours(), patience); err == nil && reply.Code != wire.Mismatch {
			return reply, nil
		}
	}
	return wire.Reply{}, errSilent
}

// askHolder asks the holder of req.Key. A holder answers at once unless the host is overloaded: if the owner of the name
// looks like this program, it is asked again, until ctx ends.
func askHolder(ctx context.Context, conn *wire.Conn, req wire.Request, patience time.Duration) (wire.Reply, error) {
	to, err := wire.Padded(req.Key.String())
	if err != nil {
		return wire.Reply{}, err
	}
	for until := time.Now().Add(busyPatience); ; {
		reply, err := exchange(conn, to, req, ours(), patience)
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
		case !ours().believesOwner(owner) || !sameCommand(owner.Command) || time.Now().After(until):
			return reply, fmt.Errorf("%s: %w", owner, err)
		}
		if !pause(ctx, AskAgain) {
			return reply, ctx.Err()
		}
	}
}

// End ends the holder of key, and clients that stand in for it. The error names those that do not end.
func End(conn *wire.Conn, key wire.Key) error {
	const patience = 5 * time.Second // a holder gives its lease back before it confirms
	end := wire.Request{Key: key, Cmd: wire.End}
	_, err := askHolder(context.Background(), conn, wire.Request{Key: key, Cmd: wire.Query}, HolderPatience)
	if err == nil {
		var to wire.Addr
		if to, err = wire.Padded(key.String()); err == nil {
			_, err = exchange(conn, to, end, ours(), patience)
		}
	}
	if errors.Is(err, syscall.ECONNREFUSED) {
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("the process that has the name of %s does not answer, end it yourself: %w", key, err)
	}
	others, standInErr := standIns(key)
	for _, to := range others {
		_, endErr := exchange(conn, to, end, ours(), patience)
		standInErr = errors.Join(standInErr, endErr)
	}
	if standInErr != nil {
		standInErr = fmt.Errorf("a process that stands in for the holder of %s does not end: %w", key, standInErr)
	}
	return errors.Join(err, standInErr)
}

// pause waits, and reports false if ctx ends before.
func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// sameCommand reports whether a process, by the name that ps shows, may be another call of this program.
func sameCommand(comm string) bool { return slices.Contains(clientNames, comm) }

// clientNames are the names of clients in ps: those that cli.NameProcess gives, and the first 15 bytes of the names of the file,
// which versions before had.
var clientNames = []string{"ta-client", "ta-watch", "table_allocator", "table-allocator", "tactl"}

// OtherHolder reports whether a client serves the address of key on another link, so that rules from that address may
// be those of that client.
func OtherHolder(key wire.Key) (bool, error) {
	names, err := HolderNames()
	if err != nil {
		return false, err
	}
	suffix := strings.TrimPrefix(key.String(), key.Ifname)
	return slices.ContainsFunc(names, func(name string) bool {
		return name != key.String() && strings.HasSuffix(name, suffix)
	}), nil
}
