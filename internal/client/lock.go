package client

import (
	"errors"
	"io/fs"
	"slices"

	"github.com/table-allocator/table-allocator/internal/cgroup"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// keepLock is what keepLock warns that it cannot do.
const keepLock = "keep the lock of bound programs, whose link stays closed after a replug until the next run"

// keepLock lets what is bound to the interface of a session leave by the link that has this name now, with the
// addresses that the link has now. A link that is added again has another ifindex.
func (l *loop) keepLock(s *session) error {
	if !slices.ContainsFunc(s.inst.Rules.Guards, uplink.IsStrict) {
		return nil
	}
	lock, err := cgroup.OpenLock()
	if err != nil {
		return err
	}
	defer lock.Close()
	return lock.Sync(s.inst.Rules.Marking.Mark, l.kernel.SourcesOf(s.lease.uplink.Key.Ifname))
}

// keepLocks makes the lock follow events of links and addresses.
func (l *loop) keepLocks(n news) {
	done := make(map[string]bool)
	for _, s := range l.sessions {
		ifname := s.lease.uplink.Key.Ifname
		concerned := n.overrun || n.names[ifname] || n.links[s.inst.Index] || n.addressed[s.inst.Index]
		if concerned && !done[ifname] && len(s.inst.Rules.Guards) > 0 {
			done[ifname] = true
			s.warn(keepLock, l.keepLock(s))
		}
	}
	if len(n.gone) > 0 {
		if err := unlock(n.gone); err != nil {
			l.log.Warn("cannot remove links that went from the lock of bound programs", "err", err)
		}
	}
}

// unlock removes links that went from the lock, if there is one: another link may get the ifindex.
func unlock(links map[int]bool) error {
	lock, err := cgroup.OpenLock()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	var errs []error
	for index := range links {
		errs = append(errs, lock.RemoveLink(index))
	}
	return errors.Join(errs...)
}
