package install

import (
	"errors"
	"os"
	"slices"

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
	return errors.Join(e.ReturnRoutes(u, tables...), r.clear(), e.RemoveServers(u))
}

// ReturnRoutes gives main back what a client of the address that was killed had moved into tables.
func (e *Env) ReturnRoutes(u uplink.Uplink, tables ...uint32) error {
	link, found, err := e.Kernel.LinkByName(u.Key.Ifname)
	if err != nil || !found {
		return err
	}
	u.Settings.Routes = uplink.MoveRoutes // it may have moved them
	p := placer{env: e}
	v, ready, err := p.look(u, link)
	if err != nil || !ready {
		return err
	}
	for _, table := range tables {
		if err := p.adopt(u, v, table); err != nil {
			return err
		}
		p.taken = slices.DeleteFunc(p.taken, func(r route.Route) bool {
			return slices.ContainsFunc(v.Main, func(m route.Route) bool { return uplink.SameWay(m, r) })
		})
		p.table = table
		err = errors.Join(err, p.putBack(u, v))
		p.drop()
	}
	return err
}

// RemoveServers removes the resolver lines of an address, if their file is there.
func (e *Env) RemoveServers(u uplink.Uplink) error {
	file := u.Settings.ServersFile
	if _, err := os.Stat(file); file == "" || err != nil {
		return nil // no lines in it
	}
	return e.setLines(lines{file, u.Addr(), nil, u.Settings.PIDFile, e.Log.With("addr", u.Key.Address)})
}
