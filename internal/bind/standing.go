package bind

import (
	"context"
	"errors"
	"slices"

	"github.com/table-allocator/table-allocator/internal/cgroup"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// Stand makes the cgroup of an interface that stands as long as somebody wants it. What is put into it is bound to the
// interface, with block.
func Stand(ctx context.Context, cfg Config) ([]cgroup.Missing, error) {
	cfg.OnLoss = uplink.Block
	b, err := Bind(ctx, cfg)
	if err != nil && !errors.Is(err, ErrNoLease) { // the lease may have ended just now
		return nil, err
	}
	cgroups, err := cgroup.Open()
	if err != nil {
		return nil, err
	}
	defer cgroups.Close()
	return cgroups.Standing(cgroup.Uplink{Ifname: b.Ifname}, cgroup.Mark{Value: b.Mark(), Mask: b.Marking.Mask})
}

// Standing are the interfaces with a cgroup that Stand made.
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

// Fell undoes Stand. While there are processes in the cgroup they stay bound, and used is true.
func Fell(cfg Config) (used bool, err error) {
	cgroups, err := cgroup.Open()
	if err != nil {
		return true, err
	}
	defer cgroups.Close()
	rules, err := List(cfg.Server, cfg.ServerUIDs, cfg.Ifname)
	if err != nil {
		return true, err // while the cgroup is there, it is tried again
	}
	mark, used, err := cgroups.RemoveStanding(cgroup.Uplink{Ifname: cfg.Ifname})
	if used || err != nil {
		return used, err
	}
	// By the mark: without the server nobody knows the name of a link that is gone.
	return false, UnbindUnused(cfg.Ifname, slices.DeleteFunc(rules, func(b Bound) bool {
		return b.OnLoss != uplink.Block || b.Traffic.Mask == 0 || b.Traffic.Mask != mark.Mask || b.Traffic.Mark != mark.Value
	}))
}
