package e2e

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
)

// many makes links wan0, wan1 ... whose far ends far0, far1 ... are in the same namespace.
func (h *machine) many(links int) {
	h.t.Helper()
	var lines []string
	for i := range links {
		lines = append(lines, fmt.Sprintf("link add wan%d type veth peer name far%d", i, i),
			fmt.Sprintf("link set wan%d up", i), fmt.Sprintf("link set far%d up", i))
	}
	h.ns.Batch(h.t, lines...)
}

// rename gives a link another name. Older kernels refuse that while the link is up.
func (h *machine) rename(from, to string) {
	h.t.Helper()
	h.ns.IP(h.t, "link set "+from+" down")
	h.ns.IP(h.t, "link set "+from+" name "+to)
	h.ns.IP(h.t, "link set "+to+" up")
}

// address is an address in the JSON of ip.
type address struct {
	Local                            string
	Prefixlen                        int
	Scope                            string
	Tentative, Deprecated, Temporary bool
	Dadfailed                        bool
}

// addresses are the global addresses of a link.
func (h *machine) addresses(ifname string) (found []address) {
	h.t.Helper()
	var links []struct {
		AddrInfo []address `json:"addr_info"`
	}
	out := h.ns.IP(h.t, "-j address show dev "+ifname)
	if err := json.Unmarshal([]byte(out), &links); err != nil {
		h.t.Fatalf("addresses of %s: %v\n%s", ifname, err, out)
	}
	for _, l := range links {
		for _, a := range l.AddrInfo {
			if a.Scope == "global" {
				found = append(found, a)
			}
		}
	}
	return found
}

// waitAddress waits until a link has a usable address in a network for which like returns true, and
// returns it.
func (h *machine) waitAddress(ifname, network string, like func(address) bool) (found string) {
	h.t.Helper()
	prefix := netip.MustParsePrefix(network)
	eventually(h.t, ifname+" has an address in "+network, func() error {
		addrs := h.addresses(ifname)
		for _, a := range addrs {
			if addr, err := netip.ParseAddr(a.Local); err == nil && prefix.Contains(addr) && !a.Tentative && !a.Dadfailed && like(a) {
				found = a.Local
				return nil
			}
		}
		return fmt.Errorf("it has %+v", addrs)
	})
	return found
}

func anyAddress(address) bool { return true }

func slaac(a address) bool { return !a.Temporary && a.Prefixlen == 64 }

func ofDHCP(a address) bool { return a.Prefixlen == 128 }

// waitQuiet waits until the kernel ignores router advertisements on a link, because another program
// handles them.
func (h *machine) waitQuiet(ifname string) {
	h.t.Helper()
	eventually(h.t, "the kernel leaves advertisements on "+ifname+" alone", func() error {
		var value []byte
		var err error
		h.ns.Do(func() { value, err = os.ReadFile("/proc/sys/net/ipv6/conf/" + ifname + "/accept_ra") })
		if err == nil && string(value) != "0\n" {
			err = fmt.Errorf("accept_ra is %q", value)
		}
		return err
	})
}

// mac is the hardware address of the host's link to provider n.
func (h *home) mac(n int) string {
	h.t.Helper()
	f := strings.Fields(h.ns.IP(h.t, "-o link show "+h.isps[n].ifname))
	at := slices.Index(f, "link/ether")
	if at < 0 {
		h.t.Fatalf("no hardware address in %q", f)
	}
	return f[at+1]
}

// numbered is the n-th address of a link, with its length: IPv4 for even n, IPv6 for odd n.
func numbered(link, n int) string {
	if n%2 == 0 {
		return fmt.Sprintf("10.%d.%d.2/24", link+1, n)
	}
	return fmt.Sprintf("2001:db8:%x:%x::2/64", link+1, n)
}
