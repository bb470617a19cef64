package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"reflect"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

const (
	// A burst of addresses is one look at the host, and so is what comes right after it.
	admitIn = 20 * time.Millisecond
	// So many addresses at once may have been too many for the kernel's queue of events.
	burst      = 100
	afterBurst = 5 * time.Second
	// How long an address waits that the server, or the kernel, refuses for good.
	refusedFor = 10 * time.Minute
	// A holder of somebody else's that took its rules away is about to end.
	afterForeign = 2 * time.Second
	// Rules that others delete come back at once, but for those that are deleted for ever.
	healEvery  = 5 * time.Second
	healBurst  = 20
	blameEvery = time.Hour

	gcPercent = 30 // a thousand addresses are 4 MiB, and this is how much more the heap may be

)

// DefaultReconcile is how often everything is compared, whatever the kernel reported.
const DefaultReconcile = time.Minute

// watch is what a loop has in addition while it serves the whole host.
type watch struct {
	config  WatchConfig
	next    time.Duration              // of the next comparison of everything
	leaving bool                       // takes everything back
	blind   bool                       // events were lost: it has to look at each session
	admitAt time.Duration              // when to look for new addresses; 0: none are known of
	foreign map[wire.Key]bool          // addresses that other processes hold
	ended   map[wire.Key]bool          // addresses that were given back on request: not served until they come anew
	blocked map[netip.Addr]bool        // addresses that went and must not send
	refused map[wire.Key]time.Duration // until when the server is not asked for an address again
	retried map[wire.Key]bool          // of those, which are asked for all the same
	order   map[lane][]uint32          // tables in the order of their unbound rules
	heals   *rate.Limiter
	healAt  time.Duration // 0: nothing waits for the limiter
	blames  rate.Sometimes
	memory  memory
}

// lane is where unbound rules stand in an order that counts: the kernel sorts by priority,
// and those of equal priority by the time at which they came.
type lane struct {
	family   int
	priority uint32
}

func (s *session) lane() lane { return lane{s.uplink.Family(), s.uplink.Priorities.Unbound} }

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
	servers, err := peer.ServerAddrs(cfg.Server)
	if err != nil {
		return err
	}
	l, err := newLoop(servers, peer.NewTrust(cfg.ServerUIDs), func(uint32, string) {}, log)
	if err != nil {
		return err
	}
	defer l.close()
	debug.SetGCPercent(gcPercent)
	l.glance = &glance{kernel: l.kernel}
	l.watch = &watch{
		config:  cfg,
		foreign: make(map[wire.Key]bool),
		ended:   make(map[wire.Key]bool),
		blocked: make(map[netip.Addr]bool),
		refused: make(map[wire.Key]time.Duration),
		heals:   rate.NewLimiter(rate.Every(healEvery), healBurst),
		blames:  rate.Sometimes{First: 1, Interval: blameEvery},
	}
	if err := l.kernel.KeepRules(); err != nil {
		return err
	}
	if err := l.watcher.Join(route.Routes4 | route.Routes6 | route.Rules4 | route.Rules6); err != nil {
		return err
	}
	if l.watch.memory, err = ownMemory(); err != nil {
		log.Warn("cannot keep what hooks tell for the next watch", "err", err)
	}
	if l.watch.order, err = l.unboundOrder(); err != nil {
		return err
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
			l.watch.leaving = true
			l.end("stopped")
		case <-reload:
			l.reload(load)
		case <-timer.C:
			if l.rests.due(wire.Now()) {
				continue
			}
			l.fire(wire.Now())
		case p := <-l.inbox:
			l.receive(p)
		case events := <-l.changes:
			l.changed(events)
			l.noticed(events)
		case err := <-l.failures:
			return err
		}
		l.rests.stir(wire.Now())
		if stop != nil {
			l.tend(wire.Now())
			continue
		}
		l.watch.next, l.watch.admitAt, l.watch.healAt = 0, 0, 0
		if len(l.sessions) == 0 {
			l.tidy() // only now are addresses that are about to be given back nobody's
			return nil
		}
	}
}

// tend does what is due for the host.
func (l *loop) tend(now time.Duration) {
	w := l.watch
	switch {
	case now >= w.next:
		l.reconcile()
	case w.admitAt != 0 && now >= w.admitAt:
		l.admit()
	}
	if w.healAt != 0 && now >= w.healAt {
		l.heal()
	}
}

