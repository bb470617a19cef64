// Package install makes rules, routes and resolver lines those that a lease of one uplink means, and removes them. It
// hides in which order they are added and deleted, whose the rules are that it finds, and what main gets back.
package install

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Env is what the installations of one process share.
type Env struct {
	Kernel  *route.Conn
	Picture *Picture // of a watch; nil: the kernel is read each time
	Log     *slog.Logger
	// OtherHolder reports whether another client serves the address of a key on another link.
	OtherHolder func(wire.Key) (bool, error)
	// RetryAt is when Retry is due; 0: nothing waits for it.
	RetryAt  time.Duration
	waiting  []lines // that could not be written, since another process of ours writes to the file, or it is silent
	waitsFor error   // why, the last time
	tries    int     // since something waits
	order    order
	takers   takers
	returned []returned
	resolved teller
	// compared is how many routes of large mains were compared with tables.
	compared int
}

// Installation is what is installed for one uplink: its rules, routes and resolver lines.
type Installation struct {
	Uplink      uplink.Uplink
	Rules       Rules
	Index       int           // of the link; 0: not seen yet
	Present     bool          // the address is on the link, as of the last look
	Usable      bool          // it is known to be no duplicate
	OnLink      bool          // the caller gave the network before the address was on the link
	Installed   bool          // rules and routes of a lease are in place
	RefreshAt   time.Duration // when routes that expire are followed again; 0: none does
	ServersFile string        // the file that has resolver lines of the address, see serversFile; empty: none
	servers     []netip.Addr  // of these lines

	env    *Env
	log    *slog.Logger
	warn   func(what string, err error)
	routes placer
	filled bool // the table has had its routes since then
}

// New returns an Installation with nothing installed. It logs changes to log. It calls warn after each step that may
// fail without harm, with the error or nil.
func (e *Env) New(u uplink.Uplink, log *slog.Logger, warn func(what string, err error)) *Installation {
	return &Installation{Uplink: u, Rules: Rules{Uplink: u, env: e}, env: e, log: log, warn: warn, routes: placer{env: e}}
}

// Place installs what a lease of table means. The routes of the table are added first, and those of main are deleted
// last, so that no flow is without a route. A route that cannot be added yet is added later, and the rules do not
// wait for it. Nothing is installed for an IPv6 address that may turn out to be a duplicate.
func (i *Installation) Place(table uint32) error {
	if i.Uplink.Addr().Is6() && !i.Usable {
		return nil
	}
	i.Installed = true
	v, ready := i.view()
	if ready {
		i.warnOfRoutes(i.routes.place(i.Uplink, v, table))
		i.RefreshAt = i.refreshes(wire.Now())
		i.filled = i.filled || i.routes.filling == nil
	}
	i.Rules.Uplink = i.blockUntilFilled()
	i.Rules.Uplink.Ties, i.Rules.Uplink.Ranges = v.Ties, v.Ranges
	if err := i.Rules.place(table); err != nil {
		return err
	}
	if ready && i.routes.filling == nil {
		i.warn("delete routes from main", i.routes.cleanMain(i.Uplink, v))
	}
	if i.filled || !i.Uplink.Settings.PlacesRoutes() {
		i.resolve()
	}
	i.SyncEndpoint()
	return nil
}

// blockUntilFilled is the uplink as its rules have to be now. Until its table is filled for the first time, the
// address is blocked: its first packets would find no route in the table, and leave by another uplink. While its link
// is down the table waits for the administrator, and the address does not.
func (i *Installation) blockUntilFilled() uplink.Uplink {
	u := i.Uplink
	if u.Settings.PlacesRoutes() && !i.filled && !i.routes.down && u.CanBlock() {
		u.Settings.OnLoss = uplink.Block
	}
	return u
}

// updateRules ends that when the table is filled, and follows the ties of main and the ranges of the link.
func (i *Installation) updateRules(table uint32, m uplink.Main) {
	if i.filled && slices.Equal(i.Rules.Uplink.Ties, m.Ties) && slices.Equal(i.Rules.Uplink.Ranges, m.Ranges) {
		return
	}
	first := !i.filled
	i.filled = true
	i.Rules.Uplink = i.Uplink
	i.Rules.Uplink.Ties, i.Rules.Uplink.Ranges = m.Ties, m.Ranges
	i.warn("place the rules", i.Rules.sync(table, i.Rules.Want(table)))
	if first {
		i.resolve()
	}
}

// refreshes is when lifetimes in main have to be read again, since an advertisement extends them without an event. A
// third of what is left is time for several tries.
func (i *Installation) refreshes(now time.Duration) time.Duration {
	if i.routes.filling != nil {
		return now // in the next turn of the loop
	}
	if i.env.Picture.Uncertain(i.Uplink.Family()) {
		return now + rereadEvery
	}
	if i.routes.unsure || i.routes.unread {
		i.routes.unsure = false
		return now + rereadEvery
	}
	if i.routes.expires == 0 || !i.Installed {
		return 0
	}
	return now + max(time.Duration(i.routes.expires)*time.Second/3, rereadEvery)
}

