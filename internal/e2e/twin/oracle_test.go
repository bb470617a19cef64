package twin

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// picture is what a namespace has at one moment.
type picture struct {
	routes    []route
	addresses []address
	rules     []rule
	names     map[int]string
}

func (s *socket) picture() (p picture, err error) {
	if p.routes, err = s.routes(); err != nil {
		return p, err
	}
	if p.addresses, err = s.addresses(); err != nil {
		return p, err
	}
	if p.rules, err = s.rules(); err != nil {
		return p, err
	}
	p.names, err = s.linkNames()
	return p, err
}

// main are the routes of table main.
func (p picture) main() []route {
	return slices.DeleteFunc(slices.Clone(p.routes), func(r route) bool { return r.table != unix.RT_TABLE_MAIN })
}

// served is an address with a table of its own: the source rule of the real host says so.
type served struct {
	addr     netip.Addr
	index    int // of its link
	networks networks
	table    uint32
}

// networks are those of an address: it may have several lengths.
type networks []netip.Prefix

func (n networks) contain(a netip.Addr) bool {
	return slices.ContainsFunc(n, func(p netip.Prefix) bool { return p.Contains(a) })
}

func (s served) family() int { return familyOf(s.addr) }

// protocol marks the rules and routes of the product.
const protocol = 116

// servedBy finds the served addresses among those of the plain host.
func servedBy(rules []rule, plain picture) (all []served) {
	for _, r := range rules {
		if r.protocol != protocol || r.action != unix.FR_ACT_TO_TBL || r.table == unix.RT_TABLE_MAIN ||
			r.priority != 10000 || !r.src.IsSingleIP() {
			continue
		}
		s := served{addr: r.src.Addr(), table: r.table}
		for _, a := range plain.addresses {
			if a.addr == s.addr {
				s.index, s.networks = a.index, append(s.networks, a.network)
			}
		}
		for _, local := range plain.routes { // made local by a route instead
			if s.index == 0 && local.typ == unix.RTN_LOCAL && local.dst == r.src && len(local.legs) > 0 {
				s.index, s.networks = local.legs[0].index, networks{local.dst}
			}
		}
		if s.index != 0 { // else it has gone meanwhile
			all = append(all, s)
		}
	}
	return all
}

// uplinks are the links by which the world is reached with a family: they have an address that is
// served, of whatever family, or main has a default of this one or half of one over them.
func uplinks(plain picture, all []served, family int) map[int]bool {
	is := make(map[int]bool)
	for _, s := range all {
		is[s.index] = true
	}
	for _, r := range plain.main() {
		if r.family == family && r.isHalf() {
			for _, l := range r.legs {
				is[l.index] = true
			}
		}
	}
	return is
}

// routesFor are the routes of main that a host would have whose only uplink is the link of s,
// and whose only provider there is the one that gave it the address s.
func routesFor(plain picture, s served, is map[int]bool, specificFirst bool) []route {
	var own, others []route
	for _, r := range plain.main() {
		if r.family != s.family() || r.dst.Addr().IsMulticast() {
			continue
		}
		if mine, ok := r.alive(func(index int) bool { return index == s.index }); ok {
			own = append(own, mine)
			continue
		}
		if r.isHalf() {
			continue // of another link: a default in disguise, too
		}
		if specificFirst && r.isError() {
			others = append(others, r)
		}
		other, ok := r.alive(func(int) bool { return true })
		if ok && (specificFirst || !slices.ContainsFunc(other.legs, func(l leg) bool { return is[l.index] })) {
			others = append(others, other)
		}
	}
	own = ofProvider(own, plain, s)
	had := make(map[place]bool)
	for _, r := range own {
		had[place{dst: r.dst, from: r.from, tos: r.tos}] = true
	}
	for _, r := range others {
		if !had[place{dst: r.dst, from: r.from, tos: r.tos}] { // of equal length the link's own counts
			own = append(own, r)
		}
	}
	return own
}

// alive is the route reduced to those of its legs over some links that are up, each once, and
// whether there are any.
func (r route) alive(is func(index int) bool) (route, bool) {
	if r.isError() {
		return route{}, false
	}
	return r.with(func(i int, l leg) bool { return is(l.index) && !r.dead[i] && slices.Index(r.legs, l) == i })
}

// ofProvider leaves out the ways of other providers on the link: of the ways to one destination,
// if one is of s itself, those by a gateway that only another address knows, and if one has s as its source, those with
// another address of the link. If none is, all are.
func ofProvider(routes []route, plain picture, s served) []route {
	var others networks // of other addresses
	isOther := make(map[netip.Addr]bool)
	for _, a := range plain.addresses {
		if a.index == s.index && a.addr != s.addr && a.addr.Is4() == s.addr.Is4() {
			others = append(others, a.network)
			isOther[a.addr] = true
		}
	}
	named := make(map[place]bool)
	for _, r := range routes {
		named[place{dst: r.dst, from: r.from, tos: r.tos}] = named[place{dst: r.dst, from: r.from, tos: r.tos}] || r.source == s.addr
	}
	ofOther := func(r route) bool {
		return isOther[r.source] && named[place{dst: r.dst, from: r.from, tos: r.tos}]
	}
	own := func(r route, l leg) bool {
		return r.source == s.addr || s.networks.contain(l.gateway) && !ofOther(r)
	}
	foreign := func(l leg) bool {
		return l.gateway.IsValid() && !l.gateway.IsLinkLocalUnicast() && !s.networks.contain(l.gateway) && others.contain(l.gateway)
	}
	has := make(map[place]bool)
	for _, r := range routes {
		for _, l := range r.legs {
			if own(r, l) {
				has[place{dst: r.dst, from: r.from, tos: r.tos}] = true
			}
		}
	}
	var kept []route
	for _, r := range routes {
		if !has[place{dst: r.dst, from: r.from, tos: r.tos}] {
			kept = append(kept, r)
			continue
		}
		if left, ok := r.with(func(_ int, l leg) bool { return own(r, l) || !foreign(l) && !ofOther(r) }); ok {
			kept = append(kept, left)
		}
	}
	return kept
}

