package server

import (
	"errors"
	"fmt"
	"log/slog"
	"os/user"
	"slices"
	"strconv"
	"time"

	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// groups are the supplementary groups of users, as the name services of the host have them. A name service may never
// answer, so it is asked beside the loops, and the datagrams of a user wait until it has answered. What it said last counts
// as long as it is silent. The server's mutex guards all of it.
type groups struct {
	known   map[uint32]groupsOf
	wanted  []uint32 // users to look up; the first one is being looked up
	parked  []parked
	working bool // lookUp runs
}

type groupsOf struct {
	gids  []uint32
	err   error
	until time.Duration
}

// parked is a datagram that waits for the groups of its sender.
type parked struct {
	socket *socket
	wire.Datagram
}

const (
	groupsFor   = 5 * time.Second // so that a flood of datagrams does not make the server read /etc/group each time
	groupsStale = time.Minute     // so long they count while they are looked up again
	groupsLimit = 2 * time.Second // for a name service, which may ask another host
	groupsMost  = 1024            // users, so that many senders do not use up the memory
	parkedMost  = 256
)

// errAwaited says that the groups of a user are being looked up, and errGroups that they cannot be.
var (
	errAwaited = errors.New("the groups of the sender are being looked up")
	errGroups  = errors.New("the groups of the sender cannot be looked up")
)

// of returns the groups of a user, or errAwaited or errGroups.
func (g *groups) of(uid uint32, now time.Duration) ([]uint32, error) {
	known, ok := g.known[uid]
	if ok && now < known.until {
		return known.gids, known.err
	}
	if !g.want(uid) {
		return known.gids, errGroups
	}
	if !ok || known.err != nil || now >= known.until+groupsStale {
		return nil, errAwaited
	}
	return known.gids, nil
}

// want has a user looked up. It reports whether there is room.
func (g *groups) want(uid uint32) bool {
	if slices.Contains(g.wanted, uid) {
		return true
	}
	if len(g.wanted) >= parkedMost {
		return false
	}
	g.wanted = append(g.wanted, uid)
	return true
}

// learn takes over what a look-up found, and returns the datagrams that waited for it.
func (g *groups) learn(uid uint32, gids []uint32, err error, now time.Duration) (ready []parked) {
	g.wanted = slices.DeleteFunc(g.wanted, func(u uint32) bool { return u == uid })
	if known, ok := g.known[uid]; ok && err != nil && known.err == nil {
		gids, err = known.gids, nil
	}
	if len(g.known) >= groupsMost {
		clear(g.known)
	}
	g.known[uid] = groupsOf{gids, err, now + groupsFor}
	g.parked = slices.DeleteFunc(g.parked, func(p parked) bool {
		if p.Cred.UID == uid {
			ready = append(ready, p)
		}
		return p.Cred.UID == uid
	})
	return ready
}

// park keeps a datagram until the groups of its sender are known. It reports whether there is room.
func (s *server) park(c *socket, d wire.Datagram) bool {
	g := &s.access.groups
	if len(g.parked) >= parkedMost {
		return false
	}
	d.Data = slices.Clone(d.Data)
	g.parked = append(g.parked, parked{c, d})
	return true
}

// startLookUp starts lookUp if users wait for it.
func (s *server) startLookUp() {
	if g := &s.access.groups; len(g.wanted) > 0 && !g.working {
		g.working = true
		s.beside.Go(s.lookUp)
	}
}

// lookUp looks users up, one after the other, and hands their datagrams to the loops.
func (s *server) lookUp() {
	for {
		s.mu.Lock()
		g := &s.access.groups
		if len(g.wanted) == 0 || s.stopping {
			g.working = false
			s.mu.Unlock()
			return
		}
		uid := g.wanted[0]
		s.mu.Unlock()
		gids, err := outside.Ask("name services", groupsLimit, func() ([]uint32, error) { return groupIDs(uid), nil })
		s.mu.Lock()
		if err != nil {
			s.faults.write(slog.LevelWarn, "cannot look up the groups of a user; what was known of them counts until that succeeds", "uid", uid, "err", err)
			err = fmt.Errorf("%w: %w", errGroups, err)
		}
		ready := g.learn(uid, gids, err, wire.Now())
		for _, p := range ready {
			p.socket.ready = append(p.socket.ready, p.Datagram)
		}
		s.mu.Unlock()
		for _, p := range ready {
			if err := p.socket.Wake(); err != nil {
				s.log.Error("cannot wake the loop of a socket, which answers users of groups later", "err", err)
			}
		}
	}
}

// groupIDs returns the groups that the name services have of a user; none if they have no such user.
func groupIDs(uid uint32) (gids []uint32) {
	u, err := user.LookupId(strconv.FormatUint(uint64(uid), 10))
	if err != nil {
		return nil
	}
	names, err := u.GroupIds()
	if err != nil {
		return nil
	}
	for _, name := range names {
		if gid, err := strconv.ParseUint(name, 10, 32); err == nil {
			gids = append(gids, uint32(gid))
		}
	}
	return gids
}
