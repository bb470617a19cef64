package twin

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestTwinByTheBook shows that what the comparison wants can be had: rules and routes as they are
// described, made by hand out of what the twins have, give no wrong answer.
func TestTwinByTheBook(t *testing.T) {
	n := *hosts
	if n == 0 {
		n = 10
	}
	base := firstSeed()
	t.Logf("seed %d", base)
	k := probe(t)
	var all []*host
	for i := range n {
		all = append(all, generate(base+uint64(i), true, phasesToGo(), k))
	}
	sum, err := live(all, *workers, byTheBook)
	if err != nil {
		t.Error(err)
	}
	t.Logf("%d hosts, %d answers, %d wrong in %d hosts", sum.hosts, sum.answers, sum.wrong, sum.bad)
	for _, k := range sum.sorted() {
		t.Errorf("%d answers, %d hosts: %s (seed %d)\n%s\n%s\n%s", k.answers, k.hosts, k.signature, k.first.host.seed, k.first.sample(k.signature, 4), k.first.host.text(), k.first.state)
	}
}

// byTheBook builds a host, installs what belongs there by hand, and compares.
func byTheBook(h *host, stock *twins) (f finding, err error) {
	f.host = h
	w, err := newWorld(h)
	if err != nil {
		return f, err
	}
	defer w.close()
	for _, s := range h.changes { // more states than a host has at its start
		if err := w.apply(s); err != nil {
			return f, err
		}
	}
	if err := w.settle(10 * quiet); err != nil { // carriers come later than links, and addresses with them
		return f, err
	}
	if err := w.tryAgain(); err != nil {
		return f, err
	}
	b := &book{w: w}
	if b.plain, err = w.plain.picture(); err != nil {
		return f, err
	}
	// An address that came later may be the gateway of a route, and then the kernel takes no other route through it.
	if err := b.install(); errors.Is(err, unix.EINVAL) {
		return f, nil
	} else if err != nil {
		return f, err
	}
	_, err = (&living{w, stock, &f}).look(atStart)
	return f, err
}

// book installs by hand what is described.
type book struct {
	w      *world
	plain  picture
	served []served
	lines  []string
}

func (b *book) install() error {
	for _, a := range b.plain.addresses {
		if i := slices.IndexFunc(b.served, func(s served) bool { return s.addr == a.addr }); i >= 0 {
			b.served[i].networks = append(b.served[i].networks, a.network)
		} else if a.addr.IsGlobalUnicast() && a.index != 1 && b.w.host.watch.selects(b.plain.names[a.index]) {
			b.served = append(b.served, served{a.addr, a.index, networks{a.network}, uint32(10000 + len(b.served))})
		}
	}
	for _, s := range b.served {
		is := uplinks(b.plain, b.served, s.family())
		for index := range b.plain.names {
			is[index] = is[index] || b.w.host.watch.clients
		}
		for _, r := range routesFor(b.plain, s, is, false) {
			if err := b.add(r, s); err != nil {
				return err
			}
		}
		b.rules(s)
	}
	if b.w.host.watch.Routes == "move" {
		if err := b.move(); err != nil {
			return err
		}
	}
	failed, err := b.w.real.run(b.lines)
	for _, i := range failed {
		return fmt.Errorf("%s failed", b.lines[i])
	}
	return err
}

func (b *book) add(r route, s served) error {
	r.table, r.protocol = s.table, protocol
	body := r.message()
	if r.typ == unix.RTN_UNICAST {
		body = attribute(body, unix.RTA_PREFSRC, s.addr.AsSlice())
	}
	const flags = unix.NLM_F_CREATE | unix.NLM_F_APPEND
	err := b.w.real.change(unix.RTM_NEWROUTE, flags, body)
	if err == unix.EINVAL && r.family == unix.AF_INET6 {
		// Main leads to the router over another link, and is asked about routers that are on the
		// link by force; about others the table itself is asked.
		return b.addBehind(r)
	}
	if err != nil && err != unix.EEXIST { // twice, with another source
		return fmt.Errorf("add %s: %w", r, err)
	}
	return nil
}

// addBehind adds a route whose routers have routes of their own as long as that takes.
func (b *book) addBehind(r route) error {
	var hops []route
	for i, l := range r.legs {
		if !l.gateway.IsValid() {
			continue
		}
		hop, _ := r.with(func(k int, _ leg) bool { return k == i })
		hop.dst, hop.legs = netip.PrefixFrom(l.gateway, 128), []leg{{index: l.index}}
		hops = append(hops, hop)
		if err := b.w.real.change(unix.RTM_NEWROUTE, unix.NLM_F_CREATE, hop.message()); err != nil {
			return fmt.Errorf("add %s: %w", hop, err)
		}
	}
	if err := b.w.real.change(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_APPEND, r.flagged(0)); err != nil {
		return fmt.Errorf("add %s: %w", r, err)
	}
	for _, hop := range hops {
		if err := b.w.real.change(unix.RTM_DELROUTE, 0, hop.message()); err != nil {
			return fmt.Errorf("delete %s: %w", hop, err)
		}
	}
	return nil
}

