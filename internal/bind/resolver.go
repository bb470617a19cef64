package bind

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Nameservers are the name servers of an interface: those that the holders of its addresses were told, else those that
// systemd-networkd or systemd-resolved has for the link.
func Nameservers(ifname string) ([]netip.Addr, error) {
	kernel, err := route.Dial()
	if err != nil {
		return nil, err
	}
	defer kernel.Close()
	link, found, err := kernel.LinkByName(ifname)
	if err != nil || !found {
		return nil, err
	}
	addresses, err := kernel.AddressesOn(unix.AF_UNSPEC, link.Index)
	if err != nil {
		return nil, err
	}
	conn, err := peer.Open(wire.Key{Ifname: link.Name, Address: "resolv"}, peer.AsAsker)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var servers []netip.Addr
	every := uplink.Selection{Profiles: []uplink.Profile{uplink.DefaultProfile()}}
	for _, a := range addresses {
		u, ok := every.Uplink(a, link.Name)
		if !ok {
			continue
		}
		reply, err := peer.Ask(ctx, conn, wire.Request{Key: u.Key, Cmd: wire.Query}, servePatience)
		switch {
		case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, context.DeadlineExceeded):
		case err != nil:
			return nil, fmt.Errorf("ask the holder of %s: %w", u, err)
		default:
			servers = appendServers(servers, strings.Fields(reply.Nameservers))
		}
	}
	if len(servers) > 0 {
		return servers, nil
	}
	for _, path := range []string{fmt.Sprintf("/run/systemd/netif/links/%d", link.Index), fmt.Sprintf("/run/systemd/resolve/netif/%d", link.Index)} {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // systemd does not serve the link
		}
		for line := range strings.Lines(string(text)) {
			for _, key := range []string{"DNS=", "SERVERS="} {
				if list, ok := strings.CutPrefix(strings.TrimSpace(line), key); ok {
					servers = appendServers(servers, strings.Fields(list))
				}
			}
		}
	}
	return servers, nil
}

// appendServers appends addresses that are not there yet.
func appendServers(servers []netip.Addr, words []string) []netip.Addr {
	for _, word := range words {
		if addr, err := netip.ParseAddr(word); err == nil && !slices.Contains(servers, addr) {
			servers = append(servers, addr)
		}
	}
	return servers
}

// BehindOthers returns the link whose network has the first of addresses, if each of them is in the network of some
// link other than ifname.
func BehindOthers(ifname string, addrs []netip.Addr) (link string, err error) {
	links, addresses, err := route.HostAddresses()
	if err != nil {
		return "", err
	}
	for i, addr := range addrs {
		if zone := addr.Zone(); zone != "" { // link-local: it says itself which link it is on
			if index, err := strconv.Atoi(zone); err == nil {
				zone = links[index].Name
			}
			if zone == ifname || zone == uplink.Loopback {
				return "", nil
			}
			if i == 0 {
				link = zone
			}
			continue
		}
		at := slices.IndexFunc(addresses, func(a route.Address) bool {
			return links[a.Index].Name != uplink.Loopback && a.Addr != addr && a.Network().Masked().Contains(addr)
		})
		if at < 0 || links[addresses[at].Index].Name == ifname {
			return "", nil
		}
		if i == 0 {
			link = links[addresses[at].Index].Name
		}
	}
	return link, nil
}
