package install

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/remember"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// moved is where the holders of a link's addresses write down what they took out of main. The copy in a table does
// not tell all that main had, and a holder that was killed leaves its routes to the next one.
type moved struct {
	dir       remember.Dir
	namespace uint64 // see remember.Namespace
}

// movedRoutes is what a file has. That there is one tells that a holder of this version was there.
type movedRoutes struct {
	Namespace uint64        `json:"namespace"`
	Table     uint32        `json:"table"` // of the lease
	Routes    []route.Route `json:"routes"`
	Order     []route.Route `json:"order"` // all that main had in the places of these
	Since     witnesses     `json:"since"`
}

// witnesses tell the next holder whether main would have lost what was taken while nobody looked. The kernel makes the
// link-local IPv6 address of a link anew whenever the link comes up. Without one nobody knows. A table that is empty then
// tells that the link was down, or that another program has emptied it.
type witnesses struct {
	Link    uint32 `json:"link"`    // when the last link-local IPv6 address came, as in route.Address; 0: there is none
	Address uint32 `json:"address"` // when the address came
}

func (w witnesses) known() bool { return w.Link != 0 && w.Address != 0 }

// since finds out what witnesses say of a link and the address of an uplink. While nobody has judged what main would have
// lost, they say what they said before: another client may have to, if this one is killed.
func (p *placer) since(u uplink.Uplink, index int) (w witnesses, err error) {
	if p.judging != nil {
		return *p.judging, nil
	}
	addresses, err := p.env.Kernel.AddressesOn(unix.AF_UNSPEC, index)
	for _, a := range addresses {
		switch {
		case a.Addr == u.Addr():
			w.Address = a.Created
		case a.Addr.Is6() && a.Addr.IsLinkLocalUnicast():
			w.Link = max(w.Link, a.Created)
		}
	}
	return w, err
}

// MovedLinks are the links that clients before this process have moved default routes of.
func MovedLinks() (map[int]bool, error) {
	all, err := remember.Own("moved")
	if err != nil {
		return nil, err
	}
	folders, err := all.Files()
	errs := []error{err}
	links := make(map[int]bool)
	for _, of := range folders {
		var index, family int
		if n, err := fmt.Sscanf(of.Name(), "%d-%d", &index, &family); n < 2 || err != nil {
			continue
		}
		m, err := movedOn(family, index)
		errs = append(errs, err)
		if err != nil {
			continue
		}
		taken, err := m.readOthers(uplink.Uplink{})
		if len(taken) > 0 {
			links[index] = true
		}
		errs = append(errs, err)
	}
	return links, errors.Join(errs...)
}

// takenByAll returns the routes that were taken for all other addresses of the family of an uplink.
func takenByAll(u uplink.Uplink) (all []route.Route, err error) {
	links, err := MovedLinks()
	errs := []error{err}
	for index := range links {
		m, err := movedOn(u.Family(), index)
		if err == nil {
			var routes []route.Route
			routes, err = m.readOthers(u)
			all = append(all, routes...)
		}
		errs = append(errs, err)
	}
	return all, errors.Join(errs...)
}

func movedOn(family, index int) (moved, error) {
	dir, err := remember.Own("moved", strconv.Itoa(index)+"-"+strconv.Itoa(family))
	if err != nil {
		return moved{}, err
	}
	namespace, err := remember.Namespace()
	return moved{dir, namespace}, err
}

// write keeps what was taken for an address, and the order of its places. The link's name is not in the file's, since
// links are renamed while nobody looks.
func (m moved) write(u uplink.Uplink, taken movedRoutes) error {
	taken.Namespace = m.namespace
	return m.dir.Write(u.Key.Address, taken)
}

// read returns what was taken for an address, and whether that is known.
func (m moved) read(u uplink.Uplink) (movedRoutes, bool, error) { return m.readName(u.Key.Address) }

func (m moved) readName(name string) (have movedRoutes, known bool, err error) {
	err = m.dir.Read(name, &have)
	if errors.Is(err, fs.ErrNotExist) || err == nil && have.Namespace != m.namespace { // that of a namespace that is gone
		return movedRoutes{}, false, nil
	}
	return have, err == nil, err
}

