package route

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// vethPeer is VETH_INFO_PEER of linux/veth.h.
const vethPeer = 1

// AddVeth adds a pair of links: name here, and peer in the network namespace of the open file netns. Both are down.
func (c *Conn) AddVeth(name, peer string, netns uintptr, mtu int) error {
	far := make([]byte, unix.SizeofIfInfomsg)
	far = appendAttribute(far, unix.IFLA_IFNAME, append([]byte(peer), 0))
	far = appendUint32(far, unix.IFLA_NET_NS_FD, uint32(netns))
	far = appendUint32(far, unix.IFLA_MTU, uint32(mtu))
	info := appendAttribute(nil, unix.IFLA_INFO_KIND, []byte("veth"))
	info = appendAttribute(info, unix.IFLA_INFO_DATA, appendAttribute(nil, vethPeer, far))
	body := make([]byte, unix.SizeofIfInfomsg)
	body = appendAttribute(body, unix.IFLA_IFNAME, append([]byte(name), 0))
	body = appendUint32(body, unix.IFLA_MTU, uint32(mtu))
	body = appendAttribute(body, unix.IFLA_LINKINFO, info)
	if err := c.change(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, body); err != nil {
		return fmt.Errorf("add link %s: %w", name, err)
	}
	return nil
}

// AddMacvlan adds a link on another one to the network namespace of the open file netns, with an address of Ethernet. Links on
// the same one do not reach each other, nor the host.
func (c *Conn) AddMacvlan(name string, below int, netns uintptr, mac []byte) error {
	const mode, private = 1, 1 // IFLA_MACVLAN_MODE, MACVLAN_MODE_PRIVATE
	info := appendAttribute(nil, unix.IFLA_INFO_KIND, []byte("macvlan"))
	info = appendAttribute(info, unix.IFLA_INFO_DATA, appendUint32(nil, mode, private))
	body := make([]byte, unix.SizeofIfInfomsg)
	body = appendAttribute(body, unix.IFLA_IFNAME, append([]byte(name), 0))
	body = appendUint32(body, unix.IFLA_LINK, uint32(below))
	body = appendUint32(body, unix.IFLA_NET_NS_FD, uint32(netns))
	body = appendAttribute(body, unix.IFLA_ADDRESS, mac)
	body = appendAttribute(body, unix.IFLA_LINKINFO, info)
	if err := c.change(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, body); err != nil {
		return fmt.Errorf("add a macvlan on link %d: %w", below, err)
	}
	return nil
}

// SetUp sets a link up, and its MTU unless that is 0.
func (c *Conn) SetUp(index, mtu int) error {
	body := make([]byte, unix.SizeofIfInfomsg)
	native.PutUint32(body[4:], uint32(index))
	native.PutUint32(body[8:], unix.IFF_UP)
	native.PutUint32(body[12:], unix.IFF_UP)
	if mtu != 0 {
		body = appendUint32(body, unix.IFLA_MTU, uint32(mtu))
	}
	if err := c.change(unix.RTM_NEWLINK, 0, body); err != nil {
		return fmt.Errorf("set link %d up: %w", index, err)
	}
	return nil
}

// DeleteLink deletes the link of a name, if there is one.
func (c *Conn) DeleteLink(name string) error {
	link, found, err := c.LinkByName(name)
	if err != nil || !found {
		return err
	}
	body := make([]byte, unix.SizeofIfInfomsg)
	native.PutUint32(body[4:], uint32(link.Index))
	if err := c.change(unix.RTM_DELLINK, 0, body); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete link %s: %w", name, err)
	}
	return nil
}

// AddAddress adds an address and its network to a link, unless the link has it. In IPv6 it can be used at once.
func (c *Conn) AddAddress(index int, addr netip.Prefix) error {
	family := byte(unix.AF_INET)
	flags := byte(0)
	if addr.Addr().Is6() {
		family, flags = unix.AF_INET6, unix.IFA_F_NODAD
	}
	body := []byte{family, byte(addr.Bits()), flags, 0}
	body = native.AppendUint32(body, uint32(index))
	body = appendAttribute(body, unix.IFA_LOCAL, addr.Addr().AsSlice())
	body = appendAttribute(body, unix.IFA_ADDRESS, addr.Addr().AsSlice())
	err := c.change(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, body)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add address %s to link %d: %w", addr, index, err)
	}
	return nil
}

// MoveLink moves a link into the network namespace of the open file netns, where it is down and has no addresses.
func (c *Conn) MoveLink(index int, netns uintptr) error {
	body := make([]byte, unix.SizeofIfInfomsg)
	native.PutUint32(body[4:], uint32(index))
	body = appendUint32(body, unix.IFLA_NET_NS_FD, uint32(netns))
	if err := c.change(unix.RTM_NEWLINK, 0, body); err != nil {
		return fmt.Errorf("move link %d to another network namespace: %w", index, err)
	}
	return nil
}
