package bind

import (
	"errors"
	"slices"

	"github.com/table-allocator/table-allocator/internal/cgroup"
	"github.com/table-allocator/table-allocator/internal/lock"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// Release unbinds the traffic of interfaces that cover names, once nothing serves them any more. rules are those that
// List listed before. Processes that were bound with block keep their lock, which is closed now, until they end.
func Release(covers func(ifname string) bool, rules []Bound) error {
	rules = slices.DeleteFunc(slices.Clone(rules), func(b Bound) bool { return !covers(b.Ifname) })
	errs := []error{closeLock(rules), Unbind(rules)}
	cgroups, err := cgroup.Open()
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	defer cgroups.Close()
	pinned, err := cgroup.Pinned()
	errs = append(errs, err)
	for _, u := range pinned {
		if covers(u.Ifname) {
			errs = append(errs, cgroup.Unpin(u))
		}
	}
	return errors.Join(append(errs, cgroups.FreeFallback(covers))...)
}

// UnbindUnused unbinds the traffic of an interface whose mark no cgroup and no program for units has.
func UnbindUnused(ifname string, rules []Bound) error {
	cgroups, err := cgroup.Open()
	if err != nil {
		return err
	}
	defer cgroups.Close()
	processes, err := cgroups.Bound()
	if err != nil {
		return err
	}
	pinned, err := cgroup.Pinned()
	if err != nil || slices.ContainsFunc(pinned, func(u cgroup.Uplink) bool { return u.Ifname == ifname }) {
		return err
	}
	return Unbind(slices.DeleteFunc(slices.Clone(rules), func(b Bound) bool {
		return slices.ContainsFunc(processes, func(p cgroup.Bound) bool { return p.Value == b.Traffic.Mark && p.Mask == b.Traffic.Mask })
	}))
}

// closeLock lets nothing leave that rules bind with block.
func closeLock(rules []Bound) error {
	var marks []uint32
	for _, b := range rules {
		if b.OnLoss == uplink.Block && b.Traffic.Mask != 0 {
			marks = append(marks, b.Traffic.Mark)
		}
	}
	return lock.Shut(marks)
}
