package probe

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"strings"
)

// Types of DNS records.
const (
	typeA    = 1
	typeNS   = 2
	typeAAAA = 28
)

const dnsHeader = 12

// dnsQuestion is a query for the records of one type of a name.
func dnsQuestion(id uint16, name string, kind uint16) []byte {
	b := binary.BigEndian.AppendUint16(nil, id)
	b = append(b, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0) // recursion is wanted; one question
	for label := range strings.SplitSeq(strings.TrimSuffix(name, "."), ".") {
		if label != "" {
			b = append(append(b, byte(len(label))), label...)
		}
	}
	b = append(b, 0)
	b = binary.BigEndian.AppendUint16(b, kind)
	return append(b, 0, 1) // of the Internet
}

// isDNSAnswer reports whether a datagram answers a question, whatever it says.
func isDNSAnswer(question, b []byte) bool {
	return len(b) >= dnsHeader && len(question) >= 2 && b[0] == question[0] && b[1] == question[1] && b[2]&0x80 != 0
}

// saysSomething reports whether an answer says what a name has, or that there is no such name, or that this type of question is
// not known there. Who refuses or fails has nobody to ask, such as the resolver of a router without the Internet.
func saysSomething(b []byte) bool {
	const failure = 2 // RFC 1035, section 4.1.1
	return b[3]&0x0f != failure && !refuses(b)
}

// refuses reports whether an answer refuses the question.
func refuses(b []byte) bool {
	const refused = 5
	return b[3]&0x0f == refused
}

var errNoAddress = errors.New("the name has no address of the family")

// dnsAddress returns the first address of one family in an answer.
func dnsAddress(b []byte, inet bool) (netip.Addr, error) {
	if len(b) < dnsHeader {
		return netip.Addr{}, errNoAddress
	}
	questions, answers := binary.BigEndian.Uint16(b[4:]), binary.BigEndian.Uint16(b[6:])
	rest := b[dnsHeader:]
	ok := true
	for range questions {
		if rest, ok = afterName(rest); !ok || len(rest) < 4 {
			return netip.Addr{}, errNoAddress
		}
		rest = rest[4:]
	}
	for range answers {
		if rest, ok = afterName(rest); !ok || len(rest) < 10 {
			break
		}
		kind, size := binary.BigEndian.Uint16(rest), int(binary.BigEndian.Uint16(rest[8:]))
		if rest = rest[10:]; len(rest) < size {
			break
		}
		if addr, ok := netip.AddrFromSlice(rest[:size]); ok && (kind == typeA && addr.Is4() && inet || kind == typeAAAA && addr.Is6() && !inet) {
			return addr, nil
		}
		rest = rest[size:]
	}
	return netip.Addr{}, errNoAddress
}

// afterName is what follows a name, which ends with an empty label or with a pointer.
func afterName(b []byte) ([]byte, bool) {
	for len(b) > 0 {
		switch n := int(b[0]); {
		case n == 0:
			return b[1:], true
		case n >= 0xc0:
			return b[min(2, len(b)):], len(b) >= 2
		case n+1 > len(b):
			return nil, false
		default:
			b = b[n+1:]
		}
	}
	return nil, false
}