// view is what a plan of routes needs. It reports false if there is nothing to plan now.
func (i *Installation) view() (uplink.Main, bool) {
	m, _, ready := i.viewOf(i.Uplink)
	return m, ready
}

// viewOf also reports whether the link is up, with the address or without it.
func (i *Installation) viewOf(u uplink.Uplink) (m uplink.Main, up, ready bool) {
	m, up, ready, _ = i.tryView(u) // which warns
	return m, up, ready
}

// tryView is viewOf, and says why it sees nothing. Then it is looked again soon.
func (i *Installation) tryView(u uplink.Uplink) (m uplink.Main, up, ready bool, err error) {
	if !u.Settings.PlacesRoutes() || !u.IsAddress() || i.Index == 0 {
		return m, false, false, nil
	}
	defer func() {
		if err != nil {
			i.RefreshAt = wire.Now() + rereadEvery
		}
	}()
	link, found, err := i.env.Kernel.LinkByIndex(i.Index)
	if err != nil || !found {
		i.warn("read the link", err)
		return m, false, false, err
	}
	m, up, ready, err = i.routes.look(u, link)
	m.OnLink = i.OnLink
	i.warn("read the routes", err)
	return m, up && err == nil, ready && err == nil, err
}

// Stale reports whether main, or the networks of the link, have changed since the routes were planned.
func (i *Installation) Stale() bool {
	if i.env.Picture == nil || i.Index == 0 {
		return true
	}
	m, err := i.env.Picture.main(i.Uplink.Family())
	if link := (linkOf{i.Uplink.Family(), i.Index}); err == nil && i.env.Picture.addressed[link] {
		_, err = i.env.Picture.local(m, link)
	}
	i.warn("read the routes", err)
	if err != nil {
		return true
	}
	now := m.version(i.Uplink, i.Index)
	now.link += m.versions[i.env.Picture.below[i.Index]] // of 0 there is none
	return now != i.routes.seen
}

// Follow copies to the table what changed in main, or fills a table that the kernel emptied. table is that of the
// lease, or 0 if there is none; then inMain says whether main has the routes.
func (i *Installation) Follow(table uint32, inMain bool) {
	i.RefreshAt = 0
	if table == 0 && !inMain {
		return // and a view costs a dump of all addresses of the link
	}
	v, ready := i.view()
	if !ready {
		i.routes.filling = nil // the kernel may empty the table
		return
	}
	switch {
	case table != 0 && i.Installed:
		err := i.routes.place(i.Uplink, v, table)
		if i.RefreshAt = i.refreshes(wire.Now()); i.routes.filling != nil {
			return
		}
		i.warnOfRoutes(errors.Join(err, i.routes.cleanMain(i.Uplink, v)))
		i.updateRules(table, v)
	case inMain:
		i.warn("place the routes in main", i.routes.fallBack(i.Uplink, v))
	}
}

// FollowChanges carries over what changed in a large main, and restores routes of the table that, as events say,
// others deleted. table is that of the lease.
func (i *Installation) FollowChanges(table uint32, changes []Change, events []route.Event) {
	if !i.Installed || !i.filled && i.routes.filling == nil {
		return
	}
	m, ready := i.view()
	if !ready {
		return
	}
	if i.Stale() { // main was read again meanwhile
		i.Follow(table, false)
		return
	}
	err := errors.Join(i.routes.follow(i.Uplink, m, table, changes), i.routes.restoreLost(i.Uplink, m, table, events))
	if len(changes) > 0 && i.routes.filling == nil {
		err = errors.Join(err, i.routes.cleanMain(i.Uplink, m))
	}
	i.warnOfRoutes(err)
}

// warnOfRoutes warns that routes could not be placed, unless the address or the link is gone, which is why the kernel
// refuses them.
func (i *Installation) warnOfRoutes(err error) {
	if err != nil {
		i.env.Picture.Invalidate() // it may be from before that
		if _, ready := i.view(); !ready {
			err = nil
		}
	}
	if image := i.env.Picture.largeMain(i.Uplink.Family()); image != nil && image.Left() > 0 {
		err = errors.Join(err, errTooMany) // which no other look at main would change
	}
	i.warn("place the routes", err)
}

// MakeDo gives main the routes until there is a lease.
func (i *Installation) MakeDo() {
	i.Follow(0, true)
	i.warn("unblock the address", i.Rules.clear())
	i.resolve()
}

