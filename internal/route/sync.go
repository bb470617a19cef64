package route

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// lifetimeSlack is by how many seconds two lifetimes that end together may seem to differ: they are
// read one after the other, and rounded. Where only a few are left each counts.
const lifetimeSlack = 2

func sameEnd(a, b int) bool {
	return a == b || a > 0 && b > 0 && abs(a-b) <= min(lifetimeSlack, a/4, b/4)
}

// AddRoute adds r. That it is there already is no error. A route of ours that is different and in
// its place, with the same destination, TOS and metric, is replaced; of another's the error tells,
// which is an EEXIST.
func (c *Conn) AddRoute(r Route) error {
	r = r.normal()
	if err := r.check(); err != nil {
		return fmt.Errorf("add route %q: %w", r, err)
	}
	// Most often there is room. Otherwise a look tells what has to be done.
	err := c.change(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, r.encode())
	if err == nil {
		return nil
	}
	if !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add route %q: %w", r, err)
	}
	for range syncRounds {
		have, err := c.dumpRoutes(r.Family, r.Table)
		if err != nil {
			return fmt.Errorf("add route %q: %w", r, err)
		}
		to := slices.DeleteFunc(have, func(h Route) bool { return h.Dst != r.Dst })
		// What changed is looked at once more: the kernel may have meant something else.
		if changed, err := c.put(to, r); err != nil || !changed {
			return err
		}
	}
	return fmt.Errorf("add route %q: %w", r, errUnsettled)
}

// Replace makes wanted of what the caller put into a table before, had, without reading the table: for tables with very
// many routes. All of them are ours, and no two of a list share a place.
func (c *Conn) Replace(had, wanted []Route) error {
	var errs []error
	inPlaceOf := func(r Route) func(Route) bool {
		return func(o Route) bool { return o.normal().place() == r.normal().place() }
	}
	alone := func(Route) bool { return len(had) == 0 || len(wanted) == 0 }
	const add = unix.NLM_F_CREATE | unix.NLM_F_EXCL
	added := c.routesTogether(unix.RTM_NEWROUTE, add, wanted, alone)
	for i, r := range wanted {
		if added[i] || slices.ContainsFunc(had, r.Equal) {
			continue
		}
		flags := uint16(add)
		if slices.ContainsFunc(had, inPlaceOf(r)) {
			flags = unix.NLM_F_CREATE | unix.NLM_F_REPLACE
		}
		err := c.add(flags, r.normal())
		if errors.Is(err, unix.EEXIST) { // it is there already, or another program's is
			err = c.AddRoute(r)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("add route %q: %w", r, err))
		}
	}
	deleted := c.routesTogether(unix.RTM_DELROUTE, 0, had, alone)
	for i, h := range had {
		if deleted[i] || slices.ContainsFunc(wanted, inPlaceOf(h)) {
			continue // it is replaced, or the same
		}
		err := c.change(unix.RTM_DELROUTE, 0, h.normal().encode())
		if err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("delete route %q: %w", h, err))
		}
	}
	return errors.Join(errs...)
}

// RestoreRoute adds r beside the routes in its place, in front of them or behind them. That it is there
// already is no error. In IPv6, where these share the traffic, it joins them. It reports whether it added the route.
func (c *Conn) RestoreRoute(r Route, inFront bool) (added bool, err error) {
	r = r.normal()
	if err := r.check(); err != nil {
		return false, fmt.Errorf("add route %q: %w", r, err)
	}
	flags := uint16(unix.NLM_F_CREATE | unix.NLM_F_APPEND)
	if inFront && r.Family == unix.AF_INET {
		flags = unix.NLM_F_CREATE
	}
	err = c.change(unix.RTM_NEWROUTE, flags, r.encode())
	if refused(err, r) { // the network of the gateway has gone, of which the kernel takes no notice; "onlink" is another route
		var reached bool
		if reached, err = c.addReached(flags, r); !reached || refused(err, r) {
			err = c.add(flags, r)
		}
	}
	if errors.Is(err, unix.EINVAL) && r.Onlink {
		err = c.addElsewhere(flags, r)
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return false, fmt.Errorf("add route %q: %w", r, err)
	}
	return err == nil, nil
}