type onLink struct {
	addr  netip.Addr
	index int
}

// noticed looks in the events for what no session knows of. It only notes what is to be
// done: many batches of events may come before that.
func (l *loop) noticed(events []route.Event) {
	w := l.watch
	var known map[onLink]bool
	var held map[uint32]bool
	for _, e := range events {
		switch e.Kind {
		case route.Overrun:
			w.next, w.blind = 0, true
		case route.AddressChanged:
			if e.Deleted {
				w.forgive(e.Addr)
			} else if w.blocked[e.Addr] { // if nobody serves it, it may send now
				delete(w.blocked, e.Addr)
				w.next = min(w.next, wire.Now()+fallBackIn)
			}
			if e.Deleted || w.admitAt != 0 {
				continue
			}
			if known == nil {
				known = make(map[onLink]bool, len(l.sessions))
				for _, s := range l.sessions {
					known[onLink{s.addr, s.index}] = true
				}
			}
			if !known[onLink{e.Addr, e.Index}] {
				l.admitSoon()
			}
		case route.LinkChanged:
			l.admitSoon() // by its name it may be another's now
		case route.RuleChanged:
			if !e.Deleted || e.Protocol != route.Protocol {
				continue
			}
			if held == nil {
				held = l.tables()
			}
			if (held[e.Table] || !isLeased(e.Table)) && w.healAt == 0 {
				w.healAt = wire.Now()
			} else if len(w.foreign) > 0 {
				w.next = min(w.next, wire.Now()+afterForeign)
			}
		}
	}
}

// retry asks again for one address of each family that the server refused: it may have been
// started with another configuration.
func (w *watch) retry() {
	w.retried = make(map[wire.Key]bool)
	for _, family := range []wire.Family{wire.Inet, wire.Inet6} {
		for key := range w.refused {
			if key.Family == family {
				w.retried[key] = true
				delete(w.refused, key)
				break
			}
		}
	}
}

// welcome asks for all of a family once the server grants one that it had refused.
func (l *loop) welcome(s *session) {
	if !s.again || s.state != held {
		return
	}
	s.again = false
	maps.DeleteFunc(l.watch.refused, func(key wire.Key, _ time.Duration) bool { return key.Family == s.uplink.Key.Family })
	l.admitSoon()
}

// forgive lets an address that went be served when it comes again.
func (w *watch) forgive(addr netip.Addr) {
	if len(w.ended)+len(w.refused) == 0 {
		return
	}
	text := addr.String()
	maps.DeleteFunc(w.ended, func(key wire.Key, _ bool) bool { return key.Address == text })
	maps.DeleteFunc(w.refused, func(key wire.Key, _ time.Duration) bool { return key.Address == text })
}

// isLeased tells whether a rule's table can be of a lease, and not main's or none at all.
func isLeased(table uint32) bool { return table != 0 && table != unix.RT_TABLE_MAIN }

// tables are those whose rules have to be there.
func (l *loop) tables() map[uint32]bool {
	tables := make(map[uint32]bool, len(l.sessions))
	for _, s := range l.sessions {
		if s.state == held && s.installed {
			tables[s.table] = true
		}
	}
	return tables
}

func (l *loop) admitSoon() {
	if l.watch.admitAt == 0 {
		l.watch.admitAt = wire.Now() + admitIn
	}
}

// dropped looks after an address whose session is over: it may have come back meanwhile.
func (l *loop) dropped(s *session) {
	if l.watch == nil {
		return
	}
	l.forget(s)
	l.unlearn(s)
	switch {
	case len(s.enders) > 0:
		l.watch.ended[s.uplink.Key] = true
	case s.present: // there was no table for it, nor will there be one soon
		l.watch.refused[s.uplink.Key] = wire.Now() + refusedFor
	}
	l.admitSoon()
}

// reconcile compares the addresses of the host with the sessions, and the kernel with
// both.
func (l *loop) reconcile() {
	w := l.watch
	w.next = wire.Now() + cmp.Or(w.config.ReconcileEvery, DefaultReconcile)
	for _, s := range l.suspects() {
		l.look(s)
	}
	w.blind = false
	w.retry()
	l.admit()
	l.heal()
	l.tidy()
}

func (l *loop) tidy() {
	if err := l.collect(); err != nil {
		l.log.Error("cannot remove what others of us left behind", "err", err)
	}
}

