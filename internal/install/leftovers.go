package install

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/remember"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// RemoveLeftovers removes what a client of the address left that was killed. Main gets back what that client had moved.
func (e *Env) RemoveLeftovers(u uplink.Uplink) error {
	r := Rules{Uplink: u, env: e}
	if err := r.adopt(); err != nil {
		return err
	}
	var tables []uint32
	for table, whole := range r.tables {
		if whole {
			tables = append(tables, table)
		}
	}
	return errors.Join(e.ReturnRoutes(u, tables...), r.clear(), e.removeRoutes(u), e.removeEndpoint(u), e.RemoveServers(u))
}

// removeRoutes empties the tables with routes of ours from the address: a client that was killed before its rules stood
// left no rule that leads there.
func (e *Env) removeRoutes(u uplink.Uplink) error {
	if shared, err := e.OtherHolder(u.Key); err != nil || shared {
		return err
	}
	tables := make(map[uint32]bool)
	err := e.Kernel.EachOfOurs(u.Family(), unix.RT_TABLE_UNSPEC, func(r route.Route) {
		if r.Src == u.Addr() && r.Table != unix.RT_TABLE_MAIN {
			tables[r.Table] = true
		}
	})
	for table := range tables {
		err = errors.Join(err, e.Kernel.FlushTable(u.Family(), table))
	}
	return errors.Join(err, e.removeMoved(u))
}

// removeMoved removes what a client noted that was killed before it moved anything: its rules come first, and without
// rules nothing was moved.
func (e *Env) removeMoved(u uplink.Uplink) error {
	link, found, err := e.Kernel.LinkByName(u.Key.Ifname)
	if err != nil || !found {
		return err
	}
	m, err := movedOn(u.Family(), link.Index)
	if err != nil {
		return err
	}
	return m.remove(u)
}

// ReturnRoutes gives main back what a client of the address that was killed had moved into tables.
func (e *Env) ReturnRoutes(u uplink.Uplink, tables ...uint32) error {
	link, found, err := e.Kernel.LinkByName(u.Key.Ifname)
	if err != nil || !found {
		return err
	}
	u.Settings.Routes = uplink.MoveRoutes // it may have moved them
	p := placer{env: e}
	m, up, _, err := p.look(u, link)
	if err != nil || !up {
		return err
	}
	for _, table := range tables {
		err = errors.Join(err, p.adopt(u, &m, table))
		emptied, emptiedErr := p.emptied(u, m, table)
		err = errors.Join(err, emptiedErr)
		p.table, p.wasDown = table, emptied
		err = errors.Join(err, p.putBack(u, m), p.drop(u, link.Index))
	}
	return err
}

// emptied reports whether the kernel has emptied a table of a killed client: the link was set down, as when it became a
// port of a bridge, and main would have lost what was taken, too. An address that is left says that it came up for routes
// again, and then another program may have emptied the table, unless the link-local address tells.
func (p *placer) emptied(u uplink.Uplink, m uplink.Main, table uint32) (bool, error) {
	if !p.upAnew && slices.ContainsFunc(m.Addresses, func(a uplink.Address) bool { return a.Addr.Is4() || !a.Addr.IsLinkLocalUnicast() }) {
		return false, nil
	}
	have, err := p.env.Kernel.Routes(u.Family(), table)
	return err == nil && !slices.ContainsFunc(have, func(r route.Route) bool { return ours(r) && r.Index == m.Index }), err
}

// Served reports whether a client serves an address now. A client has its name before it writes anything down, so whoever
// finds what was written down asks afterwards.
type Served func(netip.Addr) (bool, error)

// ReturnOrphans gives main back what clients that were killed had moved into tables, of addresses that no client serves.
// Their rules may be gone, and with an IPv6 address its routes have lost their sources: only the files tell of them.
func (e *Env) ReturnOrphans(served Served) error {
	all, err := remember.Own("moved")
	if err != nil {
		return err
	}
	links, err := all.Files()
	errs := []error{err}
	for _, of := range links {
		var index, family int
		if n, err := fmt.Sscanf(of.Name(), "%d-%d", &index, &family); n == 2 && err == nil {
			errs = append(errs, e.returnOrphansOf(family, index, served))
		}
	}
	return errors.Join(errs...)
}

// returnOrphansOf is ReturnOrphans for one link. What was moved of a link that is gone would be gone, too.
func (e *Env) returnOrphansOf(family, index int, served Served) error {
	m, err := movedOn(family, index)
	if err != nil {
		return err
	}
	files, err := m.dir.Files()
	if err != nil {
		return err
	}
	var errs []error
	for _, file := range files {
		addr, err := netip.ParseAddr(file.Name())
		if err != nil {
			continue
		}
		have, known, err := m.readName(file.Name())
		link, found, linkErr := e.Kernel.LinkByIndex(index)
		isServed, servedErr := served(addr)
		if err = errors.Join(err, linkErr, servedErr); err != nil || !known || isServed {
			errs = append(errs, err)
			continue
		}
		u := uplink.Uplink{Key: wire.Key{Family: wire.Family(family), Ifname: link.Name, Address: file.Name()}, Network: netip.PrefixFrom(addr, addr.BitLen())}
		if !found {
			errs = append(errs, m.remove(u))
			continue
		}
		errs = append(errs, e.ReturnRoutes(u, have.Table))
	}
	return errors.Join(errs...)
}

// RemoveServers removes the resolver lines of an address, if their file is there.
func (e *Env) RemoveServers(u uplink.Uplink) error {
	if err := e.removeResolved(u); err != nil {
		return err
	}
	file := u.Settings.ServersFile
	if !HasServers(file) {
		return nil // no lines in it
	}
	if shared, err := e.OtherHolder(u.Key); err != nil || shared {
		return err // the lines may be those of the other client
	}
	return e.setLines(lines{file: file, addr: u.Addr(), pidFile: u.Settings.PIDFile, log: e.Log.With("addr", u.Key.Address)})
}
