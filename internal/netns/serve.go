package netns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
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
	mountPoll = time.Second            // how long the end of a keeper may take
)

// Serve keeps all namespaces as they should be until ctx ends: it restores what other programs delete, follows the link of
// the uplink, and the name servers that it gets, adds the namespaces of the configuration, and lets users enter. Namespaces
// stay when it ends. reloads brings other configurations. ready is called once those of the configuration that can be made are.
func (h *Host) Serve(ctx context.Context, file File, reloads <-chan File, ready func(), log *slog.Logger) error {
	h.follows = true
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
	readers.Go(func() {
		err := error(nil)
		for ; err == nil; _, err = links.Next() {
			hint()
		}
		failed <- err
	})
	readers.Go(func() {
		err := error(nil)
		for ; err == nil; err = tables.Next() {
			hint()
		}
		failed <- err
	})
	keepers := make(map[string]func())
	defer func() {
		_, _, _ = links.Close(), tables.Close(), listener.Close() // they were only read
		for _, stop := range keepers {
			stop()
		}
		readers.Wait()
	}()
	log.Info("serving namespaces")
	warned := make(map[string]string)
	refused := make(map[string]time.Time)
	var once sync.Once
	programs := runner{host: h, log: log, ended: hint, again: make(map[string]*pause)}
	for {
		h.syncAll(ctx, log, warned)
		h.apply(ctx, file, log, warned, refused)
		h.keepMounts(keepers, hint, log)
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
			log.Info("read the configuration again")
		case err := <-failed:
			return err
		case <-events:
		case <-time.After(pauseAfter(refused, pause)):
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(settle):
		}
	}
}

// pauseAfter is how long it may take until the next look: what was refused is tried again before, and so is a program.
func pauseAfter(refused map[string]time.Time, program time.Duration) time.Duration {
	pause := reconcile
	if len(refused) > 0 {
		pause = tryAgain
	}
	if program > 0 {
		pause = min(pause, program)
	}
	return pause
}

// syncAll makes all namespaces what their states say. What it warns of it says once.
func (h *Host) syncAll(ctx context.Context, log *slog.Logger, warned map[string]string) {
	markings := h.askMarkings(ctx)
	err := h.locked(func(swept error) error {
		states, err := h.memory.all()
		for _, s := range states {
			if s.Phase != Up {
				continue // a command is at it, or was killed
			}
			h.syncOne(ctx, s, markings[s.Ifname], log, warned)
		}
		return errors.Join(swept, err)
	})
	if err != nil {
		log.Error("cannot keep namespaces", "err", err)
	}
}

func (h *Host) syncOne(ctx context.Context, s State, marking wire.Marking, log *slog.Logger, warned map[string]string) {
	var err error
	if marking != (wire.Marking{}) && marking != s.Marking {
		s.Marking = marking
		err = h.memory.put(s)
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

// keepMounts begins to watch the mounts of new namespaces, and ends it for those that are deleted.
func (h *Host) keepMounts(keepers map[string]func(), hint func(), log *slog.Logger) {
	states, err := h.memory.all()
	if err != nil {
		log.Error("cannot read the namespaces", "err", err)
		return
	}
	for name, stop := range keepers {
		if !slices.ContainsFunc(states, func(s State) bool { return s.Name == name && s.Phase == Up }) {
			stop()
			delete(keepers, name)
		}
	}
	for _, s := range states {
		if keepers[s.Name] != nil || s.Phase != Up {
			continue
		}
		stop, err := h.memory.watchMounts(s.Name, func() {
			if h.remount(s.Name) != nil { // the loop says why
				hint()
			}
		})
		if err != nil {
			log.Warn("cannot watch the mounts of a namespace", "namespace", s.Name, "err", err)
			continue
		}
		keepers[s.Name] = stop
		if h.remount(s.Name) != nil { // what changed before it was watched; the loop says why
			hint()
		}
	}
}

// watchMounts calls changed when the mounts of a namespace change, as when another program renames a file over a place of a
// mount.
func (m memory) watchMounts(name string, changed func()) (stop func(), err error) {
	var mounts *os.File
	if err := m.withMounts(name, func() (err error) {
		mounts, err = os.Open("/proc/thread-self/mountinfo") // of this thread's mounts, whoever reads it
		return err
	}); err != nil {
		return nil, err
	}
	done := make(chan struct{})
	var keeper sync.WaitGroup
	keeper.Go(func() {
		defer mounts.Close()
		for {
			fds := []unix.PollFd{{Fd: int32(mounts.Fd()), Events: unix.POLLPRI}}
			n, err := unix.Poll(fds, int(mountPoll/time.Millisecond))
			select {
			case <-done:
				return
			default:
			}
			if err == nil && n > 0 {
				changed()
			}
		}
	})
	return func() {
		close(done)
		keeper.Wait()
	}, nil
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
