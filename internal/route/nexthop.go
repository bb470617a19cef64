package route

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Messages and attributes of nexthop objects, linux/rtnetlink.h and linux/nexthop.h.
const (
	rtmNewNexthop = 104
	rtmDelNexthop = 105
	rtmGetNexthop = 106

	sizeofNhmsg      = 8
	sizeofNhGroup    = 8
	nhaID            = 1
	nhaGroup         = 2
	nhaOif           = 5
	nhaGateway       = 6
	nhFlagsOfMessage = 4 // offset of nh_flags
)

// nexthop is an object of `ip nexthop`: one next hop, or a group of others.
type nexthop struct {
	flags   uint32
	index   uint32
	gateway []byte
	members []nexthopMember
}

type nexthopMember struct {
	id     uint32
	weight uint8 // one less than the weight, as in struct rtnexthop
}

// resolve fills in the links and gateways of routes with a nexthop object. The kernel tells these
// itself unless the sysctl net.ipv4.nexthop_compat_mode is off.
func (c *Conn) resolve(routes []Route) error {
	var objects map[uint32]nexthop
	for i := range routes {
		r := &routes[i]
		if r.NexthopID == 0 || r.Index != 0 || r.Multipath || r.Type != unix.RTN_UNICAST {
			continue
		}
		if objects == nil {
			var err error
			if objects, err = c.nexthops(); err != nil {
				return err
			}
		}
		r.resolve(objects)
	}
	return nil
}

func (r *Route) resolve(objects map[uint32]nexthop) {
	object := objects[r.NexthopID]
	if len(object.members) == 0 {
		r.Index = int(object.index)
		r.Onlink = object.flags&unix.RTNH_F_ONLINK != 0
		r.Gateway, _ = netip.AddrFromSlice(object.gateway) // none: on the link
		return
	}
	var hops []byte
	for _, m := range object.members {
		hop := objects[m.id]
		var gateway []byte
		switch {
		case len(hop.gateway) == 16 && r.Family == unix.AF_INET:
			via := native.AppendUint16(nil, unix.AF_INET6)
			gateway = appendAttribute(nil, unix.RTA_VIA, append(via, hop.gateway...))
		case hop.gateway != nil:
			gateway = appendAttribute(nil, unix.RTA_GATEWAY, hop.gateway)
		}
		hops = native.AppendUint16(hops, uint16(unix.SizeofRtNexthop+len(gateway)))
		hops = append(hops, byte(hop.flags)&flagsNexthop, m.weight)
		hops = native.AppendUint32(hops, hop.index)
		hops = append(hops, gateway...)
	}
	r.Multipath = true
	r.rest += string(appendAttribute(nil, unix.RTA_MULTIPATH, hops))
}

// nexthopID returns the number of the object that a message is about.
func nexthopID(body []byte) (id uint32, err error) {
	if len(body) < sizeofNhmsg {
		return 0, errMalformed
	}
	err = eachAttribute(body[sizeofNhmsg:], func(typ uint16, value []byte) {
		if typ == nhaID {
			id = uint32Of(value)
		}
	})
	return id, err
}

// nexthops returns the nexthop objects by number.
func (c *Conn) nexthops() (map[uint32]nexthop, error) {
	msgs, err := c.dump(rtmGetNexthop, rtmNewNexthop, make([]byte, sizeofNhmsg))
	if errors.Is(err, unix.EOPNOTSUPP) { // before Linux 5.3
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list nexthop objects: %w", err)
	}
	objects := make(map[uint32]nexthop, len(msgs))
	for _, b := range msgs {
		if len(b) < sizeofNhmsg {
			return nil, errMalformed
		}
		object := nexthop{flags: native.Uint32(b[nhFlagsOfMessage:])}
		var id uint32
		err := eachAttribute(b[sizeofNhmsg:], func(typ uint16, value []byte) {
			switch typ {
			case nhaID:
				id = uint32Of(value)
			case nhaOif:
				object.index = uint32Of(value)
			case nhaGateway:
				object.gateway = value
			case nhaGroup:
				for ; len(value) >= sizeofNhGroup; value = value[sizeofNhGroup:] {
					object.members = append(object.members, nexthopMember{native.Uint32(value), value[4]})
				}
			}
		})
		if err != nil {
			return nil, err
		}
		objects[id] = object
	}
	return objects, nil
}
