package netns

import (
	"errors"
	"fmt"
	"hash/fnv"
	"os"

	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// How a namespace is connected.
const (
	WiringNAT     = "nat"     // by a link to this host, which forwards
	WiringMacvlan = "macvlan" // as a host of its own in the network of the uplink, with addresses of that network
	WiringPasta   = "pasta"   // by a program, which carries what it sends
)

const wirings = `"nat", "macvlan" or "pasta"`

// checkWiring returns what is wrong with how a namespace is connected.
func (c Config) checkWiring() error {
	switch {
	case c.Wiring == "" || c.Wiring == WiringNAT:
		return nil
	case c.Wiring == WiringPasta:
		if c.VPN != "" || len(c.HostAccess) > 0 || c.Way != "" && c.Way != WayAuto {
			return errors.New("wiring: what pasta carries is traffic of this host: no VPN, host_access or way of IPv6")
		}
		return nil
	case c.Wiring != WiringMacvlan:
		return fmt.Errorf("wiring: want %s, have %q", wirings, c.Wiring)
	case c.VPN != "" || c.OnLoss == uplink.Fallback || len(c.HostAccess) > 0 || c.Way != "" && c.Way != WayAuto:
		return errors.New("wiring: a namespace with a macvlan is on one uplink alone, does not reach this host, and has addresses of that network: no VPN, fallback, host_access or way of IPv6")
	}
	return nil
}

// routed reports whether packets of a namespace pass this host.
func (c Config) routed() bool { return c.VPN == "" && (c.Wiring == "" || c.Wiring == WiringNAT) }

// syncMacvlan connects a namespace with the network of its uplink.
func (h *Host) syncMacvlan(s State, lacking *[]string) error {
	below, found, err := h.kernel.LinkByName(s.Ifname)
	if err != nil {
		return err
	}
	on, err := macvlanOn(s.Name)
	if err != nil {
		return err
	}
	if on != 0 && (!found || on != below.Index) { // a macvlan stays on a link that gets another name
		if err := disconnect(s); err != nil {
			return err
		}
		on = 0
	}
	if !found {
		*lacking = append(*lacking, "there is no link "+s.Ifname+": nothing leaves the namespace until there is one")
		return nil
	}
	if on == 0 {
		ns, err := os.Open(netPin(s.Name))
		if err != nil {
			return err
		}
		defer ns.Close()
		if err := h.kernel.AddMacvlan(inner, below.Index, ns.Fd(), h.hardwareOf(s.Name)); err != nil {
			return fmt.Errorf("%w (a link of Wi-Fi, and some of clouds, refuse a second address: use --wiring nat)", err)
		}
	}
	addresses, err := enlivenMacvlan(s)
	if err == nil && len(addresses) == 0 {
		what := s.Ifname + " gave it no address yet: nothing leaves the namespace until it has one"
		if !h.follows {
			what += "; the service asks for it: " + outside.Service("enable --now", "table-allocator-netns")
		}
		*lacking = append(*lacking, what)
	}
	return err
}

// macvlanOn is the ifindex of the link that the macvlan of a namespace is on; 0: the namespace has none.
func macvlanOn(name string) (index int, err error) {
	err = insideWith(name, func(kernel *route.Conn) error {
		link, _, err := kernel.LinkByName(inner)
		index = link.Outside
		return err
	})
	return index, err
}

// enlivenMacvlan sets the links of a namespace up, and returns the addresses that it has.
func enlivenMacvlan(s State) (addresses []string, err error) {
	err = insideWith(s.Name, func(kernel *route.Conn) error {
		link, found, err := kernel.LinkByName(inner)
		if err != nil || !found {
			return errors.Join(err, fmt.Errorf("the namespace has no link %s", inner))
		}
		off, routers := "1", "0"
		if s.IPv6 {
			off, routers = "0", "1"
		}
		dir := "ipv6/conf/" + inner + "/"
		err = errors.Join(writeSetting(dir+"disable_ipv6", off), writeSetting(dir+"accept_ra", routers))
		// A link without an address has no route to a server of DHCP, and with another value, which the namespace may have from
		// this host, the kernel drops its answers.
		for _, which := range []string{"all", inner} {
			err = errors.Join(err, writeSetting("ipv4/conf/"+which+"/rp_filter", "0"))
		}
		if err != nil {
			return err
		}
		if err := errors.Join(setUp(kernel, uplink.Loopback), setUp(kernel, inner)); err != nil {
			return err
		}
		addresses, err = globalAddresses(kernel, link.Index)
		return err
	})
	return addresses, err
}

// globalAddresses are the addresses of a link that are not for the link alone.
func globalAddresses(kernel *route.Conn, index int) (texts []string, err error) {
	for _, family := range families {
		have, err := kernel.AddressesOn(family, index)
		if err != nil {
			return nil, err
		}
		for _, a := range have {
			if !a.Addr.IsLinkLocalUnicast() {
				texts = append(texts, a.Addr.String())
			}
		}
	}
	return texts, nil
}

// hardwareOf is the address of Ethernet of a namespace, the same one whenever it is made until the next boot.
func (h *Host) hardwareOf(name string) []byte {
	sum := fnv.New64a()
	fmt.Fprint(sum, h.pools.Inet6, name)
	mac := sum.Sum(nil)[:hardware]
	mac[0] = mac[0]&^1 | 2 // of one host, and not of a maker
	return mac
}

// disconnect deletes the link in a namespace that is not routed, which ends all its traffic.
func disconnect(s State) error {
	if s.Wiring != WiringMacvlan && s.Wiring != WiringPasta || !isPinned(netPin(s.Name)) {
		return nil
	}
	return insideWith(s.Name, func(kernel *route.Conn) error {
		return kernel.DeleteLink(inner)
	})
}

// macvlanRow is row for a namespace with a macvlan, which has no rules.
func (h *Host) macvlanRow(row Row, s State) (Row, error) {
	row.Addresses = []string{}
	if row.Missing = h.unmade(s); row.Missing != "" {
		return row, nil
	}
	below, found, err := h.kernel.LinkByName(s.Ifname)
	if err != nil {
		return row, err
	}
	on, err := macvlanOn(s.Name)
	if err != nil || !found || on != below.Index {
		row.Missing = "its link on " + s.Ifname
		return row, err
	}
	addresses, err := enlivenMacvlan(s)
	if row.Addresses = append(row.Addresses, addresses...); len(addresses) == 0 {
		row.Missing = "an address of the network of " + s.Ifname
	}
	return row, err
}

// leaseCommand is the program that asks for an address in a namespace with a macvlan.
func leaseCommand() ([]string, error) {
	self, err := os.Executable()
	return []string{self, "netns", "lease"}, err
}
