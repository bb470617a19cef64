package route

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Routes returns the routes of family, AF_INET or AF_INET6, in table, or in every table with 0, in
// the kernel's order. Those whose lifetime is over are not among them, nor are cached ones.
func (c *Conn) Routes(family int, table uint32) ([]Route, error) {
	return c.routes(family, filter{table: table})
}

// RoutesOn is Routes for those that lead to the link of one ifindex, perhaps beside others, at the
// cost of these alone.
func (c *Conn) RoutesOn(family int, table uint32, index int) ([]Route, error) {
	return c.routes(family, filter{table: table, index: index})
}

// ErrorRoutes is Routes for those that answer with an error or drop packets, at the cost of these alone.
func (c *Conn) ErrorRoutes(family int, table uint32) ([]Route, error) {
	var routes []Route
	for _, typ := range []uint8{unix.RTN_BLACKHOLE, unix.RTN_UNREACHABLE, unix.RTN_PROHIBIT} {
		of, err := c.routes(family, filter{table: table, typ: typ})
		if err != nil {
			return nil, err
		}
		routes = append(routes, of...)
	}
	return routes, nil
}

// filter selects routes of a dump; what is 0 selects all.
type filter struct {
	table    uint32
	index    int // routes beside others of several links count
	protocol uint8
	typ      uint8
	below    int // routes to destinations of less bits
}

// request is the body of a request for such routes.
func (f filter) request(family int) []byte {
	b := make([]byte, unix.SizeofRtMsg)
	b[0], b[5], b[7] = byte(family), f.protocol, f.typ
	if f.table != 0 {
		b = appendUint32(b, unix.RTA_TABLE, f.table)
	}
	if f.index != 0 {
		b = appendUint32(b, unix.RTA_OIF, uint32(f.index))
	}
	return b
}

func (f filter) has(r Route) bool {
	return (f.table == 0 || r.Table == f.table) && (f.index == 0 || r.Index == f.index || r.Multipath) &&
		(f.protocol == 0 || r.Protocol == f.protocol) && (f.typ == 0 || r.Type == f.typ) && (f.below == 0 || r.Dst.Bits() < f.below)
}

func (c *Conn) routes(family int, f filter) ([]Route, error) {
	routes, err := c.dumpRoutesOf(family, f)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(routes, func(r Route) bool { return r.Expires < 0 }), nil
}

// dumpRoutes is Routes with those whose lifetime is over: the kernel takes them out when it likes,
// and has no room for others meanwhile. A long dump comes in parts, and where the table changed the
// next part of an IPv6 dump begins at a position. So a socket listens, as in dumpRules.
func (c *Conn) dumpRoutes(family int, table uint32) ([]Route, error) {
	return c.dumpRoutesOf(family, filter{table: table})
}

func (c *Conn) dumpRoutesOf(family int, f filter) ([]Route, error) {
	group := unix.RTNLGRP_IPV4_ROUTE
	switch family {
	case unix.AF_INET:
	case unix.AF_INET6:
		group = unix.RTNLGRP_IPV6_ROUTE
	default:
		return nil, fmt.Errorf("list routes of family %d: %w", family, unix.EAFNOSUPPORT)
	}
	var have, seen []Route
	quiet, err := c.undisturbed(group, func() (err error) {
		seen = append(seen, have...)
		have, err = c.dumpRoutesOnce(family, f)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list routes of table %d: %w", f.table, err)
	}
	if quiet {
		return have, nil
	}
	// A part may also come twice.
	known := make(map[Route]bool, len(have))
	var all []Route
	for _, r := range slices.Concat(have, seen) {
		if !known[r.key()] {
			known[r.key()] = true
			all = append(all, r)
		}
	}
	return all, nil
}

func (c *Conn) dumpRoutesOnce(family int, f filter) ([]Route, error) {
	msgs, err := c.dump(unix.RTM_GETROUTE, unix.RTM_NEWROUTE, f.request(family))
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EAFNOSUPPORT) || f.index != 0 && errors.Is(err, unix.ENODEV) {
		return nil, nil // no such table, family or link
	}
	if err != nil {
		return nil, err
	}
	c.read += len(msgs)
	routes := make([]Route, 0, len(msgs))
	for _, m := range msgs {
		r, cloned, err := parseRoute(m)
		if err != nil {
			return nil, err
		}
		if !cloned && r.Family == family {
			routes = append(routes, r)
		}
	}
	if err := c.resolve(routes); err != nil {
		return nil, err
	}
	// Old kernels do not filter.
	return slices.DeleteFunc(routes, func(r Route) bool { return !f.has(r) }), nil
}

