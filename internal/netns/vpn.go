package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/remember"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// A tunnel is what a VPN said of itself when it came up last.
type tunnel struct {
	Addresses []netip.Prefix
	MTU       int // 0: as the link has it
	Servers   []netip.Addr
	Via       string // addresses of the uplink when the endpoint was set
}

// tunnelFile is the file of the memory with the tunnel of a namespace.
func tunnelFile(name string) string { return "." + name + ".vpn" }

// checkVPNFile returns why the configuration of a VPN cannot be used.
func (c Config) checkVPNFile() error {
	if c.VPN == "" {
		return nil
	}
	_, _, err := readVPN(c.VPN)
	return err
}

// readVPN reads the configuration of a VPN. It may name programs to execute, so that root alone must be able to write it, and
// file is its path without links, which others might change later.
func readVPN(path string) (file, text string, err error) {
	if file, err = remember.RootsFile(path); err != nil {
		return "", "", err
	}
	if text, err = copyOf(file); err != nil || isWireGuard(text) {
		return file, text, err
	}
	number := 0
	for line := range strings.Lines(text) {
		number++
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		option := strings.TrimPrefix(strings.Trim(words[0], `"'`), "--")
		if option == "daemon" || option == "inetd" {
			return "", "", fmt.Errorf("%s: line %d: %q has OpenVPN go on as another process, which nobody would end: delete the line", path, number, option)
		}
	}
	return file, text, nil
}

// isWireGuard reports whether a configuration is one for wg-quick; else it is one for OpenVPN.
func isWireGuard(text string) bool {
	for line := range strings.Lines(text) {
		if strings.EqualFold(strings.TrimSpace(line), "[interface]") {
			return true
		}
	}
	return false
}

// vpnCommand is the program of the VPN of a namespace, outside of it and bound to the uplink. Its link is made with the
// name of the link of the namespace, in this host's network, and goes into the namespace before it is up.
func (h *Host) vpnCommand(s State) ([]string, error) {
	file, text, err := readVPN(s.VPN)
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	if isWireGuard(text) {
		return h.bound(self, s, "wireguard-go", "--foreground", linkOf(s.Number)), nil
	}
	return h.bound(self, s, "openvpn", "--cd", filepath.Dir(file), "--config", file, "--dev", linkOf(s.Number), "--dev-type", "tun",
		"--ifconfig-noexec", "--route-noexec", "--script-security", "2", "--up", fmt.Sprintf("%q netns tunnel %s", self, s.Name)), nil
}

// bound is a command that runs bound to the uplink of a namespace once that has a lease.
func (h *Host) bound(self string, s State, command ...string) []string {
	const aDay = "86400"
	args := []string{self, "run", "--ifname", s.Ifname, "--on-loss", string(s.OnLoss), "--force", "--wait", aDay, "--destination", h.Server}
	for _, uid := range h.ServerUIDs {
		args = append(args, "--server-user", strconv.FormatUint(uint64(uid), 10))
	}
	return append(append(args, "--"), command...)
}

// syncVPN leads the link of a VPN into the namespace, if it waits outside, and keeps its addresses and routes there.
func (h *Host) syncVPN(s State, p plan, lacking *[]string) error {
	if err := insideWith(s.Name, func(kernel *route.Conn) error {
		return setUp(kernel, uplink.Loopback)
	}); err != nil {
		return err
	}
	if _, text, err := readVPN(s.VPN); err != nil {
		return err
	} else if isWireGuard(text) {
		if err := h.syncWireGuard(s, p, text); err != nil {
			return err
		}
	}
	up, err := isUpInside(s.Name, p.link)
	if err == nil && !up {
		what := "its VPN is down: nothing leaves the namespace until it is up"
		if !h.follows {
			what += "; the service runs it: " + outside.Service("enable --now", "table-allocator-netns")
		}
		*lacking = append(*lacking, what)
	}
	return err
}

// isUpInside reports whether there is a link of a name in a namespace.
func isUpInside(name, link string) (up bool, err error) {
	err = insideWith(name, func(kernel *route.Conn) error {
		_, up, err = kernel.LinkByName(link)
		return err
	})
	return up, err
}

// Tunnel leads the link of OpenVPN into its namespace, as a script of OpenVPN's --up, whose environment says which addresses
// the link has.
func (h *Host) Tunnel(name string, environment func(string) string) error {
	t, err := tunnelOf(environment)
	if err != nil {
		return named(name, err)
	}
	return named(name, h.locked(func(error) error {
		s, err := h.known(name)
		if err == nil && s.VPN == "" {
			err = errors.New("it has no VPN")
		}
		if err != nil {
			return err
		}
		return h.lead(s, s.plan(h.pools), t)
	}))
}

