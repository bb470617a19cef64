package client

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/table-allocator/table-allocator/internal/bind"
	"github.com/table-allocator/table-allocator/internal/remember"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// standPatience is how long a cgroup may take to be made: the server and holders are asked for it.
const standPatience = 5 * time.Second

// cgroups keeps a cgroup for each link whose profile wants one, as long as an address of the link is in service. Making
// and removing one asks holders, of which this loop is one, and walks all cgroups: that runs beside the loop. Cgroups are
// those of the whole host: a note says which are of this network namespace.
type cgroups struct {
	*host
	notes remember.Dir    // a file for each link that has one; "": they cannot be kept
	busy  map[string]bool // by link that has one, or is to have one; true: something runs for it
	told  map[string]string
	due   bool // what is wanted may have changed
}

// newCgroups takes over what the watch before has left.
func newCgroups(h *host) *cgroups {
	c := &cgroups{host: h, busy: make(map[string]bool), told: make(map[string]string)}
	var err error
	if c.notes, err = remember.Own("cgroups"); err != nil {
		h.log.Warn("cannot note cgroups of links for the next watch", "err", err)
		return c
	}
	files, err := c.notes.Files()
	if err != nil {
		h.log.Warn("cannot read which cgroups of links the watch before has left", "err", err)
	}
	for _, file := range files {
		c.busy[file.Name()] = false
	}
	return c
}

// any reports whether a link may have one.
func (c *cgroups) any() bool {
	return slices.ContainsFunc(c.config.Profiles, func(p uplink.Profile) bool { return p.Cgroup })
}

// next is when keep has something to do.
func (c *cgroups) next() time.Duration {
	if c.due {
		return 1
	}
	return 0
}

// runDue makes and removes cgroups after a change.
func (c *cgroups) runDue() {
	if c.due {
		c.keep(false)
	}
}

// keep makes and removes cgroups. One with processes in it is tried again at each call, and with again those that stand
// get back what others deleted of their rules.
func (c *cgroups) keep(again bool) {
	c.due = false
	if len(c.busy) == 0 && !c.any() {
		return
	}
	wanted := c.wanted()
	standing := bind.Standing()
	for name := range wanted {
		there, noted := slices.Contains(standing, name), false
		if _, noted = c.busy[name]; there && !noted {
			c.tell(name, errors.New("the cgroup ta-"+name+" is of a watch in another network namespace, or of one before whose note is lost: remove it with rmdir"))
		} else if !c.busy[name] && (again || !there) {
			c.beside(name, true, makeCgroup)
		}
	}
	for name, busy := range c.busy {
		if !busy && !wanted[name] {
			c.beside(name, false, removeCgroup)
		}
	}
}

// wanted are the links that are to have one.
func (c *cgroups) wanted() map[string]bool {
	wanted := make(map[string]bool)
	for _, s := range c.sessions {
		if name := s.lease.uplink.Key.Ifname; s.lease.uplink.IsAddress() && s.serves() && !c.ending && c.config.HasCgroup(name) {
			wanted[name] = true
		}
	}
	return wanted
}

// beside runs what makes the cgroup of a link, which is wanted, or removes it. do gets the mark that is noted, and returns
// that of the cgroup that is there afterwards.
func (c *cgroups) beside(name string, wanted bool, do func(bind.Config, bind.Mark) (m bind.Mark, there bool, err error)) {
	c.busy[name] = true
	cfg := bind.Config{Ifname: name, Local: true, Server: c.config.Server, ServerUIDs: c.config.ServerUIDs}
	notes := c.notes
	c.readers.Go(func() {
		var was bind.Mark
		if notes != "" {
			_ = notes.Read(name, &was) // there may be none, and without it nothing is taken for known
		}
		if wanted && notes != "" { // before the cgroup: else one whose watch is killed in between would be nobody's
			_ = notes.Write(name, was) // the write below says why it cannot
		}
		m, there, err := do(cfg, was)
		if there && notes != "" {
			err = errors.Join(err, notes.Write(name, m))
		} else if notes != "" {
			err = errors.Join(err, notes.Remove(name))
		}
		c.hand(func() {
			if there {
				c.busy[name] = false
			} else {
				delete(c.busy, name)
			}
			c.tell(name, err)
			c.due = c.due || c.wanted()[name] != wanted // it changed meanwhile
		})
	})
}

func makeCgroup(cfg bind.Config, was bind.Mark) (m bind.Mark, there bool, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), standPatience)
	defer cancel()
	m, missing, err := bind.MakeStanding(ctx, cfg, was)
	if err == nil && len(missing) > 0 {
		err = fmt.Errorf("BPF program %s is not in place, so %s: %w", missing[0].Program, missing[0].Lost, missing[0].Err)
		return m, true, err
	}
	return m, err == nil || slices.Contains(bind.Standing(), cfg.Ifname), err
}

func removeCgroup(cfg bind.Config, was bind.Mark) (m bind.Mark, there bool, err error) {
	there, err = bind.RemoveStanding(cfg, was)
	return was, there, err
}

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
