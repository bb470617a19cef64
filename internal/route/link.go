package route

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Link is a kernel interface.
type Link struct {
	Index   int
	Name    string   // the name, also of a link that was found by an alternative one
	Other   []string // alternative names, as `ip link property add` and udev give
	Up      bool     // the administrator wants it up
	Carrier bool     // it is up and has one
	Changes uint32   // how often it got or lost its carrier
	Kind    string   // of a virtual link: bridge, veth, dummy, wireguard ...; "" of hardware
	Master  int      // ifindex of the bridge or bond that it is a port of, or 0
	Below   int      // of a virtual link: the ifindex of the link of this namespace that it is on, as a macvlan or a VLAN is; or 0
	Outside int      // as Below, if that link is of another network namespace: the ifindex there
	Group   uint32   // as `ip link set group`
	MTU     int      // in bytes
	// PointToPoint is a link with one neighbour, which needs no gateway: PPP, most tunnels.
	PointToPoint bool
}

// RTEXT_FILTER_SKIP_STATS of linux/rtnetlink.h: counters are half of a link's message.
const filterSkipStats = 1 << 3

// Links returns all links.
func (c *Conn) Links() ([]Link, error) {
	msgs, err := c.dump(unix.RTM_GETLINK, unix.RTM_NEWLINK, linkRequest(0, ""))
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	links := make([]Link, len(msgs))
	for i, m := range msgs {
		if links[i], _, err = parseLink(m); err != nil {
			return nil, fmt.Errorf("list links: %w", err)
		}
	}
	return links, nil
}

const altIfnameSize = 128 // ALTIFNAMSIZ of linux/if.h

// LinkByName returns the link of that name, which may be an alternative one, and whether there is one.
func (c *Conn) LinkByName(name string) (Link, bool, error) {
	if name == "" || len(name) >= altIfnameSize {
		return Link{}, false, nil // no link can have it
	}
	link, ok, err := c.link(linkRequest(0, name))
	if len(name) >= unix.IFNAMSIZ && errors.Is(err, unix.EINVAL) { // before Linux 5.5 there are no alternative names
		return Link{}, false, nil
	}
	if err != nil {
		err = fmt.Errorf("get link %q: %w", name, err)
	}
	return link, ok, err
}

// LinkByIndex returns the link of that ifindex, and whether there is one.
func (c *Conn) LinkByIndex(index int) (Link, bool, error) {
	if index <= 0 {
		return Link{}, false, nil
	}
	link, ok, err := c.link(linkRequest(index, ""))
	if err != nil {
		err = fmt.Errorf("get link %d: %w", index, err)
	}
	return link, ok, err
}

func (c *Conn) link(body []byte) (Link, bool, error) {
	msgs, err := c.request(unix.RTM_GETLINK, 0, unix.RTM_NEWLINK, body)
	if errors.Is(err, unix.ENODEV) {
		return Link{}, false, nil
	}
	if err != nil {
		return Link{}, false, err
	}
	if len(msgs) != 1 {
		return Link{}, false, errMalformed
	}
	link, _, err := parseLink(msgs[0])
	return link, err == nil, err
}

// linkRequest asks for the link of an index or of a name, or for all.
func linkRequest(index int, name string) []byte {
	b := make([]byte, unix.SizeofIfInfomsg)
	native.PutUint32(b[4:], uint32(index))
	switch {
	case len(name) >= unix.IFNAMSIZ:
		b = appendAttribute(b, unix.IFLA_ALT_IFNAME, append([]byte(name), 0))
	case name != "":
		b = appendAttribute(b, unix.IFLA_IFNAME, append([]byte(name), 0))
	}
	return appendUint32(b, unix.IFLA_EXT_MASK, filterSkipStats)
}

// parseLink reads the body of an RTM_NEWLINK or RTM_DELLINK.
func parseLink(b []byte) (l Link, family int, err error) {
	if len(b) < unix.SizeofIfInfomsg {
		return Link{}, 0, errMalformed
	}
	var malformed, elsewhere bool
	flags := native.Uint32(b[8:])
	l = Link{
		Index:        int(int32(native.Uint32(b[4:]))),
		Up:           flags&unix.IFF_UP != 0,
		PointToPoint: flags&unix.IFF_POINTOPOINT != 0,
		Carrier:      flags&unix.IFF_LOWER_UP != 0,
	}
	err = eachAttribute(b[unix.SizeofIfInfomsg:], func(typ uint16, value []byte) {
		switch typ {
		case unix.IFLA_IFNAME:
			l.Name = unix.ByteSliceToString(value)
		case unix.IFLA_PROP_LIST:
			bad := eachAttribute(value, func(typ uint16, value []byte) {
				if typ == unix.IFLA_ALT_IFNAME {
					l.Other = append(l.Other, unix.ByteSliceToString(value))
				}
			})
			malformed = malformed || bad != nil
		case unix.IFLA_GROUP:
			l.Group = uint32Of(value)
		case unix.IFLA_MTU:
			l.MTU = int(uint32Of(value))
		case unix.IFLA_CARRIER_CHANGES:
			l.Changes = uint32Of(value)
		case unix.IFLA_LINK:
			l.Below = int(int32(uint32Of(value)))
		case unix.IFLA_LINK_NETNSID:
			elsewhere = true
		case unix.IFLA_MASTER:
			l.Master = int(int32(uint32Of(value)))
		case unix.IFLA_LINKINFO:
			bad := eachAttribute(value, func(typ uint16, value []byte) {
				if typ == unix.IFLA_INFO_KIND {
					l.Kind = unix.ByteSliceToString(value)
				}
			})
			malformed = malformed || bad != nil
		}
	})
	if malformed {
		err = errMalformed
	}
	if elsewhere {
		l.Outside, l.Below = l.Below, 0
		if l.Outside == 0 { // before Linux 5.16 the kernel leaves out an ifindex that is the same as that of the link
			l.Outside = l.Index
		}
	}
	return l, int(b[0]), err
}
