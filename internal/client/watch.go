package client

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// A watch compares everything at least this often, whatever the kernel reported.
const reconcileEvery = time.Minute

// watch is what a loop has in addition while it serves the whole host.
type watch struct {
	config  WatchConfig
	next    time.Duration // of the next comparison
	foreign map[wire.Key]bool
	order   map[int][]uint32 // by family: tables in the order of their unbound rules
	heals   *rate.Limiter
	healAt  time.Duration // 0: nothing waits for the limiter
	blamed  bool
}

// Watch keeps lease, rules, routes and resolver lines for every address of the host that
// the configuration selects, until ctx ends; then it leaves them in place, so that the
// next watch finds the host as this one left it. With clean it takes them back. load is
// called at the start and for each value of reload; a configuration that cannot be read
// later leaves the one before in force.
func Watch(ctx context.Context, load func() (WatchConfig, error), reload <-chan struct{}, clean bool, log *slog.Logger) error {
	cfg, err := load()
	if err != nil {
		return err
	}
	servers, err := serverAddrs(cfg.Server)
	if err != nil {
		return err
	}
	l, err := newLoop(servers, newTrust(cfg.ServerUIDs), func(uint32, string) {}, log)
	if err != nil {
		return err
	}
	defer l.close()
	l.watch = &watch{
		config:  cfg,
		foreign: make(map[wire.Key]bool),
		order:   make(map[int][]uint32),
		heals:   rate.NewLimiter(rate.Every(5*time.Second), 20),
	}
	if err := l.watcher.Join(route.Routes4 | route.Routes6 | route.Rules4 | route.Rules6); err != nil {
		return err
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		if l.watch.order[family], err = l.unboundOrder(family); err != nil {
			return err
		}
	}
	log.Info("watching", "profiles", len(cfg.Profiles), "exclude", strings.Join(cfg.Exclude, ","))
	return l.serveHost(ctx, load, reload, clean)
}

func (l *loop) serveHost(ctx context.Context, load func() (WatchConfig, error), reload <-chan struct{}, clean bool) error {
	l.reconcile()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	stop := ctx.Done()
	for {
		timer.Reset(l.wait(wire.Now()))
		select {
		case <-stop:
			if stop = nil; !clean {
				l.log.Info("stopped; leases, rules and routes stay in place")
				return nil
			}
			l.watch.next = 0
			l.end("stopped")
		case <-reload:
			l.reload(load)
		case <-timer.C:
			now := wire.Now()
			l.fire(now)
			if l.watch.healAt != 0 && now >= l.watch.healAt {
				l.heal()
			}
			if stop != nil && now >= l.watch.next {
				l.reconcile()
			}
		case p := <-l.inbox:
			l.receive(p)
		case events := <-l.changes:
			l.changed(events)
			if stop != nil {
				l.noticed(events)
			}
		case err := <-l.failures:
			return err
		}
		if stop == nil && len(l.sessions) == 0 {
			return nil
		}
	}
}

// noticed looks in the events for what no session knows of.
func (l *loop) noticed(events []route.Event) {
	heal, compare := false, false
	for _, e := range events {
		switch e.Kind {
		case route.Overrun:
			heal, compare = true, true
		case route.AddressChanged:
			compare = compare || !e.Deleted && !l.knows(e)
		case route.LinkChanged:
			compare = true
		case route.RuleChanged:
			heal = heal || e.Deleted && e.Protocol == route.Protocol
		}
	}
	if compare {
		l.reconcile()
	}
	if heal && l.watch.healAt == 0 {
		l.heal()
	}
}

func (l *loop) knows(e route.Event) bool {
	return slices.ContainsFunc(l.sessions, func(s *session) bool {
		return s.index == e.Index && s.uplink.addr() == e.Addr
	})
}

// reconcile compares the addresses of the host with the sessions, and the kernel with
// both.
func (l *loop) reconcile() {
	l.watch.next = wire.Now() + reconcileEvery
	for _, s := range l.all() {
		if s.state != done && s.index != 0 {
			l.look(s)
		}
	}
	if err := l.admit(); err != nil {
		l.log.Error("cannot read the addresses of the host", "err", err)
		return
	}
	l.heal()
	if err := l.collect(); err != nil {
		l.log.Error("cannot remove what others of us left behind", "err", err)
	}
}

