package inspect

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/bind"
	"github.com/table-allocator/table-allocator/internal/nat"
	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// lookNoLease finds addresses that status calls unserved, and holders that do not answer.
func lookNoLease(p *patient) (all []symptom) {
	for _, row := range slices.Concat(p.report.Uplinks, p.report.Others) {
		for _, f := range row.Findings {
			if f.IsFault() && slices.Contains([]string{"no-lease", "not-served", "silent"}, f.Name) {
				all = append(all, row.symptom(f))
			}
		}
	}
	return all
}

// leases of a family whose address is on the host, on links that differ from all before.
func (p *patient) linksOf(family int) (all []lease) {
	for _, l := range p.leases {
		if l.family == family && l.link.Index != 0 && !slices.ContainsFunc(all, func(o lease) bool { return o.Ifname == l.Ifname }) {
			all = append(all, l)
		}
	}
	return all
}

// inside are links without a lease that have a network: containers, LANs.
func (p *patient) inside(family int) (all []route.Address) {
	for _, a := range p.addresses {
		name := p.linkName(a.Index)
		if a.Family() != family || a.Network().IsSingleIP() || name == uplink.Loopback || !a.Addr.IsGlobalUnicast() ||
			slices.ContainsFunc(p.report.Uplinks, func(r Row) bool { return r.Ifname == name }) {
			continue
		}
		all = append(all, a)
	}
	return all
}

// lookUnboundShadowed finds default routes of main over links that are no uplinks, where those of uplinks have moved.
func lookUnboundShadowed(p *patient) (all []symptom) {
	for _, family := range families {
		leases := p.linksOf(family)
		if !slices.ContainsFunc(leases, func(l lease) bool { return l.Mode == string(uplink.MoveRoutes) }) {
			continue
		}
		for _, r := range p.routes(family, unix.RT_TABLE_MAIN) {
			isUplink := slices.ContainsFunc(leases, func(l lease) bool { return slices.Contains(r.Links(), l.link.Index) })
			if r.Dst.Bits() == 0 && r.Type == unix.RTN_UNICAST && r.Protocol != route.Protocol && !isUplink {
				all = append(all, symptom{"unbound traffic leaves by " + p.linkNames(r.Links()) + ", not by an uplink whose routes were moved", p.routeText(r),
					p.deleteRoute(r) + " # if that is no VPN"})
			}
		}
	}
	return all
}

// lookMarkNowhere finds marks whose rules lead to main, where no default route is left since move took them, and then nowhere: the rules of
// VPNs, by which their own packets leave. Packets without a mark may be refused, too, between main and the unbound rules.
func lookMarkNowhere(p *patient) (all []symptom) {
	for _, family := range families {
		moved := func(l lease) bool { return l.Mode == string(uplink.MoveRoutes) && l.Gateway != "" }
		if !slices.ContainsFunc(p.linksOf(family), moved) {
			continue
		}
		dst := netip.MustParseAddr(nowhere[family][0][0])
		const copyRoutes = `"routes": "copy" in watch.json, or --routes copy`
		if a, err := p.walk(family, route.Question{Dst: dst}); err == nil {
			if rule, decided := a.Rule(); decided && a.Err != 0 && rule.Protocol != route.Protocol {
				all = append(all, symptom{"unbound packets do not leave: default routes were moved from main to behind what refuses them", p.refusal(a), copyRoutes})
			}
		}
		for _, r := range p.rules[family] {
			if r.Mask == 0 || r.Flags != 0 || r.Action != route.Lookup || r.Table != unix.RT_TABLE_MAIN || r.Src.IsValid() || r.Dst.IsValid() || r.Protocol == route.Protocol {
				continue
			}
			a, err := p.walk(family, route.Question{Dst: dst, Mark: r.Mark})
			if rule, decided := a.Rule(); err != nil || a.Err == 0 || !decided || rule.Mask == 0 {
				continue // all other packets have no route either
			}
			all = append(all, symptom{fmt.Sprintf("packets with the mark %#x do not leave: their rules ask main, whose default routes were moved", r.Mark),
				r.String() + ", then " + p.refusal(a), copyRoutes})
		}
	}
	return all
}

// lookRPForward asks whether replies to forwarded connections are accepted from each uplink.
func lookRPForward(p *patient) (all []symptom) {
	if readLine("/proc/sys/net/ipv4/ip_forward") != "1" {
		return nil
	}
	peer := netip.MustParseAddr(nowhere[unix.AF_INET][0][0])
	for _, l := range p.linksOf(unix.AF_INET) {
		if rpFilter(l.Ifname) != 1 || !l.link.Carrier {
			continue
		}
		for _, a := range p.inside(unix.AF_INET) {
			if _, err := p.kernel.Match(route.Question{Dst: neighbourOf(a), Src: peer, Iif: l.link.Index}); errors.Is(err, unix.EINVAL) {
				all = append(all, symptom{"packets to the network of " + p.linkName(a.Index) + " that arrive by " + l.Ifname + " are dropped",
					fmt.Sprintf("rp_filter of %s is 1, and what is forwarded to %s leaves by another link", l.Ifname, peer), "sysctl -w net.ipv4.conf." + l.Ifname + ".rp_filter=2"})
			}
		}
	}
	return all
}

