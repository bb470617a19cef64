package netns

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// How IPv6 leaves a namespace.
const (
	WayAuto   = "auto"   // WayPrefix if the link has a delegated prefix, else WayNAT
	WayNAT    = "nat"    // with the address of the link, from an address of a pool of our own
	WayPrefix = "prefix" // with an address of a delegated prefix
	WayProxy  = "proxy"  // with an address of the link's network, for which the link answers
	WayNPT    = "npt"    // with a delegated prefix instead of that of the pool
	WayOff    = "off"
)

// SetWay takes over how IPv6 leaves.
func (c *Config) SetWay(text string) error {
	if !slices.Contains([]string{WayAuto, WayNAT, WayPrefix, WayProxy, WayNPT, WayOff}, text) {
		return errors.New("want auto, nat, prefix, proxy, npt or off")
	}
	c.IPv6, c.Way = text != WayOff, ""
	if c.IPv6 {
		c.Way = text
	}
	return nil
}

// wayOf reads how IPv6 leaves, as the configuration says it: true, false, or a word.
type wayOf Config

// UnmarshalJSON is of json.Unmarshaler.
func (w *wayOf) UnmarshalJSON(value []byte) error {
	if string(value) == "true" || string(value) == "false" {
		w.IPv6, w.Way = string(value) == "true", ""
		return nil
	}
	var text string
	return errors.Join(json.Unmarshal(value, &text), (*Config)(w).SetWay(text))
}

// checkWay returns what is wrong with how IPv6 leaves: another uplink has no packets for an address of this one.
func (c Config) checkWay() error {
	if slices.Contains([]string{WayPrefix, WayProxy, WayNPT}, c.Way) && (c.OnLoss == uplink.Fallback || c.VPN != "") {
		return fmt.Errorf("ipv6: %q is for a namespace on one uplink, and not for one with fallback or a VPN", c.Way)
	}
	return nil
}

// network6 is what a namespace has of IPv6. The zero value: addresses of the pool.
type network6 struct {
	Way  string       // one of WayNAT, WayPrefix, WayProxy, WayNPT
	From netip.Prefix // what the link has
	Of   netip.Prefix // the part of it that is for namespaces
	Pair netip.Prefix // the address of this host and, as the next one, that of the namespace
}

// prefixPatience is how long a link may be without a prefix until IPv6 leaves otherwise: who gets an address anew gets a
// prefix a moment later.
const prefixPatience = 10 * time.Second

// is reports whether IPv6 leaves in a way that was asked for.
func (n network6) is(way string) bool { return n.Way == way || way == WayAuto && n.Way == WayPrefix }

// chooseInet6 gives a namespace its addresses of IPv6, and others when the link has another prefix. While the link has none,
// packets leave with the address of the link; but a link without an IPv6 address may come back with the same prefix.
func (h *Host) chooseInet6(s *State, lacking *[]string) error {
	way := cmp.Or(s.Way, WayAuto)
	chosen, missed := network6{Way: WayNAT}, time.Duration(0)
	if s.IPv6 && s.routed() && s.Phase != Deleting && way != WayNAT && s.OnLoss != uplink.Fallback {
		link, found, err := h.kernel.LinkByName(s.Ifname)
		if err != nil {
			return err
		}
		var from netip.Prefix
		leased, keep := false, false
		if found {
			if from, leased, err = h.networkFor(link.Index, way); err != nil {
				return err
			}
		}
		if !from.IsValid() && s.Inet6.is(way) {
			missed, keep = s.waits(leased, clock(unix.CLOCK_BOOTTIME))
		}
		switch {
		case keep || from.IsValid() && s.Inet6.From == from && s.Inet6.is(way):
			chosen = s.Inet6
		case from.IsValid():
			if way == WayAuto {
				way = WayPrefix
			}
			if chosen, err = h.partOf(from, way, s.Number); err != nil {
				return err
			}
		case way != WayAuto:
			*lacking = append(*lacking, fmt.Sprintf("%s has no prefix for --ipv6 %s: IPv6 leaves with the address of the link until it has one", s.Ifname, way))
		}
	}
	if s.Missed == missed && (s.Inet6 == chosen || s.Inet6 == (network6{}) && chosen == (network6{Way: WayNAT})) {
		return nil
	}
	s.Inet6, s.Missed = chosen, missed
	return h.memory.put(*s)
}

// waits reports whether a namespace keeps its addresses although the link has no prefix for them, and since when the link
// has none.
func (s State) waits(leased bool, now time.Duration) (missed time.Duration, waits bool) {
	switch {
	case !leased: // nothing leaves anyway
		return 0, true
	case s.Missed == 0:
		return now, true
	case now-s.Missed < prefixPatience:
		return s.Missed, true
	}
	return 0, false
}