// admit starts a session for each address that has none.
func (l *loop) admit() error {
	links, err := l.kernel.Links()
	if err != nil {
		return err
	}
	names := make(map[int]string, len(links))
	for _, link := range links {
		names[link.Index] = link.Name
	}
	addresses, err := l.kernel.Addresses(unix.AF_UNSPEC)
	if err != nil {
		return err
	}
	sessions := make(map[wire.Key]*session, len(l.sessions))
	for _, s := range l.sessions {
		sessions[s.uplink.Key] = s
	}
	for _, a := range addresses {
		uplink, ok := l.watch.config.uplink(a, names[a.Index])
		if ok && sessions[uplink.Key] == nil {
			l.enrol(uplink, a.Index)
		}
	}
	return nil
}

// enrol starts a session, unless another process holds the key: that one answers for it.
func (l *loop) enrol(u Uplink, index int) {
	conn, err := open(u.Key, true)
	if errors.Is(err, syscall.EADDRINUSE) {
		if !l.watch.foreign[u.Key] {
			l.watch.foreign[u.Key] = true
			l.log.Info("another process holds this address", "ifname", u.Key.Ifname, "addr", u.Key.Address, "family", u.Key.Family.String())
		}
		return
	}
	if err != nil {
		l.log.Error("cannot hold an address", "ifname", u.Key.Ifname, "addr", u.Key.Address, "err", err)
		return
	}
	delete(l.watch.foreign, u.Key)
	m := newMachine(u, true)
	m.reported, m.watched = true, true
	s := l.add(m, conn)
	s.index = index
	l.feed(s, event{kind: start})
	l.look(s)
}

// reload takes over another configuration; leases stay.
func (l *loop) reload(load func() (WatchConfig, error)) {
	cfg, err := load()
	if err != nil {
		l.log.Error("cannot read the configuration; the one before stays in force", "err", err)
		return
	}
	l.watch.config = cfg
	l.log.Info("configuration read again", "profiles", len(cfg.Profiles), "exclude", strings.Join(cfg.Exclude, ","))
	for _, s := range l.all() {
		if s.index == 0 || !s.present {
			continue
		}
		a := route.Address{Index: s.index, Addr: s.uplink.addr(), Bits: s.uplink.Network.Bits()}
		uplink, ok := cfg.uplink(a, s.uplink.Key.Ifname)
		if !ok {
			l.feed(s, event{kind: end, why: "the configuration does not select it any more"})
			continue
		}
		uplink.Network = s.uplink.Network
		l.retell(s, uplink)
	}
	l.reconcile()
}

// heal puts back what others deleted. It is quick, but no fight: who deletes again and
// again gets a pause and a line in the log.
func (l *loop) heal() {
	l.watch.healAt = 0
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := l.kernel.Rules(family)
		if err != nil {
			l.log.Error("cannot read the rules", "err", err)
			return
		}
		have := make(map[route.Rule]bool, len(rules))
		for _, r := range rules {
			have[r] = true
		}
		for _, s := range l.sessions {
			if s.uplink.family() != family || s.state != held || !s.installed {
				continue
			}
			lost := slices.DeleteFunc(s.uplink.rules(s.table), func(r route.Rule) bool { return have[r] })
			if len(lost) == 0 {
				continue
			}
			if !l.watch.heals.Allow() {
				l.watch.healAt = wire.Now() + 5*time.Second
				return
			}
			if !l.watch.blamed {
				l.watch.blamed = true
				l.log.Warn("another program deletes our rules; they are put back (for systemd-networkd set ManageForeignRoutingPolicyRules=no and ManageForeignRoutes=no in networkd.conf)",
					"rule", lost[0].String())
			}
			s.warn("put the rules back", s.rules.sync(s.table, s.uplink.rules(s.table)))
		}
		if err := l.reorder(family); err != nil {
			l.log.Error("cannot restore the order of the unbound rules", "err", err)
		}
	}
}

