package route

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Traffic is what a rule can select by beside addresses and the link that packets leave by; the zero Traffic is all.
type Traffic struct {
	Iif            string // the link that packets arrive by; "lo": what this host sends
	Mark, Mask     uint32 // fwmark: packets whose mark is Mark in the bits of Mask
	UIDs           UIDs   // of the sockets' owners
	IPProto        uint8  // IPPROTO_*; 0: any
	Sports, Dports Ports
}

// UIDs is a range of user ids with both its ends; without Set it is all, and packets of nobody.
type UIDs struct {
	First, Last uint32
	Set         bool
}

// Ports is a range of ports with both its ends, from 1 to 65534; the zero Ports is any.
type Ports struct{ First, Last uint16 }

// String returns the selectors as `ip rule` prints them, "" for none:
// "fwmark 0x2000000/0xff000000 uidrange 1000-1000".
func (t Traffic) String() string {
	var words []string
	switch {
	case t.Mark == 0 && t.Mask == 0:
	case t.Mask == allBits:
		words = append(words, "fwmark "+hex(t.Mark))
	default:
		words = append(words, "fwmark "+hex(t.Mark)+"/"+hex(t.Mask))
	}
	if t.Iif != "" {
		words = append(words, "iif "+t.Iif)
	}
	if t.UIDs.Set {
		words = append(words, fmt.Sprintf("uidrange %d-%d", t.UIDs.First, t.UIDs.Last))
	}
	if t.IPProto != 0 {
		words = append(words, "ipproto "+ipProtoName(t.IPProto))
	}
	if t.Sports != (Ports{}) {
		words = append(words, "sport "+t.Sports.String())
	}
	if t.Dports != (Ports{}) {
		words = append(words, "dport "+t.Dports.String())
	}
	return strings.Join(words, " ")
}

// SelectsSockets reports whether sockets differ in what is selected, but for the links of their packets.
func (t Traffic) SelectsSockets() bool {
	t.Iif = ""
	return t != Traffic{}
}

// HasSocket reports whether what a socket sends is selected, but for the link that its packets arrive by.
func (t Traffic) HasSocket(s Socket) bool {
	return s.Mark&t.Mask == t.Mark && (!t.UIDs.Set || t.UIDs.First <= s.UID && s.UID <= t.UIDs.Last) &&
		(t.IPProto == 0 || t.IPProto == s.Protocol) &&
		(t.Sports == Ports{} || t.Sports.Has(s.Local.Port())) && (t.Dports == Ports{} || t.Dports.Has(s.Remote.Port()))
}

// Has reports whether a port is in the range.
func (p Ports) Has(port uint16) bool { return p.First <= port && port <= p.Last }

func (p Ports) String() string {
	if p.First == p.Last {
		return strconv.Itoa(int(p.First))
	}
	return fmt.Sprintf("%d-%d", p.First, p.Last)
}

const (
	allBits = ^uint32(0)
	noUID   = ^uint32(0) // (uid_t)-1: of nobody
	maxPort = 1<<16 - 2  // the kernel wants a range to end before the last one

	// Linux 6.15 tells a mask beside each single port, which is all bits unless one was given.
	fraSportMask = 28
	fraDportMask = 29
)

// hex is %#x of C, which does not mark a zero.
func hex(n uint32) string {
	if n == 0 {
		return "0"
	}
	return fmt.Sprintf("%#x", n)
}

func ipProtoName(n uint8) string {
	switch n {
	case unix.IPPROTO_TCP:
		return "tcp"
	case unix.IPPROTO_UDP:
		return "udp"
	case unix.IPPROTO_ICMP:
		return "icmp"
	case unix.IPPROTO_ICMPV6:
		return "ipv6-icmp"
	case unix.IPPROTO_SCTP:
		return "sctp"
	case unix.IPPROTO_DCCP:
		return "dccp"
	case unix.IPPROTO_UDPLITE:
		return "udplite"
	}
	return fmt.Sprintf("ipproto-%d", n)
}