// networkFor is the network of a link, for WayProxy, or the prefix that is delegated to it. The zero Prefix: it has none. leased
// reports whether the link has an IPv6 address with a lease.
func (h *Host) networkFor(index int, way string) (prefix netip.Prefix, leased bool, err error) {
	addresses, err := h.kernel.AddressesOn(unix.AF_INET6, index)
	if err != nil {
		return prefix, false, err
	}
	rules, err := h.kernel.RulesWhere(unix.AF_INET6, func(r *route.Rule) bool {
		return r.Protocol == route.Protocol && r.Src.IsValid() && !uplink.LeavesTable(*r)
	})
	if err != nil {
		return prefix, false, err
	}
	for _, a := range addresses {
		table := slices.IndexFunc(rules, func(r route.Rule) bool { return uplink.IsHost(r) && r.Src.Addr() == a.Addr })
		if table < 0 {
			continue // without a lease
		}
		leased = true
		const temporary = unix.IFA_F_TEMPORARY | unix.IFA_F_DEPRECATED
		if network := a.Network().Masked(); way == WayProxy && a.Flags&temporary == 0 && network.Bits() <= mostBits {
			return network, true, nil
		}
		for _, r := range rules {
			delegated := !uplink.IsHost(r) && r.Table == rules[table].Table && !r.Src.Contains(a.Addr)
			if way != WayProxy && delegated && r.Src.Bits() > 0 && r.Src.Bits() <= mostBits {
				return r.Src, true, nil
			}
		}
	}
	return netip.Prefix{}, leased, nil
}

// mostBits is the length of the smallest prefix with room for a pair of addresses of each number.
const mostBits = 112

// partOf chooses addresses out of a prefix: at random in the network of a link, and of a delegated prefix in one of its last
// networks of 64 bits that this host does not use.
func (h *Host) partOf(from netip.Prefix, way string, number int) (n network6, err error) {
	n = network6{Way: way, From: from, Of: from.Masked()}
	if way == WayProxy {
		sum := fnv.New64a()
		fmt.Fprint(sum, h.pools.Inet6, from, number)
		n.Pair = pairIn(from, sum.Sum64())
		return n, nil
	}
	if from.Bits() < 64 {
		if n.Of, err = h.unusedIn(from, number); err != nil {
			return n, err
		}
	}
	if way == WayNPT {
		if n.Of.Bits() != 64 {
			return n, fmt.Errorf("%s is too long for --ipv6 npt: want 64 bits at most", from)
		}
		return n, nil
	}
	n.Pair = pairIn(n.Of, uint64(number)<<1|1<<12)
	return n, nil
}

// pairBits is the length of the network of such a pair.
const pairBits = 127

// pairIn is a pair of addresses of a prefix, with as many bits of the number as there is room for.
func pairIn(prefix netip.Prefix, number uint64) netip.Prefix {
	addr := prefix.Masked().Addr().As16()
	for bit := max(prefix.Bits(), 64); bit < pairBits; bit++ {
		if number>>(127-bit)&1 != 0 {
			addr[bit/8] |= 0x80 >> (bit % 8)
		}
	}
	return netip.PrefixFrom(netip.AddrFrom16(addr), pairBits)
}

// unusedIn is the network of 64 bits that is the number-th of a prefix, from the last one on, or one before that which
// this host does not use.
func (h *Host) unusedIn(prefix netip.Prefix, number int) (netip.Prefix, error) {
	routes, err := h.kernel.Routes(unix.AF_INET6, unix.RT_TABLE_UNSPEC)
	if err != nil {
		return netip.Prefix{}, err
	}
	count := 1 << min(64-prefix.Bits(), 16)
	for i := range count {
		n := (2*count - number%count - i) % count
		addr := prefix.Masked().Addr().As16()
		addr[6] |= byte(n >> 8)
		addr[7] |= byte(n)
		for bit := prefix.Bits(); bit < 48; bit++ { // the last ones
			addr[bit/8] |= 0x80 >> (bit % 8)
		}
		network := netip.PrefixFrom(netip.AddrFrom16(addr), 64)
		if !slices.ContainsFunc(routes, func(r route.Route) bool {
			return r.Type == unix.RTN_UNICAST && r.Dst.Bits() > prefix.Bits() && r.Dst.Bits() != pairBits && r.Dst.Overlaps(network)
		}) {
			return network, nil
		}
	}
	return netip.Prefix{}, fmt.Errorf("this host uses all of %s", prefix)
}

// proxySettings are the settings of links that answer for addresses of namespaces. A link that forwards heeds routers only
// with the first one.
func proxySettings(states []State) (paths []string) {
	for _, s := range states {
		if s.Phase == Deleting || s.Inet6.Way != WayProxy {
			continue
		}
		for _, setting := range []string{"accept_ra", "forwarding", "proxy_ndp"} {
			if path := "ipv6/conf/" + s.Ifname + "/" + setting; !slices.Contains(paths, path) {
				paths = append(paths, path)
			}
		}
	}
	return paths
}

// syncProxies has links answer for the addresses of namespaces, and for those of no others that we made them answer for.
func (h *Host) syncProxies() error {
	states, err := h.memory.all()
	if err != nil {
		return err
	}
	var want []route.Proxy
	for _, s := range states {
		if s.Phase == Deleting || s.Inet6.Way != WayProxy {
			continue
		}
		link, found, err := h.kernel.LinkByName(s.Ifname)
		if err != nil {
			return err
		}
		if found {
			want = append(want, route.Proxy{Index: link.Index, Addr: s.plan(h.pools).ours.inet6.Addr()})
		}
	}
	return h.kernel.SyncProxies(want)
}
