package netns

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"reflect"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/bind"
	"github.com/table-allocator/table-allocator/internal/nat"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// Host changes the namespaces of this host. Its methods may be called by several processes at once: one of them waits for
// the other.
type Host struct {
	Server     string
	ServerUIDs []uint32
	Max        int               // namespaces
	Pool4      netip.Prefix      // of addresses, for when there are no namespaces; not valid: any
	Step       func(what string) // told of each step, for --debug

	memory   memory
	mounting sync.Mutex // two goroutines of Serve mount at the same places
	follows  bool       // what happens later changes the namespaces, too
	kernel   *route.Conn
	legacy   *legacyReader
	pools    Pools
}

// Open returns the host of this process's network namespace. The caller closes it.
func Open(server string, uids []uint32) (*Host, error) {
	h := &Host{Server: server, ServerUIDs: uids, Max: DefaultMax, Step: func(string) {}, legacy: new(legacyReader)}
	var err error
	if h.memory, err = openMemory(); err != nil {
		return nil, err
	}
	h.kernel, err = route.Dial()
	return h, err
}

// Close ends the use of the host.
func (h *Host) Close() { h.kernel.Close() }

// ErrExists says that there is a namespace of that name already.
var ErrExists = errors.New("there is a namespace of this name already")

// ErrUnknown says that there is no namespace of that name.
var ErrUnknown = errors.New("there is no namespace of this name")

// locked calls f with the lock of all changes, after it cured what a process that was killed has left. swept is what went
// wrong with that. Under the lock nobody waits for the server.
func (h *Host) locked(f func(swept error) error) error {
	unlock, err := h.memory.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if h.pools, err = h.memory.pools(); err != nil {
		return err
	}
	if h.pools, err = h.memory.setPool(h.pools, h.Pool4); err != nil {
		return err
	}
	return f(h.sweep())
}

// binding is what binds the traffic of a namespace to its uplink.
func (h *Host) binding(s State) bind.Config {
	return bind.Config{Ifname: s.Ifname, OnLoss: s.OnLoss, Traffic: []route.Traffic{{Iif: linkOf(s.Number)}}, Server: h.Server, ServerUIDs: h.ServerUIDs, Marking: s.Marking}
}

// Add makes a namespace. An error leaves nothing of it. What may be lacking all the same are words for the user: there is
// no lease yet.
func (h *Host) Add(ctx context.Context, cfg Config) (lacking []string, err error) {
	if err := errors.Join(cfg.Check(), cfg.checkVPNFile(), cfg.checkPrograms()); err != nil {
		return nil, err
	}
	if _, err := h.known(cfg.Name); err == nil {
		return nil, named(cfg.Name, ErrExists)
	}
	marking, err := h.linkAndMarking(ctx, &cfg, "")
	if err != nil {
		return nil, named(cfg.Name, err)
	}
	err = h.locked(func(swept error) error {
		s, found, err := h.memory.get(cfg.Name)
		if err = errors.Join(err, swept); err != nil {
			return err
		}
		switch {
		case found && s.Phase != Up: // of a process that was killed
			if err := h.remove(s); err != nil {
				return err
			}
		case found:
			return ErrExists
		case exists(netPin(cfg.Name)):
			return fmt.Errorf("another program made %s: choose another name", netPin(cfg.Name))
		}
		s = State{Config: cfg, Phase: Adding, Marking: marking}
		if s.Number, err = h.number(); err != nil {
			return err
		}
		if err := h.memory.put(s); err != nil {
			return err
		}
		if lacking, err = h.sync(ctx, &s, asked); err == nil {
			s.Phase = Up
			err = h.memory.put(s)
		}
		if err != nil {
			return errors.Join(err, h.remove(s))
		}
		return nil
	})
	return lacking, named(cfg.Name, err)
}

// Set gives a namespace another uplink, or a pattern of uplinks. Its programs stay. An error leaves it what it was.
func (h *Host) Set(ctx context.Context, name, ifname string) (lacking []string, err error) {
	s, err := h.known(name)
	if err != nil {
		return nil, named(name, err)
	}
	s.SetLink(ifname)
	return h.Change(ctx, s.Config)
}

