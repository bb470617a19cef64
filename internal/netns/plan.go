// Package netns makes network namespaces whose only way out is one uplink, and lets programs enter them. It hides what a
// namespace consists of: its pins, the link to it, addresses, rules, NAT, settings of the kernel and files; in which order
// they come and go, so that no packet leaves by another uplink and a process that is killed leaves nothing that the next
// one cannot cure.
package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nat"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Config is what the user says of a namespace.
type Config struct {
	Name    string
	Ifname  string // the link
	Pattern string // of links, one of which is Ifname: the first that has a lease; "": none
	OnLoss  uplink.OnLoss
	Resolv  string // Uplink, VPN, addresses with commas, or the absolute path of a file
	IPv6    bool
	Way     string   // of IPv6 out: WayAuto, WayNAT, WayPrefix, WayProxy or WayNPT
	Allow   []string // users and @groups who may enter; none: all of the group

	HostAccess []string   // ports of this host that programs reach, as tcp:631
	Mask       []string   // names of maskable resolvers of this host that they do not reach; nil: all
	Start      string     // of a namespace of the configuration: AtBoot, OnDemand or Manual
	Run        [][]string // programs that the service runs in it
	RunAs      string     // who they run as; "": root
	Firewall   string     // FirewallAuto, FirewallAccept or FirewallNone
	Wiring     string     // WiringNAT, "" too, WiringMacvlan or WiringPasta
	VPN        string     // path of the configuration of a VPN, which is the only way out then; "": none
}

// When a namespace of the configuration is made.
const (
	AtBoot   = "boot"      // with the service
	OnDemand = "on-demand" // when a program enters
	Manual   = "manual"    // by netns add
)

// Uplink, as Config.Resolv, is for the name servers of the link.
const Uplink = "uplink"

// VPN, as Config.Resolv, is for the name servers of the VPN.
const VPN = "vpn"

// Phases of a namespace's life.
const (
	Adding   = "adding" // something may be missing
	Up       = "up"
	Deleting = "deleting"
)

// State is a namespace as this host remembers it.
type State struct {
	Config
	Number  int // of the link and the addresses
	Inet6   network6
	Missed  time.Duration // since when the link has no prefix for Inet6, by the clock of the boot; 0: it has
	Phase   string
	Marking wire.Marking // of the link, as the server said last
}

// DefaultMax is how many namespaces a host has at most unless the configuration says another number: each costs two rules in
// each family, which all packets pass.
const DefaultMax = 32

var nameSyntax = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_-]{0,14}$`) })

var accountSyntax = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^@?[A-Za-z_][A-Za-z0-9_.$-]{0,63}$`) })

// CheckName returns why a namespace cannot have a name.
func CheckName(name string) error {
	if !nameSyntax().MatchString(name) {
		return fmt.Errorf("%q is no name of a namespace: want a letter, and up to 14 letters, digits, _ and - behind it", name)
	}
	return nil
}

// Check returns what is wrong with a configuration.
func (c Config) Check() error {
	if err := CheckName(c.Name); err != nil {
		return err
	}
	if _, err := path.Match(c.Pattern, ""); err != nil {
		return fmt.Errorf("%q is no pattern like wwan*", c.Pattern)
	}
	if c.Ifname == "" && c.Pattern == "" || len(c.Ifname) >= unix.IFNAMSIZ || strings.ContainsAny(c.Ifname, "/ \n") || strings.HasPrefix(c.Ifname, nat.Prefix) {
		return fmt.Errorf("%q is no name of an uplink", c.Ifname)
	}
	for _, who := range c.Allow {
		if !accountSyntax().MatchString(who) {
			return fmt.Errorf("%q is no name of a user, and no @GROUP", who)
		}
	}
	if err := c.checkRest(); err != nil {
		return err
	}
	if c.Resolv == Uplink || c.Resolv == VPN || strings.HasPrefix(c.Resolv, "/") {
		return nil
	}
	servers, err := parseServers(c.Resolv)
	if err == nil && slices.ContainsFunc(servers, netip.Addr.IsLoopback) {
		err = errors.New("a name server at a loopback address is not reached from a namespace")
	}
	return err
}

