package peer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/wire"
)

const (
	markPatience = 2 * time.Second        // for an answer of a server that has read the request
	markEvery    = 500 * time.Millisecond // between tries
	busyPause    = 5 * time.Millisecond   // before the next where it does not read them
)

// ErrNoServer says that no process has the name of the server, or that the process does not read.
var ErrNoServer = errors.New("no server answers")

// ErrNoMarks says that the server is the original, or a version that knows no marks.
var ErrNoMarks = errors.New("the server knows no marks: it is an older version, or the original")

// Server is the name of the server, and the users whose answers count.
type Server struct {
	Trust
	addrs []wire.Addr
}

// NewServer is the server of a name. Answers of root, the own user and uids count.
func NewServer(name string, uids []uint32) (Server, error) {
	// Both forms of the name: the original holds only the padded one, another program perhaps only the exact one.
	padded, err := wire.Padded(name)
	if err != nil {
		return Server{}, err
	}
	exact, err := wire.Exact(name)
	trust := NewTrust(uids)
	trust.server = true
	return Server{trust, []wire.Addr{padded, exact}}, err
}

// Is reports whether an address is that of the server.
func (s Server) Is(from wire.Addr) bool { return slices.Contains(s.addrs, from) }

// Send sends to the first form of the name that a process has.
func (s Server) Send(conn *wire.Conn, data []byte) error {
	for _, addr := range s.addrs {
		errs := conn.Send(wire.Message{Data: data, To: addr})
		if errs == nil {
			return nil
		}
		if !errors.Is(errs[0], syscall.ECONNREFUSED) {
			return errs[0]
		}
	}
	return s.absent()
}

// Owner returns who has the name of the server; wire.ErrNobody if no process has.
func (s Server) Owner() (owner wire.Owner, err error) {
	for _, addr := range s.addrs {
		if owner, err = wire.FindOwner(addr); !errors.Is(err, wire.ErrNobody) {
			return owner, err
		}
	}
	return owner, err
}

func (s Server) absent() error {
	return fmt.Errorf("%w: nobody has the name %s (%s)", ErrNoServer, s.addrs[0], outside.Service("start", "table-allocator-server"))
}

// Stranger says who has the name of the server, if that is no trusted user.
func (s Server) Stranger() error {
	for _, addr := range s.addrs {
		owner, err := wire.FindOwner(addr)
		switch {
		case err != nil: // no process has this form, so requests went to the other one
		case s.believesOwner(owner):
			return nil
		case owner.UID == wire.OverflowID():
			return fmt.Errorf("%s is taken by a user whom this user namespace does not map: the client has to run in that of the server", addr)
		default:
			return fmt.Errorf("%s is taken by %s, who is not trusted to lease tables (see --server-user)", addr, owner)
		}
	}
	return nil
}

// ask is exchange with the first form of the name that a process has.
func (s Server) ask(conn *wire.Conn, req wire.Request, patience time.Duration) (wire.Reply, error) {
	for _, to := range s.addrs {
		reply, err := exchange(conn, to, req, s.Trust, patience)
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return reply, err
		}
	}
	return wire.Reply{}, s.absent()
}

// Mark asks for the mark of an interface. With known the server only says which mark it gave before.
func (s Server) Mark(ctx context.Context, conn *wire.Conn, ifname string, known bool) (wire.Marking, error) {
	reply, err := s.askOwn(ctx, conn, wire.Request{Key: wire.Key{Ifname: ifname}, Cmd: wire.Mark, Known: known})
	if err != nil {
		return wire.Marking{}, err
	}
	return markOf(reply, known)
}

// askOwn asks what only root and the own user of the server may know.
func (s Server) askOwn(ctx context.Context, conn *wire.Conn, req wire.Request) (wire.Reply, error) {
	began := time.Now()
	for until := began.Add(markPatience); ; {
		reply, err := s.ask(conn, req, markEvery)
		taken, _ := conn.Backlog()
		unread := taken > 0 // the server starts, say, or the host is overloaded
		switch {
		case err == nil:
			return reply, nil
		case errors.Is(err, ErrNoServer):
			return wire.Reply{}, err
		case !errors.Is(err, errSilent) && !errors.Is(err, syscall.EAGAIN):
			return wire.Reply{}, fmt.Errorf("ask the server: %w", err)
		case unread && time.Since(began) < busyPatience:
			until = time.Now().Add(markPatience)
		case unread:
			return wire.Reply{}, fmt.Errorf("%w: whoever has the name %s does not read requests", ErrNoServer, s.addrs[0])
		case time.Now().After(until):
			return wire.Reply{}, cmp.Or(s.Stranger(), ErrNoMarks) // the original is silent
		}
		if (unread || errors.Is(err, syscall.EAGAIN)) && !pause(ctx, busyPause) {
			return wire.Reply{}, fmt.Errorf("%w: whoever has the name %s does not answer in time", ErrNoServer, s.addrs[0])
		}
	}
}

