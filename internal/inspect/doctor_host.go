package inspect

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/route"
)

// lookRPFilter asks whether a packet from the Internet is accepted at each address of an uplink.
func lookRPFilter(p *patient) (all []symptom) {
	for _, row := range p.report.Uplinks {
		addr, err := netip.ParseAddr(row.Address)
		link := p.linkNamed(row.Ifname)
		if err != nil || !addr.Is4() || rpFilter(row.Ifname) != 1 || !link.Carrier {
			continue
		}
		peer := netip.MustParseAddr(nowhere[unix.AF_INET][0][0])
		if _, err := p.kernel.Match(route.Question{Dst: addr, Src: peer, Iif: link.Index}); errors.Is(err, unix.EINVAL) {
			all = append(all, symptom{"packets to " + row.Address + " that arrive by " + row.Ifname + " are dropped",
				fmt.Sprintf("rp_filter of %s is 1, and replies to %s leave by another link", row.Ifname, peer), "sysctl -w net.ipv4.conf." + row.Ifname + ".rp_filter=2"})
		}
	}
	return all
}

func lookAcceptRA(p *patient) (all []symptom) {
	seen := make(map[string]bool)
	for _, l := range p.leases {
		if l.family != unix.AF_INET6 || seen[l.Ifname] || l.at.Flags&unix.IFA_F_PERMANENT != 0 ||
			setting(unix.AF_INET6, l.Ifname, "forwarding") != "1" || setting(unix.AF_INET6, l.Ifname, "accept_ra") != "1" {
			continue
		}
		if slices.ContainsFunc(p.routes(unix.AF_INET6, unix.RT_TABLE_MAIN), func(r route.Route) bool {
			return r.Dst.Bits() == 0 && r.Protocol == unix.RTPROT_RA && slices.Contains(r.Links(), l.link.Index)
		}) {
			continue
		}
		seen[l.Ifname] = true
		all = append(all, symptom{l.Ifname + " gets no IPv6 default route: forwarding is on, and accept_ra is 1",
			fmt.Sprintf("net.ipv6.conf.%s.forwarding=1 accept_ra=1, the address %s has a lifetime, no default route proto ra", l.Ifname, l.Address),
			"sysctl -w net.ipv6.conf." + l.Ifname + ".accept_ra=2"})
	}
	return all
}

// pairs calls f for leases of different links.
func (p *patient) pairs(f func(a, b lease)) {
	for i, a := range p.leases {
		for _, b := range p.leases[i+1:] {
			if a.Ifname != b.Ifname && a.family == b.family && networkOf(a).IsValid() && networkOf(b).IsValid() && a.addr != b.addr {
				f(a, b)
			}
		}
	}
}

func isHost(network netip.Prefix, addr netip.Addr) bool {
	return network.IsSingleIP() && network.Addr() == addr
}

// lookOverlap asks the kernel where packets to the narrower one of two networks leave.
func lookOverlap(p *patient) (all []symptom) {
	p.pairs(func(a, b lease) {
		x, y := networkOf(a), networkOf(b)
		// A network that is the address alone takes no packets away, since table local answers for it.
		if x == y || !x.Overlaps(y) || isHost(x, a.addr) || isHost(y, b.addr) {
			return
		}
		if x.Bits() > y.Bits() {
			a, b, x, y = b, a, y, x
		}
		what := fmt.Sprintf("the networks of %s and %s overlap", a.Ifname, b.Ifname)
		evidence := fmt.Sprintf("%s on %s, %s on %s", x, a.Ifname, y, b.Ifname)
		switch q := (route.Question{Dst: p.neighbourIn(y)}); {
		case !p.leavesBy(q, b.at.Index):
			all = append(all, symptom{what + ": packets to the narrower one do not leave by its link", evidence, "no_network_rule for the wider one in watch.json, or --no-network-rule"})
		case !p.leavesBy(route.Question{Src: a.addr, Dst: q.Dst}, b.at.Index):
			all = append(all, symptom{fmt.Sprintf("%s: hosts on %s get no replies from %s", what, b.Ifname, a.Address), evidence,
				fmt.Sprintf("\"specific_first\": true for %s in watch.json, or --specific-first, if they ask for that address", a.Ifname)})
		}
	})
	return all
}

