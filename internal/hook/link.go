package hook

import (
	"errors"
	"io/fs"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
)

// addresses returns the wanted addresses of a link.
func addresses(ifname string, family int, wanted func(route.Address) bool) (list []route.Address, err error) {
	err = onLink(ifname, func(kernel *route.Conn, index int) error {
		all, err := kernel.AddressesOn(family, index)
		for _, a := range all {
			if wanted(a) && len(list) < maxAddresses {
				list = append(list, a)
			}
		}
		return err
	})
	return list, err
}

// onLink calls f with the ifindex of a link, if the link exists.
func onLink(ifname string, f func(kernel *route.Conn, index int) error) error {
	kernel, err := route.Dial()
	if err != nil {
		return err
	}
	defer kernel.Close()
	link, found, err := kernel.LinkByName(ifname)
	if err != nil || !found {
		return err
	}
	return f(kernel, link.Index)
}

// present returns the IPv4 addresses of a link.
func present(ifname string) ([]route.Address, error) {
	return addresses(ifname, unix.AF_INET, func(a route.Address) bool { return a.Scope == unix.RT_SCOPE_UNIVERSE })
}

// dynamic returns the IPv6 addresses that routers and DHCPv6 gave a link, without temporary ones.
func dynamic(ifname string) (list []netip.Addr, err error) {
	const others = unix.IFA_F_PERMANENT | unix.IFA_F_TEMPORARY | unix.IFA_F_DADFAILED
	found, err := addresses(ifname, unix.AF_INET6, func(a route.Address) bool {
		return a.Scope == unix.RT_SCOPE_UNIVERSE && a.Flags&others == 0
	})
	for _, a := range found {
		list = append(list, a.Addr)
	}
	return list, err
}

// removeAddress deletes an address from a link.
func removeAddress(ifname string, addr netip.Addr) error {
	family := unix.AF_INET
	if addr.Is6() {
		family = unix.AF_INET6
	}
	return onLink(ifname, func(kernel *route.Conn, index int) error {
		all, err := kernel.AddressesOn(family, index)
		for _, a := range all {
			if a.Addr == addr {
				err = errors.Join(err, kernel.DeleteAddress(a))
			}
		}
		return err
	})
}

// missing returns nil for fs.ErrNotExist.
func missing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
