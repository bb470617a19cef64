package inspect

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/bind"
	"github.com/table-allocator/table-allocator/internal/cgroup"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

const (
	lockWhat = "rules of bound programs stand, and their lock is missing"
	lockCure = "`table-allocator-client attach --ifname IFNAME PID`, for one process of each cgroup that is bound, as root: " +
		"it makes the lock, to which watch and clients write from then on"
)

// strict reports whether programs are bound that may use no other uplink.
func (h *host) strict() bool {
	return slices.ContainsFunc(slices.Concat(h.rules[unix.AF_INET], h.rules[unix.AF_INET6]), uplink.IsStrict)
}

// noteLock tells the first address of each link whose programs have no lock. It does not look at cgroups, of which there may
// be many.
func (h *host) noteLock(rows []Row, q Question) error {
	if !h.strict() {
		return nil
	}
	err := cgroup.CheckLock()
	if err == nil || errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EPERM) {
		return nil // only root may look
	}
	bound, listErr := bind.List(q.Server, q.UIDs)
	if listErr != nil && !errors.Is(listErr, unix.EPERM) {
		return listErr
	}
	for _, b := range bound {
		at := slices.IndexFunc(rows, func(r Row) bool { return r.Ifname == b.Ifname })
		if at >= 0 && b.OnLoss == uplink.Block && b.Traffic.Mask != 0 {
			rows[at].Findings = append(rows[at].Findings, Finding{"lock-missing", Warning, lockWhat, err.Error(), lockCure})
		}
	}
	return nil
}

// lookLock finds cgroups whose programs do not read the lock of this network namespace.
func lookLock(p *patient) []symptom {
	if !p.strict() {
		return nil
	}
	lockErr := cgroup.CheckLock()
	if errors.Is(lockErr, fs.ErrPermission) {
		p.unseen = lockErr
		return nil
	}
	cgroups, err := cgroup.Open()
	if err != nil {
		p.unseen = err
		return nil
	}
	defer cgroups.Close()
	bound, err := cgroups.BoundHere()
	if err != nil {
		p.unseen = err
		return nil
	}
	var stands []string
	for _, b := range bound {
		switch {
		case b.Unlocked == "":
		case b.RulesOnly:
			stands = append(stands, fmt.Sprintf("%s of %s is held by rules alone", b.Cgroup, b.Uplink))
		default:
			stands = append(stands, fmt.Sprintf("%s of %s is closed once its link is added again", b.Cgroup, b.Uplink))
		}
	}
	if len(stands) == 0 {
		return nil
	}
	if lockErr != nil {
		stands = slices.Insert(stands, 0, lockErr.Error())
	}
	return []symptom{{lockWhat, strings.Join(stands, "; "), lockCure}}
}
