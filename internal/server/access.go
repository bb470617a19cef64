package server

import (
	"fmt"
	"os"
	"os/user"
	"slices"
	"strconv"
	"time"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// access decides who may lease. The kernel gives the real uid and gid of the sender, and no
// supplementary groups: access reads these from the group database of the host.
type access struct {
	self       uint32
	uids, gids []uint32
	cache      map[uint32]groupsOf
}

type groupsOf struct {
	gids  []uint32
	until time.Duration
}

// groupsFor is how long the groups of a user are cached, so that a flood of datagrams does not make
// the server read /etc/group each time.
const groupsFor = 5 * time.Second

func newAccess(cfg Config) *access {
	return &access{
		self:  uint32(os.Geteuid()),
		uids:  cfg.AllowedUIDs,
		gids:  cfg.AllowedGIDs,
		cache: make(map[uint32]groupsOf),
	}
}

// check returns nil if the sender may lease, or the reason why not.
func (a *access) check(now time.Duration, cred wire.Cred) error {
	switch {
	case cred.UID == wire.OverflowID():
		return fmt.Errorf("uid %d stands for users of another user namespace, who are never permitted", cred.UID)
	case cred.UID == 0, cred.UID == a.self, slices.Contains(a.uids, cred.UID):
		return nil
	case len(a.gids) == 0:
	case slices.Contains(a.gids, cred.GID) && cred.GID != wire.OverflowID():
		return nil
	case slices.ContainsFunc(a.groups(now, cred.UID), func(g uint32) bool { return slices.Contains(a.gids, g) }):
		return nil
	}
	return fmt.Errorf("uid %d is not permitted: see allowed_users and allowed_groups", cred.UID)
}

// first reports whether the sender is root or the server's own user: no other user may keep replies
// from them.
func (a *access) first(cred wire.Cred) bool {
	return cred.UID != wire.OverflowID() && (cred.UID == 0 || cred.UID == a.self)
}

func (a *access) groups(now time.Duration, uid uint32) []uint32 {
	if known, ok := a.cache[uid]; ok && now < known.until {
		return known.gids
	}
	const most = 1024 // users, so that many senders do not use up the memory
	if len(a.cache) >= most {
		clear(a.cache)
	}
	var gids []uint32
	if u, err := user.LookupId(strconv.FormatUint(uint64(uid), 10)); err == nil {
		names, err := u.GroupIds()
		if err == nil {
			for _, name := range names {
				if gid, err := strconv.ParseUint(name, 10, 32); err == nil {
					gids = append(gids, uint32(gid))
				}
			}
		}
	}
	a.cache[uid] = groupsOf{gids, now + groupsFor}
	return gids
}
