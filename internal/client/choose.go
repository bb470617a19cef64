package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/table-allocator/table-allocator/internal/choice"
	"github.com/table-allocator/table-allocator/internal/events"
	"github.com/table-allocator/table-allocator/internal/install"
	"github.com/table-allocator/table-allocator/internal/probe"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/uplinks"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// candidates are the uplinks of a family that unbound traffic could use.
func (c *chooser) candidates(family int) (all []choice.Candidate) {
	age := make(map[*session]int)
	for i, s := range slices.Concat(c.inOrder(family), c.others) { // the unbound rules stand in the order in which leases came
		age[s] = i
	}
	for key, p := range c.uplinks {
		if p.session == nil || p.session.family() != family {
			continue
		}
		leads := p.session.inst.Default()
		all = append(all, choice.Candidate{
			Ifname: key.Ifname, Address: key.Address, Table: p.session.lease.table, State: p.health.State, Rank: p.traits.Rank,
			Metered: p.traits.Metered, Default: leads.Has && !leads.Below, Metric: leads.Metric, Held: p.health.Held, Age: age[p.session],
			Speaks: p.session.speaks(),
		})
	}
	return all
}

func (c *chooser) decideFamily(now time.Duration, family int) error {
	c.dropPinned(now, family)
	of := c.of[family]
	if !c.active(family) {
		of.table = 0
		return c.withdraw(family, "nothing chooses an uplink any more")
	}
	all := c.candidates(family)
	current := of.table
	if c.awaits(now, family, all) {
		c.in(c.grace - now)
		return nil
	}
	d, best, err := c.choose(now, family, all)
	if err != nil {
		return err
	}
	c.announce(family, d)
	if d.Table != current {
		c.askSooner(now, family)
	}
	if d.At != 0 {
		c.in(max(d.At-now, decideIn))
	}
	if d.Table == 0 {
		err = c.withdraw(family, d.Why)
	} else {
		err = c.place(now, family, d.Table, best, d.Table != current)
	}
	if e := of.unsaid; e != nil && err == nil {
		of.unsaid = nil
		if best.Gateway.IsValid() {
			e.Gateway = best.Gateway.String()
		}
		c.emit(*e)
		c.resetDead(family, e.From, all, d.Table)
	}
	return err
}

// awaits reports whether the choice of the watch before stands, since its address may not be in service yet. One that was
// in service and went is not waited for.
func (c *chooser) awaits(now time.Duration, family int, all []choice.Candidate) bool {
	of := c.of[family]
	if slices.ContainsFunc(all, func(o choice.Candidate) bool { return o.Table == of.table }) {
		of.adopted = false
	}
	return of.adopted && now < c.grace
}

// someRoutes is fewer than FirstRoutes reads of a table that has more.
const someRoutes = 100

// choose returns the choice among uplinks whose tables have default routes, and the first of these. The kernel is asked,
// since it may have emptied a table.
func (c *chooser) choose(now time.Duration, family int, all []choice.Candidate) (choice.Decision, route.Route, error) {
	for {
		d := choice.Choose(now, all, c.of[family].table, c.of[family].pinned)
		if d.Table == 0 {
			return d, route.Route{}, nil
		}
		best, has, err := c.bestDefault(family, d.Table)
		if err != nil || has {
			return d, best, err
		}
		c.in(restoreEvery) // its holder adds the route again
		for i := range all {
			all[i].Default = all[i].Default && all[i].Table != d.Table
		}
	}
}

// bestDefault reads the best default route of a table.
func (c *chooser) bestDefault(family int, table uint32) (best route.Route, has bool, err error) {
	tables, err := c.kernel.FirstRoutes(family, table, 1)
	routes := slices.Concat(tables...)
	if best, has = uplink.BestDefault(routes); err == nil && !has && len(routes) >= someRoutes { // the default routes of IPv6 come last
		routes, err = c.kernel.Routes(family, table)
		best, has = uplink.BestDefault(routes)
	}
	return best, has, err
}

