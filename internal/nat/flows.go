package nat

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Messages and attributes of the kernel's table of flows (linux/netfilter/nfnetlink_conntrack.h).
const (
	flowGet    = netlink.HeaderType(unix.NFNL_SUBSYS_CTNETLINK<<8 | 1)
	flowDelete = netlink.HeaderType(unix.NFNL_SUBSYS_CTNETLINK<<8 | 2)

	flowOrigin, flowID, flowZone = 1, 12, 18
	originIP                     = 1
	sourceIPv4, sourceIPv6       = 1, 3
)

// DeleteFlows deletes the flows that any of these addresses began: what still comes for them is no longer translated to them. Where the
// kernel lets nobody delete flows (without nf_conntrack_netlink), they stay until they expire.
func DeleteFlows(from []netip.Addr) error {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return fmt.Errorf("open the table of flows: %w", err)
	}
	defer c.Close()
	var errs []error
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		header := []byte{family, unix.NFNETLINK_V0, 0, 0}
		flows, err := c.Execute(netlink.Message{Header: netlink.Header{Type: flowGet, Flags: netlink.Request | netlink.Dump}, Data: header})
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("list flows: %w", err)
		}
		for _, flow := range flows {
			key, source, err := flowKey(flow.Data)
			if err != nil || !slices.Contains(from, source) {
				errs = append(errs, err)
				continue
			}
			_, err = c.Execute(netlink.Message{Header: netlink.Header{Type: flowDelete, Flags: netlink.Request | netlink.Acknowledge}, Data: append(slices.Clone(header), key...)})
			if err != nil && !errors.Is(err, unix.ENOENT) { // it has expired
				errs = append(errs, fmt.Errorf("delete a flow of %s: %w", source, err))
			}
		}
	}
	return errors.Join(errs...)
}

// flowKey returns the attributes that tell a flow from all others, and the address that began it.
func flowKey(data []byte) (key []byte, source netip.Addr, err error) {
	const header = 4
	if len(data) < header {
		return nil, source, errors.New("the kernel tells of a flow in too few bytes")
	}
	all, err := netlink.UnmarshalAttributes(data[header:])
	if err != nil {
		return nil, source, fmt.Errorf("a flow: %w", err)
	}
	var kept []netlink.Attribute
	for _, a := range all {
		switch a.Type {
		case flowOrigin | unix.NLA_F_NESTED:
			if source, err = flowSource(a.Data); err != nil {
				return nil, source, err
			}
			kept = append(kept, a)
		case flowID, flowZone:
			kept = append(kept, a)
		}
	}
	key, err = netlink.MarshalAttributes(kept)
	return key, source, err
}

// flowSource reads the address in the origin of a flow.
func flowSource(origin []byte) (source netip.Addr, err error) {
	d, err := netlink.NewAttributeDecoder(origin)
	if err != nil {
		return source, fmt.Errorf("the origin of a flow: %w", err)
	}
	d.ByteOrder = binary.BigEndian
	for d.Next() {
		if d.Type() != originIP {
			continue
		}
		d.Nested(func(ip *netlink.AttributeDecoder) error {
			for ip.Next() {
				if t := ip.Type(); t == sourceIPv4 || t == sourceIPv6 {
					source, _ = netip.AddrFromSlice(ip.Bytes()) // not valid: no address of ours
				}
			}
			return nil
		})
	}
	return source, d.Err()
}