// neighbourIn is an address of a network that this host has not.
func (p *patient) neighbourIn(network netip.Prefix) netip.Addr {
	addr := network.Addr()
	for next := addr.Next(); network.Contains(next); next = next.Next() {
		if addr = next; !slices.ContainsFunc(p.addresses, func(a route.Address) bool { return a.Addr == addr }) {
			break
		}
	}
	return addr
}

// leavesBy reports whether packets leave by a link.
func (p *patient) leavesBy(q route.Question, index int) bool {
	r, err := p.kernel.Match(q)
	return err == nil && slices.Contains(r.Links(), index)
}

// answersForOthers reports whether a link answers ARP requests for addresses of other links.
func answersForOthers(ifname string) bool {
	return max(number(setting(unix.AF_INET, "all", "arp_ignore")), number(setting(unix.AF_INET, ifname, "arp_ignore"))) == 0
}

// isFlux reports whether one of two links answers ARP requests for addresses of the other one. Nobody asks where there is one neighbour, as
// on links of PPP, whose far end may have the same address on two of them.
func isFlux(a, b lease) bool {
	return a.family == unix.AF_INET && !a.link.PointToPoint && !b.link.PointToPoint && (answersForOthers(a.Ifname) || answersForOthers(b.Ifname))
}

func lookARPFlux(p *patient) (all []symptom) {
	p.pairs(func(a, b lease) {
		if networkOf(a) == networkOf(b) && isFlux(a, b) {
			all = append(all, symptom{fmt.Sprintf("%s and %s answer for each other's address in %s", a.Ifname, b.Ifname, networkOf(a)), "arp_ignore is 0",
				"sysctl -w net.ipv4.conf.all.arp_ignore=1"})
		}
	})
	return all
}

func lookSameSubnet(p *patient) (all []symptom) {
	p.pairs(func(a, b lease) {
		if networkOf(a) != networkOf(b) || isFlux(a, b) {
			return
		}
		all = append(all, symptom{fmt.Sprintf("%s and %s have the same network: unbound packets to neighbours leave by one of them", a.Ifname, b.Ifname), networkOf(a).String(),
			"bind programs to a link or an address"})
	})
	return all
}

func lookDuplicate(p *patient) (all []symptom) {
	links := make(map[netip.Addr][]int)
	for _, a := range p.addresses {
		if a.Addr.Is4() && !a.Addr.IsLoopback() {
			links[a.Addr] = append(links[a.Addr], a.Index)
		}
	}
	for addr, on := range links {
		if len(on) > 1 {
			all = append(all, symptom{addr.String() + " is on " + p.linkNames(on), "replies leave by the first", "delete it from one of them"})
		}
	}
	for _, r := range p.routes(unix.AF_INET, unix.RT_TABLE_MAIN) {
		if on := links[r.Gateway]; len(on) > 0 {
			all = append(all, symptom{"this host has the address of the gateway " + r.Gateway.String(), p.routeText(r), "delete the address from " + p.linkNames(on)})
		}
	}
	return all
}

// outdated reports whether the program of a process is not installed any more, and returns its name.
func outdated(pid int) (exe string, is bool) {
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	return exe, err == nil && strings.HasSuffix(exe, " (deleted)")
}

