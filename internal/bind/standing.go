package bind

import (
	"context"
	"errors"
	"slices"

	"github.com/table-allocator/table-allocator/internal/cgroup"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// Mark is that of the sockets of bound programs.
type Mark = cgroup.Mark

// MakeStanding makes the cgroup of an interface that stands as long as somebody wants it. What is put into it is bound to the
// interface, with block. Where it stands with the mark was,
// MakeStanding restores its rules, and needs no right to look at programs.
func MakeStanding(ctx context.Context, cfg Config, was Mark) (m Mark, missing []cgroup.Missing, err error) {
	cfg.OnLoss = uplink.Block
	b, err := Bind(ctx, cfg)
	if err != nil && !errors.Is(err, ErrNoLease) { // the lease may have ended just now
		return was, nil, err
	}
	if m = (Mark{Value: b.Mark(), Mask: b.Marking.Mask}); m == was && slices.Contains(Standing(), b.Ifname) {
		return m, nil, nil
	}
	cgroups, err := cgroup.Open()
	if err != nil {
		return was, nil, err
	}
	defer cgroups.Close()
	if missing, err = cgroups.Standing(cgroup.Uplink{Ifname: b.Ifname}, m); err != nil {
		return was, nil, err
	}
	return m, missing, nil
}

// Standing are the interfaces with a cgroup that MakeStanding made.
func Standing() (ifnames []string) {
	cgroups, err := cgroup.Open()
	if err != nil {
		return nil // then there are none
	}
	defer cgroups.Close()
	for _, u := range cgroups.AllStanding() {
		ifnames = append(ifnames, u.Ifname)
	}
	return ifnames
}

// RemoveStanding undoes a MakeStanding that gave a mark. While there are processes in the cgroup they stay bound, and used is true.
func RemoveStanding(cfg Config, m Mark) (used bool, err error) {
	cgroups, err := cgroup.Open()
	if err != nil {
		return true, err
	}
	defer cgroups.Close()
	rules, err := List(cfg.Server, cfg.ServerUIDs, cfg.Ifname)
	if err != nil {
		return true, err // while the cgroup is there, it is tried again
	}
	u := cgroup.Uplink{Ifname: cfg.Ifname}
	if used, err = cgroups.RemoveStanding(u); used || err != nil {
		return used, err
	}
	named, err := cgroups.Named(u)
	if err != nil || named {
		return false, err
	}
	pinned, err := cgroup.Pinned()
	if err != nil || slices.Contains(pinned, u) {
		return false, err
	}
	// By the mark: without the server nobody knows the name of a link that is gone.
	return false, Unbind(slices.DeleteFunc(rules, func(b Bound) bool {
		return b.OnLoss != uplink.Block || b.Traffic.Mask == 0 || b.Traffic.Mask != m.Mask || b.Traffic.Mark != m.Value
	}))
}
