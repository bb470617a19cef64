package netns

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// A dhcpLease is what a server of DHCP gave (RFC 2131).
type dhcpLease struct {
	addr    netip.Prefix
	routers []netip.Addr
	server  netip.Addr
	expires time.Duration // from the answer on
}

// Kinds of messages, and options, of RFC 2132.
const (
	dhcpDiscover, dhcpOffer, dhcpRequest, dhcpACK, dhcpNAK = 1, 2, 3, 5, 6

	optionMask, optionRouter, optionAddress, optionTime, optionKind, optionServer, optionWanted, optionID = 1, 3, 50, 51, 53, 54, 55, 61
)

// Where a message of DHCP has what: RFC 2131, section 2.
const (
	dhcpXID, dhcpFlags, dhcpOwn, dhcpYours, dhcpHardware, dhcpOptions = 4, 10, 12, 16, 28, 240

	dhcpCookie = 0x63825363
	hardware   = 6 // octets of an address of Ethernet
)

// A dhcpExchange is one question and its repetitions.
type dhcpExchange struct {
	id  uint32
	mac [hardware]byte
}

func newExchange(mac []byte) (x dhcpExchange) {
	var id [4]byte
	_, _ = rand.Read(id[:]) // it does not fail
	x.id = binary.BigEndian.Uint32(id[:])
	copy(x.mac[:], mac)
	return x
}

// question is a message to servers. has is the address of this client, wants the one that it asks for, of a server.
func (x dhcpExchange) question(kind byte, has, wants, server netip.Addr) []byte {
	m := make([]byte, dhcpOptions)
	m[0], m[1], m[2] = 1, 1, hardware // a question, on Ethernet
	binary.BigEndian.PutUint32(m[dhcpXID:], x.id)
	if has.IsValid() {
		copy(m[dhcpOwn:], has.AsSlice())
	} else {
		m[dhcpFlags] = 0x80 // answers by broadcast: the link has no address
	}
	copy(m[dhcpHardware:], x.mac[:])
	binary.BigEndian.PutUint32(m[dhcpOptions-4:], dhcpCookie)
	option := func(code byte, value ...byte) { m = append(append(m, code, byte(len(value))), value...) }
	option(optionKind, kind)
	option(optionID, append([]byte{1}, x.mac[:]...)...)
	option(optionWanted, optionMask, optionRouter, optionTime, optionServer)
	if wants.IsValid() {
		option(optionAddress, wants.AsSlice()...)
	}
	if server.IsValid() {
		option(optionServer, server.AsSlice()...)
	}
	m = append(m, 0xff)
	const least = 300 // servers may ignore what is shorter
	return append(m, make([]byte, max(0, least-len(m)))...)
}

var errNotForUs = errors.New("no answer to this question")

// answer reads the message of a server.
func (x dhcpExchange) answer(m []byte) (kind byte, l dhcpLease, err error) {
	if len(m) < dhcpOptions || m[0] != 2 || binary.BigEndian.Uint32(m[dhcpXID:]) != x.id || !bytes.Equal(m[dhcpHardware:][:hardware], x.mac[:]) ||
		binary.BigEndian.Uint32(m[dhcpOptions-4:]) != dhcpCookie {
		return 0, l, errNotForUs
	}
	yours, _ := netip.AddrFromSlice(m[dhcpYours:][:4])
	bits := 32
	for rest := m[dhcpOptions:]; len(rest) > 0 && rest[0] != 0xff; {
		if rest[0] == 0 {
			rest = rest[1:]
			continue
		}
		if len(rest) < 2 || len(rest) < 2+int(rest[1]) {
			return 0, l, errors.New("an option is cut short")
		}
		code, value := rest[0], rest[2:2+int(rest[1])]
		rest = rest[2+len(value):]
		switch {
		case code == optionKind && len(value) == 1:
			kind = value[0]
		case code == optionMask && len(value) == 4:
			bits = 0
			for mask := binary.BigEndian.Uint32(value); mask&(1<<31) != 0; mask <<= 1 {
				bits++
			}
		case code == optionServer && len(value) == 4:
			l.server, _ = netip.AddrFromSlice(value)
		case code == optionTime && len(value) == 4:
			l.expires = time.Duration(binary.BigEndian.Uint32(value)) * time.Second
		case code == optionRouter:
			for ; len(value) >= 4; value = value[4:] {
				router, _ := netip.AddrFromSlice(value[:4])
				l.routers = append(l.routers, router)
			}
		}
	}
	l.addr = netip.PrefixFrom(yours, bits)
	if kind == dhcpACK && (yours.IsUnspecified() || yours.IsMulticast() || yours.IsLoopback() || bits == 0 || l.expires <= 0) {
		return 0, l, fmt.Errorf("a lease of %s for %s is none", l.addr, l.expires)
	}
	return kind, l, nil
}