// differs reports whether the program of a process is not this one, byte for byte, and returns its name. A version cannot be
// asked for, since the program may be anybody's.
func differs(pid int) (exe string, is bool) {
	path := fmt.Sprintf("/proc/%d/exe", pid)
	exe, err := os.Readlink(path)
	if err != nil || strings.HasSuffix(exe, " (deleted)") {
		return exe, false // it cannot be seen, or outdated knows
	}
	theirs, err := outside.Stat(path)
	own, ownErr := os.Stat("/proc/self/exe")
	switch {
	case err != nil || ownErr != nil || os.SameFile(theirs, own):
		return exe, false
	case theirs.Size() != own.Size():
		return exe, true
	}
	a, err := outside.ReadFile(path)
	b, ownErr := os.ReadFile("/proc/self/exe")
	return exe, err == nil && ownErr == nil && !bytes.Equal(a, b)
}

// renewal is what makes the holder of a lease run the installed program.
func renewal(pid int) string {
	if isWatch(pid) {
		return outside.Service("restart", "table-allocator-watch")
	}
	return "table-allocator-client reexec"
}

// lookHolders looks for holders whose program was replaced or deleted, or is another one than this.
func lookHolders(p *patient) (all []symptom) {
	seen := make(map[int]bool)
	for _, l := range p.leases {
		if exe, is := outdated(l.PID); is && !seen[l.PID] {
			seen[l.PID] = true
			all = append(all, symptom{fmt.Sprintf("the holder of %s runs a version that is not installed any more", l.Address), fmt.Sprintf("pid %d, %s", l.PID, exe),
				renewal(l.PID)})
		} else if exe, is := differs(l.PID); is && !seen[l.PID] {
			seen[l.PID] = true
			all = append(all, symptom{fmt.Sprintf("the holder of %s runs another version than the one that asks", l.Address), fmt.Sprintf("pid %d, %s", l.PID, exe),
				renewal(l.PID) + ", after the programs at both places are the same"})
		}
	}
	return all
}

// running returns a process of a name, in the network namespace of the caller; 0: there is none.
func running(comm string) (pid int) {
	own, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		return 0
	}
	dirs, _ := filepath.Glob("/proc/[0-9]*") // the pattern is right
	for _, dir := range dirs {
		if readLine(dir+"/comm") != comm {
			continue
		}
		if theirs, err := os.Readlink(dir + "/ns/net"); err == nil && theirs == own {
			pid, _ = strconv.Atoi(filepath.Base(dir)) // of digits, by the pattern
			return pid
		}
	}
	return 0
}

// hasLine reports whether a text has a line, without what is before and behind it.
func hasLine(text, want string) bool {
	for line := range strings.Lines(text) {
		if strings.TrimSpace(line) == want {
			return true
		}
	}
	return false
}

// networkdFiles are the configuration files that systemd-networkd reads: of those with one name only the first.
func networkdFiles() (files []string) {
	seen := make(map[string]bool)
	for _, dir := range []string{"/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib"} {
		found, _ := filepath.Glob(dir + "/systemd/networkd.conf.d/*.conf") // the pattern is right
		for _, file := range append(found, dir+"/systemd/networkd.conf") {
			if _, err := os.Stat(file); err == nil && !seen[filepath.Base(file)] {
				seen[filepath.Base(file)] = true
				files = append(files, file)
			}
		}
	}
	return files
}

// managesForeign reports whether systemd-networkd says that it manages rules of others: it lists those only if it does.
// Versions before 250 do not say it, and without an answer nothing is known: that is no.
func managesForeign() bool {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "busctl", "--system", "--auto-start=no", "--json=short", "call", "org.freedesktop.network1", "/org/freedesktop/network1",
		"org.freedesktop.network1.Manager", "Describe").Output()
	var answer struct{ Data []string }
	if err != nil || json.Unmarshal(out, &answer) != nil || len(answer.Data) != 1 {
		return false
	}
	var state struct {
		RoutingPolicyRules []struct {
			ConfigSource string
			Protocol     int
		}
	}
	if json.Unmarshal([]byte(answer.Data[0]), &state) != nil {
		return false
	}
	for _, rule := range state.RoutingPolicyRules {
		if rule.ConfigSource == "foreign" && rule.Protocol != unix.RTPROT_KERNEL {
			return true
		}
	}
	return false
}