// Change gives a namespace another configuration. Its programs stay. An error leaves it what it was.
func (h *Host) Change(ctx context.Context, cfg Config) (lacking []string, err error) {
	return h.change(ctx, cfg, nil)
}

// errOvertaken says that somebody changed the configuration meanwhile.
var errOvertaken = errors.New("the namespace was changed meanwhile")

// change is Change. Unless only is nil, it fails with errOvertaken if the configuration is another one by now.
func (h *Host) change(ctx context.Context, cfg Config, only *Config) (lacking []string, err error) {
	if err := errors.Join(cfg.Check(), cfg.checkVPNFile(), cfg.checkPrograms()); err != nil {
		return nil, err
	}
	before, err := h.known(cfg.Name)
	if err != nil {
		return nil, named(cfg.Name, err)
	}
	marking, err := h.linkAndMarking(ctx, &cfg, before.Ifname)
	if err != nil {
		return nil, named(cfg.Name, err)
	}
	err = h.locked(func(swept error) error {
		old, err := h.known(cfg.Name)
		if err = errors.Join(err, swept); err != nil {
			return err
		}
		if only != nil && !reflect.DeepEqual(old.Config, *only) {
			return errOvertaken
		}
		if (old.VPN == "") != (cfg.VPN == "") {
			return errors.New("a namespace gets or loses its VPN only when it is made: delete it first")
		}
		if cmp.Or(old.Wiring, WiringNAT) != cmp.Or(cfg.Wiring, WiringNAT) {
			return errors.New("a namespace gets another wiring only when it is made: delete it first")
		}
		s := old
		s.Config, s.Marking = cfg, marking
		if old.Ifname != s.Ifname {
			s.Inet6, s.Missed = network6{}, 0
		}
		servers, err := os.ReadFile(h.memory.resolvFile(cfg.Name))
		if err != nil {
			return err
		}
		// Name servers of the uplink before are forgotten first, so that no query goes to them over the new one.
		if old.Ifname != s.Ifname && s.Resolv == Uplink {
			err = h.memory.writeResolv(cfg.Name, "")
		}
		if err == nil && old.Ifname != s.Ifname {
			err = disconnect(old)
		}
		if err == nil {
			err = h.memory.put(s)
		}
		if err == nil {
			lacking, err = h.sync(ctx, &s, asked)
		}
		if err == nil && old.Ifname != s.Ifname { // replies by the uplink before are no longer for it
			p := old.plan(h.pools)
			err = nat.DeleteFlows(p.ours.addresses())
		}
		if err == nil && (old.Ifname != s.Ifname || old.VPN != s.VPN) {
			err = h.endJobs(s.Name, func(j job) bool { return !j.Outside && !j.Lease }) // the service begins another one
		}
		if err != nil {
			undone := errors.Join(h.memory.put(old), h.memory.writeResolv(cfg.Name, string(servers)))
			_, again := h.sync(ctx, &old, unbidden)
			return errors.Join(err, undone, again)
		}
		return nil
	})
	return lacking, named(cfg.Name, err)
}

// Delete deletes a namespace. Programs that are in it lose all connections with the first step. It returns a warning about rules that
// may be left where this process cannot look.
func (h *Host) Delete(name string) (left string, err error) {
	err = h.locked(func(swept error) error {
		s, found, err := h.memory.get(name)
		if err = errors.Join(err, swept); err == nil && !found {
			err = ErrUnknown
		}
		if err != nil {
			return err
		}
		left = leftOf(s)
		return h.remove(s)
	})
	return left, named(name, err)
}

// Demand makes a namespace of the configuration for a program that enters it, if it is made on demand and is not there.
func (h *Host) Demand(ctx context.Context, file File, name string) error {
	cfg, found := file.Named(name)
	if _, err := h.known(name); !errors.Is(err, ErrUnknown) || !found || cfg.Start != OnDemand {
		return nil
	}
	h.Max, h.Pool4 = file.Max, file.Pool4
	_, err := h.Add(ctx, cfg)
	if errors.Is(err, ErrExists) {
		err = nil // another program came first
	}
	return err
}

// Has reports whether a namespace is up.
func (h *Host) Has(name string) bool {
	_, err := h.known(name)
	return err == nil
}