// checkRest checks what only the configuration has.
func (c Config) checkRest() error {
	if c.OnLoss != "" && c.OnLoss != uplink.Block && c.OnLoss != uplink.Fallback {
		return fmt.Errorf("on_loss: want \"block\" or \"fallback\", have %q", c.OnLoss)
	}
	if !slices.Contains([]string{"", AtBoot, OnDemand, Manual}, c.Start) {
		return fmt.Errorf("start: want \"boot\", \"on-demand\" or \"manual\", have %q", c.Start)
	}
	if !slices.Contains([]string{FirewallAuto, FirewallAccept, FirewallNone}, c.Firewall) {
		return fmt.Errorf("firewall: want \"accept\" or \"none\", have %q", c.Firewall)
	}
	if err := errors.Join(c.checkWiring(), c.checkWay()); err != nil {
		return err
	}
	if _, err := c.ports(); err != nil {
		return err
	}
	if err := c.checkVPN(); err != nil {
		return err
	}
	for _, name := range c.Mask {
		if maskable[name] == "" {
			return fmt.Errorf("mask: want \"nscd\", \"resolved\" or \"avahi\", have %q", name)
		}
	}
	for _, command := range c.Run {
		if len(command) == 0 || !strings.HasPrefix(command[0], "/") {
			return fmt.Errorf("run: want the absolute path of a program and its arguments, have %q", command)
		}
	}
	if c.RunAs != "" && (!accountSyntax().MatchString(c.RunAs) || len(c.Run) == 0) {
		return fmt.Errorf("run_as: %q is no name of a user, or there is no \"run\"", c.RunAs)
	}
	return nil
}

// ports reads host_access.
func (c Config) ports() (ports []nat.Port, err error) {
	for _, text := range c.HostAccess {
		proto, number, _ := strings.Cut(text, ":")
		port, err := strconv.ParseUint(number, 10, 16)
		if err != nil || port == 0 || proto != "tcp" && proto != "udp" {
			return nil, fmt.Errorf("host_access: want a port of this host, as \"tcp:631\" or \"udp:53\", have %q", text)
		}
		ports = append(ports, nat.Port{Protocol: proto, Number: uint16(port)})
	}
	return ports, nil
}

// parseServers reads a list of addresses.
func parseServers(text string) (servers []netip.Addr, err error) {
	for word := range strings.SplitSeq(text, ",") {
		addr, err := netip.ParseAddr(word)
		if err != nil {
			return nil, fmt.Errorf("name servers %q: want %s, addresses with commas, or the path of a file", text, Uplink)
		}
		servers = append(servers, addr.Unmap())
	}
	return servers, nil
}

// A side has the addresses of one end of the link between this host and a namespace, each with the length of its network.
type side struct{ inet, inet6 netip.Prefix }

// addresses are those of a side.
func (s side) addresses() []netip.Addr { return []netip.Addr{s.inet.Addr(), s.inet6.Addr()} }

// A plan is what a number means.
type plan struct {
	link       string // on this host
	here, ours side   // of this host, and of the namespace
}

// Pools are the networks that namespaces have their addresses from.
type Pools struct{ Inet, Inet6 netip.Prefix }

// DefaultInet is the pool of IPv4 addresses.
var DefaultInet = netip.MustParsePrefix("172.24.0.0/16")

// planOf returns what the number of a namespace means: the pair of addresses of that number in each pool.
func planOf(number int, pools Pools) plan {
	pair := func(pool netip.Prefix) (here, there netip.Prefix) {
		addr := pool.Masked().Addr().AsSlice()
		addr[len(addr)-2] |= byte(number >> 7)
		addr[len(addr)-1] |= byte(number << 1)
		first, _ := netip.AddrFromSlice(addr) // has the length of an address
		return netip.PrefixFrom(first, first.BitLen()-1), netip.PrefixFrom(first.Next(), first.BitLen()-1)
	}
	p := plan{link: linkOf(number)}
	p.here.inet, p.ours.inet = pair(pools.Inet)
	p.here.inet6, p.ours.inet6 = pair(pools.Inet6)
	return p
}

// plan is what a namespace consists of.
func (s State) plan(pools Pools) plan {
	p := planOf(s.Number, pools)
	if pair := s.Inet6.Pair; pair.IsValid() {
		p.here.inet6, p.ours.inet6 = pair, netip.PrefixFrom(pair.Addr().Next(), pair.Bits())
	}
	return p
}

// linkOf is this host's link to the namespace of a number.
func linkOf(number int) string { return fmt.Sprintf("%s%d", nat.Prefix, number) }

// traffic is what comes from the namespace.
func (p plan) traffic() route.Traffic { return route.Traffic{Iif: p.link} }

// in returns the side's address of a family.
func (s side) in(family int) netip.Prefix {
	if family == unix.AF_INET {
		return s.inet
	}
	return s.inet6
}