// DeleteRoute deletes r, whatever is left of its lifetime, and nothing that resembles it. It reports whether there
// was such a route.
func (c *Conn) DeleteRoute(r Route) (deleted bool, err error) {
	r = r.normal()
	have, err := c.dumpRoutes(r.Family, r.Table)
	if err != nil {
		return false, fmt.Errorf("delete route %q: %w", r, err)
	}
	return c.DeleteRouteFrom(have, r)
}

// DeleteRouteFrom is DeleteRoute for a caller that knows the routes to r's destination in its table, have.
func (c *Conn) DeleteRouteFrom(have []Route, r Route) (deleted bool, err error) {
	r = r.normal()
	if !slices.ContainsFunc(have, r.Equal) {
		return false, nil
	}
	return c.remove(have, r)
}

// DeleteWay deletes r, or of an IPv6 route that shares the traffic the next hop that leads as r does. That there is none is no
// error.
func (c *Conn) DeleteWay(r Route) error {
	deleted, err := c.DeleteRoute(r)
	if err != nil || deleted || r.Family != unix.AF_INET6 {
		return err
	}
	r = r.normal()
	err = c.change(unix.RTM_DELROUTE, 0, r.encode())
	if err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("delete route %q: %w", r, err)
	}
	return nil
}

// FlushTable deletes the routes of family, AF_INET or AF_INET6, in table that carry our Protocol.
func (c *Conn) FlushTable(family int, table uint32) error {
	if _, _, err := c.SyncRoutes(family, table, nil); err != nil {
		return fmt.Errorf("flush table %d: %w", table, err)
	}
	return nil
}

// SyncRoutes makes the routes of family in table that are ours, by their Protocol, equal to want,
// and returns what it added and deleted; that a lifetime was renewed is not told. It adds before it
// deletes, routes to links before those through gateways, and where there is room for one only
// replaces it. Nothing of others is touched, and nothing at all where nothing differs. A lifetime
// that runs out together with the wanted one does not.
//
// A route that the kernel refuses, because its gateway cannot be reached, its link is down or its
// source address is not there yet, keeps no other from its place: the error joins those of all
// routes, each with its name, and added and deleted tell the rest.
func (c *Conn) SyncRoutes(family int, table uint32, want []Route) (added, deleted []Route, err error) {
	have, err := c.dumpRoutes(family, table)
	if err != nil {
		return nil, nil, err
	}
	return c.SyncRoutesFrom(have, family, table, want)
}

// SyncRoutesFrom is SyncRoutes for a caller that has just read the table's routes, have.
func (c *Conn) SyncRoutesFrom(have []Route, family int, table uint32, want []Route) (added, deleted []Route, err error) {
	puts, wanted, invalid := distinct(family, table, want)
	slices.SortStableFunc(puts, linksFirst)

	var first []Route
	for round := range syncRounds {
		if round > 0 {
			if have, err = c.dumpRoutes(family, table); err != nil {
				return nil, nil, errors.Join(append(invalid, err)...)
			}
		}
		have = unforced(have, wanted)
		if round == 0 {
			first = have
		}
		// Only routes to the same destination are in each other's way.
		to := make(map[netip.Prefix][]Route, len(have))
		for _, r := range have {
			to[r.Dst] = append(to[r.Dst], r)
		}
		changed, refused := c.putAll(to, puts)
		if changed {
			continue // what is stale is looked up anew: some of it was replaced
		}
		// What was dumped last still holds, as nothing was added.
		stale := slices.DeleteFunc(slices.Clone(have), func(r Route) bool { return r.Protocol != Protocol || wanted[r.key()] })
		changed, kept := c.removeAll(to, stale)
		// Only a look tells that all is as it was meant: other programs change routes, too.
		if !changed {
			return oursBeyond(have, first), oursBeyond(first, have), errors.Join(slices.Concat(invalid, refused, kept)...)
		}
	}
	return nil, nil, errors.Join(append(invalid, fmt.Errorf("sync table %d: %w", table, errUnsettled))...)
}