// suspects are the sessions that a look may find changed. Events tell of what changes, so
// that a glance at the whole is enough unless some were lost.
func (l *loop) suspects() []*session {
	names, addresses, err := l.kernel.HostAddresses()
	routes := make(map[int]map[uint32]int) // how many of ours each table has
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		have, familyErr := l.kernel.OurRoutes(family)
		err = errors.Join(err, familyErr)
		routes[family] = make(map[uint32]int)
		for _, r := range have {
			routes[family][r.Table]++
		}
	}
	if err != nil || l.watch.blind {
		return l.all()
	}
	there := make(map[onLink]route.Address, len(addresses))
	for _, a := range addresses {
		there[onLink{a.Addr, a.Index}] = a
	}
	return slices.DeleteFunc(l.all(), func(s *session) bool {
		a, ok := there[onLink{s.addr, s.index}]
		return ok && a.Created == s.created && names[s.index] == s.uplink.Key.Ifname && a.Tentative() != s.usable && !a.DADFailed() &&
			(s.state != held || s.installed && routes[s.uplink.Family()][s.table] == s.routes.placed)
	})
}

// admit starts a session for each address that has none.
func (l *loop) admit() {
	w := l.watch
	w.admitAt = 0
	links, addresses, err := l.kernel.HostAddresses()
	if err != nil {
		l.log.Error("cannot read the addresses of the host", "err", err)
		return
	}
	sessions := make(map[wire.Key]bool, len(l.sessions))
	for _, s := range l.sessions {
		sessions[s.uplink.Key] = true
	}
	now := wire.Now()
	maps.DeleteFunc(w.refused, func(_ wire.Key, until time.Duration) bool { return now >= until })
	foreign, ended := make(map[wire.Key]bool), make(map[wire.Key]bool)
	before := len(l.sessions)
	for _, a := range addresses {
		u, ok := w.config.Uplink(a, links[a.Index])
		switch key := u.Key; {
		case !ok || sessions[key] || w.refused[key] != 0:
		case w.ended[key]:
			ended[key] = true
		case !l.enrol(u, a):
			foreign[key] = true
		}
	}
	w.foreign, w.ended = foreign, ended
	if len(l.sessions)-before >= burst {
		w.next = min(w.next, now+afterBurst)
	}
}

// enrol starts a session, unless another process holds the key: that one answers for it.
func (l *loop) enrol(u uplink.Uplink, a route.Address) (ours bool) {
	log := l.log.With("ifname", u.Key.Ifname, "addr", u.Key.Address, "family", u.Key.Family.String())
	conn, err := peer.Open(u.Key, peer.AsHolder)
	switch {
	case err == nil:
	case !errors.Is(err, syscall.EADDRINUSE):
		log.Error("cannot hold an address", "err", err)
		return false
	case l.watch.foreign[u.Key]:
		return false
	default:
		log.Info("another process holds this address, and goes on to serve it", "holder", ownerOf(u.Key))
		return false
	}
	m := newMachine(u, true)
	m.reported, m.watched = true, true
	s := l.add(m, conn)
	s.index, s.present, s.usable, s.created = a.Index, true, !a.Tentative(), a.Created
	s.again = l.watch.retried[u.Key]
	l.recall(s)
	if file := s.uplink.Settings.ServersFile; file != "" {
		if _, err := os.Stat(file); err == nil {
			s.servers = file // with lines of the last holder, perhaps
		}
	}
	l.feed(s, event{kind: start})
	l.feed(s, event{kind: addressSeen})
	return true
}

// ownerOf describes the process that holds a key, as far as it can be found.
func ownerOf(key wire.Key) string {
	addr, err := wire.Padded(wire.HolderName(key))
	if err != nil {
		return err.Error()
	}
	owner, err := wire.FindOwner(addr)
	if err != nil {
		return err.Error()
	}
	return owner.String()
}

// reload takes over another configuration; leases stay.
func (l *loop) reload(load func() (WatchConfig, error)) {
	w := l.watch
	cfg, err := load()
	if err != nil {
		l.log.Error("cannot read the configuration; the one before stays in force", "err", err)
		return
	}
	if servers, err := peer.ServerAddrs(cfg.Server); err == nil { // load has checked it
		l.servers = servers
	}
	before := w.config
	w.config = cfg
	clear(w.ended)
	clear(w.refused)
	w.blind = true
	l.log.Info("configuration read again", "profiles", len(cfg.Profiles), "exclude", strings.Join(cfg.Exclude, ","))
	for _, s := range l.all() {
		if s.index == 0 {
			continue
		}
		old, _ := before.Reselect(s.uplink, s.uplink.Key.Ifname)
		told, ok := cfg.Reselect(s.uplink, s.uplink.Key.Ifname)
		switch {
		case !ok:
			l.feed(s, event{kind: end, why: "the configuration does not select it any more"})
		case !reflect.DeepEqual(old, told): // else what a hook said stays as it is
			told.Settings = s.settingsUnder(told.Settings)
			l.retell(s, told)
			l.keep(s)
		}
	}
	l.reconcile()
}