// LeaveMain deletes what MakeDo gave main, after the address went: the kernel keeps it if another link has the address, and in IPv6.
func (i *Installation) LeaveMain() {
	if m, up, ready := i.viewOf(i.Uplink); up && !ready {
		i.warn("delete routes from main", i.routes.withdraw(i.Uplink, m))
	}
}

// YieldAddress removes the rule that blocks the address if another link has the address now.
func (i *Installation) YieldAddress() {
	if i.Elsewhere() {
		i.warn("unblock the address", i.Rules.unblock())
	}
}

// Elsewhere reports whether another link has the address.
func (i *Installation) Elsewhere() bool {
	addresses, err := i.env.Kernel.Addresses(i.Uplink.Family())
	i.warn("look for the address on other links", err)
	return slices.ContainsFunc(addresses, func(a route.Address) bool { return a.Addr == i.Uplink.Addr() && a.Index != i.Index })
}

// Clear removes everything, but for rules to keep. While the link is up, main gets its routes back first.
func (i *Installation) Clear(keep ...route.Rule) error {
	if i.Index != 0 {
		i.warn("delete the MPTCP endpoint", i.env.deleteEndpoint(i.Uplink.Key.Address, i.Index))
	}
	i.giveBack(i.Uplink)
	i.Installed, i.filled = false, false
	var err error
	if i.Uplink.IsAddress() { // what the holder for an old name of the link left, even if nothing was placed yet
		err = errors.Join(i.Rules.adopt(), i.Rules.clear(keep...))
	}
	i.Unresolve()
	return err
}

// Update takes over other settings. table and inMain are as for Follow.
func (i *Installation) Update(u uplink.Uplink, table uint32, inMain bool) {
	old := i.Uplink
	i.Uplink = u
	if old.Settings.ServersFile != i.Uplink.Settings.ServersFile || old.Settings.Resolver != i.Uplink.Settings.Resolver {
		i.Unresolve()
	}
	if table != 0 && old.Settings.PlacesRoutes() && i.Uplink.Settings.Routes != old.Settings.Routes {
		i.giveBack(old) // Place then does what the new mode wants
	}
	v, ready := i.view()
	if !ready {
		return
	}
	i.routes.taken = old.WithoutGiven(v, i.routes.taken)
	i.routes.lost = old.WithoutGiven(v, i.routes.lost)
	if inMain {
		i.warn("delete routes from main", i.routes.withdraw(i.Uplink, v))
		i.MakeDo()
	}
}

// resolve makes the resolver lines of the address those that it has to have now.
func (i *Installation) resolve() {
	servers := i.Uplink.Nameservers()
	if i.Uplink.Settings.Resolver == uplink.NoResolver {
		servers = nil // lines that are there are of a holder before
	}
	if i.ServersFile == "" && len(servers) > 0 {
		i.ServersFile = i.serversFile()
	}
	i.warn("write the resolver lines", i.setLines(servers))
}

// Unresolve removes the resolver lines of the address.
func (i *Installation) Unresolve() { i.warn("remove the resolver lines", i.setLines(nil)) }

func (i *Installation) setLines(servers []netip.Addr) error {
	file := i.ServersFile
	if file == "" {
		return nil
	}
	if len(servers) == 0 {
		i.ServersFile = ""
	}
	shared, err := i.env.OtherHolder(i.Uplink.Key)
	if err != nil {
		return err
	}
	shared = shared && !isOfResolved(file) // that has a file for each link
	l := lines{file: file, addr: i.Uplink.Addr(), servers: servers, own: i.servers, shared: shared, pidFile: i.Uplink.Settings.PIDFile, log: i.log}
	i.servers = servers
	return i.env.setLines(l)
}

// Missing names rules and routes of a lease of table that the kernel does not have; "" if it has all.
func (i *Installation) Missing(table uint32) string {
	if !i.Uplink.IsAddress() {
		return ""
	}
	if !i.Installed {
		return "rules, until the address is usable"
	}
	var lost []string
	rules, err := i.env.Kernel.Rules(i.Uplink.Family())
	if err != nil {
		return err.Error()
	}
	for _, want := range i.Rules.wantWith(uplink.GuardsOf(i.Rules.Marking, rules), table) {
		if !slices.Contains(rules, want) {
			lost = append(lost, "rule "+want.String())
		}
	}
	if m, ready := i.view(); ready {
		routes, err := i.missingRoutes(m, table)
		if err != nil {
			return err.Error()
		}
		lost = append(lost, routes...)
	}
	return strings.Join(lost, ", ")
}