// tunnelOf reads the environment of a script of OpenVPN's --up.
func tunnelOf(environment func(string) string) (t tunnel, err error) {
	if local := environment("ifconfig_local"); local != "" {
		addr, err := netip.ParseAddr(local)
		if err != nil {
			return t, fmt.Errorf("ifconfig_local: %w", err)
		}
		bits := addr.BitLen()
		if mask, err := netip.ParseAddr(environment("ifconfig_netmask")); err == nil && mask.Is4() {
			bits = 0
			for _, b := range mask.As4() {
				for ; b&0x80 != 0; b <<= 1 {
					bits++
				}
			}
		}
		t.Addresses = append(t.Addresses, netip.PrefixFrom(addr, bits))
	}
	if local := environment("ifconfig_ipv6_local"); local != "" {
		prefix, err := netip.ParsePrefix(local + "/" + environment("ifconfig_ipv6_netbits"))
		if err != nil {
			return t, fmt.Errorf("ifconfig_ipv6_local: %w", err)
		}
		t.Addresses = append(t.Addresses, prefix)
	}
	if len(t.Addresses) == 0 {
		return t, errors.New("OpenVPN names no address: this is for its --up")
	}
	t.MTU, _ = strconv.Atoi(environment("tun_mtu")) // 0 is none
	const most = 100
	for n := 1; n < most; n++ {
		f := strings.Fields(environment(fmt.Sprint("foreign_option_", n)))
		if len(f) == 3 && f[0] == "dhcp-option" && (f[1] == "DNS" || f[1] == "DNS6") {
			if server, err := netip.ParseAddr(f[2]); err == nil {
				t.Servers = append(t.Servers, server)
			}
		}
	}
	return t, nil
}

// lead moves the link of a VPN into the namespace, with its addresses and default routes, and writes resolv.conf.
func (h *Host) lead(s State, p plan, t tunnel) error {
	link, found, err := h.kernel.LinkByName(p.link)
	if err != nil {
		return err
	}
	if !found {
		return fmt.Errorf("the VPN has no link %s", p.link)
	}
	if err := h.memory.dir.Write(tunnelFile(s.Name), t); err != nil {
		return err
	}
	if err := insideWith(s.Name, func(kernel *route.Conn) error { // that of a VPN before
		return kernel.DeleteLink(p.link)
	}); err != nil {
		return err
	}
	ns, err := os.Open(netPin(s.Name))
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := h.kernel.MoveLink(link.Index, ns.Fd()); err != nil {
		return err
	}
	if err := insideWith(s.Name, func(kernel *route.Conn) error { return enliven(kernel, p.link, t) }); err != nil {
		return err
	}
	var lacking []string
	return h.syncResolv(s, unbidden, &lacking)
}

// enliven sets a link of a namespace up, with the addresses of a tunnel, and leads everything there.
func enliven(kernel *route.Conn, name string, t tunnel) error {
	link, found, err := kernel.LinkByName(name)
	if err != nil || !found {
		return errors.Join(err, fmt.Errorf("link %s is gone", name))
	}
	if err := kernel.SetUp(link.Index, t.MTU); err != nil {
		return err
	}
	for _, a := range t.Addresses {
		if err := kernel.AddAddress(link.Index, a); err != nil {
			return err
		}
	}
	for _, family := range families {
		var want []route.Route
		if slices.ContainsFunc(t.Addresses, func(a netip.Prefix) bool { return a.Addr().Is4() == (family == unix.AF_INET) }) {
			want = append(want, route.NewRoute(unix.RT_TABLE_MAIN, anywhere(family), netip.Addr{}, link.Index))
		}
		if _, _, err := kernel.SyncRoutes(family, unix.RT_TABLE_MAIN, want); err != nil {
			return err
		}
	}
	return nil
}

// addressesOf are the addresses of a link as one text.
func (h *Host) addressesOf(ifname string) (string, error) {
	link, found, err := h.kernel.LinkByName(ifname)
	if err != nil || !found {
		return "", err
	}
	var all []string
	for _, family := range families {
		addresses, err := h.kernel.AddressesOn(family, link.Index)
		if err != nil {
			return "", err
		}
		for _, a := range addresses {
			all = append(all, a.Addr.String())
		}
	}
	slices.Sort(all)
	return strings.Join(all, " "), nil
}

// vpnServers are the name servers of the VPN of a namespace, as it said last.
func (m memory) vpnServers(name string) ([]netip.Addr, error) {
	var t tunnel
	err := m.dir.Read(tunnelFile(name), &t)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return t.Servers, err
}

// vpnPatience is how long a VPN may take to open its socket after its link.
const vpnPatience = time.Second
