package install

import (
	"errors"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
)

// returned is a route that main got back, until the event of that is heard.
type returned struct {
	route.Route
	gone bool         // main would have lost it before
	went []netip.Addr // IPv4 addresses that were deleted from its link before
}

// UnheardReturns reports whether main got back routes of which the events are still to come.
func (e *Env) UnheardReturns() bool { return len(e.returned) > 0 }

// HearReturned takes over events, in order. What the kernel says of an address is newer than the events that were heard
// before: if the address is gone, its link may have been down meanwhile, and main would have lost its routes with that. So
// the events up to the one of a route that main got back decide whether it stays there. The caller has heard all that was told
// before main got it, so this is about a link that goes down and comes up within a millisecond. A program that adds the
// route again before its event is heard then loses it: the kernel tells of no addition of what is there.
func (e *Env) HearReturned(events []route.Event) error {
	var errs []error
	for _, of := range events {
		if len(e.returned) == 0 {
			break
		}
		switch of.Kind {
		case route.Overrun:
			e.returned = nil
		case route.LinkChanged, route.LinkGone:
			for i, r := range e.returned {
				e.returned[i].gone = r.gone || of.Down && r.Index == of.Index
			}
		case route.AddressChanged:
			e.returnedAddressChanged(of)
		case route.RouteChanged:
			if of.Table == unix.RT_TABLE_MAIN && !of.Deleted {
				errs = append(errs, e.returnedChanged(of))
			}
		}
	}
	return errors.Join(errs...)
}

// returnedAddressChanged notes what went with an address.
func (e *Env) returnedAddressChanged(of route.Event) {
	if !of.Deleted || !of.Addr.Is4() || !of.Network.IsValid() {
		return
	}
	for i, r := range e.returned {
		e.returned[i].gone = r.gone || r.Src == of.Addr && !of.Elsewhere || of.Bare && r.Index == of.Index && r.Family == unix.AF_INET
		if r.Index == of.Index {
			e.returned[i].went = append(e.returned[i].went, of.Addr)
		}
	}
}

// returnedChanged takes over that main got a route. If this process added it, it is as new as what the kernel said then.
func (e *Env) returnedChanged(of route.Event) error {
	at := slices.IndexFunc(e.returned, func(r returned) bool {
		return slices.ContainsFunc(of.Route.Legs(r.Index), func(l route.Route) bool { return samePlace(l, r.Route) && l.Gateway == r.Gateway })
	})
	if at < 0 {
		return nil
	}
	r := e.returned[at]
	if !e.Kernel.Made(of) { // somebody has put it back before
		e.returned[at].gone, e.returned[at].went = false, nil
		return nil
	}
	e.returned = slices.Delete(e.returned, at, at+1)
	bare, err := e.wasBare(r)
	if err != nil || !r.gone && !bare {
		return err
	}
	e.Picture.Invalidate()
	return e.Kernel.DeleteWay(r.Route)
}

// wasBare reports whether the link of an IPv4 route was without any IPv4 address: the kernel then deletes its routes.
func (e *Env) wasBare(r returned) (bool, error) {
	if r.Family != unix.AF_INET || len(r.went) == 0 {
		return false, nil
	}
	addresses, err := e.Kernel.AddressesOn(r.Family, r.Index)
	return err == nil && !slices.ContainsFunc(addresses, func(a route.Address) bool { return a.Created != 0 && !slices.Contains(r.went, a.Addr) }), err
}