// maxNumber is the greatest number of a namespace: a pool of 9 bits has room for its pair of addresses.
const maxNumber = 255

// maxPoolBits is the length of the smallest pool with room for them.
const maxPoolBits = 23

// shortest is the length of the shortest network that counts as used: a VPN may have a route to one half of all addresses.
const shortest = 8

// freeNumber returns the first number that no namespace has and whose addresses overlap nothing in use.
func freeNumber(taken map[int]bool, used []netip.Prefix, pools Pools) (int, error) {
	for number := 1; number <= maxNumber; number++ {
		p := planOf(number, pools)
		overlaps := slices.ContainsFunc(used, func(u netip.Prefix) bool {
			return u.Bits() >= shortest && (u.Overlaps(p.here.inet) || u.Overlaps(p.here.inet6))
		})
		if !taken[number] && !overlaps {
			return number, nil
		}
	}
	return 0, fmt.Errorf("routes or addresses of this host use all of %s", pools.Inet)
}

// rules are the rules of a namespace in a family: the one that leads to its address, and its guard.
func (p plan) rules(m wire.Marking, onLoss uplink.OnLoss, family int) ([]route.Rule, error) {
	to, err := uplink.NamespaceRule(m, p.ours.in(family).Addr())
	return []route.Rule{to, uplink.GuardOf(m, p.traffic(), onLoss)}, err
}

// ofNamespace reports whether a rule is for the namespace of a plan, whatever uplink it has.
func (p plan) ofNamespace(r route.Rule) bool {
	return r.Protocol == route.Protocol && (r.Iif == p.link ||
		uplink.IsNamespace(r) && (r.Dst.Addr() == p.ours.inet.Addr() || r.Dst.Addr() == p.ours.inet6.Addr()))
}

// strayRule reports whether a rule is that of a namespace, and of none of these.
func strayRule(r route.Rule, plans []plan) bool {
	ours := r.Protocol == route.Protocol && strings.HasPrefix(r.Iif, nat.Prefix) || uplink.IsNamespace(r)
	return ours && !slices.ContainsFunc(plans, func(p plan) bool { return p.ofNamespace(r) })
}

// ruleset is the nftables table for all namespaces. closed are links whose forwarding is for them alone. uplinks are the links
// that a namespace with fallback may use: others lead to containers, say, whose own filter our rules may come before.
func ruleset(states []State, pools Pools, closed, uplinks []string) nat.Ruleset {
	r := nat.Ruleset{Closed: closed}
	for _, s := range states {
		if !s.routed() {
			continue
		}
		ports, _ := s.ports() // they were checked
		p := s.plan(pools)
		n := nat.Namespace{Link: p.link, Uplinks: []string{s.Ifname}, Ports: ports, Inside: p.ours.addresses()}
		switch s.Inet6.Way {
		case WayPrefix, WayProxy:
			n.Own = p.ours.inet6.Addr()
		case WayNPT:
			n.Own, n.As = p.ours.inet6.Addr(), s.Inet6.Of
		}
		if s.OnLoss == uplink.Fallback {
			others := slices.DeleteFunc(slices.Clone(uplinks), func(link string) bool { return link == s.Ifname })
			n.Uplinks = append(n.Uplinks, others...)
		}
		r.Namespaces = append(r.Namespaces, n)
	}
	return r
}

// settings are the settings of the kernel that forwarding between namespaces and links needs, as paths below
// /proc/sys/net. uplinks are the links that a namespace with fallback may use.
func settings(states []State, pools Pools, uplinks []string) []string {
	links := []string{}
	for _, s := range states {
		if s.Phase == Deleting || !s.routed() {
			continue
		}
		of := []string{planOf(s.Number, pools).link, s.Ifname}
		if s.OnLoss == uplink.Fallback {
			of = append(of, uplinks...)
		}
		for _, link := range of {
			if !slices.Contains(links, link) {
				links = append(links, link)
			}
		}
	}
	var paths []string
	for _, link := range links {
		paths = append(paths, "ipv4/conf/"+link+"/forwarding", "ipv6/conf/"+link+"/force_forwarding")
	}
	return append(paths, proxySettings(states)...)
}

func (c Config) checkVPN() error {
	if c.VPN == "" && c.Resolv == VPN {
		return errors.New("resolv: there is no VPN")
	}
	if c.VPN != "" && !strings.HasPrefix(c.VPN, "/") {
		return fmt.Errorf("vpn: want the absolute path of a configuration, have %q", c.VPN)
	}
	return nil
}