// unboundOrder is the order of the unbound rules: it chooses the uplink for traffic that
// is bound to nothing.
func (l *loop) unboundOrder(family int) ([]uint32, error) {
	rules, err := l.kernel.Rules(family)
	if err != nil {
		return nil, err
	}
	var tables []uint32
	for _, r := range rules {
		if r.Protocol == route.Protocol && r.Iif == "lo" {
			tables = append(tables, r.Table)
		}
	}
	return tables, nil
}

// reorder restores that order: a rule that is added again goes behind its equals, so all
// that have to stand behind it are added again, too.
func (l *loop) reorder(family int) error {
	now, err := l.unboundOrder(family)
	if err != nil {
		return err
	}
	order := slices.DeleteFunc(l.watch.order[family], func(t uint32) bool { return !slices.Contains(now, t) })
	for _, t := range now {
		if !slices.Contains(order, t) {
			order = append(order, t)
		}
	}
	l.watch.order[family] = order
	first := 0
	for first < len(now) && now[first] == order[first] {
		first++
	}
	for _, table := range order[first:] {
		for _, s := range l.sessions {
			if s.uplink.family() != family || s.table != table || s.state != held || !s.installed {
				continue
			}
			rules := s.uplink.rules(table)
			unbound := rules[len(rules)-1]
			same := func(r route.Rule) bool { return r == unbound }
			if _, _, err := l.kernel.SyncRules(family, same, nil); err != nil {
				return err
			}
			if _, _, err := l.kernel.SyncRules(family, same, []route.Rule{unbound}); err != nil {
				return err
			}
		}
	}
	return nil
}

// collect removes rules and routes of ours that nobody stands for: of clients that died
// and of addresses that went while nobody looked.
func (l *loop) collect() error {
	names, err := wire.PaddedNames(l.peers.has)
	if err != nil {
		return err
	}
	var errs []error
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		errs = append(errs, l.collectFamily(family, names))
	}
	return errors.Join(errs...)
}

func (l *loop) collectFamily(family int, names []string) error {
	rules, err := l.kernel.Rules(family)
	if err != nil {
		return err
	}
	routes, err := l.kernel.Routes(family, 0)
	if err != nil {
		return err
	}
	served := func(addr string) bool {
		suffix := fmt.Sprintf("-%s-%d", addr, family) // of HolderName
		return slices.ContainsFunc(names, func(name string) bool { return strings.HasSuffix(name, suffix) })
	}
	live := make(map[uint32]bool) // tables that an address in service has, or is about to
	for _, r := range rules {
		if r.Protocol == route.Protocol && isHost(r) && !beside(r) && served(r.Src.Addr().String()) {
			live[r.Table] = true
		}
	}
	for _, r := range routes {
		if r.Protocol == route.Protocol && r.Src.IsValid() && served(r.Src.String()) {
			live[r.Table] = true
		}
	}
	for _, s := range l.sessions {
		if s.uplink.family() == family && s.table != 0 {
			live[s.table] = true
		}
	}
	stale := func(r route.Rule) bool {
		if r.Protocol != route.Protocol {
			return false
		}
		if beside(r) {
			return isHost(r) && !served(r.Src.Addr().String())
		}
		return !live[r.Table]
	}
	_, deleted, err := l.kernel.SyncRules(family, stale, nil)
	for _, r := range deleted {
		l.log.Info("rule of nobody removed", "rule", r.String(), "table", r.Table)
	}
	errs := []error{err}
	for _, r := range routes {
		if r.Protocol == route.Protocol && r.Table != unix.RT_TABLE_MAIN && !live[r.Table] {
			l.log.Info("route of nobody removed", "route", r.String(), "table", r.Table)
			errs = append(errs, l.kernel.DeleteRoute(r))
		}
	}
	return errors.Join(errs...)
}

func isHost(r route.Rule) bool { return r.Src.IsValid() && r.Src.IsSingleIP() }