// Check returns why the kernel would not take t in a rule, or take it for another one.
func (t Traffic) Check() error {
	switch {
	case t.Mark&^t.Mask != 0:
		return fmt.Errorf("fwmark %s has bits outside of its mask %s", hex(t.Mark), hex(t.Mask))
	case !t.UIDs.Set && t.UIDs != UIDs{}:
		return errors.New("uidrange has ends and is not set")
	case t.UIDs.Set && (t.UIDs.First > t.UIDs.Last || t.UIDs.Last == noUID):
		return fmt.Errorf("uidrange %d-%d is no range of users", t.UIDs.First, t.UIDs.Last)
	}
	for _, p := range []Ports{t.Sports, t.Dports} {
		if p != (Ports{}) && (p.First == 0 || p.First > p.Last || p.Last > maxPort) {
			return fmt.Errorf("ports %d-%d: want a range within 1 to %d", p.First, p.Last, maxPort)
		}
	}
	return nil
}

func (t Traffic) append(b []byte) []byte {
	if t.Iif != "" {
		b = appendAttribute(b, unix.FRA_IIFNAME, append([]byte(t.Iif), 0))
	}
	if t.Mark != 0 || t.Mask != 0 {
		b = appendUint32(b, unix.FRA_FWMARK, t.Mark)
		b = appendUint32(b, unix.FRA_FWMASK, t.Mask)
	}
	if t.UIDs.Set {
		b = appendAttribute(b, unix.FRA_UID_RANGE, native.AppendUint32(native.AppendUint32(nil, t.UIDs.First), t.UIDs.Last))
	}
	if t.IPProto != 0 {
		b = appendAttribute(b, unix.FRA_IP_PROTO, []byte{t.IPProto})
	}
	for _, p := range []struct {
		typ uint16
		Ports
	}{{unix.FRA_SPORT_RANGE, t.Sports}, {unix.FRA_DPORT_RANGE, t.Dports}} {
		if p.Ports != (Ports{}) {
			b = appendAttribute(b, p.typ, native.AppendUint16(native.AppendUint16(nil, p.First), p.Last))
		}
	}
	return b
}

// take reads an attribute of a rule, and reports whether it was one of t's and makes sense.
func (t *Traffic) take(typ uint16, value []byte) bool {
	switch {
	case typ == unix.FRA_IIFNAME:
		t.Iif = unix.ByteSliceToString(value)
	case typ == unix.FRA_FWMARK && len(value) == 4:
		t.Mark = native.Uint32(value)
	case typ == unix.FRA_FWMASK && len(value) == 4:
		t.Mask = native.Uint32(value)
	case typ == unix.FRA_UID_RANGE && len(value) == 8:
		t.UIDs = UIDs{native.Uint32(value), native.Uint32(value[4:]), true}
	case typ == unix.FRA_IP_PROTO && len(value) == 1:
		t.IPProto = value[0]
	case typ == unix.FRA_SPORT_RANGE && len(value) == 4:
		t.Sports = portsOf(value)
	case typ == unix.FRA_DPORT_RANGE && len(value) == 4:
		t.Dports = portsOf(value)
	case typ == fraSportMask || typ == fraDportMask:
		return len(value) == 2 && native.Uint16(value) == 1<<16-1
	default:
		return false
	}
	return true
}

func portsOf(value []byte) Ports { return Ports{native.Uint16(value), native.Uint16(value[2:])} }

// hits reports whether t, in a request to delete, matches other: what it does not have
// matches anything.
func (t Traffic) hits(other Traffic) bool {
	return (t.Iif == "" || t.Iif == other.Iif) && (t.Mark == 0 || t.Mark == other.Mark) && (t.Mask == 0 || t.Mask == other.Mask) &&
		(!t.UIDs.Set || t.UIDs == other.UIDs) &&
		(t.IPProto == 0 || t.IPProto == other.IPProto) &&
		(t.Sports == Ports{} || t.Sports == other.Sports) &&
		(t.Dports == Ports{} || t.Dports == other.Dports)
}

// Overlapping returns the rules of other programs that look at bits of mask in a packet's
// mark: they may take what is marked with those bits for theirs, or not know their own any
// more once it is.
func Overlapping(rules []Rule, mask uint32) []Rule {
	var some []Rule
	for _, r := range rules {
		// "not fwmark X", with none of those bits in X, matches marked packets like all others.
		harmless := r.Flags&flagInvert != 0 && r.Mark&mask == 0
		if r.Protocol != Protocol && r.Mask&mask != 0 && !harmless {
			some = append(some, r)
		}
	}
	return some
}
