package route

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Address is an address of this host on a link.
type Address struct {
	Index int // ifindex of the link
	Addr  netip.Addr
	// Bits is the length of the prefix that is on the link: of Addr, or of Peer if there is one.
	Bits  int
	Peer  netip.Addr // the far end of a point-to-point address, else the zero Addr
	Flags uint32     // unix.IFA_F_*: secondary, tentative, deprecated ...
	Scope uint8      // unix.RT_SCOPE_*: universe, link, host ...
	// Created is when it was put on the link, in hundredths of seconds since the boot.
	Created uint32
}

// Network returns the prefix that is on the link, with its host bits.
func (a Address) Network() netip.Prefix {
	if a.Peer.IsValid() {
		return netip.PrefixFrom(a.Peer, a.Bits)
	}
	return netip.PrefixFrom(a.Addr, a.Bits)
}

// Family returns AF_INET or AF_INET6.
func (a Address) Family() int {
	if a.Addr.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// Tentative reports whether the address is not usable yet: it is not known whether another host has
// it, as long as the link has no carrier for one. One that another host has stays so. Optimistic
// addresses are usable.
func (a Address) Tentative() bool {
	return a.Flags&unix.IFA_F_TENTATIVE != 0 && a.Flags&unix.IFA_F_OPTIMISTIC == 0
}

// DADFailed reports whether another host has the address.
func (a Address) DADFailed() bool { return a.Flags&unix.IFA_F_DADFAILED != 0 }

// Addresses returns the addresses of family, AF_INET or AF_INET6, or of both with AF_UNSPEC.
func (c *Conn) Addresses(family int) ([]Address, error) { return c.AddressesOn(family, 0) }

// AddressOn returns one address of the link of that name, and whether it is there.
func (c *Conn) AddressOn(ifname string, addr netip.Addr) (Address, bool, error) {
	link, found, err := c.LinkByName(ifname)
	if err != nil || !found {
		return Address{}, false, err
	}
	all, err := c.AddressesOn(unix.AF_UNSPEC, link.Index)
	for _, a := range all {
		if a.Addr == addr {
			return a, true, nil
		}
	}
	return Address{}, false, err
}

// AddressesOn is Addresses for the link of one ifindex, at the cost of that link alone. There are
// none on a link that does not exist. Routes of type local that somebody added for single addresses
// of a link count as addresses: the host answers for them, too.
func (c *Conn) AddressesOn(family, index int) ([]Address, error) {
	addrs, _, err := c.Local(family, index)
	return addrs, err
}

// Local returns what AddressesOn does, and the ranges of addresses that routes of type local give to the link.
func (c *Conn) Local(family, index int) (addrs []Address, ranges []netip.Prefix, err error) {
	header := []byte{byte(family), 0, 0, 0}
	header = native.AppendUint32(header, uint32(index))
	msgs, err := c.dump(unix.RTM_GETADDR, unix.RTM_NEWADDR, header)
	if index != 0 && errors.Is(err, unix.ENODEV) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, m := range msgs {
		a, got, err := parseAddress(m)
		if err != nil {
			return nil, nil, fmt.Errorf("list addresses: %w", err)
		}
		// Families other than the two have addresses of their own, and old kernels do not filter.
		if got != unix.AF_INET && got != unix.AF_INET6 ||
			family != unix.AF_UNSPEC && got != family || index != 0 && a.Index != index {
			continue
		}
		addrs = append(addrs, a)
	}
	for _, f := range []int{unix.AF_INET, unix.AF_INET6} {
		if family != unix.AF_UNSPEC && family != f {
			continue
		}
		local, err := c.routes(f, filter{table: unix.RT_TABLE_LOCAL, index: index, typ: unix.RTN_LOCAL})
		if err != nil {
			return nil, nil, err
		}
		for _, r := range local {
			if a, ok := r.localAddress(); ok && !slices.ContainsFunc(addrs, func(h Address) bool { return h.Addr == a.Addr && h.Index == a.Index }) {
				addrs = append(addrs, a)
			}
			if r.IsLocalRange() {
				ranges = append(ranges, r.Dst)
			}
		}
	}
	return addrs, ranges, nil
}

// localAddress returns the address that r gives to a link, if it does: the kernel adds such a route for
// each address itself, and for those of lo.
func (r Route) localAddress() (Address, bool) {
	if !r.isLocal() || !r.Dst.IsSingleIP() {
		return Address{}, false
	}
	return Address{Index: r.Index, Addr: r.Dst.Addr(), Bits: r.Dst.Bits()}, true
}

// IsLocalRange reports whether r gives a range of addresses to a link, as agents of clouds do.
func (r Route) IsLocalRange() bool { return r.isLocal() && !r.Dst.IsSingleIP() }

// isLocal reports whether another program than the kernel has the host answer on a link.
func (r Route) isLocal() bool {
	const loopbackIndex = 1
	return r.Type == unix.RTN_LOCAL && r.Table == unix.RT_TABLE_LOCAL && r.Protocol != unix.RTPROT_KERNEL && r.Index > loopbackIndex
}

// HostAddresses is that of a connection, which is made for it.
func HostAddresses() (links map[int]Link, addresses []Address, err error) {
	c, err := Dial()
	if err != nil {
		return nil, nil, err
	}
	defer c.Close()
	return c.HostAddresses()
}

// HostAddresses returns all addresses of this host, and its links by their ifindex.
func (c *Conn) HostAddresses() (links map[int]Link, addresses []Address, err error) {
	all, err := c.Links()
	if err != nil {
		return nil, nil, err
	}
	links = make(map[int]Link, len(all))
	for _, link := range all {
		links[link.Index] = link
	}
	addresses, err = c.Addresses(unix.AF_UNSPEC)
	return links, addresses, err
}

// DeleteAddress takes an address from its link. It is no error if that has happened already.
func (c *Conn) DeleteAddress(a Address) error {
	family := byte(unix.AF_INET)
	if a.Addr.Is6() {
		family = unix.AF_INET6
	}
	body := []byte{family, byte(a.Bits), 0, 0}
	body = native.AppendUint32(body, uint32(a.Index))
	body = appendAttribute(body, unix.IFA_LOCAL, a.Addr.AsSlice())
	body = appendAttribute(body, unix.IFA_ADDRESS, a.Network().Addr().AsSlice())
	err := c.change(unix.RTM_DELADDR, 0, body)
	if errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("delete address %s: %w", a.Network(), err)
	}
	return nil
}