// neighbourOf is another address of the network of an address.
func neighbourOf(a route.Address) netip.Addr {
	first := a.Network().Masked().Addr().Next()
	if first == a.Addr {
		return first.Next()
	}
	return first
}

// lookForward finds rules for forwarded packets on a host that does not forward, and filters that drop them.
func lookForward(p *patient) (all []symptom) {
	for _, family := range families {
		name := map[int]string{unix.AF_INET: "ipv4.ip_forward", unix.AF_INET6: "ipv6.conf.all.forwarding"}[family]
		if readLine("/proc/sys/net/"+strings.ReplaceAll(name, ".", "/")) != "0" {
			continue
		}
		for _, r := range p.rules[family] {
			if r.Protocol == route.Protocol && r.Src.IsValid() && !r.Src.IsSingleIP() && r.Action == route.Lookup && p.tables[r.Table] != "" {
				all = append(all, symptom{"a lease has a rule for packets that this host forwards, and the host does not forward", r.String(), "sysctl -w net." + name + "=1"})
			}
		}
	}
	if readLine("/proc/sys/net/ipv4/ip_forward") != "1" || len(p.inside(unix.AF_INET)) == 0 {
		return all
	}
	var inside []string
	for _, a := range p.inside(unix.AF_INET) {
		inside = append(inside, p.linkName(a.Index))
	}
	for _, c := range p.chains("hook forward") {
		if !strings.Contains(c.body, "policy drop") || c.family != "ip" && c.family != "inet" {
			continue
		}
		for _, l := range p.linksOf(unix.AF_INET) {
			if !c.accepts(append(slices.Clone(inside), l.Ifname)) {
				all = append(all, symptom{"a packet filter drops what is forwarded by " + l.Ifname, fmt.Sprintf("chain %s has policy drop, and accepts nothing for %s", c.name, l.Ifname),
					"accept it there: oifname " + l.Ifname})
			}
		}
	}
	return all
}

// chain is a chain of nftables.
type chain struct{ family, table, name, body string }

// chains are those of nftables whose text has some words. Without nft, or without the right to list, there are none.
func (p *patient) chains(words string) (all []chain) {
	if p.nftables == nil {
		p.nftables = []chain{}
		for _, c := range nat.Listed() {
			p.nftables = append(p.nftables, chain{c.Family, c.Table, c.Name, c.Body})
		}
	}
	for _, c := range p.nftables {
		if strings.Contains(c.body, words) {
			all = append(all, c)
		}
	}
	return all
}

// reached are the chains whose text has some words, and those that they lead to.
func (p *patient) reached(words string) []chain {
	all := slices.Clone(p.chains(words))
	for i := 0; i < len(all); i++ {
		for _, c := range p.nftables {
			leads := slices.ContainsFunc([]string{"jump ", "goto "}, func(verb string) bool {
				return slices.ContainsFunc(strings.Split(all[i].body, "\n"), func(line string) bool {
					return strings.HasSuffix(line, verb+c.name)
				})
			})
			if leads && c.family == all[i].family && c.table == all[i].table && !slices.Contains(all, c) {
				all = append(all, c)
			}
		}
	}
	return all
}

// accepts reports whether a rule of the chain may accept packets of one of some links, or another chain decides.
func (c chain) accepts(ifnames []string) bool {
	for line := range strings.Lines(c.body) {
		decides := strings.Contains(line, "accept") && !strings.Contains(line, "policy ") || strings.Contains(line, "jump ") || strings.Contains(line, "goto ")
		named := strings.Contains(line, "ifname") || strings.Contains(line, " iif ") || strings.Contains(line, " oif ")
		ours := slices.ContainsFunc(ifnames, func(name string) bool { return strings.Contains(line, `"`+name+`"`) })
		if decides && (!named || ours || strings.Contains(line, "@") || strings.Contains(line, "*") || strings.Contains(line, "vmap")) {
			return true
		}
	}
	return false
}

// lookSNAT looks for addresses of leases that a packet filter gives to packets.
func lookSNAT(p *patient) (all []symptom) {
	for _, l := range p.leases {
		for _, c := range p.chains("snat ") {
			for line := range strings.Lines(c.body) {
				if strings.Contains(line, "snat ") && slices.Contains(strings.Fields(line), l.Address) {
					all = append(all, symptom{"packets get the source " + l.Address + " whatever uplink they leave by, and connections end when that changes", strings.TrimSpace(line),
						"masquerade in place of snat"})
				}
			}
		}
	}
	return all
}

