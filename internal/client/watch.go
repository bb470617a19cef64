package client

import (
	"cmp"
	"context"
	"log/slog"
	"maps"
	"net/netip"
	"reflect"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"golang.org/x/time/rate"

	"github.com/table-allocator/table-allocator/internal/events"
	"github.com/table-allocator/table-allocator/internal/install"
	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/remember"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// DefaultReconcile is how often everything is compared, even without events.
const DefaultReconcile = time.Minute

// host serves every address of the host that its configuration selects.
type host struct {
	*loop
	config      WatchConfig
	clean       bool                       // takes everything back at the end
	reconcileAt time.Duration              // when everything is compared next
	admitAt     time.Duration              // when new addresses are looked for; 0: none are known of
	healAt      time.Duration              // when rules that were deleted are restored; 0: none are known of
	blind       bool                       // events were lost, so that each session has to be looked at
	round       *round                     // while everything is compared, and nothing was found to differ; nil else
	foreign     map[wire.Key]time.Duration // addresses that other clients serve, and when that was found
	moved       map[int]bool               // links whose default routes an earlier watch moved; nil once these are served
	ruled       map[netip.Addr]bool        // addresses that had a rule of ours to a table, when admit looked
	leased      map[int]bool               // their links
	ended       map[wire.Key]bool          // addresses that a command released: not served until they are added again
	refused     map[wire.Key]time.Duration // until when the server is not asked for an address
	deprecated  map[wire.Key]bool          // of these, those that gave their tables since they were deprecated: asked for once they are not
	excluded    map[string]bool            // links of which it was said that the configuration leaves them alone
	retried     map[wire.Key]bool          // refused addresses that are asked for all the same
	order       map[lane][]uint32          // tables in the order of their unbound rules
	shortage    shortage
	nobodyGives map[need]time.Duration // until when
	heals       *rate.Limiter
	blame       blame
	memory      remember.Dir // of this network namespace, see remembered; "": none
	choices     *chooser
	cgroups     *cgroups
	replies     *replies
	alive       heartbeat
}

// heartbeat tells the service manager that the loop comes round. Where the loop comes round anyway, as it does each minute, that
// wakes the process for nothing more.
type heartbeat struct {
	tell   func()
	period time.Duration
	last   time.Duration
}

// next is when beat has to be called at the latest; 0: never.
func (b *heartbeat) next() time.Duration {
	if b.tell == nil {
		return 0
	}
	return b.last + b.period
}

func (b *heartbeat) beat(now time.Duration) {
	if b.tell != nil && now-b.last >= b.period/2 {
		b.last = now
		b.tell()
	}
}

// Reload is a configuration that was read again. With Err the one before stays in force.
type Reload struct {
	Config WatchConfig
	Err    error
}

func newHost(l *loop, cfg WatchConfig, clean bool) *host {
	cfg.Others = make(uplink.OtherNames)
	return &host{
		loop:        l,
		config:      cfg,
		clean:       clean,
		foreign:     make(map[wire.Key]time.Duration),
		ended:       make(map[wire.Key]bool),
		refused:     make(map[wire.Key]time.Duration),
		deprecated:  make(map[wire.Key]bool),
		excluded:    make(map[string]bool),
		nobodyGives: make(map[need]time.Duration),
		heals:       rate.NewLimiter(rate.Every(healEvery), healBurst),
		alive:       heartbeat{cfg.Alive, cfg.AlivePeriod, wire.Now()},
	}
}

// reconcileEvery is DefaultReconcile, or what the configuration says.
func (h *host) reconcileEvery() time.Duration {
	return cmp.Or(h.config.ReconcileEvery, DefaultReconcile)
}

// Watch keeps lease, rules, routes and resolver lines for every address of the host that
// the configuration selects, until ctx ends; then it leaves them in place, so that the
// next watch finds the host as this one left it. With clean it takes them back.
func Watch(ctx context.Context, cfg WatchConfig, reloads <-chan Reload, clean bool, log *slog.Logger) error {
	l, err := newLoop(cfg.Server, cfg.ServerUIDs, func(uint32, string) {}, log)
	if err != nil {
		return err
	}
	defer l.close()
	debug.SetGCPercent(gcPercent)
	name, err := peer.OpenWatch()
	if err != nil {
		return err
	}
	defer name.Close()
	h := newHost(l, cfg, clean)
	l.scope, l.env.Picture, l.reloads, l.reload = h, install.NewPicture(l.kernel, h.servesLink, cmp.Or(cfg.MaxRoutes, DefaultMaxRoutes)), reloads, h.reloadConfig
	if err := h.prepare(); err != nil {
		return err
	}
	if l.former.requests, err = h.findFormer(); err != nil {
		log.Warn("cannot find out what an earlier watch had leased", "err", err)
	}
	l.renewFormer()
	h.choices, h.cgroups, h.replies = newChooser(h), newCgroups(h), newReplies(h)
	defer h.choices.program.Close()
	defer h.choices.stop()
	defer h.replies.stop()
	if err := h.choices.serve(); err != nil {
		log.Warn("this watch does not answer the command uplinks", "err", err)
	}
	if err = h.choices.adopt(); err != nil {
		return err
	}
	log.Info("watching", "profiles", len(cfg.Profiles), "exclude", strings.Join(cfg.Exclude, ","))
	h.tellHost(events.Started, "a watch started")
	if cfg.Ready != nil {
		cfg.Ready()
	}
	h.reconcile()
	h.moved, l.former = nil, former{}
	err = l.run(ctx)
	h.tellHost(events.Stopped, "the watch ended")
	if h.ending && err == nil {
		h.collectStale() // only now no session has the addresses any more
		h.replies.remove()
	}
	return err
}

// prepare subscribes to what happens to the host, and reads what the watch before remembered.
func (h *host) prepare() error {
	if err := h.kernel.KeepRules(); err != nil {
		return err
	}
	if err := h.watcher.Join(route.Routes4 | route.Routes6 | route.Nexthops | route.Rules4 | route.Rules6); err != nil {
		return err
	}
	var err error
	if h.memory, err = remember.Own("told"); err != nil {
		h.log.Warn("cannot save what hooks say for the next watch", "err", err)
	}
	if h.moved, err = install.MovedLinks(); err != nil {
		h.log.Warn("cannot read which default routes an earlier watch moved", "err", err)
	}
	h.order, err = h.unboundOrder(uplink.Loopback)
	return err
}

func (h *host) awaits() bool { return !h.ending }

func (h *host) leaves(failure error) bool {
	if failure == nil {
		h.choices.leave(h.clean)
	}
	if failure == nil && !h.clean {
		h.log.Info("stopped; leases, rules and routes stay in place")
	}
	return failure != nil || !h.clean
}

func (h *host) next() time.Duration {
	if h.ending {
		return h.alive.next()
	}
	return earliest(max(h.reconcileAt, 1), h.admitAt, h.healAt, h.choices.next(wire.Now()), h.cgroups.next(), h.replies.next(), h.alive.next())
}

func (h *host) runDue(now time.Duration) {
	h.alive.beat(now)
	h.cgroups.runDue()
	if h.ending {
		return
	}
	h.replies.runDue(now)
	h.speakersFirst()
	switch {
	case now >= h.reconcileAt:
		h.reconcile()
	case h.admitAt != 0 && now >= h.admitAt:
		h.admit()
	}
	if h.healAt != 0 && now >= h.healAt {
		h.heal()
	}
	h.choices.runDue(now)
}

func (h *host) settled(s *session) {
	h.appendOrder(s)
	h.retryRefused(s)
	h.saveSettings(s)
	h.choices.soon()
	h.cgroups.due = true
	h.replies.soon()
}

// reconcile compares the addresses of the host with the sessions, and rules and routes with both.
func (h *host) reconcile() {
	h.reconcileAt = wire.Now() + h.reconcileEvery()
	h.read = make(map[linkOf][]route.Address)
	for _, s := range h.changedSessions() {
		h.look(s)
	}
	h.read = nil
	defer func() { h.round = nil }()
	for _, s := range h.all() {
		if s.serves() && s.lease.uplink.Settings.MPTCP { // the kernel has no event of endpoints
			s.inst.SyncEndpoint()
		}
		if s.serves() {
			s.inst.SyncResolved()
		}
	}
	h.blind = false
	h.keepLocks(news{overrun: true})
	h.retryOne()
	h.admit()
	h.checkPrefixes()
	h.heal()
	h.collectStale()
	h.choices.serveAgain()
	h.choices.soon()
	h.cgroups.keep(true)
	h.replies.soon()
}

// reloadConfig takes over another configuration. Leases stay.
func (h *host) reloadConfig(r Reload) {
	cfg := r.Config
	if r.Err != nil {
		h.log.Error("cannot read the configuration; the one before stays in force", "err", r.Err)
		return
	}
	if server, err := peer.NewServer(cfg.Server, cfg.ServerUIDs); err == nil { // load has checked it
		h.server = server
	}
	before := h.config
	h.config, h.config.Others = cfg, before.Others
	if was, now := cmp.Or(before.MaxRoutes, DefaultMaxRoutes), cmp.Or(cfg.MaxRoutes, DefaultMaxRoutes); was != now {
		h.log.Warn("max_routes cannot change while the watch runs; the value of its start stays in force: restart the watch", "in_force", was, "ignored", now)
		h.config.MaxRoutes = was
	}
	clear(h.ended)
	clear(h.refused)
	h.blind = true
	h.choices.configure()
	h.log.Info("configuration read again", "profiles", len(cfg.Profiles), "exclude", strings.Join(cfg.Exclude, ","))
	h.reselect(before.Selection, nil)
	h.reconcile()
}

// reselect carries over to the addresses in service what the configuration says of them now, and did not before: to all, or to those of
// links that have their names still.
func (h *host) reselect(before uplink.Selection, links map[int]route.Link) {
	for _, s := range h.all() {
		u := s.lease.uplink
		if s.inst.Index == 0 || links != nil && links[s.inst.Index].Name != u.Key.Ifname {
			continue
		}
		old, _ := before.Reselect(u, u.Key.Ifname)
		newer, ok := h.config.Reselect(u, u.Key.Ifname)
		switch {
		case !ok:
			h.feed(s, event{kind: end, why: "the configuration no longer selects it"})
		case !reflect.DeepEqual(old, newer): // else settings of a hook stay as they are
			newer.Settings = s.settingsUnder(newer.Settings)
			h.update(s, newer)
		}
	}
}

// nameLinks takes over the alternative names of links, for which the configuration may say something else.
func (h *host) nameLinks(links map[int]route.Link) {
	before, others := h.config.Selection, uplink.OthersOf(links)
	if maps.EqualFunc(before.Others, others, slices.Equal) {
		return
	}
	h.config.Others = others
	h.reselect(before, links)
	h.choices.soon()
	h.cgroups.due = true
}

func (h *host) renamed(s *session, ifname string) (uplink.Uplink, bool) {
	if link, found, err := h.kernel.LinkByIndex(s.inst.Index); err == nil && found && len(link.Other) > 0 {
		h.config.Others[ifname] = link.Other // the configuration may have one of these
	}
	u, ok := h.config.Reselect(s.lease.uplink, ifname)
	u.Settings = s.settingsUnder(u.Settings)
	return u, ok
}
