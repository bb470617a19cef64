package uplink

import (
	"regexp"
	"slices"
	"sync"

	"github.com/table-allocator/table-allocator/internal/route"
)

// Link says what decides whether a link is an uplink.
type Link struct {
	route.Link
	Ports   []route.Link // of a bridge
	VRF     bool         // it is in a VRF: the kernel's rule leads to the VRF's table, and only what is bound to the VRF has its addresses
	Default bool         // main has a default route over it, or a half of one
}

// OtherNames are the alternative names of links, by their names. Configurations may have any of them.
type OtherNames map[string][]string

// OthersOf returns the alternative names of the links of a host.
func OthersOf(links map[int]route.Link) OtherNames {
	others := make(OtherNames)
	for _, l := range links {
		if len(l.Other) > 0 {
			others[l.Name] = l.Other
		}
	}
	return others
}

// Links returns what tells of each link of a host, by ifindex. defaults are the links over which main has a default
// route, or a half of one.
func Links(links map[int]route.Link, defaults map[int]bool) map[int]Link {
	all := make(map[int]Link, len(links))
	for index, l := range links {
		all[index] = Link{Link: l, Default: defaults[index]}
	}
	for _, l := range links {
		master, ok := all[l.Master]
		if !ok || l.Master == 0 {
			continue
		}
		master.Ports = append(master.Ports, l)
		all[l.Master] = master
		if master.Kind == "vrf" {
			port := all[l.Index]
			port.VRF = true
			all[l.Index] = port
		}
	}
	return all
}

// Defaults returns the links over which routes are defaults or halves of them. One to all multicast groups is none.
func Defaults(routes []route.Route) map[int]bool {
	defaults := make(map[int]bool)
	for _, r := range routes {
		if r.Dst.Bits() > Halves(r.Family) || r.Dst.Addr().IsMulticast() || IsChoiceRoute(r) {
			continue
		}
		for _, index := range r.Links() {
			defaults[index] = true
		}
	}
	return defaults
}

// internalName has the names that container engines and hypervisors give bridges and the host's ends of cables.
var internalName = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^(lo|docker[0-9]+|br-[0-9a-f]{12}|docker_gwbridge|veth.*|virbr[0-9].*|vnet[0-9].*|lxc.*|lxdbr[0-9].*|cni.*|cali.*|flannel.*|podman[0-9].*|kube-ipvs[0-9]+|cilium_.*|antrea-gw[0-9]+|ovn-k8s-mp[0-9]+|vmnet[0-9]+|vboxnet[0-9]+|nodelocaldns|tailscale[0-9]+|ifb[0-9]+|dummy[0-9]+|tav[0-9]+)$`)
})

// LeftToVRF reports whether addresses of a link are the business of its VRF: a table of ours would have no routes.
func (l Link) LeftToVRF() bool { return l.VRF && !l.Default }

// internal reports whether a link leads to this host itself, to its containers and virtual machines, or into a
// tunnel: addresses there are services or far ends, and no uplinks unless main has a default route over the link.
func (l Link) internal() bool {
	switch l.Kind {
	case "vrf", "dummy", "ifb", "nlmon", "netdevsim", "vcan",
		"tun", "wireguard", "ipip", "sit", "gre", "gretap", "ip6tnl", "ip6gre", "ip6gretap", "erspan", "ip6erspan",
		"vti", "vti6", "xfrm", "vxlan", "geneve", "bareudp", "amt":
		return true
	case "bridge":
		return l.hasOnlyContainers()
	}
	return internalName().MatchString(l.Name)
}

// hasOnlyContainers reports whether no port of a bridge leads out of this host and its tunnels. A bridge without ports is one whose containers
// or virtual machines are not running.
func (l Link) hasOnlyContainers() bool {
	return !slices.ContainsFunc(l.Ports, func(port route.Link) bool { return port.Kind != "veth" && !(Link{Link: port}).internal() })
}