// others returns what was taken for each of the other addresses of the link.
func (m moved) others(u uplink.Uplink) (all []movedRoutes, err error) {
	files, err := m.dir.Files()
	if err != nil {
		return nil, err
	}
	for _, e := range files {
		if e.Name() == u.Key.Address || e.Name()[0] == '.' {
			continue
		}
		have, _, err := m.readName(e.Name())
		if err != nil {
			return all, err
		}
		all = append(all, have)
	}
	return all, nil
}

// readOthers returns the routes that were taken for the other addresses of the link.
func (m moved) readOthers(u uplink.Uplink) (routes []route.Route, err error) {
	all, err := m.others(u)
	for _, have := range all {
		routes = append(routes, have.Routes...)
	}
	return routes, err
}

// standing returns the routes that were taken for an address, without those that were replaced in main while nobody looked,
// by routes that the holder of another address of the link has taken since: neither has seen the other's route.
func (m moved) standing(u uplink.Uplink, mine movedRoutes) ([]route.Route, error) {
	all, err := m.others(u)
	return slices.DeleteFunc(slices.Clone(mine.Routes), func(r route.Route) bool {
		return slices.ContainsFunc(all, func(have movedRoutes) bool {
			return !slices.ContainsFunc(have.Order, r.Equal) && slices.ContainsFunc(have.Routes, func(o route.Route) bool {
				return samePlace(o, r) && !slices.ContainsFunc(mine.Order, o.Equal)
			})
		})
	}), err
}

func (m moved) remove(u uplink.Uplink) error {
	err := m.dir.Remove(u.Key.Address)
	m.dir.RemoveEmpty()
	return err
}

// adoptOlder finds what a holder of a version before took out of main, which left no file and had no rule to main
// before that to the network: routes of the table that nobody gave. It also took networks and static routes. These
// main gets back.
func (p *placer) adoptOlder(u uplink.Uplink, m uplink.Main, table uint32) (taken []route.Route, err error) {
	have, err := p.env.Kernel.Routes(u.Family(), table)
	if err != nil {
		return nil, err
	}
	given := u.Given(m, table)
	var inMain, others []route.Route
	for _, r := range m.Routes {
		inMain = append(inMain, r.Legs(m.Index)...)
	}
	for _, r := range have {
		same := func(o route.Route) bool { return uplink.SameWay(o, r) }
		if !ours(r) || r.Index != m.Index || r.Src != u.Addr() || slices.ContainsFunc(inMain, same) ||
			r.Gateway.IsValid() && slices.ContainsFunc(given, same) {
			continue
		}
		r = asBefore(u, r)
		if r.Dst.Bits() == 0 {
			taken = append(taken, r)
			continue
		}
		others = append(others, r)
	}
	return taken, p.restore(u, others)
}

// asBefore is a route of the table as main may have had it. The network of the link was the kernel's; of others the
// protocol is not known any more.
func asBefore(u uplink.Uplink, r route.Route) route.Route {
	r = r.In(unix.RT_TABLE_MAIN, r.Src)
	r.Protocol = unix.RTPROT_BOOT
	if r.Dst == u.Network.Masked() && !r.Gateway.IsValid() {
		r.Protocol = unix.RTPROT_KERNEL
	}
	return r
}

// order remembers in which order main had the routes of one place. The kernel takes the first of them, and those
// that were moved have to come back where they stood.
type order struct {
	places [][]route.Route
	before []route.Route // what clients of other addresses had taken before, so that main did not show it
}

func samePlace(a, b route.Route) bool { return PlaceOf(a) == PlaceOf(b) }

// note takes over the order of default routes of main, among those that are known. What main has lost since stays
// where it was.
func (o *order) note(routes []route.Route) {
	var next []route.Route // that follow in routes
	for _, r := range slices.Backward(routes) {
		if r.Dst.Bits() != 0 {
			continue
		}
		i := slices.IndexFunc(o.places, func(p []route.Route) bool { return samePlace(p[0], r) })
		switch {
		case i < 0:
			o.places = append(o.places, []route.Route{r})
		case !slices.ContainsFunc(o.places[i], r.Equal):
			before := func(known route.Route) bool { return slices.ContainsFunc(next, known.Equal) }
			at := slices.IndexFunc(o.places[i], before)
			if at < 0 {
				at = len(o.places[i])
			}
			o.places[i] = slices.Insert(o.places[i], at, r)
		}
		next = append(next, r)
	}
}