// known returns a namespace that is up.
func (h *Host) known(name string) (State, error) {
	s, found, err := h.memory.get(name)
	if err == nil && (!found || s.Phase != Up) {
		err = ErrUnknown
	}
	return s, err
}

func named(name string, err error) error {
	if err != nil {
		return fmt.Errorf("namespace %s: %w", name, err)
	}
	return nil
}

// number chooses the number of a new namespace.
func (h *Host) number() (int, error) {
	states, err := h.memory.all()
	if err != nil {
		return 0, err
	}
	if len(states) >= h.Max {
		return 0, fmt.Errorf("there are %d namespaces already, which is the most (\"max\" in %s)", len(states), ConfigPath)
	}
	taken := make(map[int]bool)
	for _, s := range states {
		taken[s.Number] = true
	}
	links, addresses, err := h.kernel.HostAddresses()
	if err != nil {
		return 0, err
	}
	for _, l := range links { // of another program
		var number int
		if _, err := fmt.Sscanf(l.Name, nat.Prefix+"%d", &number); err == nil {
			taken[number] = true
		}
	}
	var used []netip.Prefix
	for _, a := range addresses {
		used = append(used, a.Network().Masked())
	}
	for _, family := range families {
		routes, err := h.kernel.Routes(family, unix.RT_TABLE_UNSPEC)
		if err != nil {
			return 0, err
		}
		for _, r := range routes {
			used = append(used, r.Dst)
		}
	}
	return freeNumber(taken, used, h.pools)
}

var families = []int{unix.AF_INET, unix.AF_INET6}

// remove deletes all that belongs to a namespace: the link first, which ends all its traffic at once.
func (h *Host) remove(s State) error {
	s.Phase = Deleting
	if err := h.memory.put(s); err != nil {
		return err
	}
	p := s.plan(h.pools)
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"end its VPN and programs of the service", func() error { return h.endJobs(s.Name, func(job) bool { return false }) }},
		{"delete the link", func() error { return errors.Join(disconnect(s), h.kernel.DeleteLink(p.link)) }},
		{"end its flows", func() error { return nat.DeleteFlows(p.ours.addresses()) }},
		{"delete rules in other filters", func() error { return h.leaveFirewalls(p.link) }},
		{"answer no longer for its address", h.syncProxies},
		{"delete rules", func() error { return h.deleteRules(p.ofNamespace) }},
		{"delete the namespaces", func() error { return h.memory.unpin(s.Name) }},
		{"delete resolv.conf", func() error { return removeFile(h.memory.resolvFile(s.Name)) }},
		{"forget its programs", func() error {
			return errors.Join(h.memory.dir.Remove(runFile(s.Name)), h.memory.dir.Remove(tunnelFile(s.Name)))
		}},
		{"forget it", func() error { return h.memory.dir.Remove(s.Name) }},
		{"delete NAT and filter", h.syncForwarding},
		{"unmount the directory of pins", h.memory.removePins},
		{"delete empty directories of resolvers", h.memory.removeMasked},
	} {
		h.Step(step.name)
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
	}
	return nil
}

func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// deleteRules deletes rules in both families: guards first, since holders restore lookups while there are guards.
func (h *Host) deleteRules(owned func(route.Rule) bool) error {
	for _, which := range []func(route.Rule) bool{uplink.IsGuard, func(route.Rule) bool { return true }} {
		for _, family := range families {
			_, _, err := h.kernel.SyncRules(family, func(r route.Rule) bool { return which(r) && owned(r) }, nil)
			if err != nil && !(family == unix.AF_INET6 && errors.Is(err, unix.EAFNOSUPPORT)) {
				return err
			}
		}
	}
	return nil
}

// sweep deletes what belongs to no namespace any more: rules of namespaces that are forgotten, and settings. A process that
// was killed left it.
func (h *Host) sweep() error {
	states, err := h.memory.all()
	if err != nil {
		return err
	}
	var plans []plan
	for _, s := range states {
		plans = append(plans, s.plan(h.pools))
	}
	if err := h.deleteRules(func(r route.Rule) bool { return strayRule(r, plans) }); err != nil {
		return err
	}
	return errors.Join(h.syncProxies(), h.syncForwarding())
}
