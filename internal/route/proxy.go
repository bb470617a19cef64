package route

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Proxy is an address for which a link answers its neighbours (NDP), since it is behind this host.
type Proxy struct {
	Index int // of the link
	Addr  netip.Addr
}

// Of struct ndmsg and its attributes, in linux/neighbour.h.
const (
	neighbourSize     = 12 // of struct ndmsg
	neighbourProxy    = 8  // NTF_PROXY, among ndm_flags
	neighbourFlagsAt  = 10
	neighbourDst      = 1  // NDA_DST
	neighbourProtocol = 12 // NDA_PROTOCOL
)

// SyncProxies makes the proxies of IPv6 with our protocol what is wanted.
func (c *Conn) SyncProxies(want []Proxy) error {
	request := c.proxy(Proxy{})
	messages, err := c.dump(unix.RTM_GETNEIGH, unix.RTM_NEWNEIGH, request[:neighbourSize])
	if err != nil {
		return fmt.Errorf("list proxies of neighbours: %w", err)
	}
	var have []Proxy
	for _, m := range messages {
		if len(m) < neighbourSize {
			return fmt.Errorf("list proxies of neighbours: %w", errMalformed)
		}
		p, ours := Proxy{Index: int(int32(native.Uint32(m[4:])))}, false
		if err := eachAttribute(m[neighbourSize:], func(typ uint16, value []byte) {
			switch {
			case typ == neighbourDst:
				p.Addr, _ = netip.AddrFromSlice(value)
			case typ == neighbourProtocol && len(value) > 0:
				ours = value[0] == Protocol
			}
		}); err != nil {
			return fmt.Errorf("list proxies of neighbours: %w", err)
		}
		if ours && m[neighbourFlagsAt]&neighbourProxy != 0 {
			have = append(have, p)
		}
	}
	for _, p := range want {
		if slices.Contains(have, p) {
			continue
		}
		if err := c.change(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, c.proxy(p)); err != nil {
			return fmt.Errorf("have link %d answer for %s: %w", p.Index, p.Addr, err)
		}
	}
	for _, p := range have {
		if slices.Contains(want, p) {
			continue
		}
		err := c.change(unix.RTM_DELNEIGH, 0, c.proxy(p))
		if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("have link %d no longer answer for %s: %w", p.Index, p.Addr, err)
		}
	}
	return nil
}

// proxy is the body of a message about a proxy.
func (c *Conn) proxy(p Proxy) []byte {
	body := make([]byte, neighbourSize)
	body[0], body[neighbourFlagsAt] = unix.AF_INET6, neighbourProxy
	native.PutUint32(body[4:], uint32(p.Index))
	if p.Addr.IsValid() {
		body = appendAttribute(body, neighbourDst, p.Addr.AsSlice())
		body = appendAttribute(body, neighbourProtocol, []byte{Protocol})
	}
	return body
}
