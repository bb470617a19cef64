package peer

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/wire"
)

const (
	markPatience = 2 * time.Second        // for an answer of a server that has read the request
	markEvery    = 500 * time.Millisecond // between tries
	busyPause    = 5 * time.Millisecond   // before the next where it does not read them
)

// ErrNoServer says that nobody serves the name of the server.
var ErrNoServer = errors.New("no server")

// ErrNoMarks says that the server is the original, or a version that knows no marks.
var ErrNoMarks = errors.New("the server knows no marks: it is an older version, or the original")

// AskMark asks the server for the mark of an interface; with known it gives none anew.
func AskMark(conn *wire.Conn, name string, uids []uint32, ifname string, known bool) (wire.Marking, error) {
	servers, err := ServerAddrs(name)
	if err != nil {
		return wire.Marking{}, err
	}
	trusted := NewTrust(uids)
	req := wire.Request{Key: wire.Key{Ifname: ifname}, Cmd: wire.Mark, Known: known}
	began := time.Now()
	for until := began.Add(markPatience); ; {
		var reply wire.Reply
		for _, to := range servers { // the first form of the name that somebody is bound to
			if reply, err = Exchange(conn, to, req, trusted, markEvery); !errors.Is(err, syscall.ECONNREFUSED) {
				break
			}
		}
		switch {
		case err == nil && reply.Code == wire.Malformed:
			return wire.Marking{}, ErrNoMarks
		case err == nil && reply.Code == wire.Denied:
			return wire.Marking{}, fmt.Errorf("%w: %s", unix.EPERM, reply.Error)
		case err == nil && reply.Error != "":
			return wire.Marking{}, fmt.Errorf("ask the server for a mark: %s", reply.Error)
		case err == nil && reply.Marking == wire.Marking{} && !known:
			return wire.Marking{}, ErrNoMarks
		case err == nil:
			return reply.Marking, nil
		case errors.Is(err, syscall.ECONNREFUSED):
			return wire.Marking{}, fmt.Errorf("%w: nobody serves %s", ErrNoServer, servers[0])
		case !errors.Is(err, errSilent) && !errors.Is(err, syscall.EAGAIN):
			return wire.Marking{}, fmt.Errorf("ask the server for a mark: %w", err)
		case conn.Backlog() > 0 && time.Since(began) > busyPatience:
			return wire.Marking{}, fmt.Errorf("%w: who serves %s does not read requests", ErrNoServer, servers[0])
		case conn.Backlog() > 0: // it starts, say, on a host that is out of breath
			until = time.Now().Add(markPatience)
			time.Sleep(busyPause)
		case time.Now().After(until):
			if stranger := Explain(servers, trusted); stranger != nil {
				return wire.Marking{}, stranger
			}
			return wire.Marking{}, ErrNoMarks // the original is silent
		case errors.Is(err, syscall.EAGAIN): // its queue is full
			time.Sleep(busyPause)
		}
	}
}

// MarkedInterfaces maps the priorities of lookups to the interfaces that have them.
func MarkedInterfaces(server string, uids []uint32, ifnames []string) (map[uint32]string, error) {
	marked := make(map[uint32]string)
	for _, ifname := range ifnames {
		m, err := knownMark(server, uids, ifname)
		if err != nil {
			return marked, err
		}
		if m != (wire.Marking{}) {
			marked[m.Block], marked[m.Fallback] = ifname, ifname
		}
	}
	return marked, nil
}

// knownMark asks on a socket of its own: a server that was slow answers each try, and no answer tells
// which interface it is about.
func knownMark(server string, uids []uint32, ifname string) (wire.Marking, error) {
	conn, err := Open(wire.Key{Ifname: "marks", Address: fmt.Sprint(os.Getpid())}, AsAsker)
	if err != nil {
		return wire.Marking{}, err
	}
	defer conn.Close()
	return AskMark(conn, server, uids, ifname, true)
}

// ReleaseLease gives the lease of key back to the server. With ErrNoServer the lease ends by itself.
func ReleaseLease(conn *wire.Conn, server string, uids []uint32, key wire.Key) error {
	trusted := NewTrust(uids)
	servers, err := ServerAddrs(server)
	if err != nil {
		return err
	}
	req := wire.Request{Key: key, Cmd: wire.Release}
	for until := time.Now().Add(ReleaseTries * ReleaseEvery); ; {
		var reply wire.Reply
		for _, to := range servers { // the first form of the name that somebody is bound to
			reply, err = Exchange(conn, to, req, trusted, ReleaseEvery)
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
			if stranger := Explain(servers, trusted); stranger != nil {
				err = stranger
			}
			return fmt.Errorf("release the lease, which ends by itself: %w", err)
		case errors.Is(err, syscall.EAGAIN): // its queue is full
			time.Sleep(rand.N(20 * time.Millisecond))
		}
	}
}

// ServerAddrs are both forms of the server's name: the original holds only the padded
// one, another program perhaps only the exact one.
func ServerAddrs(name string) ([]wire.Addr, error) {
	padded, err := wire.Padded(name)
	if err != nil {
		return nil, err
	}
	exact, err := wire.Exact(name)
	return []wire.Addr{padded, exact}, err
}

// SendToServer sends to the first form of the name that somebody is bound to.
func SendToServer(conn *wire.Conn, addrs []wire.Addr, data []byte) error {
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

// Explain says why nobody trusted answers at the server's name, if a stranger has it.
func Explain(addrs []wire.Addr, trusted Trust) error {
	for _, addr := range addrs {
		owner, err := wire.FindOwner(addr)
		switch {
		case err != nil: // nobody there, so requests went to the other form
		case trusted.Has(owner.UID):
			return nil
		case owner.UID == wire.OverflowID():
			return fmt.Errorf("%s is taken by a user whom this user namespace does not map: the client has to run in that of the server", addr)
		default:
			return fmt.Errorf("%s is taken by %s, who is not trusted to lease tables (see --server-user)", addr, owner)
		}
	}
	return nil
}
