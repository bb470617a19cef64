package netns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/bind"
	"github.com/table-allocator/table-allocator/internal/nat"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

const (
	settle    = 100 * time.Millisecond // in which events that belong together come
	reconcile = time.Minute            // between looks without an event
	tryAgain  = 5 * time.Second        // after a namespace of the configuration could not be made
	patience  = 2 * time.Second        // of one that is made, for the server
)

// Serve keeps all namespaces as they should be until ctx ends: it restores what other programs delete, follows the link of
// the uplink, and the name servers that it gets, adds the namespaces of the configuration, and lets users enter. Namespaces
// stay when it ends. reloads brings other configurations. ready is called once those of the configuration that can be made are.
func (h *Host) Serve(ctx context.Context, file File, reloads <-chan File, ready func(), log *slog.Logger) error {
	h.follows, h.legacy.keep = true, reconcile
	listener, err := openDoor(file.Group, log)
	if err != nil {
		return fmt.Errorf("listen at %s: %w", DoorPath, err)
	}
	d := door{host: h, log: log, group: file.Group, users: make(map[uint32]int), file: file}
	events := make(chan struct{}, 1)
	hint := func() {
		select {
		case events <- struct{}{}:
		default: // one is waiting
		}
	}
	links, err := route.Watch(route.Links | route.Addresses4 | route.Addresses6 | route.Rules4 | route.Rules6)
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	tables, err := nat.Watch()
	if err != nil {
		return errors.Join(err, links.Close(), listener.Close())
	}
	var readers sync.WaitGroup
	readers.Go(func() { d.serve(listener) })
	failed := make(chan error, 2)
	linksNext := func() error { _, err := links.Next(); return err }
	for _, next := range []func() error{linksNext, tables.Next} {
		readers.Go(func() {
			err := error(nil)
			for ; err == nil; err = next() {
				hint()
			}
			failed <- err
		})
	}
	stop := h.keepMounts(hint, log)
	defer func() {
		_, _, _ = links.Close(), tables.Close(), listener.Close() // they were only read
		stop()
		readers.Wait()
	}()
	log.Info("serving namespaces")
	warned := make(map[string]string)
	refused := make(map[string]time.Time)
	var once sync.Once
	programs := runner{host: h, log: log, ended: hint, again: make(map[string]*pause)}
	for {
		soon := h.syncAll(ctx, log, warned)
		h.followPatterns(ctx, log, warned, refused)
		h.apply(ctx, file, log, warned, refused)
		pause := programs.run()
		once.Do(ready)
		select {
		case <-ctx.Done():
			h.leave(log, warned)
			return nil
		case next := <-reloads:
			if next.Group != file.Group {
				log.Warn("another group may enter namespaces only after a restart", "group", next.Group)
				next.Group = file.Group
			}
			file = next
			d.configure(file)
			clear(refused)
			log.Info("configuration read again")
		case err := <-failed:
			return err
		case <-events:
		case <-time.After(pauseAfter(refused, soon, pause)):
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(settle):
		}
	}
}

// pauseAfter is how long it may take until the next look: what was refused is tried again before, and so is a program.
func pauseAfter(refused map[string]time.Time, soon bool, program time.Duration) time.Duration {
	pause := reconcile
	if len(refused) > 0 || soon {
		pause = tryAgain
	}
	if program > 0 {
		pause = min(pause, program)
	}
	return pause
}

// syncAll makes all namespaces what their states say. What it warns of it says once. soon reports whether one waits for the
// prefix of its link, which no event ends.
func (h *Host) syncAll(ctx context.Context, log *slog.Logger, warned map[string]string) (soon bool) {
	markings := h.askMarkings(ctx)
	err := h.locked(func(swept error) error {
		states, err := h.memory.all()
		for _, s := range states {
			if s.Phase != Up {
				continue // a command is at it, or was killed
			}
			h.syncOne(ctx, &s, markings[s.Ifname], log, warned)
			soon = soon || s.Missed != 0
		}
		return errors.Join(swept, err)
	})
	if err != nil {
		log.Error("cannot read or restore all namespaces; that is tried again", "err", err)
	}
	return soon
}

