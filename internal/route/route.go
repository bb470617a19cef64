package route

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// flushRounds bounds FlushTable: one round deletes, the next finds nothing.
const flushRounds = 5

// FlushTable deletes the routes of family, AF_INET or AF_INET6, in table that carry our Protocol.
func (c *Conn) FlushTable(family int, table uint32) error {
	for range flushRounds {
		routes, err := c.ourRoutes(family, table)
		if err != nil {
			return fmt.Errorf("list routes of table %d: %w", table, err)
		}
		if len(routes) == 0 {
			return nil
		}
		for _, m := range routes {
			// The message as it came names all that tells the route from its neighbours.
			err := c.change(unix.RTM_DELROUTE, 0, m)
			// Routes go by themselves, with their link for one.
			if err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("delete route of table %d: %w", table, err)
			}
		}
	}
	return fmt.Errorf("flush table %d: another program fills it with routes of protocol %d", table, Protocol)
}

// ourRoutes returns the messages of the routes in table that carry our Protocol.
func (c *Conn) ourRoutes(family int, table uint32) (routes [][]byte, err error) {
	request := make([]byte, unix.SizeofRtMsg)
	request[0], request[5] = byte(family), Protocol
	request = appendUint32(request, unix.RTA_TABLE, table)
	msgs, err := c.dump(unix.RTM_GETROUTE, unix.RTM_NEWROUTE, request)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EAFNOSUPPORT) {
		return nil, nil // no such table, or no such family
	}
	if err != nil {
		return nil, err
	}
	for _, m := range msgs {
		r, err := parseRoute(m)
		if err != nil {
			return nil, err
		}
		// Old kernels do not filter. Cloned ones belong to the route they come from.
		if r.family == family && r.table == table && r.protocol == Protocol && !r.cloned {
			routes = append(routes, m)
		}
	}
	return routes, nil
}

// routeHead is what is read of a route so far.
type routeHead struct {
	family   int
	table    uint32
	protocol uint8
	cloned   bool
	index    int // ifindex of its only link, or 0
}

// parseRoute reads the body of an RTM_NEWROUTE or RTM_DELROUTE.
func parseRoute(b []byte) (routeHead, error) {
	if len(b) < unix.SizeofRtMsg {
		return routeHead{}, errMalformed
	}
	r := routeHead{
		family:   int(b[0]),
		table:    uint32(b[4]),
		protocol: b[5],
		cloned:   native.Uint32(b[8:])&unix.RTM_F_CLONED != 0,
	}
	err := eachAttribute(b[unix.SizeofRtMsg:], func(typ uint16, value []byte) {
		switch typ {
		case unix.RTA_TABLE:
			r.table = uint32Of(value)
		case unix.RTA_OIF:
			r.index = int(int32(uint32Of(value)))
		}
	})
	return r, err
}