var dnatTo = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`dnat (?:ip6? )?to \[?([0-9a-fA-F.:]+?)\]?(?::\d+)?(?:\s|$)`)
})

// lookPublished asks by which uplink containers answer connections to published ports.
func lookPublished(p *patient) (all []symptom) {
	seen := make(map[string]bool)
	for _, c := range p.chains("dnat ") {
		for line := range strings.Lines(c.body) {
			found := dnatTo().FindStringSubmatch(line)
			if found == nil {
				continue
			}
			to, err := netip.ParseAddr(found[1])
			if err != nil {
				continue
			}
			in, err := p.kernel.Resolve(route.Question{Dst: to})
			if err != nil || slices.ContainsFunc(p.leases, func(l lease) bool { return l.link.Index == in.Index }) {
				continue // the answer of a neighbour does not come here
			}
			q := route.Question{Dst: netip.MustParseAddr(nowhere[familyOf(to)][0][0]), Src: to, Iif: in.Index}
			out, err := p.kernel.Match(q)
			for _, l := range p.linksOf(familyOf(to)) {
				if err != nil || slices.Contains(out.Links(), l.link.Index) || p.answersByMark(l) || p.repliesByUplink(l) || strings.Contains(line, "iifname") && !strings.Contains(line, `"`+l.Ifname+`"`) || seen[l.Ifname+to.String()] {
					continue
				}
				seen[l.Ifname+to.String()] = true
				all = append(all, symptom{fmt.Sprintf("connections to %s that arrive by %s and are forwarded to %s are answered by %s", l.Address, l.Ifname, to, p.linkNames(out.Links())), strings.TrimSpace(line),
					replyByUplink + ", or publish the port on " + p.linkNames(out.Links()) + " only"})
			}
		}
	}
	return all
}

// replyByUplink is what turns repliesByUplink on.
const replyByUplink = `set "reply_by_uplink": true in watch.json, beside "links"`

// repliesByUplink reports whether replies leave by the uplink of a lease that was asked at its address, also those that have no source when
// their route is chosen: there is the rule for that, and, as far as nftables can be read, what uses the rule.
func (p *patient) repliesByUplink(l lease) bool {
	if !slices.ContainsFunc(p.rules[l.family], func(r route.Rule) bool { return uplink.IsReply(r) && r.Table == l.Table }) {
		return false
	}
	all, err := nat.RepliesOf()
	return err != nil || all[l.addr]
}

// answersByMark reports whether packets of a connection get the mark of the connection, and a rule of another program leads
// packets with a mark to the table of a lease.
func (p *patient) answersByMark(l lease) bool {
	restores := slices.ContainsFunc([]string{"meta mark set ct mark", "meta mark set (ct mark", "CONNMARK restore"}, func(words string) bool { return len(p.chains(words)) > 0 })
	return restores && slices.ContainsFunc(p.foreign(l.family), func(r route.Rule) bool { return r.Mask != 0 && r.Action == route.Lookup && r.Table == l.Table })
}

// lookGuards finds sockets that are bound to a link whose address is blocked: IPv4 sends their packets all the same.
func lookGuards(p *patient) (all []symptom) {
	for _, l := range p.leases {
		if l.family != unix.AF_INET || !slices.ContainsFunc(l.Findings, func(f Finding) bool { return f.Name == "blocked" }) {
			continue
		}
		sockets, _ := route.Sockets() // which everybody may list
		for _, s := range sockets {
			if s.Device == l.link.Index && s.Local.Addr().Is4() {
				all = append(all, symptom{l.Address + " is blocked, and a socket that is bound to " + l.Ifname + " sends to neighbours all the same", fmt.Sprintf("%s, uid %d", s.Local, s.UID),
					"bind the program in place of the socket: table-allocator-client run " + l.Ifname})
			}
		}
	}
	return all
}

// lookMPTCP finds endpoints of MPTCP whose subflows leave by any uplink.
func lookMPTCP(p *patient) (all []symptom) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	text, _ := exec.CommandContext(ctx, "ip", "mptcp", "endpoint", "show").Output() // there is no ip, or no MPTCP
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		addr, err := netip.ParseAddr(fields[0])
		if err != nil || slices.ContainsFunc(p.rules[familyOf(addr)], func(r route.Rule) bool {
			return r.Src.IsValid() && r.Src.Contains(addr) && r.Action == route.Lookup
		}) {
			continue
		}
		all = append(all, symptom{"MPTCP uses " + addr.String() + ", which has no rule: its subflows leave by the uplink of main", strings.Join(fields, " "),
			"have a watch or a client serve the address"})
	}
	return all
}

