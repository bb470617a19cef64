package inspect

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/walk"
)

// host is what the kernel says about this host.
type host struct {
	kernel    *route.Conn
	links     map[int]route.Link
	addresses []route.Address
	rules     map[int][]route.Rule // by family
	worlds    map[int]*walk.World  // made when one is needed
	unread    map[int]error        // why there is none
	policies  map[int][]route.Policy
}

var families = []int{unix.AF_INET, unix.AF_INET6}

// openHost reads links, addresses and rules. The caller closes it.
func openHost() (*host, error) {
	kernel, err := route.Dial()
	if err != nil {
		return nil, err
	}
	h := &host{kernel: kernel, rules: make(map[int][]route.Rule), worlds: make(map[int]*walk.World), unread: make(map[int]error), policies: make(map[int][]route.Policy)}
	h.links, h.addresses, err = kernel.HostAddresses()
	for _, family := range families {
		if err == nil {
			h.rules[family], err = kernel.Rules(family)
		}
	}
	if err != nil {
		kernel.Close()
		return nil, err
	}
	return h, nil
}

func (h *host) close() { h.kernel.Close() }

func (h *host) linkNamed(name string) route.Link {
	for _, l := range h.links {
		if l.Name == name {
			return l
		}
	}
	return route.Link{}
}

// address returns an address of a link, and whether it is there.
func (h *host) address(ifname string, addr netip.Addr) (route.Address, bool) {
	at := slices.IndexFunc(h.addresses, func(a route.Address) bool {
		return a.Addr == addr && h.links[a.Index].Name == ifname
	})
	if at < 0 {
		return route.Address{}, false
	}
	return h.addresses[at], true
}

// mostRoutes is how many routes of a table are read at most: a walk through more helps nobody.
const mostRoutes = 100000

var errManyRoutes = fmt.Errorf("a table has more than %d routes: only the kernel is asked", mostRoutes)

// world is what walk needs of a family.
func (h *host) world(family int) (*walk.World, error) {
	if w := h.worlds[family]; w != nil || h.unread[family] != nil {
		return w, h.unread[family]
	}
	w := &walk.World{Rules: h.rules[family], Links: h.links, Tables: make(map[uint32][]route.Route), IgnoreLinkdown: make(map[int]bool)}
	for _, r := range w.Rules {
		if _, known := w.Tables[r.Table]; known || r.Action != route.Lookup {
			continue
		}
		routes, all, err := h.kernel.RoutesAtMost(family, r.Table, mostRoutes)
		if err == nil && !all {
			err = errManyRoutes
		}
		if err != nil {
			h.unread[family] = err
			return nil, err
		}
		w.Tables[r.Table] = routes
	}
	const ignore = "ignore_routes_with_linkdown"
	ofAll := family == unix.AF_INET && setting(family, "all", ignore) == "1" // that of IPv6 sets those of the links
	for index, l := range h.links {
		w.IgnoreLinkdown[index] = ofAll || setting(family, l.Name, ignore) == "1"
	}
	h.worlds[family] = w
	return w, nil
}

// addressesOn are the addresses of a link.
func (h *host) addressesOn(ifname string) (all []netip.Addr) {
	for _, a := range h.addresses {
		if h.linkName(a.Index) == ifname {
			all = append(all, a.Addr)
		}
	}
	return all
}

// setting is a sysctl of a link; "" if there is none.
func setting(family int, ifname, name string) string {
	dir := "ipv4"
	if family == unix.AF_INET6 {
		dir = "ipv6"
	}
	return readLine("/proc/sys/net/" + dir + "/conf/" + ifname + "/" + name)
}

// readLine is the text of a small file of the kernel without its newline; "" if it cannot be read.
func readLine(path string) string {
	text, err := outside.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(string(text), "\n")
}

// nowhere are addresses of the Internet, some of either half of the addresses of a family, since VPNs have a route for
// each half. Nothing is sent to them.
var nowhere = map[int][][]string{
	unix.AF_INET:  {{"9.9.9.9", "62.0.0.1", "45.3.2.1"}, {"150.1.2.3", "203.0.114.1", "198.20.0.1"}},
	unix.AF_INET6: {{"2600::9", "2a00:1450::1", "2407::1"}, {"3fff:1::1", "3abc::1", "3fe0::1"}},
}

// exit is where packets to the Internet leave.
type exit struct {
	to    netip.Addr
	route route.Route
	err   error // of a lookup that finds nothing, or a route that answers with an error
}

// links are the ifindexes of the links of an exit.
func (e exit) links() []int {
	if e.err != nil {
		return nil
	}
	return e.route.Links()
}

// isExit reports whether the error of route.Match is an answer.
func isExit(err error) bool {
	for _, errno := range []syscall.Errno{unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EINVAL} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return err == nil
}

// exits asks the kernel where packets leave that have no network of this host as destination, for either half of all
// addresses. Of the addresses to ask for, the first counts that no specific route leads to or refuses, and no rule is for.
func (h *host) exits(family int, q route.Question) (exits []exit, err error) {
	for _, half := range nowhere[family] {
		var chosen exit
		for i, text := range half {
			q.Dst = netip.MustParseAddr(text)
			e := exit{to: q.Dst}
			e.route, e.err = h.kernel.Match(q)
			if !isExit(e.err) {
				return nil, e.err
			}
			usual := e.err == nil && e.route.Dst.Bits() <= uplink.Halves(family) && !h.isSpecial(family, q.Dst)
			if i == 0 || usual {
				chosen = e
			}
			if usual {
				break
			}
		}
		exits = append(exits, chosen)
	}
	return exits, nil
}

// isSpecial reports whether a rule of another program is for a destination, among others or alone.
func (h *host) isSpecial(family int, dst netip.Addr) bool {
	return slices.ContainsFunc(h.foreign(family), func(r route.Rule) bool {
		return r.Dst.IsValid() && r.Dst.Bits() > uplink.Halves(family) && r.Dst.Contains(dst)
	})
}

// walk goes through the rules for a packet.
func (h *host) walk(family int, q route.Question) (walk.Answer, error) {
	w, err := h.world(family)
	if err != nil {
		return walk.Answer{}, err
	}
	return w.Walk(walk.Packet{Question: q, Bound: q.Oif != 0}), nil
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// routeText is a route as `ip route` prints it, with the names of links.
func (h *host) routeText(r route.Route) string {
	if len(r.Links()) > 1 {
		return h.routeCommand(r) + " (over " + h.linkNames(r.Links()) + ")"
	}
	return h.withNames(r.String())
}

// routeCommand is a route as `ip route delete` reads it.
func (h *host) routeCommand(r route.Route) string {
	text, _, _ := strings.Cut(r.String(), " [")
	return h.withNames(text)
}

// withNames puts the names of links in place of their numbers.
func (h *host) withNames(text string) string {
	words := strings.Fields(text)
	for i, w := range words {
		var index int
		if _, err := fmt.Sscanf(w, "#%d", &index); err == nil && i > 0 && words[i-1] == "dev" {
			words[i] = h.linkName(index)
		}
	}
	return strings.Join(words, " ")
}

// linkName is the name of a link, or its ifindex if it is gone.
func (h *host) linkName(index int) string {
	if l, ok := h.links[index]; ok {
		return l.Name
	}
	return fmt.Sprintf("#%d", index)
}

// linkNames are the names of links, for a sentence.
func (h *host) linkNames(indexes []int) string {
	var names []string
	for _, index := range indexes {
		if name := h.linkName(index); !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return strings.Join(names, " and ")
}
