package client

import (
	"errors"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// install makes kernel and resolver what a lease of table means. Routes come first and
// main loses its own last, so that at no moment a flow has none. What a route lacks does
// not keep the rules away: it is placed when that comes. An IPv6 address may turn out to
// be a duplicate, so nothing is installed before it is usable.
func (s *session) install(table uint32) error {
	if s.uplink.Addr().Is6() && !s.usable {
		return nil
	}
	s.installed = true
	v, ready := s.view()
	if ready {
		s.warnOfRoutes(s.routes.place(s.uplink, v, table))
		s.refreshAt = s.refreshes(wire.Now())
		s.filled = true
	}
	s.rules.uplink = s.guarded()
	if err := s.rules.place(table); err != nil {
		return err
	}
	if ready {
		s.warn("take routes out of main", s.routes.settle(s.uplink, v))
	}
	if s.filled || !s.uplink.Settings.PlacesRoutes() {
		s.resolve()
	}
	return nil
}

// guarded is the uplink as its rules have to be now. Until its table is filled for the
// first time nothing leaves from the address: in a table that is still empty the first
// packets would find no route, and leave by another uplink.
func (s *session) guarded() uplink.Uplink {
	u := s.uplink
	if u.Settings.PlacesRoutes() && !s.filled && u.CanBlock() {
		u.Settings.OnLoss = uplink.Block
	}
	return u
}

// unguard lifts that once the table is filled.
func (s *session) unguard() {
	if s.filled {
		return
	}
	s.filled = true
	s.rules.uplink = s.uplink
	s.warn("place the rules", s.rules.sync(s.table, s.rules.want(s.table)))
	s.resolve()
}

// refreshes is when lifetimes in main are worth another look: an advertisement extends
// them without a word. A third of what is left is time for several tries.
func (s *session) refreshes(now time.Duration) time.Duration {
	if s.routes.expires == 0 || !s.installed {
		return 0
	}
	const soonest = time.Second
	return now + max(time.Duration(s.routes.expires)*time.Second/3, soonest)
}

// view is what a plan of routes needs, if there is anything to plan now.
func (s *session) view() (uplink.View, bool) { return s.viewOf(s.uplink) }

func (s *session) viewOf(u uplink.Uplink) (uplink.View, bool) {
	if !u.Settings.PlacesRoutes() || !u.IsAddress() || s.index == 0 {
		return uplink.View{}, false
	}
	link, found, err := s.rules.kernel.LinkByIndex(s.index)
	if err != nil || !found {
		s.warn("read the link", err)
		return uplink.View{}, false
	}
	v, ready, err := s.routes.look(u, link)
	s.warn("read the routes", err)
	return v, ready && err == nil
}

// follow carries over what changed in main, or fills a table that the kernel emptied.
func (s *session) follow() {
	s.refreshAt = 0
	v, ready := s.view()
	if !ready {
		return
	}
	switch {
	case s.state == held && s.installed:
		s.warnOfRoutes(errors.Join(s.routes.place(s.uplink, v, s.table), s.routes.settle(s.uplink, v)))
		s.refreshAt = s.refreshes(wire.Now())
		s.unguard()
	case s.state == asking && s.fellBack:
		s.warn("place the routes in main", s.routes.fallBack(s.uplink, v))
	}
}

// warnOfRoutes logs that routes could not be placed, unless there is nothing to place them
// for by now: the kernel refuses those of an address that has just gone.
func (s *session) warnOfRoutes(err error) {
	if err != nil {
		s.routes.glance.forget() // it may be older than that
		if _, ready := s.view(); !ready {
			err = nil
		}
	}
	s.warn("place the routes", err)
}

// makeDo gives main the routes while there is no lease.
func (s *session) makeDo() {
	s.follow()
	s.warn("let packets leave from the address", s.rules.clear())
	s.resolve()
}

// yieldAddress lets them leave, too, if another link has the address now.
func (s *session) yieldAddress() {
	if s.elsewhere() {
		s.warn("let packets leave from the address", s.rules.clear())
	}
}

// elsewhere tells whether another link has the address.
func (s *session) elsewhere() bool {
	addresses, err := s.rules.kernel.Addresses(s.uplink.Family())
	s.warn("look for the address on other links", err)
	return slices.ContainsFunc(addresses, func(a route.Address) bool { return a.Addr == s.addr && a.Index != s.index })
}

// clear takes everything back, but for a rule to keep. While the address stands, main gets
// its routes back first.
func (s *session) clear(keep ...route.Rule) error {
	var errs []error
	if s.present {
		if v, ready := s.view(); ready {
			s.warn("put routes back into main", s.routes.putBack(s.uplink, v))
		}
	}
	s.routes.drop()
	s.installed, s.filled = false, false
	errs = append(errs, s.rules.clear(keep...))
	s.unresolve()
	return errors.Join(errs...)
}

// retell takes over other settings.
func (s *session) retell(old uplink.Uplink) {
	if old.Settings.ServersFile != s.uplink.Settings.ServersFile {
		s.unresolve()
	}
	if s.state == held && old.Settings.PlacesRoutes() && s.uplink.Settings.Routes != old.Settings.Routes {
		s.changeMode(old)
	}
	v, ready := s.view()
	if !ready {
		return
	}
	s.routes.taken = uplink.WithoutGiven(s.routes.taken, old, v)
	s.routes.kept = uplink.WithoutGiven(s.routes.kept, old, v)
	if s.state == asking && s.fellBack {
		s.warn("take routes out of main", s.routes.withdraw(s.uplink, v))
		s.makeDo()
	}
}

// changeMode gives main what was moved, and leaves the rest to what follows.
func (s *session) changeMode(old uplink.Uplink) {
	if v, ready := s.viewOf(old); ready {
		s.warn("put routes back into main", s.routes.putBack(old, v))
	}
	s.routes.drop()
}

// settingsUnder are the settings of a profile, with what a hook said of the network.
func (s *session) settingsUnder(profile uplink.Settings) uplink.Settings {
	if !s.hooked {
		return profile
	}
	return s.uplink.Settings.Under(profile)
}

// resolve writes the resolver lines of the address, and takes away what it wrote before.
func (s *session) resolve() {
	servers := s.uplink.Nameservers()
	if len(servers) == 0 && s.servers == "" {
		return
	}
	file := s.uplink.Settings.ServersFile
	if s.servers != "" {
		file = s.servers
	}
	s.servers = file
	if len(servers) == 0 {
		s.servers = ""
	}
	changed, err := setServers(file, s.uplink.Addr(), servers)
	if changed {
		s.log.Info("resolver lines written", "file", file, "servers", len(servers))
		err = errors.Join(err, tellDnsmasq(s.uplink.Settings.PIDFile))
	}
	s.warn("write the resolver lines", err)
}

func (s *session) unresolve() {
	if s.servers == "" {
		return
	}
	changed, err := setServers(s.servers, s.uplink.Addr(), nil)
	if changed {
		s.log.Info("resolver lines taken out", "file", s.servers)
		err = errors.Join(err, tellDnsmasq(s.uplink.Settings.PIDFile))
	}
	s.servers = ""
	s.warn("take the resolver lines out", err)
}

// warn logs a failure that does not end anything, once for as long as it stays the same.
func (s *session) warn(what string, err error) {
	if err == nil {
		delete(s.warned, what)
		return
	}
	if s.warned == nil {
		s.warned = make(map[string]string)
	}
	if text := err.Error(); s.warned[what] != text {
		s.warned[what] = text
		s.log.Warn("cannot "+what, "table", s.table, "err", text)
	}
}

// concernsRoutes tells whether a route event may change what the uplink's table, or main
// for its link, has to hold.
func (s *session) concernsRoutes(e route.Event) bool {
	if !s.uplink.Settings.PlacesRoutes() || e.Family != s.uplink.Family() || e.Index != s.index && e.Index != 0 {
		return false
	}
	if e.Table == unix.RT_TABLE_MAIN {
		return e.Protocol != route.Protocol
	}
	return e.Table == s.table && e.Deleted && s.state == held
}

// missing says what the lease means for the kernel and is not there; "" if nothing.
func (s *session) missing() string {
	if !s.uplink.IsAddress() {
		return ""
	}
	if !s.installed {
		return "rules, until the address is usable"
	}
	var lost []string
	rules, err := s.rules.kernel.Rules(s.uplink.Family())
	if err != nil {
		return err.Error()
	}
	for _, want := range s.rules.wantWith(uplink.GuardsOf(s.rules.marking, rules), s.table) {
		if !slices.Contains(rules, want) {
			lost = append(lost, "rule "+want.String())
		}
	}
	if v, ready := s.view(); ready {
		have, err := s.rules.kernel.Routes(s.uplink.Family(), s.table)
		if err != nil {
			return err.Error()
		}
		for _, want := range uplink.MakePlan(s.uplink, v, s.table, s.routes.taken, s.routes.kept).Table {
			if !slices.ContainsFunc(have, func(h route.Route) bool { return ours(h) && uplink.SameWay(h, want) }) {
				lost = append(lost, "route "+want.String())
			}
		}
	}
	return strings.Join(lost, ", ")
}
