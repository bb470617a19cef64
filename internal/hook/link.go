package hook

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/route"
)

// addresses returns the wanted addresses of a link.
func addresses(ifname string, family int, wanted func(route.Address) bool) (list []route.Address, err error) {
	err = onLink(ifname, func(kernel *route.Conn, index int) error {
		all, err := kernel.AddressesOn(family, index)
		for _, a := range all {
			if wanted(a) && len(list) < maxAddresses {
				list = append(list, a)
			}
		}
		return err
	})
	return list, err
}

// onLink calls f with the ifindex of a link, if the link exists.
func onLink(ifname string, f func(kernel *route.Conn, index int) error) error {
	kernel, err := route.Dial()
	if err != nil {
		return err
	}
	defer kernel.Close()
	link, found, err := kernel.LinkByName(ifname)
	if err != nil || !found {
		return err
	}
	return f(kernel, link.Index)
}

// dynamic returns the IPv6 addresses that routers and DHCPv6 gave a link, without temporary ones.
func dynamic(ifname string) (list []netip.Addr, err error) {
	const others = unix.IFA_F_PERMANENT | unix.IFA_F_TEMPORARY | unix.IFA_F_DADFAILED
	found, err := addresses(ifname, unix.AF_INET6, func(a route.Address) bool {
		return a.Scope == unix.RT_SCOPE_UNIVERSE && a.Flags&others == 0
	})
	for _, a := range found {
		list = append(list, a.Addr)
	}
	return list, err
}

// removeAddress deletes an address from a link.
func removeAddress(ifname string, addr netip.Addr) error {
	family := unix.AF_INET
	if addr.Is6() {
		family = unix.AF_INET6
	}
	return onLink(ifname, func(kernel *route.Conn, index int) error {
		all, err := kernel.AddressesOn(family, index)
		for _, a := range all {
			if a.Addr == addr {
				err = errors.Join(err, kernel.DeleteAddress(a))
			}
		}
		return err
	})
}

// AwaitProgram is the name under which a hook starts Await in the background.
const AwaitProgram = "await"

// awaitFor is how long a router may take to answer.
const awaitFor = time.Minute

// Await waits a minute for the first IPv6 address that a router or DHCPv6 gives a link, and holds it with
// the options of the newest event. One process for a link is enough: a second one returns at once.
func (r *Runner) Await(ifname string) error {
	if !isLinkName(ifname) {
		return fmt.Errorf("%q: no link can have this name", ifname)
	}
	m := r.memory(ifname)
	lock, err := m.lock()
	if err != nil || lock == nil {
		return err
	}
	defer lock.Close()
	events, err := route.Watch(route.Addresses6)
	if err != nil {
		return err
	}
	defer time.AfterFunc(awaitFor, func() { events.Close() }).Stop()
	for {
		found, err := dynamic(ifname)
		if err != nil {
			return err
		}
		if len(found) > 0 {
			var l Lease
			if err := m.Read(awaitedName, &l); err != nil {
				return missing(err) // none: the prefix was dropped meanwhile
			}
			r.until = time.Now().Add(awaitFor)
			return errors.Join(r.holdAll(l, found), m.Remove(awaitedName))
		}
		if _, err := events.Next(); errors.Is(err, os.ErrClosed) {
			return m.Remove(awaitedName)
		} else if err != nil {
			return err
		}
	}
}

// lock returns nil if another process waits for an address of the link.
func (m memory) lock() (*os.File, error) {
	if err := m.Make(); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(m.Path(awaitedName+".lock"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
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

// missing returns nil for fs.ErrNotExist.
func missing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
