package route

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Question is a packet, for which the kernel is asked where it goes (RTM_GETROUTE).
type Question struct {
	Dst      netip.Addr
	Src      netip.Addr // the zero Addr: the sender has not chosen one
	Iif, Oif int        // ifindexes: of the link on which it arrives, and of the device that its socket is bound to; 0: none
	Mark     uint32
	UID      uint32 // of the socket's owner; what is forwarded has 0
	TOS      uint8
	IPProto  uint8 // IPPROTO_*; 0: not said, which the kernel takes for UDP in IPv4
	Sport    uint16
	Dport    uint16
}

// Family returns AF_INET or AF_INET6.
func (q Question) Family() int {
	if q.Dst.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

const (
	rtmFibMatch = 0x2000 // RTM_F_FIB_MATCH of linux/rtnetlink.h, Linux 4.20

	rtaUID, rtaIPProto, rtaSport, rtaDport = 25, 27, 28, 29 // of linux/rtnetlink.h
)

// Match returns the route of a table that the kernel finds for a packet. Where it finds none, or one that answers with
// an error, the error is that of the kernel: ENETUNREACH, EHOSTUNREACH, EACCES or EINVAL.
// A source that rp_filter refuses is EINVAL, also where the kernel is older and says EXDEV.
func (c *Conn) Match(q Question) (Route, error) {
	flags := uint32(rtmFibMatch)
	if q.Family() == unix.AF_INET { // in IPv6 the answer always has the table, and the flag is an error
		flags |= unix.RTM_F_LOOKUP_TABLE
	}
	return c.ask(q, flags)
}

// Resolve returns what the kernel does with a packet: the link, the gateway and, in Src, the source address that it
// chooses. The error is as for Match.
func (c *Conn) Resolve(q Question) (Route, error) { return c.ask(q, 0) }

func (c *Conn) ask(q Question, flags uint32) (Route, error) {
	msgs, err := c.request(unix.RTM_GETROUTE, 0, unix.RTM_NEWROUTE, q.encode(flags))
	if err == nil && len(msgs) != 1 {
		err = errMalformed
	}
	if errors.Is(err, unix.EXDEV) {
		err = unix.EINVAL
	}
	if err != nil {
		return Route{}, fmt.Errorf("ask for the route to %s: %w", q.Dst, err)
	}
	r, _, err := parseRoute(msgs[0])
	return r, err
}

func (q Question) encode(flags uint32) []byte {
	bits := byte(q.Dst.BitLen())
	b := []byte{byte(q.Family()), bits, 0, q.TOS, 0, 0, 0, 0}
	b = native.AppendUint32(b, flags)
	b = appendAttribute(b, unix.RTA_DST, q.Dst.WithZone("").AsSlice())
	if q.Src.IsValid() {
		b[2] = bits
		b = appendAttribute(b, unix.RTA_SRC, q.Src.WithZone("").AsSlice())
	}
	for _, a := range []struct {
		typ   uint16
		value uint32
	}{{unix.RTA_IIF, uint32(q.Iif)}, {unix.RTA_OIF, uint32(q.Oif)}, {unix.RTA_MARK, q.Mark}} {
		if a.value != 0 {
			b = appendUint32(b, a.typ, a.value)
		}
	}
	b = appendUint32(b, rtaUID, q.UID)
	if q.IPProto != 0 {
		b = appendAttribute(b, rtaIPProto, []byte{q.IPProto})
	}
	if q.Sport != 0 {
		b = appendAttribute(b, rtaSport, binary.BigEndian.AppendUint16(nil, q.Sport))
	}
	if q.Dport != 0 {
		b = appendAttribute(b, rtaDport, binary.BigEndian.AppendUint16(nil, q.Dport))
	}
	return b
}

// Selectors are what a rule selects by beside the fields of Rule.
type Selectors struct {
	TOS      uint8
	DSCP     uint8 // with DSCPMask, at the place of the TOS: Linux 6.13
	DSCPMask uint8 // 0: any
	// Flow labels, of IPv6; a zero mask is any. Linux 6.14.
	FlowLabel, FlowMask uint32
	// The bits of a single port that count; 0: all, or the range says.
	SportMask, DportMask uint16
	Tunnel               bool   // packets out of a tunnel with an id: none of this host's own
	VRF                  bool   // packets of a VRF
	Group                uint32 // with HasGroup: routes over links of this group do not count
	HasGroup             bool
	Unknown              string // what is left: selectors that this version does not know
}

// Selectors reads Rule.Other.
func (r Rule) Selectors() (s Selectors) {
	var unknown []string
	for _, word := range strings.Fields(r.Other) {
		name, text, _ := strings.Cut(word, "=")
		switch name {
		case "tos":
			n, _ := strconv.ParseUint(text, 16, 8) // parseRule wrote it
			s.TOS = uint8(n)
		case "dscp":
			s.DSCP, s.DSCPMask = uint8(hexNumber(text, binary.BigEndian))<<dscpShift, allDSCP
		case "dscp_mask": // behind dscp, since words are sorted; before Linux 6.15 there is none
			s.DSCPMask = uint8(hexNumber(text, binary.BigEndian)) << dscpShift
		case "flowlabel":
			s.FlowLabel = hexNumber(text, binary.BigEndian)
		case "flowlabel_mask":
			s.FlowMask = hexNumber(text, binary.BigEndian)
		case "sport_mask":
			s.SportMask = uint16(hexNumber(text, native))
		case "dport_mask":
			s.DportMask = uint16(hexNumber(text, native))
		case "tun_id":
			s.Tunnel = true
		case "l3mdev":
			s.VRF = true
		case "suppress_ifgroup":
			s.Group = hexNumber(text, native)
			s.HasGroup = s.Group != noSuppress
		case "realms": // selects nothing
		default:
			unknown = append(unknown, word)
		}
	}
	s.Unknown = strings.Join(unknown, " ")
	return s
}

const (
	dscpShift = 2 // of a DSCP in a TOS, below which are the bits of ECN
	allDSCP   = 0xfc
)

// hexNumber reads the bytes of a number of up to 32 bits; what is none is 0.
func hexNumber(text string, order binary.ByteOrder) uint32 {
	n, err := strconv.ParseUint(text, 16, 32)
	if err != nil {
		return 0
	}
	b := binary.BigEndian.AppendUint32(nil, uint32(n))
	if len(text) == 4 {
		return uint32(order.Uint16(b[2:]))
	} else if len(text) == 8 {
		return order.Uint32(b)
	}
	return uint32(n)
}

// Match reports whether a port is in the range or, with a mask that is not 0, has the bits of the first one; the zero Ports is any.
func (p Ports) Match(port, mask uint16) bool {
	if mask != 0 {
		return (p.First^port)&mask == 0
	}
	return p == Ports{} || p.Has(port)
}

// MTU returns the MTU that a route has of its own, 0 if it has none.
func (r Route) MTU() int {
	mtu := 0
	_ = eachAttribute([]byte(r.rest), func(typ uint16, value []byte) { // rest was read attribute by attribute
		if typ != unix.RTA_METRICS {
			return
		}
		_ = eachAttribute(value, func(typ uint16, value []byte) { // what is malformed is no MTU
			if typ == unix.RTAX_MTU {
				mtu = int(uint32Of(value))
			}
		})
	})
	return mtu
}
