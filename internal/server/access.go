package server

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// access decides who may lease. The kernel gives the real uid and gid of the sender, and no
// supplementary groups: access reads these from the group database of the host.
type access struct {
	self       uint32
	uids, gids []uint32
	groups     groups
	standings  map[int32]standingOf
	hidden     bool          // the standing of a sender could not be found out
	now        time.Duration // of the round at hand: to read the clock for each datagram costs more than what it is for
}

type standingOf struct {
	wire.Standing
	until  time.Duration
	unread error // why it is Silent
}

// standingFor is how long the standing of a process is cached, so that a flood of datagrams does not make the server
// read /proc each time. No pid is used again so soon.
const standingFor = 100 * time.Millisecond

// errUnsaid says that /proc was silent, and is not any more.
var errUnsaid = errors.New("it did not answer")

// errSilent says that nobody knows what uid 0 of a sender is worth.
var errSilent = errors.New("whether the sender is root of this host is not known: ask later")

func newAccess(cfg Config) *access {
	a := &access{
		self:      uint32(os.Geteuid()),
		groups:    groups{known: make(map[uint32]groupsOf)},
		standings: make(map[int32]standingOf),
	}
	a.permit(cfg)
	return a
}

// permit sets who may lease.
func (a *access) permit(cfg Config) {
	a.uids, a.gids = cfg.AllowedUIDs, cfg.AllowedGIDs
	clear(a.groups.known)
}

// standing is that of a sender; of users other than root it is NoRoot.
func (a *access) standing(cred wire.Cred) wire.Standing {
	if cred.UID != 0 || wire.OverflowID() == 0 {
		return wire.NoRoot
	}
	known, ok := a.standings[cred.PID]
	if !ok || a.now >= known.until {
		const most = 1024 // processes, so that many senders do not use up the memory
		if len(a.standings) >= most {
			clear(a.standings)
		}
		known = standingOf{Standing: wire.StandingOf(cred), until: a.now + standingFor}
		if known.Standing == wire.Silent {
			known.unread = wire.Unread(cred)
		}
		a.standings[cred.PID] = known
	}
	a.hidden = a.hidden || known.Standing == wire.Hidden
	return known.Standing
}

// isRoot reports whether the sender is root of the host. Where /proc hides processes, every uid 0 is.
func (a *access) isRoot(cred wire.Cred) bool {
	s := a.standing(cred)
	return s == wire.Root || s == wire.Hidden
}

// owner is the user that the leases of a sender belong to. Those of uid 0 that is an ordinary user belong to the
// overflow uid, which no other sender has.
func (a *access) owner(cred wire.Cred) uint32 {
	if cred.UID == 0 && !a.isRoot(cred) {
		return wire.OverflowID()
	}
	return cred.UID
}

// check returns nil if the sender may lease, or the reason why not. errAwaited says that this is not known yet, and
// errGroups that it cannot be found out now.
func (a *access) check(cred wire.Cred) error {
	switch {
	case cred.UID == wire.OverflowID():
		return fmt.Errorf("uid %d stands for users of another user namespace, who are never permitted", cred.UID)
	case a.first(cred), slices.Contains(a.uids, cred.UID):
		return nil
	case cred.UID == 0 && a.standing(cred) == wire.Silent:
		return fmt.Errorf("/proc cannot be read now (%w), so %w", cmp.Or(a.standings[cred.PID].unread, errUnsaid), errSilent)
	case cred.UID == 0 && a.standing(cred) == wire.Gone:
		return errors.New("the sender has ended, so it can release only what it leased itself")
	case cred.UID == 0: // it can have any group
		return errors.New("uid 0 without CAP_NET_ADMIN, as in a container, is an ordinary user: see allowed_users")
	case len(a.gids) == 0:
	case slices.Contains(a.gids, cred.GID) && cred.GID != wire.OverflowID():
		return nil
	default:
		gids, err := a.groups.of(cred.UID, a.now)
		if err != nil || slices.ContainsFunc(gids, func(g uint32) bool { return slices.Contains(a.gids, g) }) {
			return err
		}
	}
	return fmt.Errorf("uid %d is not permitted: see allowed_users and allowed_groups", cred.UID)
}

// first reports whether the sender is root or the server's own user: no other user may keep replies
// from them.
func (a *access) first(cred wire.Cred) bool {
	if cred.UID == wire.OverflowID() {
		return false
	}
	return cred.UID == a.self && a.self != 0 || a.isRoot(cred)
}
