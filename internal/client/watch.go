package client

import (
	"cmp"
	"context"
	"log/slog"
	"net/netip"
	"reflect"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/time/rate"

	"github.com/table-allocator/table-allocator/internal/install"
	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

const gcPercent = 30 // a thousand addresses are 4 MiB, and this is how much more the heap may be

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
	l.env.Glance = install.NewGlance(l.kernel)
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
		if s.inst.Index == 0 {
			continue
		}
		old, _ := before.Reselect(s.lease.uplink, s.lease.uplink.Key.Ifname)
		told, ok := cfg.Reselect(s.lease.uplink, s.lease.uplink.Key.Ifname)
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
	told, ok := w.config.Reselect(s.lease.uplink, name)
	told.Settings = s.settingsUnder(told.Settings)
	return told, ok
}
