package netns

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// pasta is the program that carries what the namespace sends by sockets of its own, outside.
const pasta = "pasta"

var errNoPasta = errors.New("wiring: there is no program pasta: install passt (apt install passt), or use --wiring nat")

// checkPrograms returns which program is missing that a namespace cannot do without.
func (c Config) checkPrograms() error {
	if c.Wiring == WiringPasta && helperProgram(pasta) == "" {
		return errNoPasta
	}
	return nil
}

// pastaCommand is the program of a namespace whose wiring is pasta: outside of it, and bound to the uplink.
func (h *Host) pastaCommand(s State) ([]string, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	with := func(families string) []string { return h.bound(self, s, self, "netns", "pasta", s.Name, families) }
	inet, both := with("ipv4"), with("both") // another process once there is IPv6
	if !s.IPv6 {
		return inet, nil
	}
	jobs, err := h.memory.jobs(s.Name)
	if err != nil || slices.ContainsFunc(jobs, func(j job) bool { return j.runs() && slices.Equal(j.Args, both) }) {
		return both, err
	}
	if _, found, err := h.modelFor(s); err != nil || !found {
		return inet, err
	}
	return both, nil
}

// modelFor is a link with an address of IPv6 for the link alone, without which pasta has no IPv6: any link does, and while that of
// the namespace is down it has none.
func (h *Host) modelFor(s State) (ifname string, found bool, err error) {
	links, addresses, err := h.kernel.HostAddresses()
	ifname = s.Ifname
	for _, l := range links {
		if (l.Name == s.Ifname || !found) && slices.ContainsFunc(addresses, func(a route.Address) bool { return a.Index == l.Index && a.Addr.Is6() && a.Addr.IsLinkLocalUnicast() }) {
			ifname, found = l.Name, true
		}
	}
	return ifname, found, err
}

// Pasta executes pasta in place of this process, which is bound to the uplink, for a namespace. It returns only if that fails.
func (h *Host) Pasta(name string) error {
	runtime.LockOSThread()
	s, err := h.known(name)
	if err != nil {
		return named(name, err)
	}
	pools, err := h.memory.pools()
	if err != nil {
		return err
	}
	path := helperProgram(pasta)
	if path == "" {
		return errNoPasta
	}
	ns, err := pinForPasta(name)
	if err != nil {
		return fmt.Errorf("show pasta the namespace: %w", err)
	}
	model, inet6, err := h.modelFor(s)
	if err != nil {
		return err
	}
	p := s.plan(pools)
	mac := net.HardwareAddr(h.hardwareOf(name)).String()
	args := []string{pasta, "--foreground", "--quiet", "--netns-only", "--netns", ns, "--ns-ifname", inner, "--interface", model, "--mac-addr", mac,
		"--config-net", "--address", p.ours.inet.Addr().String(), "--netmask", fmt.Sprint(p.ours.inet.Bits()), "--gateway", p.here.inet.Addr().String(),
		"--dns", "none", "--no-dhcp", "--no-dhcpv6", "--no-ra",
		"--no-map-gw", "--tcp-ports", "none", "--udp-ports", "none", "--tcp-ns", "none", "--udp-ns", "none"} // nothing of this host's loopback
	if s.IPv6 && inet6 {
		args = append(args, "--address", p.ours.inet6.Addr().String(), "--gateway", p.here.inet6.Addr().String())
	} else {
		args = append(args, "--ipv4-only")
	}
	if err := becomeNobody(unix.CAP_SYS_ADMIN, unix.CAP_NET_ADMIN); err != nil {
		return fmt.Errorf("run pasta as another user: %w", err)
	}
	return syscall.Exec(path, args, []string{"PATH=" + binaries})
}

// nobody is the user that pasta runs as.
const nobody = 65534

// pinForPasta mounts a namespace, for this thread alone, where the profiles of AppArmor that come with pasta let it look.
func pinForPasta(name string) (path string, err error) {
	ns, err := os.Open(netPin(name))
	if err != nil {
		return "", err
	}
	defer ns.Close()
	dir := fmt.Sprintf("/run/user/%d/netns", nobody)
	path = filepath.Join(dir, name)
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return "", err
	}
	if err := errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"), os.MkdirAll(dir, 0o755),
		os.WriteFile(path, nil, 0o600)); err != nil {
		return "", err
	}
	return path, unix.Mount(fmt.Sprintf("/proc/thread-self/fd/%d", ns.Fd()), path, "", unix.MS_BIND, "")
}

// becomeNobody gives this process another user, and the program that it executes these capabilities. Pasta gives them up, but for
// that of entering the namespace.
func becomeNobody(capabilities ...uint) error {
	// A version of 2023 closes all descriptors that it may have, one after the other.
	const files = 1 << 16
	var limit syscall.Rlimit
	err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit)
	limit.Max = min(limit.Max, files)
	limit.Cur = limit.Max
	if err := errors.Join(err, syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit), unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0)); err != nil {
		return err
	}
	if err := errors.Join(syscall.Setgroups(nil), syscall.Setresgid(nobody, nobody, nobody), syscall.Setresuid(nobody, nobody, nobody)); err != nil {
		return err
	}
	var sets [2]unix.CapUserData
	for _, c := range capabilities {
		sets[0].Permitted |= 1 << c
	}
	sets[0].Effective, sets[0].Inheritable = sets[0].Permitted, sets[0].Permitted
	if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &sets[0]); err != nil {
		return err
	}
	for _, c := range capabilities {
		if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(c), 0, 0); err != nil {
			return err
		}
	}
	return nil
}

// syncPasta sets up what a namespace has beside the link of pasta.
func (h *Host) syncPasta(s State, lacking *[]string) error {
	addresses, err := pastaAddresses(s.Name)
	if err == nil && len(addresses) == 0 {
		what := "its program pasta does not run: nothing leaves the namespace until it does, which needs a lease of " + s.Ifname
		if !h.follows {
			what += "; the service runs it: " + outside.Service("enable --now", "table-allocator-netns")
		}
		*lacking = append(*lacking, what)
	}
	return err
}

// pastaAddresses are the addresses on the link of pasta, which is there while pasta runs.
func pastaAddresses(name string) (addresses []string, err error) {
	err = insideWith(name, func(kernel *route.Conn) error {
		if err := setUp(kernel, uplink.Loopback); err != nil {
			return err
		}
		link, found, err := kernel.LinkByName(inner)
		if err != nil || !found {
			return err
		}
		addresses, err = globalAddresses(kernel, link.Index)
		return err
	})
	return addresses, err
}

// pastaRow is row for a namespace whose wiring is pasta, which has no rules.
func (h *Host) pastaRow(row Row, s State) (Row, error) {
	row.Addresses = []string{}
	if row.Missing = h.unmade(s); row.Missing != "" {
		return row, nil
	}
	addresses, err := pastaAddresses(s.Name)
	if err != nil {
		return row, err
	}
	row.Addresses = append(row.Addresses, addresses...)
	leased, err := h.leased(s.Ifname)
	switch {
	case !leased:
		row.Missing = "a lease"
	case len(addresses) == 0:
		row.Missing = "its program pasta"
	}
	return row, err
}