func (h *Host) syncOne(ctx context.Context, s *State, marking wire.Marking, log *slog.Logger, warned map[string]string) {
	var err error
	if marking != (wire.Marking{}) && marking != s.Marking {
		s.Marking = marking
		err = h.memory.put(*s)
	}
	var lacking []string
	if err == nil {
		lacking, err = h.sync(ctx, s, unbidden)
	}
	text := ""
	if err != nil {
		text = err.Error()
	} else if len(lacking) > 0 {
		text = lacking[0]
	}
	if text != "" && text != warned[s.Name] {
		log.Warn("namespace is not as it should be", "namespace", s.Name, "ifname", s.Ifname, "err", text)
	} else if text == "" && warned[s.Name] != "" {
		log.Info("namespace is as it should be", "namespace", s.Name, "ifname", s.Ifname)
	}
	warned[s.Name] = text
}

// askMarkings asks the server for the markings of all uplinks, before the lock is taken. Where it does not answer, what it
// said last counts.
func (h *Host) askMarkings(ctx context.Context) map[string]wire.Marking {
	const patience = 2 * time.Second // for all together
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	states, err := h.memory.all()
	if err != nil {
		return nil // which the caller meets, too
	}
	markings := make(map[string]wire.Marking)
	for _, s := range states {
		if _, asked := markings[s.Ifname]; asked {
			continue
		}
		marking, err := bind.MarkingOf(ctx, h.binding(State{Config: s.Config}))
		if err != nil {
			break
		}
		markings[s.Ifname] = marking
	}
	return markings
}

// keepMounts mounts again in all namespaces where other programs replace files, until stop is called.
func (h *Host) keepMounts(hint func(), log *slog.Logger) (stop func()) {
	const late = "what replaces resolv.conf is noticed within a minute only"
	places, err := watchPlaces()
	if err != nil { // others may have all there is: fs.inotify.max_user_instances and max_user_watches
		log.Warn(late, "err", err)
		return func() {}
	}
	var reader sync.WaitGroup
	reader.Go(func() {
		for {
			if err := places.next(); errors.Is(err, os.ErrClosed) {
				return
			} else if err != nil {
				log.Warn(late, "err", err)
				return
			}
			if h.remountAll() != nil { // the loop says why
				hint()
			}
		}
	})
	return func() {
		_ = places.close() // it was only read
		reader.Wait()
	}
}

// remountAll mounts again, in all namespaces, what is no longer in its place.
func (h *Host) remountAll() error {
	states, err := h.memory.all()
	errs := []error{err}
	for _, s := range states {
		if s.Phase == Up {
			errs = append(errs, h.remount(s.Name))
		}
	}
	return errors.Join(errs...)
}

// leave makes namespaces wait for a lease again, since nobody will be there to open them when it comes.
func (h *Host) leave(log *slog.Logger, warned map[string]string) {
	const patience = 5 * time.Second
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	h.follows = false
	h.syncAll(ctx, log, warned)
}

// defaultRoute is the default route in a namespace. While its uplink has no lease in the family, programs get an error at
// once, where the guard would have them wait.
func (h *Host) defaultRoute(s State, p plan, family, index int) (route.Route, error) {
	way := route.NewRoute(unix.RT_TABLE_MAIN, anywhere(family), p.here.in(family).Addr(), index)
	if !h.follows || s.OnLoss == uplink.Fallback {
		return way, nil
	}
	rules, err := h.kernel.RulesWhere(family, func(r *route.Rule) bool { return r.Iif == p.link && uplink.IsLookup(*r) })
	if err == nil && len(rules) == 0 {
		way = route.Route{Family: family, Dst: anywhere(family), Table: unix.RT_TABLE_MAIN, Type: unix.RTN_UNREACHABLE, Protocol: route.Protocol}
	}
	return way, err
}
