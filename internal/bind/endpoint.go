package bind

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
)

// accepting returns the endpoints of MPTCP that have a port and none of the own addresses. The kernel itself listens
// there. What a subflow that comes in there sends leaves with the address of the endpoint, and no lock holds it, since
// its socket belongs to no program.
func accepting(own []netip.Addr) ([]route.Endpoint, error) {
	all, err := route.Endpoints()
	if errors.Is(err, route.ErrNoMPTCP) {
		return nil, nil
	}
	return slices.DeleteFunc(all, func(e route.Endpoint) bool { return e.Port == 0 || slices.Contains(own, e.Addr) }), err
}

// subflows says which endpoint of MPTCP takes further subflows of programs that are bound to a link; "" if none does.
func subflows(kernel *route.Conn, ifname string) (string, error) {
	var own []netip.Addr
	link, found, err := kernel.LinkByName(ifname)
	if err == nil && found {
		var addresses []route.Address
		addresses, err = kernel.AddressesOn(unix.AF_UNSPEC, link.Index)
		for _, a := range addresses {
			own = append(own, a.Addr)
		}
	}
	if err != nil {
		return "", err
	}
	all, err := accepting(own)
	if err != nil || len(all) == 0 {
		return "", err
	}
	return fmt.Sprintf("a hold on MPTCP connections: the kernel accepts further subflows of them at %s, and what these send leaves by another uplink; ip mptcp endpoint delete id %d",
		netip.AddrPortFrom(all[0].Addr, all[0].Port), all[0].ID), nil
}