// distinct returns the routes of want once each, without those that cannot be, which have an error each; and the
// keys of all that it returns.
func distinct(family int, table uint32, want []Route) (routes []Route, keys map[Route]bool, invalid []error) {
	keys = make(map[Route]bool, len(want))
	taken := make(map[place]bool, len(want))
	for _, r := range want {
		r = r.normal()
		err := r.check()
		switch {
		case err != nil:
		case r.Family != family || r.Table != table || r.Protocol != Protocol:
			err = fmt.Errorf("is not for family %d and table %d, or not ours", family, table)
		case keys[r.key()]:
			continue
		case taken[r.place()]:
			err = errors.New("another route is wanted in its place")
		}
		if err != nil {
			invalid = append(invalid, fmt.Errorf("add route %q: %w", r, err))
			continue
		}
		keys[r.key()], taken[r.place()] = true, true
		routes = append(routes, r)
	}
	return routes, keys, invalid
}

// putAll adds those of routes that are missing, and reports whether it changed anything. Of to it reads what there is
// to each destination.
func (c *Conn) putAll(to map[netip.Prefix][]Route, routes []Route) (changed bool, refused []error) {
	added := c.routesTogether(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, routes, func(r Route) bool {
		return !slices.ContainsFunc(to[r.Dst], func(h Route) bool { return h.place() == r.place() })
	})
	for i, r := range routes {
		if added[i] {
			changed = true
			continue
		}
		put, err := c.put(to[r.Dst], r)
		changed = changed || put
		if err != nil {
			refused = append(refused, err)
		}
	}
	return changed, refused
}

// removeAll deletes the routes stale, also from to, and reports whether it deleted any.
func (c *Conn) removeAll(to map[netip.Prefix][]Route, stale []Route) (changed bool, refused []error) {
	deleted := c.routesTogether(unix.RTM_DELROUTE, 0, stale, func(r Route) bool {
		return !slices.ContainsFunc(to[r.Dst], func(h Route) bool { return r.hits(h) && !h.Equal(r) })
	})
	forget := func(r Route) {
		changed = true
		to[r.Dst] = slices.DeleteFunc(to[r.Dst], r.Equal)
	}
	for i, r := range stale {
		if deleted[i] {
			forget(r)
		}
	}
	for i, r := range stale {
		if deleted[i] {
			continue
		}
		if _, err := c.remove(to[r.Dst], r); err != nil {
			refused = append(refused, err)
			continue
		}
		forget(r)
	}
	return changed, refused
}

// linksFirst orders routes as they can be added: the kernel looks for the way to a gateway.
func linksFirst(a, b Route) int {
	switch {
	case a.viaGateway() == b.viaGateway():
		return 0
	case a.viaGateway():
		return 1
	}
	return -1
}

// oursBeyond returns our routes of a that are not in b.
func oursBeyond(a, b []Route) (beyond []Route) {
	known := make(map[Route]bool, len(b))
	for _, r := range b {
		known[r.key()] = true
	}
	for _, r := range a {
		if r.Protocol == Protocol && !known[r.key()] {
			beyond = append(beyond, r)
		}
	}
	return beyond
}