// announce notes a decision, and says what changed.
func (c *chooser) announce(family int, d choice.Decision) {
	of := c.of[family]
	before, from, to := of.decision, of.table, d.Table
	of.decision, of.table = d, to
	kept := "kept, since none works"
	switch {
	case from != to:
		c.log.Info("unbound traffic uses another uplink", "family", wire.Family(family).String(), "from", c.linkHaving(family, from), "to", c.linkHaving(family, to), "table", to, "why", d.Why)
		c.events.Append(events.Event{What: events.UplinkChosen, Ifname: c.linkHaving(family, to), Family: wire.Family(family).String(), Table: to,
			Text: fmt.Sprintf("unbound traffic of %s leaves by %s, not %s: %s", wire.Family(family).String(), cmp.Or(c.linkHaving(family, to), "no chosen uplink"), cmp.Or(c.linkHaving(family, from), "as main says"), d.Why)})
		e := uplinks.Event{Event: "unbound", Family: wire.Family(family).String(), Ifname: c.linkHaving(family, to), Table: to,
			From: c.linkHaving(family, from), To: c.linkHaving(family, to), Reason: d.Why}
		if s := c.sessionOf(family, to); s != nil {
			e.Address = s.lease.uplink.Key.Address
		}
		of.unsaid = &e
	case d.Why == kept && before.Why != kept:
		c.log.Warn("no uplink works; unbound traffic stays where it is, since the targets or this host may be the cause",
			"family", wire.Family(family).String(), "ifname", c.linkHaving(family, to), "table", to)
	}
}

// noteFailure has the choice made again that the kernel refused, and says why if that does not pass: what was read of the host may have
// been gone by then, as an address that is swapped, and the event on its way.
func (c *chooser) noteFailure(now time.Duration, err error) {
	if err == nil {
		c.failure, c.failing = "", 0
		return
	}
	if c.failing == 0 {
		c.failing = now
	}
	if passes := c.failing + lookAgain - now; passes > 0 {
		c.log.Debug("the choice is made again", "err", err)
		c.in(passes)
		return
	}
	if text := err.Error(); text != c.failure {
		c.failure = text
		c.log.Error("cannot lead unbound traffic to the chosen uplink; that is tried again", "err", err)
	}
	c.in(restoreEvery)
}

// sessionOf returns the session that has a table.
func (c *chooser) sessionOf(family int, table uint32) *session {
	for _, s := range c.leases() {
		if s.family() == family && s.lease.table == table {
			return s
		}
	}
	return nil
}

// place leads unbound traffic to a table, whose best default route main gets if it keeps one of its own. switched says
// that this is another table than before; else nothing differs, unless another program deleted something.
func (c *chooser) place(now time.Duration, family int, table uint32, best route.Route, switched bool) error {
	kept, err := c.env.Picture.KeptDefaults(family)
	if err != nil {
		return err
	}
	of := c.of[family]
	if !switched && of.placed && now < c.restored {
		c.in(c.restored - now)
		return nil
	}
	s := c.sessionOf(family, table)
	if s == nil {
		return fmt.Errorf("table %d is of no address in service", table)
	}
	want, inMain := c.want(family, s, best, kept)
	changed, err := c.env.SyncChoice(family, want)
	against, readErr := c.against(family, s, inMain, kept.Front)
	c.warn(family, s, against)
	err = errors.Join(err, readErr)
	if changed && of.placed && want.Equal(of.wanted) {
		c.restoredSomething(now)
	}
	of.placed, of.wanted = true, want
	return err
}

// want is what leads unbound traffic of a family to the table of a session: a rule, a route of main, or both. inMain says that main
// is to have the route, whatever stands there.
func (c *chooser) want(family int, s *session, best route.Route, kept install.Kept) (want install.Choice, inMain bool) {
	mode := UnboundAuto
	if c.config.Probes != nil {
		mode = c.config.Probes.Unbound
	}
	want.Attrs = []any{"ifname", s.lease.uplink.Key.Ifname, "addr", s.lease.uplink.Key.Address, "family", wire.Family(family).String()}
	var by []string
	if mode == UnboundAuto || mode == UnboundRule {
		moves := slices.ContainsFunc(c.leases(), func(o *session) bool {
			return o.family() == family && o.serves() && o.lease.uplink.Settings.Routes == uplink.MoveRoutes
		})
		want.Rules = uplink.ChoiceRules(s.lease.table, moves && !kept.Any)
		by = append(by, "rule")
	}
	inMain = mode == UnboundMain || mode == UnboundAuto && kept.Any
	taken := slices.ContainsFunc(kept.Front, func(r route.Route) bool { return r.Metric == uplink.ChoiceMetric })
	if inMain && !taken {
		r := uplink.ChoiceRoute(best, c.source(s))
		want.Route = &r
		by = append(by, "main")
	}
	c.of[family].by = by
	return want, inMain
}

