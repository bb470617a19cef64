package nettest

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Far4 and Far6 are the addresses of an Internet.
const (
	Far4 = "198.51.100.1"
	Far6 = "2001:db8:ffff::1"
)

// A Provider is the router at the far end of an uplink: its link "lan" leads to the host, its
// link "net" to the internet.
type Provider struct {
	*Namespace          // set by NewInternet
	Ifname     string   // of the host's link to it, and of the internet's
	Routers    []string // its addresses on lan, each with the length of its network: 192.0.2.1/24
	Routed     []string // the networks that the internet sends to it: 192.0.2.0/24
}

// Internet is what a host reaches by each of its uplinks.
type Internet struct {
	*Namespace
	Providers []*Provider
	host      *Namespace
}

// NewInternet connects a host to an internet through providers. The host gets links that are up and
// have no addresses: the test adds those, or a DHCP server at a provider does. A provider and the
// internet have IPv4 between them, and IPv6 if Routers has an IPv6 address. The internet forwards
// packets, so a host can reach a provider by the uplink of another provider.
func NewInternet(t TB, host *Namespace, providers ...*Provider) *Internet {
	t.Helper()
	i := &Internet{Namespace: New(t, "internet"), Providers: providers, host: host}
	i.IP(t, "address add "+Far4+"/32 dev lo")
	i.Sysctl(t, "net/ipv4/ip_forward", "1")
	if slices.ContainsFunc(providers, (*Provider).inet6) {
		i.Sysctl(t, "net/ipv6/conf/all/forwarding", "1")
		i.IP(t, "address add "+Far6+"/128 dev lo nodad")
	}
	for n, p := range providers {
		p.Namespace = New(t, fmt.Sprint("isp", n))
		p.Sysctl(t, "net/ipv4/ip_forward", "1")
		if p.inet6() {
			p.Sysctl(t, "net/ipv6/conf/all/forwarding", "1")
			// The routers have the addresses that the test gives them, and none that the kernel makes.
			p.Sysctl(t, "net/ipv6/conf/default/addr_gen_mode", "1")
		}
		i.connect(t, n)
		i.Plug(t, n)
	}
	return i
}

// Transit returns the IPv4 address that provider n has at the internet.
func Transit(n int) netip.Addr { return netip.AddrFrom4([4]byte{100, 64, byte(n + 1), 2}) }

// connect joins provider n and the internet.
func (i *Internet) connect(t TB, n int) {
	t.Helper()
	p, here := i.Providers[n], Transit(n).Prev().String()
	here6, there6 := fmt.Sprintf("2001:db8:fff%d::1", n), fmt.Sprintf("2001:db8:fff%d::2", n)
	provider := []string{
		"link add net type veth peer name " + p.Ifname + " netns " + i.Path(),
		"link set net up",
		"address add " + Transit(n).String() + "/30 dev net",
	}
	internet := []string{"link set " + p.Ifname + " up", "address add " + here + "/30 dev " + p.Ifname}
	routes := []string{"route add default via " + here}
	if p.inet6() {
		provider = append(provider, "address add "+there6+"/64 dev net nodad",
			"address add fe80::2/64 dev net nodad") // from there a router asks for its neighbours
		internet = append(internet, "address add "+here6+"/64 dev "+p.Ifname+" nodad")
		routes = append(routes, "route add default via "+here6)
	}
	for _, network := range p.Routed {
		via := Transit(n).String()
		if strings.Contains(network, ":") {
			via = there6
		}
		internet = append(internet, "route add "+network+" via "+via)
	}
	p.Batch(t, provider...)
	i.Batch(t, internet...)
	p.Batch(t, routes...)
}

// Plug makes the link between the host and provider n. A test calls it after it deleted that link.
func (i *Internet) Plug(t TB, n int) {
	t.Helper()
	p := i.Providers[n]
	Veth(t, p.Namespace, "lan", i.host, p.Ifname)
	var lines []string
	for _, addr := range p.Routers {
		lines = append(lines, "address add "+addr+" dev lan nodad")
	}
	p.Batch(t, lines...)
}

func (p *Provider) inet6() bool {
	return slices.ContainsFunc(p.Routers, func(addr string) bool { return strings.Contains(addr, ":") })
}