// put adds r to its table, which has the routes to for its destination. It reports
// whether it changed anything, or found that another program has.
func (c *Conn) put(to []Route, r Route) (changed bool, err error) {
	there := slices.DeleteFunc(slices.Clone(to), func(h Route) bool { return h.place() != r.place() })
	present := slices.IndexFunc(there, r.Equal)
	flags := uint16(unix.NLM_F_CREATE | unix.NLM_F_EXCL)
	switch {
	case present >= 0:
		h := there[present]
		switch {
		case sameEnd(h.Expires, r.Expires):
			return false, nil
		case h.Expires == 0 && len(there) == 1:
			flags = unix.NLM_F_CREATE | unix.NLM_F_REPLACE
		case h.Expires == 0:
			// Another route may be the one that is replaced. What shares its place serves meanwhile.
			if _, err := c.remove(to, h); err != nil {
				return false, err
			}
			flags = unix.NLM_F_CREATE | unix.NLM_F_APPEND
		default:
			// Asked to add what has a lifetime the kernel takes over the new one, and says EEXIST.
			// Unlike with a replacement the path MTUs that it has learnt stay.
			flags = unix.NLM_F_CREATE
		}
	case len(there) > 0:
		for _, h := range there {
			if h.Protocol != Protocol {
				return false, fmt.Errorf("add route %q: %q is in its place: %w", r, h, unix.EEXIST)
			}
		}
		flags = unix.NLM_F_CREATE | unix.NLM_F_REPLACE
		if i := slices.IndexFunc(there, func(h Route) bool { return h.Multipath && h.Family == unix.AF_INET6 }); i >= 0 {
			// One of the gateways may be another's, who appended it: the kernel shows the first one's
			// protocol for all, and a replacement takes all.
			if _, err := c.remove(to, there[i]); err != nil {
				return false, err
			}
			if len(there) == 1 {
				flags = unix.NLM_F_CREATE | unix.NLM_F_EXCL
			}
		}
	}
	err = c.add(flags, r)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return false, fmt.Errorf("add route %q: %w", r, err)
	}
	return true, nil
}

func abs(n int) int { return max(n, -n) }

// remove deletes r from its table, which has the routes have, r among them. A delete takes the
// first route that it matches, and it matches partially. Where that was another one, it is put back
// at once; it then stands behind the others in its place. remove reports false if r has gone already.
func (c *Conn) remove(have []Route, r Route) (removed bool, err error) {
	var near []Route
	for _, h := range have {
		if r.hits(h) && !h.Equal(r) {
			near = append(near, h)
		}
	}
	for range len(near) + 1 {
		err := c.change(unix.RTM_DELROUTE, 0, r.encode())
		// Routes go by themselves, with their link for one.
		if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("delete route %q: %w", r, err)
		}
		if len(near) == 0 {
			return true, nil
		}
		now, err := c.dumpRoutes(r.Family, r.Table)
		if err != nil {
			return false, fmt.Errorf("delete route %q: %w", r, err)
		}
		for _, h := range near {
			if h.Expires < 0 || slices.ContainsFunc(now, h.Equal) {
				continue
			}
			err := c.change(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_APPEND, h.encode())
			if err != nil && !errors.Is(err, unix.EEXIST) {
				return false, fmt.Errorf("put back route %q: %w", h, err)
			}
		}
		if !slices.ContainsFunc(now, r.Equal) {
			return true, nil
		}
	}
	return false, fmt.Errorf("delete route %q: %w", r, errUnsettled)
}

// hits reports whether a request to delete d may delete r: what d does not have matches anything,
// and what is not compared here the kernel does not compare either, or not in every version
// (fib_table_delete, ip6_route_del).
func (d Route) hits(r Route) bool {
	return d.Dst == r.Dst && d.From == r.From && d.TOS == r.TOS &&
		(d.Metric == 0 || d.Metric == r.Metric) &&
		(d.Protocol == 0 || d.Protocol == r.Protocol) &&
		(!d.Gateway.IsValid() || d.Gateway == r.Gateway) &&
		(d.Index == 0 || d.Index == r.Index) &&
		(d.Family == unix.AF_INET6 || d.Type == r.Type && d.Scope == r.Scope && (!d.Src.IsValid() || d.Src == r.Src))
}
