package client

import (
	"context"
	"fmt"
	"slices"

	"github.com/table-allocator/table-allocator/internal/bind"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// cgroups keeps a cgroup for each link whose profile wants one, as long as an address of the link is in service. Making
// and removing one asks holders, of which this loop is one, and walks all cgroups: that runs beside the loop.
type cgroups struct {
	*host
	busy map[string]bool // by link that has one, or is to have one; true: something runs for it
	told map[string]string
}

// newCgroups takes over what the watch before has left.
func newCgroups(h *host) *cgroups {
	c := &cgroups{host: h, busy: make(map[string]bool), told: make(map[string]string)}
	if !c.any() {
		return c
	}
	for _, name := range bind.Standing() {
		if h.config.HasCgroup(name) { // else it is of another network namespace
			c.busy[name] = false
		}
	}
	return c
}

// any reports whether a link may have one.
func (c *cgroups) any() bool {
	return slices.ContainsFunc(c.config.Profiles, func(p uplink.Profile) bool { return p.Cgroup })
}

// keep makes and removes cgroups. One with processes in it is tried again at each call.
func (c *cgroups) keep() {
	if len(c.busy) == 0 && !c.any() {
		return
	}
	wanted := make(map[string]bool)
	for _, s := range c.sessions {
		if name := s.lease.uplink.Key.Ifname; s.lease.uplink.IsAddress() && s.serves() && !c.ending && c.config.HasCgroup(name) {
			wanted[name] = true
		}
	}
	for name := range wanted {
		if !c.busy[name] && !bind.Stands(name) {
			c.beside(name, c.stand)
		}
	}
	for name, busy := range c.busy {
		if !busy && !wanted[name] {
			c.beside(name, c.fell)
		}
	}
}

// beside runs what makes or removes the cgroup of a link, and says whether it is there afterwards.
func (c *cgroups) beside(name string, do func(bind.Config) (there bool, err error)) {
	c.busy[name] = true
	cfg := bind.Config{Ifname: name, Local: true, Server: c.config.Server, ServerUIDs: c.config.ServerUIDs}
	c.readers.Go(func() {
		there, err := do(cfg)
		c.hand(func() {
			if there {
				c.busy[name] = false
			} else {
				delete(c.busy, name)
			}
			c.tell(name, err)
		})
	})
}

func (c *cgroups) stand(cfg bind.Config) (there bool, err error) {
	missing, err := bind.Stand(context.Background(), cfg)
	if err == nil && len(missing) > 0 {
		err = fmt.Errorf("this kernel does not take BPF program %s, so %s: %w", missing[0].Program, missing[0].Lost, missing[0].Err)
		return true, err
	}
	return err == nil, err
}

func (c *cgroups) fell(cfg bind.Config) (there bool, err error) { return bind.Fell(cfg) }

// tell logs what is wrong with the cgroup of a link, once.
func (c *cgroups) tell(name string, err error) {
	if err == nil {
		delete(c.told, name)
		return
	}
	if c.told[name] != err.Error() {
		c.told[name] = err.Error()
		c.log.Warn("the cgroup of the link is not as the configuration wants it", "ifname", name, "err", err)
	}
}
