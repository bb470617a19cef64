package inspect

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
)

// TestARPOfNeighbours: two links with one network answer for each other's addresses, but for those of PPP, which nobody asks: there the
// network, which is the same far end, is a note.
func TestARPOfNeighbours(t *testing.T) {
	of := func(ifname, address string, pointToPoint bool) lease {
		l := lease{Row: Row{Ifname: ifname, Family: "inet", Address: address}, addr: netip.MustParseAddr(address), family: unix.AF_INET}
		l.at = route.Address{Addr: l.addr, Bits: 24}
		l.link = route.Link{Name: ifname, PointToPoint: pointToPoint}
		return l
	}
	for _, pointToPoint := range []bool{false, true} {
		p := &patient{leases: []lease{of("lo", "192.0.2.2", false), of("wan1", "192.0.2.3", pointToPoint)}} // lo: it has settings, and arp_ignore is 0
		if flux, same := len(lookARPFlux(p)), len(lookSameSubnet(p)); (flux == 1) == pointToPoint || (same == 1) != pointToPoint {
			t.Errorf("point to point %v: %d that answer for others, %d with the same network", pointToPoint, flux, same)
		}
	}
}
