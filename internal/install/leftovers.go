package install

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
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
		p.table = table
		err = errors.Join(err, p.putBack(u, m), p.drop(u, link.Index))
	}
	return err
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
