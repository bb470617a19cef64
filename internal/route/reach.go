package route

import (
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"
)

// add adds r. The kernel refuses a route by a gateway that no route leads to, which may have led there when main got
// its route: it is added with the gateway on the link by force.
func (c *Conn) add(flags uint16, r Route) error {
	err := c.change(unix.RTM_NEWROUTE, flags, r.encode())
	elsewhere := r.Onlink && (r.Family == unix.AF_INET6 || r.Table != unix.RT_TABLE_MAIN) // main is to refuse 127.0.0.1
	if errors.Is(err, unix.EINVAL) && elsewhere && c.addElsewhere(flags, r) == nil {
		return nil
	}
	if !refused(err, r) {
		return err
	}
	forced := r
	if forced.Onlink = !r.Multipath; r.Multipath {
		forced = r.forceHops(true)
	}
	if c.change(unix.RTM_NEWROUTE, flags, forced.encode()) == nil {
		return nil
	}
	if r.Family == unix.AF_INET6 {
		if _, reachedErr := c.addReached(flags, r.forceHops(false)); reachedErr == nil {
			return nil
		}
	}
	return err
}

// refused reports whether the kernel refused a route since nothing leads to its gateway.
func refused(err error, r Route) bool {
	unreached := errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.EINVAL)
	return unreached && (r.Gateway.IsValid() || r.Multipath) && r.NexthopID == 0 && !r.Onlink
}

// addElsewhere adds a route by a gateway that is on its link by force, although main leads there over another link, as half
// of all addresses through a VPN does, or it is an address of this host now: the kernel refuses that for whichever table.
// An IPv6 route comes into main while main leads to the gateway; others come without the force.
func (c *Conn) addElsewhere(flags uint16, r Route) error {
	if r.Table == unix.RT_TABLE_MAIN && r.Family == unix.AF_INET6 {
		if _, err := c.addReached(flags, r); err == nil {
			return nil
		}
	}
	if r.Onlink = false; c.change(unix.RTM_NEWROUTE, flags, r.encode()) == nil {
		return nil // the table leads to the gateway by itself
	}
	_, err := c.addReached(flags, r)
	return err
}

// addReached adds r while its table leads to the gateway, or to each of several. By force the kernel refuses an IPv6 route if main
// leads to the gateway over another link; what it has it keeps. It reports whether the table led there by routes of ours.
func (c *Conn) addReached(flags uint16, r Route) (reached bool, err error) {
	var ways []Route
	for i, hop := range r.hops() {
		if !hop.Gateway.IsValid() || r.Multipath && hop.Gateway.IsLinkLocalUnicast() {
			continue
		}
		way := NewRoute(r.Table, netip.PrefixFrom(hop.Gateway, hop.Gateway.BitLen()), netip.Addr{}, hop.Index)
		if i > 0 {
			way.Metric = MetricIPv6 + uint32(i) // a place of its own, if several links have a gateway of this address
		}
		ways = append(ways, way)
	}
	if len(ways) == 0 {
		return false, unix.EHOSTUNREACH
	}
	for i, way := range ways {
		if err = c.change(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, way.encode()); err != nil {
			ways = ways[:i]
			break
		}
	}
	reached = err == nil
	if reached {
		err = c.change(unix.RTM_NEWROUTE, flags, r.encode())
	}
	for _, way := range ways {
		err = errors.Join(err, c.change(unix.RTM_DELROUTE, 0, way.encode()))
	}
	return reached, err
}

// unforced returns routes as add was asked for them: without what it forced, and with what it had to leave out, where
// wanted has them so.
func unforced(routes []Route, wanted map[Route]bool) []Route {
	var hops map[Route]string // of the routes over several next hops in wanted, by these routes without the force
	for i, r := range routes {
		if r.Multipath && !wanted[r.key()] {
			if hops == nil {
				hops = make(map[Route]string)
				for w := range wanted {
					hops[w.forceHops(false)] = w.rest
				}
			}
			if rest, ok := hops[r.forceHops(false).key()]; ok {
				routes[i].rest = rest
			}
			continue
		}
		forced := r.Onlink
		if r.Onlink = !forced; (forced || r.Gateway.IsValid()) && !wanted[routes[i].key()] && wanted[r.key()] {
			routes[i] = r
		}
	}
	return routes
}