// renamed is what the configuration wants for an address whose link has another name now.
func (w *watch) renamed(s *session, name string) (uplink.Uplink, bool) {
	told, ok := w.config.Reselect(s.uplink, name)
	told.Settings = s.settingsUnder(told.Settings)
	return told, ok
}

// heal puts back what others deleted. It is quick, but no fight: who deletes again and
// again gets a pause and a line in the log.
func (l *loop) heal() {
	w := l.watch
	w.healAt = 0
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		if err := l.healFamily(family); err != nil {
			l.log.Error("cannot put the rules back", "err", err)
		}
	}
}

func (l *loop) healFamily(family int) error {
	w := l.watch
	rules, err := l.kernel.RulesWhere(family, func(r *route.Rule) bool { return r.Protocol == route.Protocol })
	if err != nil {
		return err
	}
	if l.serveNews(family, rules) {
		if rules, err = l.kernel.RulesWhere(family, func(r *route.Rule) bool { return r.Protocol == route.Protocol }); err != nil {
			return err
		}
	}
	have := make(map[route.Rule]bool, len(rules))
	for _, r := range rules {
		have[r] = true
	}
	sessions := make(map[uint32]*session)
	var lost []route.Rule
	whose := make(map[route.Rule]*session)
	for _, s := range l.inOrder(family) {
		sessions[s.table] = s
		for _, r := range s.rules.want(s.table) {
			if !have[r] {
				lost, whose[r] = append(lost, r), s
			}
		}
	}
	behind, err := l.disordered(family, sessions)
	if err != nil || len(lost) == 0 && len(behind) == 0 {
		return err
	}
	if !w.heals.Allow() {
		w.healAt = wire.Now() + healEvery
		return nil
	}
	if len(lost) > 0 {
		w.blames.Do(func() {
			l.log.Warn("another program deletes our rules; they are put back, but not faster than every "+healEvery.String()+" if it goes on (for systemd-networkd set ManageForeignRoutingPolicyRules=no and ManageForeignRoutes=no in networkd.conf)",
				"rule", lost[0].String())
		})
		// Those that keep an address to its uplink first, for all addresses.
		slices.SortStableFunc(lost, func(a, b route.Rule) int { return cmp.Compare(a.Priority, b.Priority) })
		none := func(route.Rule) bool { return false } // is to be deleted
		added, _, err := l.kernel.SyncRules(family, none, lost)
		for _, r := range added {
			l.log.Info("rule added", whose[r].rules.attrs(r)...)
		}
		if err != nil {
			return err
		}
	}
	if behind, err = l.disordered(family, sessions); err != nil {
		return err
	}
	for _, s := range behind {
		if err := l.moveBehind(s); err != nil {
			return fmt.Errorf("restore the order of the unbound rules: %w", err)
		}
	}
	return nil
}

// inOrder are the sessions whose rules have to be there, in the order of their unbound rules.
func (l *loop) inOrder(family int) []*session {
	at := make(map[uint32]int)
	for of, order := range l.watch.order {
		if of.family != family {
			continue
		}
		for i, table := range order {
			at[table] = i
		}
	}
	sessions := slices.DeleteFunc(l.all(), func(s *session) bool {
		return s.uplink.Family() != family || s.state != held || !s.installed
	})
	slices.SortStableFunc(sessions, func(a, b *session) int { return cmp.Compare(at[a.table], at[b.table]) })
	return sessions
}

// unboundOrder is the order of the unbound rules: it chooses the uplink for traffic that
// is bound to nothing.
func (l *loop) unboundOrder() (map[lane][]uint32, error) {
	order := make(map[lane][]uint32)
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := l.kernel.RulesWhere(family, func(r *route.Rule) bool {
			return r.Protocol == route.Protocol && r.Iif == uplink.Loopback && !uplink.LeavesTable(*r)
		})
		if err != nil {
			return nil, err
		}
		for _, r := range rules {
			of := lane{family, r.Priority}
			order[of] = append(order[of], r.Table)
		}
	}
	return order, nil
}

