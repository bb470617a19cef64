package allocator

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"
)

// Open opens the database, or makes one. Leases of this epoch stay in force for a full timeout at
// least, since their holders could not renew while no server ran; leases of other epochs become
// preferences. The first Open of a database of the original leaves a copy of it beside it. A damaged
// database of ours is set aside, and a new one begun. After any other error, which says what to do, the
// database is as it was.
func Open(cfg Config, now int64, log *slog.Logger) (*Allocator, error) {
	a := &Allocator{cfg: cfg, utc: time.Now, log: log}
	a.reset()
	if err := a.attach(now); err != nil {
		return nil, fmt.Errorf("open database %s: %w", cfg.Path, err)
	}
	return a, nil
}

// reset empties the index.
func (a *Allocator) reset() {
	a.pools = make(map[Family]*pool)
	for f, p := range a.cfg.Pools {
		a.pools[f] = newPool(f, p)
	}
	a.byKey, a.due, a.unsaved, a.dirty, a.touched = make(map[Key]*slot), nil, nil, nil, make(map[Key]struct{})
	a.pairs = newPairs()
	a.marks = marks{Marks: a.cfg.Marks, byIfname: make(map[string]mark), ifnames: make(map[uint32]string)}
}

func (a *Allocator) attach(now int64) (err error) {
	if a.store, err = openStore(a.cfg.Path, a.cfg.Epoch, a.log); err == nil {
		err = a.takeOver(now)
	}
	if errors.Is(err, errDamaged) {
		err = a.salvage(now, err)
	}
	if err != nil {
		return errors.Join(err, a.store.close())
	}
	return nil
}

// takeOver makes the index of a database that is whole, and stores what changes with the start.
func (a *Allocator) takeOver(now int64) error {
	version, original, err := a.store.version()
	if err == nil {
		err = a.store.check()
	}
	copied := ""
	if err == nil && original {
		copied, err = a.store.copyOriginal()
	}
	if err != nil {
		return err
	}
	behind := 0
	if err := a.store.start(version, a.log, func() error {
		l := loader{a: a, now: now}
		if err := l.read(schemaVersion); err != nil {
			return err
		}
		if err := l.finish(); err != nil {
			return err
		}
		behind = min(len(a.dirty), flushMost)
		return a.store.put(now, a.utc(), a.unsaved, a.dirty[:behind])
	}); err != nil {
		if original {
			err = errors.Join(err, os.Remove(copied)) // the original is untouched
		}
		return err
	}
	a.written(now, behind)
	if original {
		a.log.Info("database of the original taken over", "path", a.cfg.Path, "copy", copied)
	}
	return nil
}

// salvage replaces a damaged database by a new one with the rows that can still be read.
func (a *Allocator) salvage(now int64, cause error) error {
	if err := a.store.prove(); err != nil {
		return fmt.Errorf("%w: %w", cause, err)
	}
	a.reset()
	l := loader{a: a, now: now, damaged: true}
	l.salvage()
	aside, err := a.store.setAside(a.utc())
	if err != nil {
		return err
	}
	_ = a.store.close() // a damaged database need not close without an error
	if a.store, err = openStore(a.cfg.Path, a.cfg.Epoch, a.log); err != nil {
		return err
	}
	if err := errors.Join(l.finish(), a.fill(now)); err != nil {
		return err
	}
	a.log.Warn("the database was damaged, so it is set aside and a new one begun; its leases are preferences now", "path", a.cfg.Path,
		"aside", aside, "leases", len(a.unsaved), "marks", len(a.marks.byIfname), "err", cause)
	a.written(now, len(a.dirty))
	return nil
}