// rules are those of an address.
func (b *book) rules(s served) {
	rule := func(priority int, format string, args ...any) {
		family := ""
		if s.addr.Is6() {
			family = "-6 "
		}
		line := fmt.Sprintf("ip %srule add pref %d protocol %d %s", family, priority, protocol, fmt.Sprintf(format, args...))
		if !slices.Contains(b.lines, line) { // two addresses of a network share those to main
			b.lines = append(b.lines, line)
		}
	}
	if b.w.host.watch.SpecificFirst {
		for _, p := range b.shared(s) {
			rule(9997-p.Bits(), "from %s to %s lookup %d", s.addr, p, s.table)
			for _, longer := range b.longer(p) {
				if slices.Contains(b.shared(s), longer) {
					continue
				}
				rule(9997-longer.Bits(), "from %s to %s lookup main suppress_prefixlength %d", s.addr, longer, longer.Bits()-1)
			}
		}
		rule(9998, "from %s lookup main suppress_prefixlength %d", s.addr, halfBits(s.addr))
	}
	rule(10000, "from %s lookup %d", s.addr, s.table)
	if b.w.host.watch.OnLoss == "block" {
		rule(10001, "from %s unreachable", s.addr)
	}
	for _, n := range s.networks {
		if s.addr.Is4() || n.Bits() < 128 {
			rule(19999, "to %s lookup main suppress_prefixlength %d", n, n.Bits()-1)
			rule(20000, "to %s lookup %d", n, s.table)
		}
	}
	rule(91000, "iif lo lookup %d", s.table)
	if b.w.host.watch.Routes == "move" {
		rule(91001, "lookup %d", s.table)
	}
}

func halfBits(a netip.Addr) int {
	if a.Is4() {
		return 7
	}
	return 6
}

// shared are prefixes that main has over the link of s and over another one.
func (b *book) shared(s served) (all []netip.Prefix) {
	for _, r := range b.plain.main() {
		if r.family != s.family() || r.isHalf() || r.dst.Addr().IsMulticast() || slices.Contains(all, r.dst) {
			continue
		}
		_, own := r.alive(func(index int) bool { return index == s.index })
		if own && slices.ContainsFunc(b.plain.main(), func(other route) bool {
			_, elsewhere := other.alive(func(index int) bool { return index != s.index })
			return other.dst == r.dst && other.tos == r.tos && (elsewhere || other.isError())
		}) {
			all = append(all, r.dst)
		}
	}
	return all
}

// longer are prefixes of main within p.
func (b *book) longer(p netip.Prefix) (all []netip.Prefix) {
	for _, r := range b.plain.main() {
		if r.dst.Bits() > p.Bits() && p.Contains(r.dst.Addr()) && !slices.Contains(all, r.dst) {
			all = append(all, r.dst)
		}
	}
	return all
}

// move takes out of main the defaults over links with tables, unless an error would be left there
// as the last word.
func (b *book) move() error {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		main := slices.DeleteFunc(b.plain.main(), func(r route) bool { return r.family != family || !r.isDefault() })
		if slices.ContainsFunc(main, route.isError) {
			continue
		}
		for _, r := range main {
			if r.protocol == unix.RTPROT_RA || !b.all(r) {
				continue
			}
			if err := b.take(r); err != nil {
				return fmt.Errorf("take %s out of main: %w", r, err)
			}
		}
	}
	return nil
}

func (b *book) take(r route) error {
	del := func(body []byte) error { return b.w.real.change(unix.RTM_DELROUTE, 0, body) }
	if r.nexthop != 0 {
		bare := r
		bare.legs = nil
		return del(attribute32(bare.message(), rtaNexthop, r.nexthop))
	}
	if r.family == unix.AF_INET {
		return del(r.message())
	}
	for i := range r.legs { // which the kernel has as routes of their own
		one, _ := r.with(func(k int, _ leg) bool { return k == i })
		one.protocol = unix.RTPROT_UNSPEC // it may be another one's
		if err := del(one.message()); err != nil {
			return err
		}
	}
	return nil
}

// all reports whether all legs of a route are over links with a table of the family.
func (b *book) all(r route) bool {
	return !slices.ContainsFunc(r.legs, func(l leg) bool {
		return !slices.ContainsFunc(b.served, func(s served) bool { return s.index == l.index && s.family() == r.family })
	})
}

// TestTwinGenerates makes up many hosts, and looks at their commands only.
func TestTwinGenerates(t *testing.T) {
	k := make(kernel)
	for _, kind := range optionalKinds {
		k[kind] = true
	}
	for s := range uint64(300) {
		h := generate(s, true, allPhases, k)
		commands := h.buildCommands()
		for _, c := range h.changes {
			commands = append(commands, c.commands...)
		}
		for _, c := range commands {
			var index int
			if _, after, ok := strings.Cut(c, " index "); ok {
				if _, err := fmt.Sscan(after, &index); err != nil {
					t.Fatalf("seed %d: %q: %v", s, c, err)
				}
			}
			if index > maxIndex && index < 1000 || strings.Contains(c, "invalid") || strings.Contains(c, "%!") {
				t.Errorf("seed %d: %q", s, c)
			}
		}
	}
}
