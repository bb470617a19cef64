package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// home is a site with IPv6 whose addresses a watch serves, without hooks. Only the real programs of a
// test add addresses to its links.
type home struct {
	*site
	server *process
	watch  *process
}

// newHome makes a home behind the first of the providers, with a server.
func newHome(t *testing.T, uplinks int) *home {
	t.Helper()
	h := newHomeAround(t, uplinks)
	empty := filepath.Join(h.dir, "image")
	if err := os.MkdirAll(filepath.Join(empty, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	h.enclose(empty)
	if hooks := h.sh("grep -rl table-allocator /etc /usr/lib/NetworkManager /lib/udev /lib/dhcpcd || true"); hooks != "" {
		t.Fatalf("there are hooks: %s", hooks)
	}
	h.server = h.serve()
	return h
}

// newHookedHome makes a home with the commands and hooks as "make install" installs them, and without
// a watch.
func newHookedHome(t *testing.T, uplinks int, settings ...string) *home {
	t.Helper()
	image, err := installed()
	if err != nil {
		t.Fatal(err)
	}
	h := newHomeAround(t, uplinks)
	h.enclose(image)
	h.configure(settings...)
	h.server = h.serve()
	return h
}

// newHomeAround makes a home that has no files of its own yet.
func newHomeAround(t *testing.T, uplinks int) *home {
	t.Helper()
	h := &home{site: &site{uplinks: newHost(t).behind(some(uplinks, true)...)}}
	h.internet.IP(t, "address add "+special6+"/128 dev lo nodad")
	h.internet.Do(func() { serveWho(t, net.JoinHostPort(special6, "7")) })
	sysctl(t, h.ns, "net/ipv6/conf/default/accept_ra_rt_info_max_plen", "64")
	for _, isp := range h.isps {
		sysctl(t, h.ns, "net/ipv6/conf/"+isp.ifname+"/accept_ra_rt_info_max_plen", "64")
	}
	return h
}

// watched starts a watch.
func (h *home) watched(options ...string) {
	h.t.Helper()
	h.watch = h.start(exec.Command(bin(h.t, clientBin), append([]string{"watch", "--debug"}, options...)...))
	h.watch.waitLog("msg=watching")
}

// block6 is the IPv6 network of a provider; it drops and counts packets with another source.
func block6(n int) netip.Prefix {
	return netip.MustParsePrefix(fmt.Sprintf("2001:db8:%d000::/36", n+1))
}

// prefix6 is the i-th network that provider n gives out.
func prefix6(n, i int) string { return fmt.Sprintf("2001:db8:%d00%d::/64", n+1, i) }

// router6At is the address of the router of provider n in that network.
func router6At(n, i int) string { return strings.TrimSuffix(prefix6(n, i), "/64") + "1" }

const (
	special6 = "2001:db8:aaaa::1" // another address of the internet
	// router6 is the address that every provider's router has on its customers' link.
	router6 = "fe80::1"
)

// waitServed waits until the table of an address has the routes of want, as waitFilled does, and until
// packets from the address pass provider n.
func (h *home) waitServed(n int, addr string, want ...string) {
	h.t.Helper()
	h.waitFilled(addr, want...)
	eventually(h.t, "packets from "+addr+" pass", func() error { return h.pass(n, addr, answers) })
	h.wantOwnOnly()
}

// waitNothing waits until an address has no lease, source rule and routes. A client may still block the
// address, and wait for it to come back.
func (h *home) waitNothing(addr string) {
	h.t.Helper()
	eventually(h.t, "nothing is left of "+addr, func() error { return h.left(addr) })
}

// waitExactly waits until leases, rules and routes are those of these addresses, and of no others.
func (h *home) waitExactly(addrs ...string) {
	h.t.Helper()
	eventually(h.t, fmt.Sprintf("there is what %q need and no more", addrs), func() error {
		leases := h.leases()
		tables := make(map[string]bool)
		for _, addr := range addrs {
			if !slices.ContainsFunc(leases, func(l string) bool { return strings.Contains(l, "|"+addr+"|") }) {
				return fmt.Errorf("no lease of %s in %q", addr, leases)
			}
			table := h.tableOf(addr)
			if table == "" {
				return fmt.Errorf("%s has no rule", addr)
			}
			tables[table] = true
		}
		if len(leases) != len(addrs) {
			return fmt.Errorf("leases: %q", leases)
		}
		for _, rule := range h.allRules() {
			_, rest, _ := strings.Cut(rule, " lookup ")
			known := tables[strings.Fields(rest)[0]] || h.isMainFirst(rule, addrs)
			if !strings.HasSuffix(rule, " proto 116") || !known {
				return fmt.Errorf("a rule of nobody: %s", rule)
			}
		}
		for _, family := range []string{"-4", "-6"} {
			for line := range strings.Lines(h.ns.IP(h.t, family+" route show table all proto 116")) {
				_, rest, _ := strings.Cut(line, " table ")
				if f := strings.Fields(rest); len(f) == 0 || !tables[f[0]] {
					return fmt.Errorf("a route of nobody: %s", line)
				}
			}
		}
		return nil
	})
}

// isMainFirst reports whether a rule lets main answer for a network that one of the addresses has
// on its link.
func (h *home) isMainFirst(rule string, addrs []string) bool {
	h.t.Helper()
	for _, isp := range h.isps {
		for _, a := range h.addresses(isp.ifname) {
			network := netip.PrefixFrom(netip.MustParseAddr(a.Local), a.Prefixlen).Masked().String()
			if slices.Contains(addrs, a.Local) && rule == mainFirst(network) {
				return true
			}
		}
	}
	return false
}

// waitHealthy waits until status reports that no address misses anything.
func (h *home) waitHealthy() {
	h.t.Helper()
	eventually(h.t, "status is content", func() error {
		if r := h.run(bin(h.t, clientBin), "status"); r.code != 0 {
			return errors.New(r.stdout + r.stderr)
		}
		return nil
	})
}

// routesOf are the routes that an address at provider n has by router advertisements.
func (h *home) routesOf(n int) []string {
	dev := " dev " + h.isps[n].ifname
	return []string{prefix6(n, 0) + dev, "default via " + router6 + dev}
}