// source is that of the route in main for a session: its address, unless main's own route says another one that is on no
// link with a lease, as an address of lo. In IPv6 the kernel chooses one for each destination, unless main's route has one.
func (c *chooser) source(s *session) netip.Addr {
	source := s.inst.Default().Source
	if !source.IsValid() && s.addr.Is6() {
		return source
	}
	if !source.IsValid() || slices.ContainsFunc(c.leases(), func(o *session) bool { return o.addr == source }) {
		return s.addr
	}
	return source
}

// obstacle is what keeps unbound traffic from the chosen uplink, and what to do about it.
type obstacle struct{ text, cure string }

// against returns what stands against the choice: a default route of another program in main, unless that leads to the chosen uplink,
// or, where no route of main counts, a rule behind main and before that of the choice.
func (c *chooser) against(family int, s *session, inMain bool, front []route.Route) (obstacle, error) {
	if inMain {
		if len(front) == 0 || slices.Equal(front[0].Links(), []int{s.inst.Index}) {
			return obstacle{}, nil
		}
		return obstacle{fmt.Sprintf("main has %q of another program, before which no route of the choice can stand", c.env.RouteText(front[0])),
			`give the link of that route "routes": "move"`}, nil
	}
	rules, err := c.kernel.RulesWhere(family, func(r *route.Rule) bool { return uplink.IsChoice(*r) || uplink.PrecedesChoice(*r) })
	for _, r := range rules {
		if uplink.IsChoice(r) {
			break
		}
		best, has, readErr := c.bestDefault(family, r.Table)
		if err = errors.Join(err, readErr); has && best.Index != s.inst.Index {
			return obstacle{fmt.Sprintf("the rule %q of another program stands before that of the choice", r), "delete that rule, or give it a priority above 90001"}, err
		}
	}
	return obstacle{}, err
}

// warn notes what stands against the choice. The log has each once.
func (c *chooser) warn(family int, s *session, against obstacle) {
	of := c.of[family]
	of.warning = against
	if against != (obstacle{}) && against != of.warned {
		of.warned = against
		c.log.Warn("unbound traffic may not use the chosen uplink: "+against.text+"; "+against.cure, "family", wire.Family(family).String(), "ifname", s.lease.uplink.Key.Ifname)
	}
}

// restoredSomething notes that another program deleted what leads to the choice. If it goes on, that is restored at times only.
func (c *chooser) restoredSomething(now time.Duration) {
	if !c.restores.Allow() {
		c.restored = now + restoreEvery
		c.blame.do(func() {
			c.log.Warn("another program deletes the rule or route that leads unbound traffic to the chosen uplink; they are restored, but not faster than every " + restoreEvery.String() + advice)
		})
	}
}

// withdraw removes what leads to a choice.
func (c *chooser) withdraw(family int, why string) error {
	of := c.of[family]
	if !of.placed {
		return nil
	}
	changed, err := c.env.SyncChoice(family, install.Choice{})
	if err != nil {
		return err
	}
	if changed {
		c.log.Info("no uplink is chosen for unbound traffic", "family", wire.Family(family).String(), "why", why)
	}
	of.placed, of.by, of.warning, of.wanted = false, nil, obstacle{}, install.Choice{}
	return nil
}

// leave takes the route out of main at a stop: without a watch nobody would take it away when its uplink fails. The rule
// stands behind main and before the rules of all uplinks, which serve where it leads nowhere.
func (c *chooser) leave(clean bool) {
	for _, family := range families {
		if !c.of[family].placed {
			continue
		}
		var keep install.Choice
		if !clean {
			rules, err := c.kernel.RulesWhere(family, func(r *route.Rule) bool { return uplink.IsChoice(*r) })
			if err != nil {
				c.log.Error("cannot read the rules that lead unbound traffic to the chosen uplink", "err", err)
				continue
			}
			keep.Rules = rules
		}
		if _, err := c.env.SyncChoice(family, keep); err != nil {
			c.log.Error("cannot delete rules and routes that lead unbound traffic to the chosen uplink", "err", err)
		}
	}
}

// runRound runs a round until it is over or the loop is.
func runRound(t probe.Task, stopped <-chan struct{}) (probe.Result, bool) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	result := make(chan probe.Result, 1)
	go func() { result <- probe.Round(ctx, t) }()
	select {
	case r := <-result:
		return r, true
	case <-stopped:
		cancel()
		return <-result, false
	}
}
