package netns

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/bind"
	"github.com/table-allocator/table-allocator/internal/nat"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// Who calls sync.
type caller bool

const (
	asked    caller = true  // a command, whose user hears of the first error
	unbidden caller = false // Serve, which does what can be done
)

// sync makes everything what the state says. It is safe to repeat. The guard comes before anything can be sent.
func (h *Host) sync(ctx context.Context, state *State, by caller) (lacking []string, err error) {
	h.Step("choose ways of IPv6")
	if err := h.chooseInet6(state, &lacking); err != nil {
		return nil, fmt.Errorf("choose its addresses of IPv6: %w", err)
	}
	s := *state
	p := s.plan(h.pools)
	var errs []error
	for _, step := range []struct {
		name   string
		needed bool // by the steps after it
		do     func() error
	}{
		{"write resolv.conf", false, func() error { return h.syncResolv(s, by, &lacking) }},
		{"make the namespaces", true, func() error { return h.memory.pin(s.Config) }},
		{"mount files", false, func() error { return h.remount(s.Name) }},
		{"add rules", true, func() error { return h.syncRules(ctx, s, p, &lacking) }},
		{"add NAT and filter", true, h.syncForwarding},
		{"add the link", true, func() error { return h.syncLink(s, p) }},
		{"set forwarding", true, h.syncForwarding}, // the link has settings only now
		{"answer for its address", false, h.syncProxies},
		{"pass other filters", false, func() error { return h.syncFirewalls(s, p.link, &lacking) }},
	} {
		if !s.routed() && step.name == "add rules" { // and NAT, filter and link: its packets do not pass this host
			break
		}
		h.Step(step.name)
		if err := step.do(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", step.name, err))
			if step.needed || by == asked {
				break
			}
		}
	}
	if unsure := unsureOf(s); by == asked && unsure != "" { // to the service nothing is wrong, as far as it can tell
		lacking = append(lacking, unsure)
	}
	switch {
	case s.routed() || len(errs) > 0:
	case s.VPN != "":
		h.Step("lead the VPN in")
		errs = append(errs, h.syncVPN(s, p, &lacking))
	case s.Wiring == WiringPasta:
		h.Step("look for pasta")
		errs = append(errs, h.syncPasta(s, &lacking))
	default:
		h.Step("connect it with the network")
		errs = append(errs, h.syncMacvlan(s, &lacking))
	}
	return lacking, errors.Join(errs...)
}

// syncResolv writes resolv.conf. A link without a lease may have no name servers yet.
func (h *Host) syncResolv(s State, by caller, lacking *[]string) error {
	text, err := h.memory.resolv(s.Config)
	if errors.Is(err, errNoServers) {
		kept, readErr := os.ReadFile(h.memory.resolvFile(s.Name))
		leased, leaseErr := false, error(nil)
		if s.Resolv == Uplink {
			leased, leaseErr = h.leased(s.Ifname)
		}
		switch {
		case leaseErr != nil:
			return leaseErr
		case readErr == nil && len(kept) > 0 && s.Phase != Adding:
			text = string(kept)
		case leased && by == asked:
			return err
		default:
			who := s.Ifname + " has a lease with name servers"
			if s.Resolv == VPN {
				who = "its VPN names name servers"
			}
			*lacking = append(*lacking, "no name resolves in it until "+who)
		}
		err = nil
	}
	if err != nil {
		return err
	}
	return h.memory.writeResolv(s.Name, text)
}

// leased reports whether an address of a link has a rule of ours to a table.
func (h *Host) leased(ifname string) (bool, error) {
	link, found, err := h.kernel.LinkByName(ifname)
	if err != nil || !found {
		return false, err
	}
	for _, family := range families {
		addresses, err := h.kernel.AddressesOn(family, link.Index)
		if err != nil {
			return false, err
		}
		rules, err := h.kernel.RulesWhere(family, func(r *route.Rule) bool {
			return r.Protocol == route.Protocol && uplink.IsHost(*r) && !uplink.LeavesTable(*r)
		})
		if err != nil {
			return false, err
		}
		for _, r := range rules {
			if slices.ContainsFunc(addresses, func(a route.Address) bool { return a.Addr == r.Src.Addr() }) {
				return true, nil
			}
		}
	}
	return false, nil
}

// syncRules binds what comes from the namespace to the uplink, and deletes the rules of an uplink before.
func (h *Host) syncRules(ctx context.Context, s State, p plan, lacking *[]string) error {
	b, err := bind.Bind(ctx, h.binding(s))
	switch {
	case errors.Is(err, bind.ErrNoLease):
		*lacking = append(*lacking, s.Ifname+" has no lease now: nothing leaves the namespace until it has one")
	case err != nil:
		return err
	}
	*lacking = append(*lacking, b.Unanswered...)
	if b.InFront != "" {
		*lacking = append(*lacking, s.Ifname+" misses "+b.InFront)
	}
	if s.IPv6 && !canForwardIPv6() {
		*lacking = append(*lacking, "it has no IPv6: that needs Linux 6.17, or net.ipv6.conf.all.forwarding=1, with which links ignore router advertisements unless their accept_ra is 2")
	}
	for _, family := range families {
		want, err := p.rules(b.Marking, s.OnLoss, family)
		if err != nil {
			return err
		}
		lookup := uplink.LookupOf(want[len(want)-1], 0).Priority
		stale := func(r route.Rule) bool {
			return p.ofNamespace(r) && !(uplink.IsLookup(r) && r.Priority == lookup)
		}
		// Guards first: the holders of an uplink before restore lookups while there is its guard.
		staleGuard := func(r route.Rule) bool { return stale(r) && uplink.IsGuard(r) }
		for _, which := range []func(route.Rule) bool{staleGuard, stale} {
			_, _, err = h.kernel.SyncRules(family, which, want)
			if err != nil && !(family == unix.AF_INET6 && errors.Is(err, unix.EAFNOSUPPORT)) {
				return err
			}
		}
	}
	return nil
}