// parseAddress reads the body of an RTM_NEWADDR or RTM_DELADDR.
func parseAddress(b []byte) (a Address, family int, err error) {
	if len(b) < unix.SizeofIfAddrmsg {
		return Address{}, 0, errMalformed
	}
	family = int(b[0])
	a = Address{Bits: int(b[1]), Flags: uint32(b[2]), Scope: b[3], Index: int(int32(native.Uint32(b[4:])))}
	var local, address netip.Addr
	err = eachAttribute(b[unix.SizeofIfAddrmsg:], func(typ uint16, value []byte) {
		switch typ {
		case unix.IFA_LOCAL:
			local, _ = netip.AddrFromSlice(value)
		case unix.IFA_ADDRESS:
			address, _ = netip.AddrFromSlice(value)
		case unix.IFA_FLAGS:
			a.Flags = uint32Of(value)
		case unix.IFA_CACHEINFO: // struct ifa_cacheinfo: preferred, valid, created, updated
			const created = 8
			if len(value) >= created+4 {
				a.Created = native.Uint32(value[created:])
			}
		}
	})
	// IFA_ADDRESS is the far end where the two differ; plain IPv6 addresses have no IFA_LOCAL.
	switch {
	case !local.IsValid():
		a.Addr = address
	case local == address || !address.IsValid():
		a.Addr = local
	default:
		a.Addr, a.Peer = local, address
	}
	return a, family, err
}