// disordered are the sessions whose unbound rules have to go behind all others, one after
// the other, so that all stand in the order that they had. sessions are those by table that
// can be moved.
func (l *loop) disordered(family int, sessions map[uint32]*session) ([]*session, error) {
	now, err := l.unboundOrder()
	if err != nil {
		return nil, err
	}
	var behind []*session
	for of, order := range l.watch.order {
		if of.family != family {
			continue
		}
		for _, table := range misplaced(order, now[of], func(table uint32) bool { return sessions[table] != nil }) {
			behind = append(behind, sessions[table])
		}
	}
	return behind, nil
}

// misplaced are the tables that have to go to the end of now, one after the other, so that
// those which can be moved stand as in order: a rule that was added again stands behind its
// equals, and those that followed it have to follow it again.
func misplaced(order, now []uint32, movable func(uint32) bool) []uint32 {
	there := make(map[uint32]bool, len(now))
	for _, table := range now {
		there[table] = true
	}
	order = slices.DeleteFunc(slices.Clone(order), func(table uint32) bool { return !movable(table) || !there[table] })
	at := 0 // all of order before it stands where it should
	for _, table := range now {
		if at < len(order) && table == order[at] {
			at++
		}
	}
	return order[at:]
}

// moveBehind adds the unbound rule of a session again.
func (l *loop) moveBehind(s *session) error {
	rules := s.rules.uplink.Rules(s.table)
	unbound := rules[len(rules)-1]
	same := func(r route.Rule) bool { return r == unbound }
	if _, _, err := l.kernel.SyncRules(s.uplink.Family(), same, nil); err != nil {
		return err
	}
	_, _, err := l.kernel.SyncRules(s.uplink.Family(), same, []route.Rule{unbound})
	return err
}

// remember notes where the unbound rule of a session came to stand: behind all others.
func (l *loop) remember(s *session) {
	if l.watch == nil || s.state != held || !s.installed || s.ordered == s.table && s.orderedIn == s.lane() {
		return
	}
	l.forget(s)
	s.ordered, s.orderedIn = s.table, s.lane()
	if !slices.Contains(l.watch.order[s.orderedIn], s.table) { // else it stood before this process began
		l.watch.order[s.orderedIn] = append(l.watch.order[s.orderedIn], s.table)
	}
}

func (l *loop) forget(s *session) {
	order := l.watch.order[s.orderedIn]
	if at := slices.Index(order, s.ordered); s.ordered != 0 && at >= 0 {
		l.watch.order[s.orderedIn] = slices.Delete(order, at, at+1)
	}
	s.ordered = 0
}

// collect removes rules and routes of ours that nobody stands for: of clients that died
// and of addresses that went while nobody looked.
func (l *loop) collect() error {
	names, err := peer.HolderNames()
	if err != nil {
		return err
	}
	served := make(map[netip.Addr]bool, len(names))
	for _, name := range names {
		// IFNAME-ADDR-FAMILY, and more for a client whose name somebody had taken.
		words := strings.Split(name, "-")
		for _, word := range words[1:] {
			if addr, err := netip.ParseAddr(word); err == nil {
				served[addr] = true
			}
		}
	}
	errs := []error{l.forgetStale(names)}
	clear(l.watch.blocked)
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		errs = append(errs, l.collectFamily(family, served))
	}
	order, err := l.unboundOrder()
	for of := range l.watch.order {
		l.watch.order[of] = slices.DeleteFunc(l.watch.order[of], func(table uint32) bool {
			return err == nil && !slices.Contains(order[of], table) &&
				!slices.ContainsFunc(l.sessions, func(s *session) bool { return s.ordered == table && s.orderedIn == of })
		})
	}
	return errors.Join(append(errs, err)...)
}