// missingRoutes says which routes the table has to have and has not, and which of another program it has.
func (i *Installation) missingRoutes(m uplink.Main, table uint32) (lost []string, err error) {
	if image := i.env.Picture.largeMain(i.Uplink.Family()); image != nil && image.Left() > 0 {
		lost = append(lost, fmt.Sprintf("%d routes (above max_routes)", image.Left()))
	}
	text := func(r route.Route) string {
		const named = 10 // more do not fit into an answer
		if len(lost) >= named {
			return r.String()
		}
		return i.env.RouteText(r)
	}
	plan := i.Uplink.Plan(m, table)
	missing, foreign, err := i.compare(plan, table)
	if err != nil {
		return nil, err
	}
	for _, r := range missing {
		lost = append(lost, "route "+text(r))
	}
	if i.routes.toAll && !slices.ContainsFunc(plan, func(r route.Route) bool { return r.Dst.Bits() == 0 }) {
		lost = append(lost, uplink.LostDefault)
	}
	for _, r := range foreign { // the last, since an answer has little room
		lost = append(lost, "only ours (another program's is "+text(r)+")")
	}
	return lost, nil
}

// compare returns the routes of plan that the table has not, and those of others that it has. While routes change, a dump that
// is read once may lack some: what it lacks is looked for in one that is whole.
func (i *Installation) compare(plan []route.Route, table uint32) (missing, foreign []route.Route, err error) {
	wanted := make(map[uplink.Way]bool, len(plan)) // and whether it is there
	for _, r := range plan {
		wanted[uplink.WayOf(r)] = false
	}
	note := func(r route.Route) {
		if !ours(r) {
			foreign = append(foreign, r)
		} else if _, is := wanted[uplink.WayOf(r)]; is {
			wanted[uplink.WayOf(r)] = true
		}
	}
	lacks := func(r route.Route) bool { return !wanted[uplink.WayOf(r)] }
	err = i.env.Kernel.EachRoute(i.Uplink.Family(), table, note)
	if err == nil && slices.ContainsFunc(plan, lacks) {
		var have []route.Route
		have, err = i.env.Kernel.Routes(i.Uplink.Family(), table)
		foreign = nil
		for _, r := range have {
			note(r)
		}
	}
	for _, r := range plan {
		if lacks(r) {
			missing = append(missing, r)
		}
	}
	return missing, foreign, err
}

// Routes is how many routes the table had after the last sync.
func (i *Installation) Routes() int { return i.routes.placed }

// Leads reports whether the table had a default route after the last sync.
func (i *Installation) Leads() bool { return i.routes.hasDefault }

// Moved reports whether main has lost a default route to the table.
func (i *Installation) Moved() bool { return len(i.routes.taken) > 0 }

// SharesRoutes reports whether main has routes with several next hops over the link, as of the last look. Those of IPv4 the
// kernel deletes with any of their links, without an event.
func (i *Installation) SharesRoutes() bool { return i.routes.shared }

// Restored reports whether the last sync added any.
func (i *Installation) Restored() bool { return i.routes.added > 0 }

// Replaced are the links of the routes that took the places of other ones in main, the last ones.
type Replaced map[Place]int

// Place is where IPv4 tables hold a route, and a newer one replaces it.
type Place struct {
	Family    int
	Dst, From netip.Prefix
	TOS       uint8
	Metric    uint32
}

// PlaceOf returns the place of a route.
func PlaceOf(r route.Route) Place { return Place{r.Family, r.Dst, r.From, r.TOS, r.Metric} }

// Hear takes over events: of the link and of main's routes over it, and of addresses that were deleted from links, which
// were the source of routes, each in order. back are addresses that were added again.
func (i *Installation) Hear(history, left []Past, back []netip.Addr) {
	i.routes.unsure = len(history) > 0 && i.env.Picture == nil && i.Uplink.Settings.Routes == uplink.MoveRoutes
	i.warn("note what main lost", i.routes.hear(i.Uplink, i.Index, history, left, back))
}

// HearReplaced takes over what took the places of other routes in main. Nobody puts back what another link's route has
// replaced: it was not lost with its link. It comes before Hear.
func (i *Installation) HearReplaced(by Replaced) {
	replaced := func(r route.Route) bool {
		index, ok := by[PlaceOf(r)]
		return ok && index != i.Index
	}
	i.routes.last = slices.DeleteFunc(i.routes.last, replaced)
	i.routes.forgetLost(i.Uplink.Family(), replaced)
}

// Missed says that events were lost, those of what was taken among them: nothing waits for them.
func (i *Installation) Missed() {
	i.routes.fresh, i.routes.spent, i.routes.newer, i.routes.strange = nil, nil, nil, nil
}

// ForgetObjects takes over that nexthop objects were deleted. With them the kernel deletes routes, without an event; what
// the link had lost of these before nobody puts back.
func (i *Installation) ForgetObjects(deleted map[uint32]bool) {
	of := func(r route.Route) bool { return deleted[r.NexthopID] }
	i.routes.last = slices.DeleteFunc(i.routes.last, of)
	i.routes.forgetLost(i.Uplink.Family(), of)
}