// lookPrograms finds 32-bit programs that are bound to a link.
func lookPrograms(p *patient) (all []symptom) {
	rows, err := bind.Rows(p.question.Server, p.question.UIDs)
	if err != nil {
		p.unseen = err // only root may ask, and only where cgroups are
		return nil
	}
	for _, row := range rows {
		for _, process := range row.Processes {
			if process.Is32Bit() {
				all = append(all, symptom{fmt.Sprintf("a 32-bit program is bound to %s: options that it sets for multicast and for other links are not seen", row.Ifname),
					fmt.Sprintf("pid %d (%s)", process.PID, process.Name), "run the program's 64-bit version"})
			}
		}
	}
	return all
}

// lookLeftOut finds links that main has a default route over and that no profile names, or that have no router.
func lookLeftOut(p *patient) (all []symptom) {
	all = p.found("no-router")
	selection := p.question.Selection
	for _, family := range families {
		main := p.routes(family, unix.RT_TABLE_MAIN)
		for index := range uplink.Defaults(main) {
			name := p.linkName(index)
			at := slices.IndexFunc(p.addresses, func(a route.Address) bool {
				_, selected := selection.Uplink(a, name)
				return a.Index == index && a.Family() == family && uplink.Leaves(main, a) && !a.DADFailed() && !selected
			})
			if at < 0 || selection.Excludes(name) || !p.question.shows(name, 0) {
				continue
			}
			all = append(all, symptom{fmt.Sprintf("main has a default route over %s, and no profile names the link: %s is not served", name, p.addresses[at].Addr), "the configuration of the watch",
				"add a profile for " + name + " to watch.json, or exclude the link"})
		}
	}
	slices.SortFunc(all, func(a, b symptom) int { return strings.Compare(a.what, b.what) })
	return all
}

// lookDNS finds name servers that unbound programs ask by another uplink than the one whose server they are, and a dnsmasq
// that does not know which is whose.
func lookDNS(p *patient) (all []symptom) {
	own, err := os.ReadFile(uplink.DefaultServersFile)
	if err != nil {
		return nil // nobody named a server
	}
	for line := range strings.Lines(readText("/etc/resolv.conf")) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		server, err := netip.ParseAddr(fields[1])
		if err != nil || server.IsLoopback() {
			continue
		}
		for _, l := range p.leases {
			if l.link.Index == 0 || !strings.Contains(string(own), fmt.Sprintf("server=%s@%s\n", server, l.Address)) {
				continue
			}
			out, err := p.kernel.Match(route.Question{Dst: server})
			if err == nil && !slices.Contains(out.Links(), l.link.Index) {
				all = append(all, symptom{fmt.Sprintf("the name server %s of %s is asked by %s", server, l.Ifname, p.linkNames(out.Links())), "nameserver " + server.String() + " in /etc/resolv.conf",
					"use dnsmasq, which asks each server by its uplink, and nameserver 127.0.0.1"})
			}
		}
	}
	if running("dnsmasq") != 0 && !dnsmasqReads(uplink.DefaultServersFile) {
		all = append(all, symptom{"dnsmasq does not read the name servers of uplinks", "no servers-file=" + uplink.DefaultServersFile + " in its configuration",
			"ln -s " + exampleOf("dnsmasq.conf") + " /etc/dnsmasq.d/, and restart dnsmasq"})
	}
	return all
}

// exampleOf is where an example is installed: below /usr by packages, below /usr/local by make install.
func exampleOf(name string) string {
	const dir = "share/doc/table-allocator/examples/"
	if _, err := os.Stat("/usr/" + dir + name); err == nil {
		return "/usr/" + dir + name
	}
	return "/usr/local/" + dir + name
}

// dnsmasqReads reports whether a usual configuration of dnsmasq, or the command line of one that runs, names a file.
func dnsmasqReads(file string) bool {
	files, _ := filepath.Glob("/etc/dnsmasq.d/*") // the pattern is right
	for _, name := range append(files, "/etc/dnsmasq.conf") {
		for line := range strings.Lines(readText(name)) {
			if line = strings.TrimSpace(line); !strings.HasPrefix(line, "#") && strings.Contains(line, file) {
				return true
			}
		}
	}
	dirs, _ := filepath.Glob("/proc/[0-9]*") // the pattern is right
	return slices.ContainsFunc(dirs, func(dir string) bool {
		return readLine(dir+"/comm") == "dnsmasq" && strings.Contains(readText(dir+"/cmdline"), file)
	})
}

// readText is the text of a file; "" if it cannot be read.
func readText(path string) string {
	text, err := outside.ReadFile(path)
	if err != nil {
		return ""
	}
	return string(text)
}
