package hook

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/route"
)

// AwaitProgram and AwaitPresentProgram are the names under which a hook starts Await and AwaitPresent in the background.
const (
	AwaitProgram        = "await"
	AwaitPresentProgram = "await-ipv4"
)

const (
	awaitFor        = time.Minute      // how long a router may take to answer
	awaitPresentFor = 10 * time.Second // how long a program may take to add what it has told
)

// awaits has a process in the background wait for addresses of a link that come after the event, for lease.
func (r *Runner) awaits(program, name string, lease Lease) error {
	if err := r.memory(lease.Ifname).Write(name, lease); err != nil {
		return fmt.Errorf("wait for an address on %s: %w", lease.Ifname, err)
	}
	_, err := r.Behind([]string{"hook", "-i", lease.Ifname, program})
	return err
}

// Await waits a minute for the first IPv6 address that a router or DHCPv6 gives a link, and holds it with
// the options of the newest event.
func (r *Runner) Await(ifname string) error {
	return r.await(ifname, awaitedName, func(m memory) error {
		return each(route.Addresses6, awaitFor, func() (done bool, err error) {
			found, err := dynamic(ifname)
			if err != nil || len(found) == 0 {
				return false, err
			}
			var l Lease
			if err := m.Read(awaitedName, &l); err != nil {
				return true, missing(err) // none: the prefix was dropped meanwhile
			}
			r.until = time.Now().Add(awaitFor)
			return true, r.holdAll(l, found)
		})
	})
}

// AwaitPresent holds the IPv4 addresses that a link gets within some seconds of the newest event, with its options.
func (r *Runner) AwaitPresent(ifname string) error {
	return r.await(ifname, presentName, func(m memory) error {
		for {
			var l Lease
			if err := m.Read(presentName, &l); err != nil {
				return missing(err) // none: there was no event since
			}
			if err := m.Remove(presentName); err != nil {
				return err
			}
			if err := each(route.Addresses4, awaitPresentFor, func() (done bool, err error) {
				r.until = time.Now().Add(awaitPresentFor)
				if err := r.holdPresent(l); err != nil {
					r.Warn(err.Error())
				}
				return false, nil
			}); err != nil {
				return err
			}
		}
	})
}

// await calls wait, and forgets what was waited for. One process for a link is enough: a second one returns at once.
func (r *Runner) await(ifname, name string, wait func(m memory) error) error {
	if !isLinkName(ifname) {
		return fmt.Errorf("%q: no link can have this name", ifname)
	}
	m := r.memory(ifname)
	lock, err := m.lock(name)
	if err != nil || lock == nil {
		return err
	}
	defer lock.Close()
	return errors.Join(wait(m), m.Remove(name))
}

// each calls look, and again after each event of these groups, until it is done or the limit is over.
func each(groups route.Groups, limit time.Duration, look func() (done bool, err error)) error {
	events, err := route.Watch(groups)
	if err != nil {
		return err
	}
	defer events.Close()
	defer time.AfterFunc(limit, func() { events.Close() }).Stop()
	for {
		if done, err := look(); done || err != nil {
			return err
		}
		if _, err := events.Next(); errors.Is(err, os.ErrClosed) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// lock returns nil if another process waits for the same.
func (m memory) lock(name string) (*os.File, error) {
	if err := m.Make(); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(m.Path(name+".lock"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := outside.Again(func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) }); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, nil
		}
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return f, nil
}