func (l *loop) collectFamily(family int, served map[netip.Addr]bool) error {
	// The original marks nothing, but rules of ours may lead to its tables, too: for what is bound.
	rules, err := l.kernel.RulesWhere(family, func(r *route.Rule) bool { return r.Protocol == route.Protocol || uplink.IsHost(*r) })
	if err != nil {
		return err
	}
	routes, err := l.kernel.OurRoutes(family)
	if err != nil {
		return err
	}
	live := make(map[uint32]bool)        // tables that an address in service has, or is about to
	sourced := make(map[netip.Addr]bool) // addresses with a rule to a table
	for _, r := range rules {
		if uplink.IsHost(r) && !uplink.LeavesTable(r) {
			sourced[r.Src.Addr()] = true
			live[r.Table] = live[r.Table] || served[r.Src.Addr()]
		}
	}
	for _, r := range routes {
		if served[r.Src] {
			live[r.Table] = true
		}
	}
	for _, s := range l.sessions {
		if s.uplink.Family() == family && s.table != 0 {
			live[s.table] = true
		}
	}
	addresses, err := l.kernel.Addresses(family)
	if err != nil {
		return err
	}
	there := make(map[netip.Addr]bool, len(addresses))
	for _, a := range addresses {
		there[a.Addr] = true
	}
	keep := uplink.KeptBlocks(rules, there)
	if l.watch.leaving {
		clear(keep)
	}
	for r := range keep {
		l.watch.blocked[r.Src.Addr()] = true
	}
	waiting := make(map[netip.Addr]bool) // back, and without a lease: main has to do
	for _, s := range l.sessions {
		if s.state == asking && !sourced[s.addr] {
			waiting[s.addr] = true
		}
	}
	orphan := uplink.Orphans(slices.DeleteFunc(slices.Clone(rules), func(r route.Rule) bool { return !live[r.Table] }))
	stale := func(r route.Rule) bool {
		switch {
		case r.Protocol != route.Protocol:
			return false
		case uplink.LeavesTable(r):
			return uplink.IsHost(r) && (!served[r.Src.Addr()] || waiting[r.Src.Addr()]) && !keep[r] || orphan(r)
		}
		return !live[r.Table]
	}
	var errs []error
	for _, r := range rules {
		if uplink.IsHost(r) && !uplink.LeavesTable(r) && stale(r) {
			errs = append(errs, l.bury(family, r, routes))
		}
	}
	_, deleted, err := l.kernel.SyncRules(family, stale, nil)
	errs = append(errs, err)
	for _, r := range deleted {
		l.log.Info("rule of nobody removed", "rule", r.String(), "table", r.Table)
	}
	tables := make(map[uint32]bool)
	for _, r := range routes {
		if isLeased(r.Table) && !live[r.Table] {
			l.log.Info("route of nobody removed", "route", r.String(), "table", r.Table)
			tables[r.Table] = true
		}
	}
	for table := range tables {
		errs = append(errs, l.kernel.FlushTable(family, table))
	}
	return errors.Join(errs...)
}

// bury gives main what a client that is dead had moved into its table, if its address is
// still there, and its lease to the server. source is the rule from its address.
func (l *loop) bury(family int, source route.Rule, routes []route.Route) error {
	addr := source.Src.Addr()
	if err := l.forgetServers(addr); err != nil {
		return err
	}
	index := 0 // of its link, as far as anything tells
	for _, r := range routes {
		if r.Table == source.Table && r.Index != 0 {
			index = r.Index
		}
	}
	addresses, err := l.kernel.Addresses(family)
	if err != nil {
		return err
	}
	network := source.Src
	for _, a := range addresses {
		if a.Addr == addr && (index == 0 || index == a.Index) {
			index, network = a.Index, a.Network()
		}
	}
	link, found, err := l.kernel.LinkByIndex(index)
	if err != nil || !found {
		return err
	}
	u := uplink.Uplink{Key: wire.Key{Family: wire.Family(family), Ifname: link.Name, Address: addr.String()}, Network: network}
	l.log.Info("client is dead; its lease is given back", "ifname", link.Name, "addr", u.Key.Address, "family", u.Key.Family.String(), "table", source.Table)
	err = returnRoutes(u, &ruleset{uplink: u, kernel: l.kernel, log: l.log, tables: map[uint32]bool{source.Table: true}}, l.log)
	return errors.Join(err, l.release(u.Key))
}

// release gives a lease back that no session has, without waiting for the answer: if it is
// lost, the lease ends by itself.
func (l *loop) release(key wire.Key) error {
	conn, err := peer.Open(key, peer.AsAsker)
	if err != nil {
		return err
	}
	defer conn.Close()
	req := wire.Request{Key: key, Cmd: wire.Release}
	err = peer.SendToServer(conn, l.servers, req.Append(nil))
	if err != nil {
		l.log.Debug("lease not released", "key", key.String(), "err", err)
	}
	return nil
}
