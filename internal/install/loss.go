package install

import (
	"errors"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// noteLoss finds out what went with the link. The kernel empties all tables when a link goes down, and main gets back
// its network only. The table keeps the rest until main has routes to the same destinations again. What was taken out of
// main is no longer main's then: it would have gone, too. empty reports that the table has no route over the link.
func (p *placer) noteLoss(u uplink.Uplink, m *uplink.Main, empty bool) {
	empty = empty && len(p.last)+len(p.taken) > 0
	others := m.Taken[min(len(p.taken), len(m.Taken)):]
	if p.wasDown || empty {
		p.lose(p.wasDown || p.upAnew || p.bare(u, *m))
	}
	p.noteStrange(others)
	inMain := func(r route.Route) bool { return slices.ContainsFunc(m.Routes, r.Equal) }
	p.others = slices.Concat(others, slices.DeleteFunc(p.others, func(r route.Route) bool { return !inMain(r) }))
	m.Taken = slices.Concat(p.taken, p.others)
	p.wasDown, p.upAnew, p.went, p.newer = false, false, nil, nil
	now := slices.Concat(slices.DeleteFunc(slices.Clone(m.Routes), func(r route.Route) bool { return !u.Carries(r) }), others)
	p.lost = slices.DeleteFunc(p.lost, func(r route.Route) bool {
		return slices.ContainsFunc(now, func(l route.Route) bool { return sameDestination(l, r) })
	})
	p.last = nil // most often it stays that: a thousand addresses keep nothing
	for _, r := range now {
		// What was advertised comes with an advertisement, or was over, and the kernel's comes with an address.
		if r.Expires == 0 && r.Protocol != unix.RTPROT_KERNEL && len(now) <= maxLost {
			p.last = append(p.last, r)
		}
	}
	m.Lost = p.lost
}

// noteStrange notes of what others of the link took, and this placer sees for the first time, that it came to main after the last
// event that was heard: the event of that tells what it replaced.
func (p *placer) noteStrange(others []route.Route) {
	adopted := p.judging != nil // which says nothing of what this process has seen
	for _, r := range others {
		known := slices.ContainsFunc(p.taken, r.Equal) || !adopted && slices.ContainsFunc(p.others, r.Equal)
		if !known && p.env.takers.fresh(r) {
			p.strange = append(p.strange, r)
		}
	}
}

// lose notes that main has lost its routes over the link, and would have lost those that were taken.
func (p *placer) lose(taken bool) {
	p.lost = append(p.lost, p.last...)
	p.last = nil
	if taken {
		gone := slices.DeleteFunc(slices.Clone(p.taken), p.outlives)
		p.env.order.forget(gone)
		p.env.order.renew(slices.DeleteFunc(p.again, func(r route.Route) bool { return !p.outlives(r) }))
		p.again = nil
		p.lost = append(p.lost, gone...)
		p.taken = slices.DeleteFunc(p.taken, func(r route.Route) bool { return !p.outlives(r) })
	}
}

// outlives reports whether a route was taken after all losses that were heard.
func (p *placer) outlives(r route.Route) bool {
	return p.isFresh(r) || slices.ContainsFunc(p.newer, r.Equal)
}

// isFresh reports whether events that are heard now may be from before a route was taken.
func (p *placer) isFresh(r route.Route) bool { return slices.ContainsFunc(p.fresh, r.Equal) }

// Past is an event with its place among all that are heard at once.
type Past struct {
	At int
	route.Event
}

// hear takes over what happened to the link and to main's routes over it, and which addresses were deleted from links,
// all in order. back are addresses that were added again.
func (p *placer) hear(u uplink.Uplink, index int, history, left []Past, back []netip.Addr) error {
	var errs []error
	changed, had := false, len(p.lost)
	p.doubt(u, history)
	for len(history)+len(left) > 0 {
		var lost bool
		if len(left) == 0 || len(history) > 0 && history[0].At < left[0].At {
			var err error
			lost, err = p.hearOne(u, index, history[0].Event)
			errs, history = append(errs, err), history[1:]
		} else {
			var err error
			lost, err = p.addressWent(u, index, left[0].Event, slices.Contains(back, left[0].Addr))
			errs, left = append(errs, err), left[1:]
		}
		changed = changed || lost
	}
	if changed {
		errs = append(errs, p.writeTaken(u, index))
	}
	if changed || len(p.lost) != had {
		p.recompare(u.Family())
	}
	return errors.Join(errs...)
}

// forgetLost drops routes that nobody will put back.
func (p *placer) forgetLost(family int, drop func(route.Route) bool) {
	had := len(p.lost)
	if p.lost = slices.DeleteFunc(p.lost, drop); len(p.lost) != had {
		p.recompare(family)
	}
}

// recompare has the table compared even if main is as it was. That of a large main is filled for long, and follows changes.
func (p *placer) recompare(family int) {
	if p.env.Picture.largeMain(family) == nil {
		p.seen = version{link: -1} // which no main has
	}
}

// doubt has the table compared if another program added a default route to main, which may have replaced what an address of the
// link has taken, and be deleted already.
func (p *placer) doubt(u uplink.Uplink, history []Past) {
	if u.Settings.Routes == uplink.MoveRoutes && slices.ContainsFunc(history, func(e Past) bool {
		return e.Route != nil && !e.Deleted && e.Route.Dst.Bits() == 0 && !p.env.Kernel.Made(e.Event)
	}) {
		p.recompare(u.Family())
	}
}

// hearOne takes over one event of the link or of main's routes over it, and reports whether that changed what was taken.
// Main may have been read since, so that it does not show all of that: what somebody put back is not lost any more, even
// if he has deleted it again, what somebody deleted or replaced was not lost with the link that was down later, and what
// came into the place of a route that was taken replaced it, even if the holder of another address has taken it.
func (p *placer) hearOne(u uplink.Uplink, index int, e route.Event) (changed bool, err error) {
	had := len(p.taken)
	switch {
	case e.Route == nil:
		p.newer = slices.Clone(p.fresh)
		p.lose(true)
	case e.Deleted:
		p.hearTaken(e)
		p.strange = slices.DeleteFunc(p.strange, e.Route.Equal)
		p.last = slices.DeleteFunc(p.last, e.Route.Equal)
		if e.Port != 0 && !p.env.Kernel.Made(e) { // else it went with the link, or was taken
			p.lost = slices.DeleteFunc(p.lost, e.Route.Equal)
			changed, err = p.deletedByOther(u, index, *e.Route)
		}
	case e.Protocol != route.Protocol:
		p.lost = slices.DeleteFunc(p.lost, func(r route.Route) bool { return sameDestination(r, *e.Route) })
		p.last = slices.DeleteFunc(p.last, func(r route.Route) bool { return e.Replaced && samePlace(r, *e.Route) })
		if e.Beside() {
			p.others = append(p.others, *e.Route)
			break
		}
		strange := slices.ContainsFunc(p.strange, e.Route.Equal)
		if strange || !slices.ContainsFunc(slices.Concat(p.others, p.taken), e.Route.Equal) { // what was taken and is added again replaces nothing
			p.keepTaken(func(r route.Route) bool { return !samePlace(r, *e.Route) || r.Equal(*e.Route) || p.isFresh(r) })
		}
	}
	return changed || len(p.taken) != had, err
}

// deletedByOther takes over that another process deleted a route of main, and reports whether that changed what is written
// down. If it had been taken somebody had put it back. It keeps its place beside others if the holder of another address has
// taken it, who writes that down before.
func (p *placer) deletedByOther(u uplink.Uplink, index int, r route.Route) (changed bool, err error) {
	taken := slices.ContainsFunc(p.taken, r.Equal)
	if place, _ := p.env.order.find(r); u.Settings.Routes != uplink.MoveRoutes || p.isFresh(r) || !taken && place < 0 {
		return false, nil
	}
	others, err := p.takenByOthers(u, index)
	p.taken = slices.DeleteFunc(p.taken, r.Equal)
	if err == nil && slices.ContainsFunc(others, r.Equal) {
		p.others = append(p.others, r)
		return taken, nil
	}
	p.env.order.forget([]route.Route{r})
	return true, err
}

func sameDestination(a, b route.Route) bool {
	return a.Dst == b.Dst && a.From == b.From && a.TOS == b.TOS
}

// hearTaken takes over that main lost a route. If this process took it, which may be several times, what is heard from
// here on is newer.
func (p *placer) hearTaken(e route.Event) {
	if !p.env.Kernel.Made(e) { // as of the IPv6 routes over a link that goes down
		return
	}
	for _, waiting := range []*[]route.Route{&p.spent, &p.fresh} {
		if at := slices.IndexFunc(*waiting, e.Route.Equal); at >= 0 {
			*waiting = slices.Delete(*waiting, at, at+1)
			return
		}
	}
}

// addressWent notes what main would have lost of what was taken, now that an address was deleted from a link, and reports
// whether that is any of it. The kernel keeps what has it as its source while the address is anywhere, also by a route of
// type local, and when such a route is deleted. back says that it was added again; of that the event may be still to come.
func (p *placer) addressWent(u uplink.Uplink, index int, e route.Event, back bool) (bool, error) {
	if e.Addr.Is4() != u.Addr().Is4() || !e.Network.IsValid() {
		return false, nil
	}
	here, had := e.Index == index, len(p.taken)
	if here && e.Bare { // its routes are gone, whatever it has been given since
		p.newer = slices.Clone(p.fresh)
		p.lose(true)
	}
	if e.Elsewhere {
		return len(p.taken) != had, nil
	}
	if here && e.Addr.Is4() {
		p.went, p.newer = append(p.went, e.Addr), slices.Clone(p.fresh)
	}
	source := func(r route.Route) bool {
		return r.Src == e.Addr && (here || e.Addr.Is4()) && !p.isFresh(r)
	}
	other := func(r route.Route) bool { return e.Addr.Is4() && r.Src == e.Addr && e.Addr != u.Addr() }
	if !slices.ContainsFunc([][]route.Route{p.taken, p.last, p.lost, p.others}, func(known []route.Route) bool {
		return slices.ContainsFunc(known, source) || slices.ContainsFunc(known, other)
	}) {
		return len(p.taken) != had, nil
	}
	addresses, err := p.env.Kernel.Addresses(u.Family())
	there, routed := false, false
	for _, a := range addresses {
		there, routed = there || a.Addr == e.Addr, routed || a.Addr == e.Addr && a.Created == 0
	}
	if err != nil || routed {
		return len(p.taken) != had, err
	}
	if !back && !there {
		p.last, p.lost = slices.DeleteFunc(p.last, other), slices.DeleteFunc(p.lost, other)
		p.others = slices.DeleteFunc(p.others, other)
		p.recompare(u.Family())
	}
	if !slices.ContainsFunc(p.taken, source) {
		return len(p.taken) != had, nil
	}
	left := uplink.WithoutSource(p.taken, source)
	p.env.order.forget(slices.DeleteFunc(p.taken, func(r route.Route) bool { return slices.ContainsFunc(left, r.Equal) }))
	p.taken = left
	return true, nil
}

// bare reports whether the link has been without any IPv4 address since the last look, for all that is known. The kernel
// then deletes all IPv4 routes over it.
func (p *placer) bare(u uplink.Uplink, m uplink.Main) bool {
	local := slices.ContainsFunc(m.Addresses, func(a uplink.Address) bool { return a.Local }) // such a link may have been without for long
	return u.Addr().Is4() && (!local || len(p.went) > 0) &&
		!slices.ContainsFunc(m.Addresses, func(a uplink.Address) bool { return !a.Local && !slices.Contains(p.went, a.Addr) })
}

// wentUnheard reports whether the link was down and nothing was heard of that, as when events were lost: the table is empty,
// and the link-local address of IPv6 is not the one from when the routes were taken.
func (p *placer) wentUnheard(u uplink.Uplink, m uplink.Main) (bool, error) {
	if len(p.taken) == 0 {
		return false, nil
	}
	files, err := movedOn(u.Family(), m.Index)
	if err != nil {
		return false, err
	}
	before, known, err := files.read(u)
	if err != nil || !known || before.Since.Link == 0 {
		return false, err
	}
	now, err := p.since(u, m.Index)
	if err != nil || now.Link == before.Since.Link {
		return false, err
	}
	have, err := p.env.Kernel.Routes(u.Family(), p.table)
	return err == nil && !slices.ContainsFunc(have, func(r route.Route) bool { return ours(r) && r.Index == m.Index }), err
}

// standing drops what was taken and has been replaced in main since. had is how much was taken before.
func (p *placer) standing(u uplink.Uplink, m uplink.Main, had int) error {
	stands := p.stands(m)
	stood := func(r route.Route) bool { return slices.ContainsFunc(stands, r.Equal) }
	p.keepTaken(func(r route.Route) bool { return stood(r) || slices.ContainsFunc(m.Routes, r.Equal) })
	for _, r := range p.taken {
		if !stood(r) {
			p.again = append(p.again, r)
		}
	}
	p.taken = slices.DeleteFunc(p.taken, func(r route.Route) bool { return !stood(r) }) // what main has again keeps its place
	judged := p.judging == nil || p.unbroken || len(p.taken) == 0
	p.judging = nil
	if len(p.taken) == had && judged {
		return nil
	}
	return p.writeTaken(u, m.Index)
}

// keepTaken drops what was taken but for some routes. What is dropped has been replaced: if it comes again, it is a newer route
// and has not stood beside the others.
func (p *placer) keepTaken(keep func(route.Route) bool) {
	p.env.order.forget(slices.DeleteFunc(slices.Clone(p.taken), keep))
	p.taken = slices.DeleteFunc(p.taken, func(r route.Route) bool { return !keep(r) })
}

// stands returns what main would have still of what was taken. What others took replaces nothing when they give it back.
func (p *placer) stands(m uplink.Main) []route.Route {
	m.Taken = slices.Concat(p.taken, p.others)
	return slices.DeleteFunc(m.Standing(), func(r route.Route) bool { return !slices.ContainsFunc(p.taken, r.Equal) })
}