// forget drops routes that main would have lost: if they come again, they come behind the others.
func (o *order) forget(routes []route.Route) {
	for i := range o.places {
		o.places[i] = slices.DeleteFunc(o.places[i], func(r route.Route) bool { return slices.ContainsFunc(routes, r.Equal) })
	}
	o.places = slices.DeleteFunc(o.places, func(p []route.Route) bool { return len(p) == 0 })
}

// renew puts routes behind the others of their places: main had lost them, and has got them again since.
func (o *order) renew(routes []route.Route) {
	for _, r := range routes {
		if place, at := o.find(r); place >= 0 {
			o.places[place] = append(slices.Delete(o.places[place], at, at+1), r)
		}
	}
}

// of returns the routes of the places that routes have, in order.
func (o *order) of(routes []route.Route) (all []route.Route) {
	for _, p := range o.places {
		if slices.ContainsFunc(routes, func(r route.Route) bool { return samePlace(p[0], r) }) {
			all = append(all, p...)
		}
	}
	return all
}

// around divides routes that main gets back into those that belong in front of what main has now in their places, and
// those behind, each in order: the kernel adds a route there or there. What stood between two that main has goes behind
// them, so that the first one stays that.
func (o *order) around(now, routes []route.Route) (front, behind []route.Route) {
	routes = slices.Clone(routes)
	slices.SortStableFunc(routes, func(a, b route.Route) int {
		placeA, atA := o.find(a)
		placeB, atB := o.find(b)
		return cmp.Or(placeA-placeB, atA-atB)
	})
	for _, r := range routes {
		if o.inFront(r, now) {
			front = append(front, r)
		} else {
			behind = append(behind, r)
		}
	}
	return front, behind
}

// find returns where r stood: its place, and where in that; -1 and 0 if that is not known.
func (o *order) find(r route.Route) (place, at int) {
	for i, p := range o.places {
		if at := slices.IndexFunc(p, r.Equal); at >= 0 {
			return i, at
		}
	}
	return -1, 0
}

// inFront reports whether r stood in front of the routes that main has now in its place. One that is not known came after r
// was taken.
func (o *order) inFront(r route.Route, now []route.Route) bool {
	place, at := o.find(r)
	if place < 0 {
		return false
	}
	earlier := slices.Concat(o.before, o.places[place][:at])
	return slices.ContainsFunc(now, func(n route.Route) bool { return samePlace(n, r) }) &&
		!slices.ContainsFunc(now, func(n route.Route) bool { return slices.ContainsFunc(earlier, n.Equal) })
}

// giveBack gives main back what was moved. It looks once more if main cannot be read, since nobody comes back to it, and then
// does without: main may get a route then that it would have lost meanwhile.
func (i *Installation) giveBack(u uplink.Uplink) {
	m, up, ready, err := i.tryView(u)
	if err != nil {
		m, up, ready, err = i.tryView(u)
	}
	switch {
	case err != nil:
		err = i.routes.restore(u, i.routes.taken)
	case up:
		if err = i.routes.putBack(u, m); !ready { // of an address that went the kernel refuses some, as it deletes them
			err = nil
		}
	}
	i.warn("restore routes in main", err)
	i.warn("forget what was moved", i.routes.drop(u, i.Index))
}

// Stood is where the last of the routes stood that main has lost to the table, among those of its place; -1: it has lost none. At the
// end of all, main gets them back in this order: the kernel adds a route in front of its place or behind, and none in between.
func (i *Installation) Stood() int {
	last := -1
	for _, r := range i.routes.taken {
		_, at := i.env.order.find(r)
		last = max(last, at)
	}
	return last
}

// drop clears what is known of a table that is being emptied.
func (p *placer) drop(u uplink.Uplink, index int) error {
	before := *p
	*p = placer{env: p.env}
	p.env.takers.end(p, u, index)
	p.env.order.forget(before.taken) // else main had them back
	if u.Settings.Routes != uplink.MoveRoutes || before.table == 0 || before.succeeded(u, index) {
		return nil
	}
	files, err := movedOn(u.Family(), index)
	if err != nil {
		return err
	}
	return files.remove(u)
}