// markOf reads the answer to a request for a mark.
func markOf(r wire.Reply, known bool) (wire.Marking, error) {
	switch {
	case r.Code == wire.Malformed, r.Error == "" && r.Marking == wire.Marking{} && !known:
		return wire.Marking{}, ErrNoMarks
	case r.Code == wire.Denied:
		return wire.Marking{}, fmt.Errorf("%w: %s", unix.EPERM, r.Error)
	case r.Error != "":
		return wire.Marking{}, fmt.Errorf("ask the server for a mark: %s", r.Error)
	}
	return r.Marking, nil
}

// MarkedInterfaces maps the priorities of lookups to the interfaces that have them.
func (s Server) MarkedInterfaces(ctx context.Context, ifnames []string) (map[uint32]string, error) {
	marked := make(map[uint32]string)
	for _, ifname := range ifnames {
		m, err := s.knownMark(ctx, ifname)
		if err != nil {
			return marked, err
		}
		if m != (wire.Marking{}) {
			marked[m.Block], marked[m.Fallback] = ifname, ifname
		}
	}
	return marked, nil
}

// knownMark asks from a socket of its own: a slow server answers each try, and no answer names its interface.
func (s Server) knownMark(ctx context.Context, ifname string) (wire.Marking, error) {
	conn, err := openAsker()
	if err != nil {
		return wire.Marking{}, err
	}
	defer conn.Close()
	return s.Mark(ctx, conn, ifname, true)
}

// InterfaceAt returns the interface whose lookups have a priority, which may be gone; "" if the server knows none.
func (s Server) InterfaceAt(ctx context.Context, priority uint32) (string, error) {
	conn, err := openAsker()
	if err != nil {
		return "", err
	}
	defer conn.Close()
	reply, err := s.askOwn(ctx, conn, wire.Request{Key: wire.Key{Ifname: wire.AnyInterface}, Cmd: wire.Mark, Known: true, Priority: priority})
	if err != nil || reply.Error != "" {
		return "", err // a version that does not know the question
	}
	return strings.TrimPrefix(reply.Ifname, wire.AnyInterface), nil
}

// ErrNoHealth says that the server does not know the question for its health.
var ErrNoHealth = errors.New("the server does not say how it stands: it is an older version, or the original")

// Health asks how the server and its pool of a family stand. The reply has no Tables if the family is not served.
func (s Server) Health(ctx context.Context, family wire.Family) (wire.Reply, error) {
	conn, err := openAsker()
	if err != nil {
		return wire.Reply{}, err
	}
	defer conn.Close()
	reply, err := s.askOwn(ctx, conn, wire.Request{Key: wire.Key{Ifname: wire.AnyInterface, Family: family}, Cmd: wire.Health})
	switch {
	case errors.Is(err, ErrNoMarks), reply.Code == wire.Malformed:
		return wire.Reply{}, ErrNoHealth
	case reply.Code == wire.Denied:
		return wire.Reply{}, fmt.Errorf("%w: %s", unix.EPERM, reply.Error)
	}
	return reply, err
}

func openAsker() (*wire.Conn, error) {
	return Open(wire.Key{Ifname: "marks", Address: fmt.Sprint(os.Getpid())}, AsAsker)
}

// Release releases the lease of key. After ErrNoServer the lease expires.
func (s Server) Release(conn *wire.Conn, key wire.Key) error {
	req := wire.Request{Key: key, Cmd: wire.Release}
	for until := time.Now().Add(ReleaseTries * ReleaseEvery); ; {
		reply, err := s.ask(conn, req, ReleaseEvery)
		switch {
		case err == nil && reply.Error != "":
			return fmt.Errorf("release the lease: %s", reply.Error)
		case err == nil:
			return nil
		case errors.Is(err, ErrNoServer):
			return fmt.Errorf("release the lease, which ends by itself: %w", err)
		case time.Now().After(until):
			return fmt.Errorf("release the lease, which ends by itself: %w", cmp.Or(s.Stranger(), err))
		case errors.Is(err, syscall.EAGAIN): // its queue is full
			time.Sleep(rand.N(20 * time.Millisecond))
		}
	}
}
