package client

import (
	"context"
	"log/slog"
	"slices"
	"time"

	"github.com/table-allocator/table-allocator/internal/install"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// What other clients serve is read from the kernel: a rule of ours from an address leads to a table, and the default route
// there says which link and gateway that is.

// leases are the sessions of this process and those that were seen of other clients.
func (c *chooser) leases() []*session {
	if len(c.others) == 0 {
		return c.sessions
	}
	return slices.Concat(c.sessions, c.others)
}

// sees reports whether other clients serve addresses of this host that unbound traffic could use.
func (c *chooser) sees() bool { return c.alone || len(c.foreign) > 0 }

// see looks at what other clients serve.
func (c *chooser) see() error {
	if !c.sees() {
		c.others = nil
		return nil
	}
	v := view{}
	var err error
	if v.links, v.addresses, err = c.kernel.HostAddresses(); err != nil {
		return err
	}
	for _, family := range families {
		rules, err := c.kernel.RulesWhere(family, func(r *route.Rule) bool { return r.Protocol == route.Protocol })
		if err != nil {
			return err
		}
		unbound := unboundTables(rules)
		for _, r := range rules {
			if err := c.seeRule(&v, family, r, unbound[r.Table]); err != nil {
				return err
			}
		}
	}
	c.others = v.others
	for _, s := range v.others {
		if link := v.links[s.inst.Index]; install.Follows(link) && c.has(s, link.Below) {
			s.inst.SawBelow()
		}
	}
	return nil
}

// view is the host as see reads it, and what other clients serve there.
type view struct {
	links     map[int]route.Link
	addresses []route.Address
	others    []*session
}

// unbound says which unbound rules lead to a table: of packets of the host itself, and of those that it forwards.
type unbound struct{ own, forwarded bool }

func unboundTables(rules []route.Rule) map[uint32]unbound {
	tables := make(map[uint32]unbound)
	for _, r := range rules {
		if uplink.IsUnbound(r) {
			u := tables[r.Table]
			tables[r.Table] = unbound{u.own || r.Iif == uplink.Loopback, u.forwarded || r.Iif == ""}
		}
	}
	return tables
}

// seeRule adds the address that another client serves, if a rule is that client's source rule.
func (c *chooser) seeRule(v *view, family int, r route.Rule, by unbound) error {
	if !uplink.IsHost(r) || uplink.LeavesTable(r) || uplink.IsOwnLookup(r) || r.Dst.IsValid() {
		return nil
	}
	best, has, err := c.bestDefault(family, r.Table)
	if err != nil {
		return err
	}
	at := slices.IndexFunc(v.addresses, func(a route.Address) bool { return a.Addr == r.Src.Addr() && (!has || a.Index == best.Index) })
	if at < 0 {
		return nil // it is gone, and its client is about to end
	}
	address := v.addresses[at]
	key := wire.Key{Family: wire.Family(family), Ifname: v.links[address.Index].Name, Address: r.Src.Addr().String()}
	_, foreign := c.foreign[key]
	if !c.alone && !foreign || slices.ContainsFunc(v.others, func(s *session) bool { return s.lease.uplink.Key == key }) {
		return nil
	}
	u := uplink.Uplink{Key: key, Network: address.Network(), NoUnbound: !by.own}
	u.Priorities.Source = r.Priority
	if by.forwarded {
		u.Settings.Routes = uplink.MoveRoutes
	}
	s := c.seen(u, r.Table)
	s.inst.Saw(address.Index, best, has)
	v.others = append(v.others, s)
	return nil
}

// has reports whether the default route of a macvlan's table is that of the link below, which has one of a better metric there.
func (c *chooser) has(s *session, below int) bool {
	leads := s.inst.Default()
	return slices.ContainsFunc(c.leases(), func(o *session) bool {
		at := o.inst.Default()
		return o.family() == s.family() && o.inst.Index == below && at.Has && at.Gateway == leads.Gateway && at.Metric+1 == leads.Metric
	})
}

// seen is the session that stands for an address of another client: that of the last look, if there was one.
func (c *chooser) seen(u uplink.Uplink, table uint32) *session {
	if at := slices.IndexFunc(c.others, func(s *session) bool { return s.lease.uplink.Key == u.Key }); at >= 0 {
		s := c.others[at]
		s.lease = seenMachine(u, table)
		return s
	}
	s := &session{lease: seenMachine(u, table), addr: u.Addr(), log: c.log.With("ifname", u.Key.Ifname, "addr", u.Key.Address, "family", u.Key.Family.String())}
	s.inst = c.env.New(u, s.log, s.warn)
	return s
}

// Choose probes the uplinks of a host without a watch, and keeps unbound traffic on one that works, until ctx ends: it takes
// addresses and tables from the rules and routes of the clients that serve them. Then the rule of the choice stays, and with
// clean nothing does. One process of a network namespace can do that, or its watch.
func Choose(ctx context.Context, cfg WatchConfig, reloads <-chan Reload, clean bool, log *slog.Logger) error {
	l, err := newLoop(cfg.Server, cfg.ServerUIDs, func(uint32, string) {}, log)
	if err != nil {
		return err
	}
	defer l.close()
	h := newHost(l, cfg, clean)
	h.choices = newChooser(h)
	h.choices.alone = true
	defer h.choices.program.Close()
	defer h.choices.stop()
	l.scope, l.reloads, l.reload = chooses{h}, reloads, h.choices.reload
	l.env.Picture = install.NewPicture(l.kernel, h.choices.seesLink, DefaultMaxRoutes)
	if err := l.watcher.Join(route.Routes4 | route.Routes6 | route.Nexthops | route.Rules4 | route.Rules6); err != nil {
		return err
	}
	switch err := h.choices.serve(); {
	case h.choices.yields:
		return err
	case err != nil: // a user that is not trusted has the name, and must not end this
		log.Warn(err.Error())
	}
	if err := h.choices.adopt(); err != nil {
		return err
	}
	log.Info("choosing the uplink of unbound traffic")
	if cfg.Ready != nil {
		cfg.Ready()
	}
	return l.run(ctx)
}

// reload takes over another configuration. States stay.
func (c *chooser) reload(r Reload) {
	if r.Err != nil {
		c.log.Error("cannot read the configuration; the one before stays in force", "err", r.Err)
		return
	}
	c.config = r.Config
	c.configure()
	c.log.Info("configuration read again")
	c.soon()
}

// seesLink reports whether a link has an address of a client.
func (c *chooser) seesLink(index int) bool {
	return slices.ContainsFunc(c.others, func(s *session) bool { return s.inst.Index == index })
}

// chooses is the scope of Choose, which serves no address.
type chooses struct{ *host }

func (s chooses) awaits() bool { return true }

func (s chooses) leaves(failure error) bool {
	if failure == nil {
		s.choices.leave(s.clean)
	}
	return true
}

func (s chooses) next() time.Duration { return s.choices.next(wire.Now()) }

func (s chooses) runDue(now time.Duration) { s.choices.runDue(now) }

func (s chooses) note(n news) { s.choices.note(n) }