// twins is a stock of namespaces that become twins, one host after the other. A twin is a host
// that has one uplink only, the link of an address, and what main says of that. Where a packet
// from the address must go the kernel says there.
type twins struct {
	stock []*namespace
	used  int
	same  map[string]*namespace // twins of this comparison by what they have
}

// maxIndex is the highest index of a link of a host that a twin can have.
const maxIndex = 60

func (t *twins) close() {
	for _, n := range t.stock {
		n.close()
	}
}

// twinTable is what a twin has in the place of main: the kernel asks main whether a router is really
// on its link, and not another table.
const twinTable = 100

// begin forgets the twins of the comparison before.
func (t *twins) begin() { t.used, t.same = 0, make(map[string]*namespace) }

// of returns a twin that has the address and the routes.
func (t *twins) of(plain picture, s served, routes []route) (*namespace, error) {
	var text strings.Builder
	fmt.Fprintln(&text, s.index, s.family())
	if !slices.ContainsFunc(plain.addresses, func(a address) bool { return a.addr == s.addr && a.index == s.index }) {
		fmt.Fprintln(&text, s.addr) // local by a route: no other twin has it
	}
	for _, r := range routes {
		fmt.Fprintln(&text, r)
	}
	key := text.String()
	if twin := t.same[key]; twin != nil {
		return twin, nil
	}
	if t.used == len(t.stock) {
		n, err := newTwin()
		if err != nil {
			return nil, err
		}
		t.stock = append(t.stock, n)
	}
	n := t.stock[t.used]
	t.used++
	if err := n.become(plain, s, routes); err != nil {
		return nil, err
	}
	t.same[key] = n
	return n, nil
}

// newTwin makes a namespace with a link for every index that a host may have.
func newTwin() (*namespace, error) {
	n, err := newNamespace("twin")
	if err != nil {
		return nil, err
	}
	lines := []string{fmt.Sprintf("ip rule add lookup %d", twinTable), fmt.Sprintf("ip -6 rule add lookup %d", twinTable)}
	for i := 2; i <= maxIndex; i++ {
		lines = append(lines, fmt.Sprintf("ip link add t%d index %d type veth peer name x%d index %d", i, i, i, i+1000),
			fmt.Sprintf("ip link set t%d up", i), fmt.Sprintf("ip link set x%d up", i))
	}
	if failed, err := n.run(lines); err != nil || len(failed) > 0 {
		n.close()
		return nil, fmt.Errorf("make the links of a twin: %d failed, %w", len(failed), err)
	}
	return n, nil
}

// become clears the namespace and gives it the addresses of the link of s, and routes.
func (n *namespace) become(plain picture, s served, routes []route) error {
	old, err := n.addresses()
	if err != nil {
		return err
	}
	for _, a := range old {
		if a.index != 1 {
			// One that was second in its network went with the first.
			if err := n.change(unix.RTM_DELADDR, 0, a.message); err != nil && err != unix.EADDRNOTAVAIL {
				return fmt.Errorf("delete address %s of a twin: %w", a.addr, err)
			}
		}
	}
	add := func(addr netip.Addr, network netip.Prefix) error {
		if err := n.change(unix.RTM_NEWADDR, unix.NLM_F_CREATE, addressMessage(s.index, addr, network)); err != nil {
			return fmt.Errorf("add address %s to a twin: %w", addr, err)
		}
		return nil
	}
	known := false
	for _, a := range plain.addresses {
		if a.index == s.index && a.addr.Is4() == s.addr.Is4() {
			known = known || a.addr == s.addr
			if err := add(a.addr, a.network); err != nil {
				return err
			}
		}
	}
	if !known { // local by a route
		if err := add(s.addr, netip.PrefixFrom(s.addr, s.addr.BitLen())); err != nil {
			return err
		}
	}
	all, err := n.routes()
	if err != nil {
		return err
	}
	for _, r := range all {
		if r.table == twinTable {
			if err := n.change(unix.RTM_DELROUTE, 0, r.message()); err != nil && err != unix.ESRCH {
				return fmt.Errorf("delete route %s of a twin: %w", r, err)
			}
		}
	}
	for _, r := range routes {
		r.table = twinTable
		if err := n.change(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_APPEND, r.message()); err != nil && err != unix.EEXIST { // twice, with another source
			return fmt.Errorf("add route %s to a twin: %w", r, err)
		}
	}
	return nil
}

// addressMessage is the body of the RTM_NEWADDR that gives an address to a link, and no route of
// main with it.
func addressMessage(index int, addr netip.Addr, network netip.Prefix) []byte {
	far := addr
	if !network.Contains(addr) {
		far = network.Addr()
	}
	b := []byte{byte(familyOf(addr)), byte(network.Bits()), 0, 0}
	b = native.AppendUint32(b, uint32(index))
	b = attribute(b, unix.IFA_LOCAL, addr.AsSlice())
	b = attribute(b, unix.IFA_ADDRESS, far.AsSlice())
	return attribute32(b, unix.IFA_FLAGS, unix.IFA_F_NODAD|unix.IFA_F_NOPREFIXROUTE)
}