// lookNetworkd looks for the setting without which systemd-networkd deletes rules of others, and asks whether it was read.
// The time of a file does not tell: each upgrade of a package renews it.
func lookNetworkd(*patient) []symptom {
	pid := running("systemd-network") // a name has 15 bytes
	if pid == 0 {
		return nil
	}
	const cure = "systemctl restart systemd-networkd"
	for _, file := range networkdFiles() {
		switch {
		case !hasLine(readText(file), "ManageForeignRoutingPolicyRules=no"):
		case managesForeign():
			return []symptom{{"systemd-networkd deletes our rules: it has not read its configuration since that says no",
				fmt.Sprintf("%s says no, and pid %d lists rules of others among those that it manages: networkctl --json=short list", file, pid), cure}}
		default:
			return nil
		}
	}
	return []symptom{{"systemd-networkd deletes our rules", "no networkd.conf has ManageForeignRoutingPolicyRules=no",
		"put ManageForeignRoutingPolicyRules=no below [Network] in /etc/systemd/networkd.conf.d/table-allocator.conf, and: " + cure}}
}

// hookFiles are where hooks are installed.
var hookFiles = []string{"/etc/dhcp/dhclient-enter-hooks.d/table-allocator", "/etc/network/if-up.d/table-allocator", "/etc/NetworkManager/dispatcher.d/table-allocator",
	"/usr/lib/NetworkManager/dispatcher.d/table-allocator", "/usr/lib/dhcpcd/dhcpcd-hooks/60-table-allocator", "/usr/libexec/dhcpcd-hooks/60-table-allocator", "/etc/ppp/ip-up.d/table-allocator"}

func installedHooks() (files []string) {
	for _, file := range hookFiles {
		if _, err := os.Stat(file); err == nil {
			files = append(files, file)
		}
	}
	return files
}

func lookHooks(p *patient) []symptom {
	if files := installedHooks(); len(files) > 0 && p.report.Server.State == Stopped {
		return []symptom{{"hooks are installed, and the server is stopped: addresses get no table", strings.Join(files, " "), outside.Service("enable --now", "table-allocator-server")}}
	}
	return nil
}

func lookIfupdown2(p *patient) []symptom {
	const dir = "/usr/share/ifupdown2"
	if _, err := os.Stat(dir); err != nil || !slices.Contains(installedHooks(), "/etc/network/if-up.d/table-allocator") {
		return nil
	}
	return []symptom{{"ifupdown2 does not say to hooks which address it has set", dir, outside.Service("enable --now", "table-allocator-watch")}}
}

// lookUDP looks for servers that answer from another address than the one that was asked.
func lookUDP(p *patient) (all []symptom) {
	links := make(map[string]bool)
	for _, l := range p.leases {
		if l.family == unix.AF_INET {
			links[l.Ifname] = links[l.Ifname] || !p.repliesByUplink(l)
		}
	}
	if !slices.Contains(slices.Collect(maps.Values(links)), true) {
		return nil
	}
	text, err := os.ReadFile("/proc/thread-self/net/udp")
	if err != nil || len(links) < 2 {
		return nil
	}
	known := map[string]bool{"0043": true, "0044": true, "14E9": true} // DHCP and mDNS answer by link
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) < 3 {
			continue
		}
		addr, port, _ := strings.Cut(fields[1], ":")
		var number uint16
		if addr != "00000000" || !strings.HasPrefix(fields[2], "00000000:") || known[port] {
			continue
		}
		if _, err := fmt.Sscanf(port, "%X", &number); err == nil && number < 32768 { // else a client
			all = append(all, symptom{fmt.Sprintf("a UDP server on 0.0.0.0 port %d may answer from another uplink's address than the one that was asked", number), "/proc/net/udp: " + fields[1],
				replyByUplink + ", or bind the server to each address, unless it sets the source itself (IP_PKTINFO)"})
		}
	}
	return all
}
