package netns

import (
	"net/netip"
	"testing"
	"time"
)

// offered is the answer of a server to a question.
func offered(x dhcpExchange, kind byte, options ...byte) []byte {
	m := x.question(kind, netip.Addr{}, netip.Addr{}, netip.Addr{})[:dhcpOptions]
	m[0] = 2
	copy(m[dhcpYours:], []byte{192, 0, 2, 77})
	return append(append(m, optionKind, 1, kind), options...)
}

func TestDHCPAnswer(t *testing.T) {
	x := newExchange([]byte{2, 0, 0, 0, 0, 1})
	whole := []byte{0, optionMask, 4, 255, 255, 255, 128, optionRouter, 8, 192, 0, 2, 1, 192, 0, 2, 2, optionTime, 4, 0, 0, 14, 16, optionServer, 4, 192, 0, 2, 3, 0xff}
	kind, l, err := x.answer(offered(x, dhcpACK, whole...))
	if err != nil || kind != dhcpACK || l.addr != netip.MustParsePrefix("192.0.2.77/25") || len(l.routers) != 2 || l.expires != time.Hour || l.server.String() != "192.0.2.3" {
		t.Errorf("got %d, %+v, %v", kind, l, err)
	}
	for name, m := range map[string][]byte{
		"short":              offered(x, dhcpACK, whole...)[:200],
		"a cut option":       offered(x, dhcpACK, optionMask, 4, 255),
		"without a time":     offered(x, dhcpACK, optionMask, 4, 255, 255, 255, 0, 0xff),
		"a mask of none":     offered(x, dhcpACK, optionMask, 4, 0, 0, 0, 0, optionTime, 4, 0, 0, 14, 16),
		"of another client":  offered(newExchange([]byte{2, 0, 0, 0, 0, 2}), dhcpACK, whole...),
		"a question":         x.question(dhcpDiscover, netip.Addr{}, netip.Addr{}, netip.Addr{}),
		"nothing":            nil,
		"of another network": append([]byte{2}, make([]byte, 300)...),
	} {
		if kind, l, err := x.answer(m); err == nil {
			t.Errorf("%s: got %d, %+v", name, kind, l)
		}
	}
}

// FuzzDHCPAnswer: whatever a server sends, an answer has a network of a host, and a lease that ends.
func FuzzDHCPAnswer(f *testing.F) {
	x := dhcpExchange{id: 7, mac: [hardware]byte{2, 0, 0, 0, 0, 1}}
	f.Add(offered(x, dhcpACK, optionMask, 4, 255, 255, 255, 0, optionTime, 4, 0, 0, 14, 16, optionRouter, 4, 192, 0, 2, 1, 0xff))
	f.Add(offered(x, dhcpOffer, 0, 0, optionServer, 4, 192, 0, 2, 3))
	f.Fuzz(func(t *testing.T, m []byte) {
		kind, l, err := x.answer(m)
		if err == nil && kind == dhcpACK && (!l.addr.IsValid() || l.addr.Bits() == 0 || l.expires <= 0) {
			t.Errorf("%x: %+v", m, l)
		}
	})
}