// RoutesAtMost is Routes of a table if it has no more than most, and reports whether it has not.
func (c *Conn) RoutesAtMost(family int, table uint32, most int) (routes []Route, all bool, err error) {
	err = c.eachRoute(family, filter{table: table}, func(r Route) {
		if len(routes) <= most {
			routes = append(routes, r)
		}
	})
	if err != nil || len(routes) > most {
		return nil, false, err
	}
	return routes, true, c.resolve(routes)
}

// Wide returns the routes of a table to destinations of at most bits: defaults, and halves of them. Others cost no more
// than their transport, since the table may have very many.
func (c *Conn) Wide(family int, table uint32, bits int) (routes []Route, err error) {
	read := func() error {
		routes = nil
		return c.eachRoute(family, filter{table: table, below: bits + 1}, func(r Route) { routes = append(routes, r) })
	}
	if family == unix.AF_INET { // the next part of its dumps begins at a destination
		err = read()
	} else {
		_, err = c.undisturbed(unix.RTNLGRP_IPV6_ROUTE, read)
	}
	if err != nil {
		return nil, err
	}
	return routes, c.resolve(routes)
}

// EachOfOurs calls f for each route of ours in a table, or in every table with 0, one after the other as the
// kernel tells them: for tables with very many routes.
func (c *Conn) EachOfOurs(family int, table uint32, f func(Route)) error {
	return c.eachRoute(family, filter{table: table, protocol: Protocol}, f)
}

// EachRoute is EachOfOurs for the routes of all programs.
func (c *Conn) EachRoute(family int, table uint32, f func(Route)) error {
	return c.eachRoute(family, filter{table: table}, f)
}

// eachRoute calls f for each route of a dump. What changes meanwhile may be missing: the events of it come later.
func (c *Conn) eachRoute(family int, selected filter, f func(Route)) error {
	const bitsAt = 1 // of the destination, in the header of a route
	var malformed error
	err := c.each(unix.RTM_GETROUTE, unix.RTM_NEWROUTE, selected.request(family), func(body []byte) {
		c.read++
		if selected.below != 0 && len(body) > bitsAt && int(body[bitsAt]) >= selected.below {
			return
		}
		r, cloned, err := parseRoute(body)
		if err != nil {
			malformed = err
		} else if !cloned && r.Family == family && selected.has(r) && r.Expires >= 0 {
			f(r)
		}
	})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, nl.ErrDumpInterrupted) {
		err = nil // no such table or family
	}
	if err = errors.Join(err, malformed); err != nil {
		return fmt.Errorf("list routes of table %d: %w", selected.table, err)
	}
	return nil
}

// AwaitTold returns once the kernel has done all that its events have told. Of what it deletes it tells first: an IPv4 route
// is in main still, as are those that go with an address or a link, and from Linux 6.9 on a dump does not wait for the rest.
// So wait for the lock of whoever changes routes, by a change that changes nothing.
func (c *Conn) AwaitTold() error {
	nothing := NewRoute(unix.RT_TABLE_MAIN, netip.PrefixFrom(netip.AddrFrom4([4]byte{255, 255, 255, 255}), 32), netip.Addr{}, 0)
	nothing.Type, nothing.Metric = unix.RTN_BLACKHOLE, math.MaxUint32
	err := c.change(unix.RTM_DELROUTE, 0, nothing.encode())
	if err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("wait for the kernel: %w", err)
	}
	return nil
}
