package route

import (
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// firstReads is how often FirstRoutes reads from its socket. The kernel hands over a hundred routes or more at a time.
const firstReads = 8

// FirstRoutes is Routes for the first thousand or so of a table: it does not read the others of a large one. A route
// that names a nexthop object may have no link here.
func (c *Conn) FirstRoutes(family int, table uint32) (routes []Route, err error) {
	if c.first == nil {
		if c.first, err = readingSocket(); err != nil {
			return nil, err
		}
	}
	done, err := c.readFirst(family, filter{table: table}, func(r Route) { routes = append(routes, r) })
	if !done { // the rest would be in the way of the next dump
		c.first.Close()
		c.first = nil
	}
	if err != nil {
		return nil, fmt.Errorf("list routes of table %d: %w", table, err)
	}
	return routes, nil
}

// readFirst reports whether it has read the whole dump.
func (c *Conn) readFirst(family int, f filter, add func(Route)) (done bool, err error) {
	req := &nl.NetlinkRequest{
		NlMsghdr: unix.NlMsghdr{Type: unix.RTM_GETROUTE, Flags: unix.NLM_F_REQUEST | unix.NLM_F_DUMP},
		RawData:  f.request(family),
	}
	if err := c.first.Send(req); err != nil {
		return false, err
	}
	for range firstReads {
		msgs, _, err := c.first.Receive()
		if err != nil {
			return false, err
		}
		for _, m := range msgs {
			switch m.Header.Type {
			case unix.NLMSG_DONE, unix.NLMSG_ERROR:
				if errno := unix.Errno(-int32(uint32Of(m.Data))); errno != 0 && errno != unix.ENOENT && errno != unix.EAFNOSUPPORT {
					return true, errno
				}
				return true, nil // ENOENT: there is no such table
			case unix.RTM_NEWROUTE:
				r, cloned, err := parseRoute(m.Data)
				if err != nil {
					return false, err
				}
				if !cloned && r.Family == family && f.has(r) && r.Expires >= 0 {
					add(r)
				}
			}
		}
	}
	return false, nil
}