// syncForwarding makes the nftables table and the settings of forwarding what all namespaces need. In no moment a link
// forwards without the filter: links close before it changes, and open after it.
func (h *Host) syncForwarding() error {
	states, err := h.memory.all()
	if err != nil {
		return err
	}
	uplinks, err := h.defaults()
	if err != nil {
		return err
	}
	want := settings(states, h.pools, uplinks)
	h.Step("close links")
	if err := h.memory.closeLinks(want); err != nil {
		return err
	}
	closed, err := h.memory.closed(want)
	if err != nil {
		return err
	}
	h.Step("change NAT and filter")
	if _, err := nat.Sync(ruleset(states, h.pools, closed, uplinks)); err != nil {
		return err
	}
	h.Step("open links")
	return h.memory.openLinks(want)
}

// defaults are the links over which this host has a default route, in main or in the table of a lease.
func (h *Host) defaults() ([]string, error) {
	links, err := h.kernel.Links()
	if err != nil {
		return nil, err
	}
	have := make(map[int]bool)
	for _, family := range families {
		routes, err := h.kernel.Routes(family, unix.RT_TABLE_UNSPEC)
		if err != nil {
			return nil, err
		}
		for _, r := range routes {
			for _, index := range r.Links() {
				have[index] = have[index] || r.Dst.Bits() == 0 && r.Type == unix.RTN_UNICAST
			}
		}
	}
	var names []string
	for _, l := range links {
		if have[l.Index] && l.Name != uplink.Loopback && !strings.HasPrefix(l.Name, nat.Prefix) {
			names = append(names, l.Name)
		}
	}
	return names, nil
}

// inner is the name of the link in the namespace.
const inner = "eth0"

// syncLink adds the link to the namespace, its addresses, and the default routes in there.
func (h *Host) syncLink(s State, p plan) error {
	mtu := 1500
	up, found, err := h.kernel.LinkByName(s.Ifname)
	if err != nil {
		return err
	}
	if found && up.MTU >= 1280 && up.MTU <= 65535 { // else IPv6 ends, and a veth has no more
		mtu = up.MTU
	}
	link, found, err := h.kernel.LinkByName(p.link)
	if err != nil {
		return err
	}
	if !found {
		ns, err := os.Open(netPin(s.Name))
		if err != nil {
			return err
		}
		err = h.kernel.AddVeth(p.link, inner, ns.Fd(), mtu)
		ns.Close()
		if err != nil {
			return err
		}
		if link, _, err = h.kernel.LinkByName(p.link); err != nil {
			return err
		}
	}
	if err := syncEnd(h.kernel, link, mtu, p.here, s.IPv6); err != nil {
		return err
	}
	forwardsIPv6 := canForwardIPv6()
	return insideWith(s.Name, func(kernel *route.Conn) error {
		if err := setUp(kernel, uplink.Loopback); err != nil {
			return err
		}
		link, found, err := kernel.LinkByName(inner)
		if err != nil || !found {
			return errors.Join(err, fmt.Errorf("the namespace has no link %s", inner))
		}
		if err := syncEnd(kernel, link, mtu, p.ours, s.IPv6); err != nil {
			return err
		}
		for _, family := range families {
			var want []route.Route
			if family == unix.AF_INET || s.IPv6 && forwardsIPv6 { // else nothing would come back
				way, err := h.defaultRoute(s, p, family, link.Index)
				if err != nil {
					return err
				}
				want = append(want, way)
			}
			if _, _, err := kernel.SyncRoutes(family, unix.RT_TABLE_MAIN, want); err != nil {
				return err
			}
		}
		return nil
	})
}

// anywhere is the destination of a default route.
func anywhere(family int) netip.Prefix {
	if family == unix.AF_INET {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
}

// setUp sets a link up, unless it is.
func setUp(kernel *route.Conn, name string) error {
	link, found, err := kernel.LinkByName(name)
	if err != nil || !found || link.Up {
		return err
	}
	return kernel.SetUp(link.Index, 0)
}

// syncEnd makes one end of the link between this host and a namespace what it should be.
func syncEnd(kernel *route.Conn, link route.Link, mtu int, addrs side, inet6 bool) error {
	if !link.Up || link.MTU != mtu {
		if err := kernel.SetUp(link.Index, mtu); err != nil {
			return err
		}
	}
	for _, family := range families {
		if family == unix.AF_INET6 && !inet6 {
			continue
		}
		want := addrs.in(family)
		have, err := kernel.AddressesOn(family, link.Index)
		if err == nil && !slices.ContainsFunc(have, func(a route.Address) bool { return a.Network() == want }) {
			err = kernel.AddAddress(link.Index, want)
		}
		for _, a := range have {
			if family == unix.AF_INET6 && a.Bits == want.Bits() && a.Addr != want.Addr() { // of a prefix before
				err = errors.Join(err, kernel.DeleteAddress(a))
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}
