// Package lock makes what bound programs may reach equal to what the host has: the links and addresses in the map of
// their lock, and the rules that lead to networks of the host itself, as those of containers. Whoever binds programs
// makes the lock, and whoever serves an address of their link keeps it.
package lock

import (
	"errors"
	"io/fs"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/cgroup"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Make lets sockets with the mark of an interface leave by the link of that name, with its addresses. With local they
// reach networks of the host, too. That holds for all programs that are bound to the interface.
func Make(kernel *route.Conn, m wire.Marking, ifname string, local bool) error {
	if err := cgroup.EmptyReused(func() (bool, error) { return unused(kernel) }); err != nil {
		return err
	}
	lock, err := cgroup.MakeLock()
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := lock.SetLocal(m.Mark, local); err != nil {
		return err
	}
	return sync(kernel, lock, m, ifname, func(uplink.Link) bool { return false })
}

// unused reports whether nothing is bound in this network namespace.
func unused(kernel *route.Conn) (bool, error) {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		guards, err := kernel.RulesWhere(family, func(r *route.Rule) bool { return uplink.IsGuard(*r) })
		if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) || len(guards) > 0 {
			return false, err
		}
	}
	return true, nil
}

// Keep is Make for a lock that is there, with what was said of local then. A link that was added again has another
// ifindex. wants reports whether a link is an uplink also before it has its lease.
func Keep(kernel *route.Conn, m wire.Marking, ifname string, wants func(uplink.Link) bool) error {
	lock, err := cgroup.OpenLock()
	if err != nil {
		return err
	}
	defer lock.Close()
	return sync(kernel, lock, m, ifname, wants)
}

// Remove removes links that went from the lock, if there is one: another link may get the ifindex.
func Remove(links map[int]bool) error {
	return ifThere(func(lock *cgroup.Lock) error {
		var errs []error
		for index := range links {
			errs = append(errs, lock.RemoveLink(index))
		}
		return errors.Join(errs...)
	})
}

// Shut lets nothing leave that has one of marks, if there is a lock.
func Shut(marks []uint32) error {
	return ifThere(func(lock *cgroup.Lock) error {
		var errs []error
		for _, mark := range marks {
			errs = append(errs, lock.Sync(mark, func(bool) (cgroup.Allowed, error) { return cgroup.Allowed{}, nil }))
		}
		return errors.Join(errs...)
	})
}

func ifThere(do func(*cgroup.Lock) error) error {
	lock, err := cgroup.OpenLock()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	return do(lock)
}

func sync(kernel *route.Conn, lock *cgroup.Lock, m wire.Marking, ifname string, wants func(uplink.Link) bool) error {
	var local []uplink.Local
	err := lock.Sync(m.Mark, func(withLocal bool) (cgroup.Allowed, error) {
		link, found, err := kernel.LinkByName(ifname)
		if err != nil || !found {
			return cgroup.Allowed{}, err
		}
		allowed := cgroup.Allowed{Index: link.Index}
		addresses, err := kernel.AddressesOn(unix.AF_UNSPEC, link.Index)
		for _, a := range addresses {
			allowed.Addrs = append(allowed.Addrs, a.Addr)
		}
		if err != nil || !withLocal {
			return allowed, err
		}
		local, err = localNetworks(kernel, lock, link.Index, wants)
		for _, l := range local {
			allowed.Local = append(allowed.Local, cgroup.Local(l))
		}
		return allowed, err
	})
	if err != nil {
		return err
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		ours := func(r route.Rule) bool { return uplink.IsLocal(r) && r.Mark == m.Mark && r.Mask == m.Mask }
		_, _, err := kernel.SyncRules(family, ours, uplink.LocalRules(m, local, family))
		if err != nil && !(family == unix.AF_INET6 && errors.Is(err, unix.EAFNOSUPPORT)) {
			return err
		}
	}
	return nil
}

// localNetworks are the networks of the host beside those of its uplinks, of which bound is one.
func localNetworks(kernel *route.Conn, lock *cgroup.Lock, bound int, wants func(uplink.Link) bool) ([]uplink.Local, error) {
	links, addresses, err := kernel.HostAddresses()
	if err != nil {
		return nil, err
	}
	leased := make(map[netip.Addr]bool)
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := kernel.RulesWhere(family, func(r *route.Rule) bool { return uplink.IsHost(*r) && !uplink.LeavesTable(*r) })
		if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
			return nil, err
		}
		for _, r := range rules {
			leased[r.Src.Addr()] = true
		}
	}
	uplinks := map[int]bool{bound: true}
	for _, a := range addresses {
		uplinks[a.Index] = uplinks[a.Index] || leased[a.Addr]
	}
	var errs []error
	asked := make(map[int]bool) // links that would count if no route led to the internet there
	for _, l := range uplink.LocalNetworks(links, addresses, uplinks) {
		asked[l.Index] = true
	}
	described, wide := uplink.Links(links, nil), make(defaults)
	for index, link := range links {
		leads := uplinks[index] || wants(described[index])
		if !leads && asked[index] {
			leads, err = wide.leadOn(kernel, index)
			errs = append(errs, err)
		}
		if leads {
			errs = append(errs, lock.NoteUplink(link.Name))
		} else {
			leads, err = lock.WasUplink(link.Name) // before it gets its lease or route again
			errs = append(errs, err)
		}
		uplinks[index] = leads
	}
	return uplink.LocalNetworks(links, addresses, uplinks), errors.Join(errs...)
}

// defaults are the links of default routes of any table by family, as far as they were needed: the tables may have very
// many other routes.
type defaults map[int]map[int]bool

// leadOn reports whether the internet is behind a link, by the routes of any table.
func (d defaults) leadOn(kernel *route.Conn, index int) (bool, error) {
	for family, far := range map[int]string{unix.AF_INET: "1.1.1.1", unix.AF_INET6: "2606:4700:4700::1111"} { // nothing is sent there
		_, err := kernel.Match(route.Question{Dst: netip.MustParseAddr(far), Oif: index})
		switch {
		case err == nil:
			return true, nil
		case errors.Is(err, unix.EAFNOSUPPORT):
			continue
		case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.EACCES), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENODEV):
		default:
			return false, err
		}
		if d[family] == nil {
			routes, err := kernel.Wide(family, unix.RT_TABLE_UNSPEC, uplink.Halves(family))
			if err != nil {
				return false, err
			}
			d[family] = uplink.Defaults(routes)
		}
		if d[family][index] {
			return true, nil
		}
	}
	return false, nil
}
