package install

import (
	"errors"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// Choice is what leads unbound traffic of one family to the chosen uplink. The zero Choice is none.
type Choice struct {
	Rules []route.Rule
	Route *route.Route // in main; nil: none
	Attrs []any        // of log lines
}

// Equal reports whether two choices have the same rules and the same route.
func (c Choice) Equal(o Choice) bool {
	same := c.Route == nil && o.Route == nil || c.Route != nil && o.Route != nil && c.Route.Equal(*o.Route)
	return same && slices.Equal(c.Rules, o.Rules)
}

// isRoute reports whether a route of the kernel is the one of the choice, whose gateway may be on the link by force: the
// address whose network it is in may have gone.
func (c Choice) isRoute(r route.Route) bool {
	if c.Route == nil {
		return false
	}
	r.Onlink = c.Route.Onlink
	return r.Equal(*c.Route)
}

// SyncChoice makes rules and route of the choice what c wants, additions first, and reports whether anything differed.
func (e *Env) SyncChoice(family int, c Choice) (changed bool, err error) {
	have, err := e.choiceRoutes(family)
	if err != nil {
		return false, err
	}
	var errs []error
	there := false
	for _, r := range have {
		there = there || c.isRoute(r)
	}
	stands := there
	if c.Route != nil && !there {
		err := e.addChoice(have, *c.Route)
		if err == nil {
			changed, stands = true, true
			e.Log.Info("default route of the chosen uplink added to main", append([]any{"route", e.RouteText(*c.Route)}, c.Attrs...)...)
		}
		errs = append(errs, err)
	}
	added, deleted, err := e.Kernel.SyncRules(family, uplink.IsChoice, c.Rules)
	errs = append(errs, err)
	for _, r := range added {
		e.Log.Info("rule added", append([]any{"rule", r.String(), "table", r.Table, "priority", r.Priority}, c.Attrs...)...)
	}
	for _, r := range deleted {
		e.Log.Info("rule removed", "rule", r.String(), "table", r.Table, "priority", r.Priority)
	}
	changed = changed || len(added)+len(deleted) > 0
	for _, r := range have {
		if c.isRoute(r) || c.Route != nil && stands && r.Family == unix.AF_INET {
			continue // it is right, or was replaced
		}
		gone, err := e.deleteChoice(r)
		if gone {
			changed = true
			e.Log.Info("default route of the choice deleted from main", "route", e.RouteText(r))
		}
		errs = append(errs, err)
	}
	if changed {
		e.Picture.Invalidate()
	}
	return changed, errors.Join(errs...)
}

// choiceRoutes returns the routes of choices that main has.
func (e *Env) choiceRoutes(family int) (have []route.Route, err error) {
	note := func(r route.Route) {
		if uplink.IsChoiceRoute(r) {
			have = append(have, r)
		}
	}
	if family == unix.AF_INET && e.Picture.largeMain(family) != nil { // the kernel begins with 0.0.0.0
		tables, err := e.Kernel.FirstRoutes(family, unix.RT_TABLE_MAIN, 1)
		for _, r := range slices.Concat(tables...) {
			note(r)
		}
		return have, err
	}
	return have, e.Kernel.EachOfOurs(family, unix.RT_TABLE_MAIN, note)
}

// addChoice adds the route of the choice, which replaces the one of the choice before.
func (e *Env) addChoice(have []route.Route, r route.Route) error {
	add := e.Kernel.AddRoute
	if e.Picture.largeMain(r.Family) != nil { // which is not read for that
		add = func(r route.Route) error { return e.Kernel.Replace(have, []route.Route{r}) }
	}
	err := add(r)
	if err == nil || errors.Is(err, unix.EEXIST) || !r.Gateway.IsValid() || r.Onlink {
		return err
	}
	r.Onlink = true
	if add(r) == nil {
		return nil
	}
	return err
}

func (e *Env) deleteChoice(r route.Route) (deleted bool, err error) {
	if e.Picture.largeMain(r.Family) != nil {
		err := e.Kernel.Replace([]route.Route{r}, nil)
		return err == nil, err
	}
	return e.Kernel.DeleteRoute(r)
}

// Kept is which default routes of others main has.
type Kept struct {
	Any   bool
	Front []route.Route // those of the metric of the choice's route, in whose place it cannot be, or of a better one
}

// KeptDefaults returns which default routes of others main has.
func (p *Picture) KeptDefaults(family int) (Kept, error) {
	m, err := p.main(family)
	if err != nil {
		return Kept{}, err
	}
	return m.kept, nil
}

// Default is the best default route of a table.
type Default struct {
	Metric  uint32
	Has     bool
	Gateway netip.Addr
	Below   bool       // it is that of the link which a macvlan is on, and works as that does
	Source  netip.Addr // of traffic that is bound to nothing, see uplink.Source
}

// Default returns that of the table of the lease.
func (i *Installation) Default() Default {
	return Default{i.routes.metric, i.routes.hasDefault, i.routes.gateway, i.routes.isBelow, i.routes.source}
}

// Saw notes what another client has in place: rules, and in the table of its lease the best default route, if there is one.
func (i *Installation) Saw(index int, best route.Route, has bool) {
	i.Index, i.Installed = index, true
	i.routes.metric, i.routes.hasDefault, i.routes.gateway, i.routes.isBelow = best.Metric, has, best.Gateway, false
}

// SawBelow notes that what Saw noted is the default route of the link which a macvlan is on.
func (i *Installation) SawBelow() { i.routes.isBelow = true }

// noteDefault notes which default route is the best of a plan.
func (p *placer) noteDefault(u uplink.Uplink, m uplink.Main, plan []route.Route) {
	p.source = u.Source(m)
	best, has := uplink.BestDefault(plan)
	p.metric, p.hasDefault, p.gateway = best.Metric, has, best.Gateway
	p.isBelow = has && slices.ContainsFunc(m.Below, func(r route.Route) bool { return r.Gateway == best.Gateway }) &&
		!slices.ContainsFunc(m.Routes, func(r route.Route) bool { return r.Gateway == best.Gateway })
}
