package twin

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// wrong is an answer of the real host that differs from the right one.
type wrong struct {
	signature string // what kind it is: the same for what is likely to have one cause
	text      string // the question and both answers
}

// result is what a comparison found.
type result struct {
	answers int
	wrong   []wrong
}

func (r *result) add(signature, format string, args ...any) {
	r.wrong = append(r.wrong, wrong{signature, fmt.Sprintf(format, args...)})
}

// answer is where a packet goes.
type answer struct {
	typ   uint8 // RTN_UNSPEC: nowhere
	legs  []leg // each as good as the others
	match route
}

func (a answer) isLocal() bool {
	return slices.Contains([]uint8{unix.RTN_LOCAL, unix.RTN_BROADCAST, unix.RTN_ANYCAST, unix.RTN_MULTICAST}, a.typ)
}

// shape is what an answer has in common with others of its kind.
func (a answer) shape() string {
	switch {
	case a.typ == unix.RTN_UNSPEC:
		return "none"
	case a.typ != unix.RTN_UNICAST:
		return typeNames[a.typ]
	case len(a.legs) > 1:
		return "multipath"
	case len(a.legs) == 1 && !a.legs[0].gateway.IsValid():
		return "on-link"
	}
	return "gateway"
}

func (a answer) text(names map[int]string) string {
	if a.typ != unix.RTN_UNICAST {
		return a.shape()
	}
	var legs []string
	for _, l := range a.legs {
		text := "dev " + names[l.index]
		if l.gateway.IsValid() {
			text = fmt.Sprintf("via %s %s", l.gateway, text)
		}
		legs = append(legs, text)
	}
	return strings.Join(legs, " or ")
}

// allows reports whether an answer of the real host is as right as this one.
func (a answer) allows(got answer) bool {
	if a.typ != got.typ {
		return false
	}
	for _, l := range got.legs {
		if !slices.Contains(a.legs, l) {
			return false
		}
	}
	return true
}

// ask returns the answer of a namespace, whose routes in main are known.
func ask(n *namespace, q question, main []route) (answer, error) {
	r, ok, err := n.way(q)
	if err != nil || !ok {
		return answer{}, err
	}
	a := answer{r.typ, r.legs, r}
	if r.typ != unix.RTN_UNICAST {
		a.legs = nil
		return a, nil
	}
	if r.table != unix.RT_TABLE_MAIN && r.table != twinTable || r.family == unix.AF_INET && !r.isDefault() {
		return a, nil
	}
	// Of several defaults in one place the kernel takes one by what it knows of the neighbours,
	// and of IPv6 routes in one place each in its turn.
	for _, other := range main {
		if other.family == r.family && other.typ == r.typ && other.place() == r.place() {
			up, _ := other.alive(func(int) bool { return true })
			for _, l := range up.legs {
				if !slices.Contains(a.legs, l) {
					a.legs = append(slices.Clone(a.legs), l)
				}
			}
		}
	}
	return a, nil
}

// comparison asks the real host and compares with what is right.
type comparison struct {
	w       *world
	twins   *twins
	plain   picture
	main    []route // of plain
	tables  []route // of the real host
	served  []served
	routes  map[netip.Addr][]route // of the twin of an address
	twin    map[netip.Addr]*namespace
	uplinks map[int]map[int]bool // of a family, by index
	early   map[uint32]bool      // tables of rules of others before ours
	chosen  map[int][]route      // of a family: the best default routes of the chosen link, see chosen_test.go
	result  result
}

// compare asks all questions.
func (w *world) compare(t *twins) (result, error) {
	c := &comparison{w: w, twins: t, routes: make(map[netip.Addr][]route), twin: make(map[netip.Addr]*namespace), early: make(map[uint32]bool), uplinks: make(map[int]map[int]bool)}
	t.begin()
	var err error
	if c.plain, err = w.plain.picture(); err != nil {
		return c.result, err
	}
	c.plain.takeChosen()
	rules, err := w.real.rules()
	if err != nil {
		return c.result, err
	}
	if c.tables, err = w.real.routes(); err != nil {
		return c.result, err
	}
	c.main, c.served = c.plain.main(), servedBy(rules, c.plain)
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		c.uplinks[family] = uplinks(c.plain, c.served, family)
		for index := range c.plain.names {
			c.uplinks[family][index] = c.uplinks[family][index] || w.host.watch.clients // which know of their link only
		}
	}
	for _, s := range c.served {
		c.routes[s.addr] = routesFor(c.plain, s, c.uplinks[s.family()], w.host.watch.SpecificFirst)
		if c.twin[s.addr], err = t.of(c.plain, s, c.routes[s.addr]); err != nil {
			return c.result, err
		}
	}
	for _, r := range c.plain.rules {
		if r.priority > 0 && r.priority < 9000 && r.table != 0 { // that of VRFs has none
			c.early[r.table] = true
		}
	}
	if w.host.chosen {
		if err := c.choose(); err != nil {
			return c.result, err
		}
	}
	c.notServed()
	for _, command := range w.refused {
		c.result.add("a command is refused", "%s: refused, and not without the product", command)
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		if err := c.family(family); err != nil {
			return c.result, err
		}
	}
	return c.result, nil
}

// notServed finds the addresses that must have a table, since the world is reached by their link,
// and have none.
func (c *comparison) notServed() {
	for _, a := range c.plain.addresses {
		if c.w.host.watch.clients || !c.w.host.watch.selects(c.plain.names[a.index]) || !a.addr.IsGlobalUnicast() {
			continue
		}
		leads := slices.ContainsFunc(c.main, func(r route) bool {
			up, ok := r.alive(func(index int) bool { return index == a.index })
			return ok && up.isDefault() && r.family == familyOf(a.addr)
		})
		has := slices.ContainsFunc(c.served, func(s served) bool { return s.addr == a.addr })
		if leads && !has {
			c.result.add("not served", "%s on %s has no table", a.addr, c.plain.names[a.index])
		}
	}
}

func (c *comparison) family(family int) error {
	tos := toses(c.plain, family)
	for _, dst := range destinations(c.plain, c.tables, family) {
		for _, t := range tos {
			if t == 0 || !c.w.host.watch.SpecificFirst { // which of two routes comes first may depend on both
				if err := c.bound(question{kind: "bound", dst: dst, tos: t}); err != nil {
					return err
				}
			}
			if err := c.likePlain(question{kind: "unbound", dst: dst, tos: t}); err != nil {
				return err
			}
		}
	}
	for _, s := range c.served {
		if s.family() == unix.AF_INET6 && family == unix.AF_INET6 && s.index != 0 {
			q := question{kind: "on the link", dst: netip.MustParseAddr("fe80::9"), src: s.addr, oif: s.index}
			if err := c.from(s, q); err != nil {
				return err
			}
		}
	}
	return c.forwarded(family)
}

// bound asks for packets from each address of the host, served or not.
func (c *comparison) bound(q question) error {
	for _, a := range c.plain.addresses {
		if a.addr.Is4() != q.dst.Is4() || !a.addr.IsGlobalUnicast() {
			continue
		}
		if slices.ContainsFunc(c.plain.addresses, func(b address) bool { return a.addr == b.addr && a.index != b.index }) {
			continue // of which link its packets are, nobody can say
		}
		if slices.ContainsFunc(c.plain.routes, func(r route) bool { return r.typ == unix.RTN_BROADCAST && r.dst.Addr() == a.addr }) {
			continue // it is the broadcast address of another network, and no route can have it as its source
		}
		q.src = a.addr
		i := slices.IndexFunc(c.served, func(s served) bool { return s.addr == a.addr })
		if i >= 0 {
			if err := c.from(c.served[i], q); err != nil {
				return err
			}
			continue
		}
		other := q
		other.kind = "bound, not served"
		if err := c.likePlain(other); err != nil {
			return err
		}
	}
	for _, s := range c.served { // local by a route
		if s.addr.Is4() == q.dst.Is4() && !slices.ContainsFunc(c.plain.addresses, func(a address) bool { return a.addr == s.addr }) {
			q.src = s.addr
			if err := c.from(s, q); err != nil {
				return err
			}
		}
	}
	return nil
}

// from asks for a packet from a served address: as on its twin.
func (c *comparison) from(s served, q question) error {
	plain, err := ask(c.w.plain, q, c.main)
	if err != nil {
		return err
	}
	if plain.isLocal() || c.early[plain.match.table] {
		return c.check(q, plain, plain)
	}
	twin, err := c.twinOf(s, q)
	if err != nil {
		return err
	}
	if kept, err := c.keeps(q, s.index, plain, twin); kept || err != nil {
		return err
	}
	switch {
	case twin.typ != unix.RTN_UNSPEC:
		wants := []answer{twin}
		if c.w.host.watch.SpecificFirst && !plain.match.isHalf() && c.all(plain, s.index) {
			wants = append(wants, plain) // main comes first, and leads over the link by whatever router
		}
		return c.check(q, plain, wants...)
	case c.w.host.watch.OnLoss == "block":
		return c.check(q, plain, answer{})
	}
	return c.asUnbound(q, plain, c.moved(q, plain)) // what leaves by another link
}

// asUnbound asks for a packet that goes as one that is bound to nothing, by one of wants.
func (c *comparison) asUnbound(q question, plain answer, wants []answer) error {
	if plain.typ == unix.RTN_UNSPEC || len(wants) > 1 { // with move a default that a table keeps serves it, too
		if kept, err := c.keeps(q, 0, plain, answer{}); kept || err != nil {
			return err
		}
	}
	more, err := c.byNetworkRule(q, plain)
	if err != nil {
		return err
	}
	return c.check(q, plain, append(wants, more...)...)
}

// all reports whether all legs of an answer are over a link.
func (c *comparison) all(a answer, index int) bool {
	return len(a.legs) > 0 && !slices.ContainsFunc(a.legs, func(l leg) bool { return l.index != index })
}

func (c *comparison) twinOf(s served, q question) (answer, error) {
	return ask(c.twin[s.addr], q, c.routes[s.addr])
}

// likePlain asks for a packet that must go as on the plain host.
func (c *comparison) likePlain(q question) error {
	plain, err := ask(c.w.plain, q, c.main)
	if err != nil {
		return err
	}
	wants := c.moved(q, plain)
	if plain.typ == unix.RTN_UNSPEC || len(wants) > 1 { // with move such a default serves what is bound to none, too
		if kept, err := c.keeps(q, 0, plain, answer{}); kept || err != nil {
			return err
		}
	}
	more, err := c.byNetworkRule(q, plain)
	if err != nil {
		return err
	}
	if err := c.check(q, plain, append(wants, more...)...); err != nil {
		return err
	}
	if q.kind == "unbound" && q.dst.Is4() && plain.typ == unix.RTN_UNICAST && len(plain.legs) == 1 && len(wants) == 1 && wants[0].allows(plain) && len(more) == 0 {
		return c.checkSource(q, plain)
	}
	return nil
}

// moved is the plain host's answer, and with move, if it is a default, any default that there is.
func (c *comparison) moved(q question, plain answer) []answer {
	if wants := c.firstOf(q, plain); wants != nil {
		return wants
	}
	wants := []answer{plain}
	if c.w.host.watch.Routes != "move" || plain.typ != unix.RTN_UNICAST || plain.match.table != unix.RT_TABLE_MAIN || !plain.match.isDefault() {
		return wants
	}
	for _, r := range c.main {
		if up, ok := r.alive(func(int) bool { return true }); ok && r.isDefault() && r.family == familyOf(q.dst) {
			wants = append(wants, answer{unix.RTN_UNICAST, up.legs, up})
		}
	}
	return wants
}

// byNetworkRule are the answers that the rules to the networks of addresses may give besides:
// where main itself has no route of a network's length they lead to the address's table, as they
// always did.
func (c *comparison) byNetworkRule(q question, plain answer) (more []answer, err error) {
	if plain.isLocal() || c.early[plain.match.table] {
		return nil, nil
	}
	for _, s := range c.served {
		shorter := func(n netip.Prefix) bool {
			return plain.typ == unix.RTN_UNSPEC || plain.match.table != unix.RT_TABLE_MAIN || plain.match.dst.Bits() < n.Bits()
		}
		if !slices.ContainsFunc(s.networks, func(n netip.Prefix) bool { return n.Contains(q.dst) && shorter(n) }) {
			continue
		}
		q := q
		q.iif = 0
		if q.dst.Is4() { // which takes own addresses only, and has no routes by source
			q.src = s.addr
		}
		twin, err := c.twinOf(s, q)
		if err != nil {
			return nil, err
		}
		if twin.typ != unix.RTN_UNSPEC {
			more = append(more, twin)
		}
		if !c.w.host.watch.SpecificFirst {
			continue
		}
		// Routes of other links may come first by rules, and need not be in the table.
		bare := routesFor(c.plain, s, c.uplinks[s.family()], false)
		n, err := c.twins.of(c.plain, s, bare)
		if err != nil {
			return nil, err
		}
		if twin, err = ask(n, q, bare); err != nil {
			return nil, err
		}
		if twin.typ != unix.RTN_UNSPEC {
			more = append(more, twin)
		}
	}
	return more, nil
}

// forwarded asks for packets that come in by each link and go on.
func (c *comparison) forwarded(family int) error {
	links := make(map[int]bool)
	for _, a := range c.plain.addresses {
		if a.index == 1 || links[a.index] {
			continue
		}
		links[a.index] = true
		for _, src := range strangers(c.plain, family, a.index) {
			for i, dst := range destinations(c.plain, c.tables, family) {
				if i%2 == 1 && !src.IsPrivate() { // half of them will do
					continue
				}
				if err := c.likePlain(question{kind: "forwarded", dst: dst, src: src, iif: a.index}); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// check asks the real host: one of wants is right.
func (c *comparison) check(q question, plain answer, wants ...answer) error {
	c.result.answers++
	got, err := ask(c.w.real, q, nil)
	if err != nil {
		return err
	}
	for _, want := range wants {
		if want.allows(got) {
			return nil
		}
	}
	names := c.plain.names
	signature := fmt.Sprintf("%s, main has %s: want %s, got %s%s", q.kind, kindOf(plain.match), wants[0].shape(), got.shape(), relation(wants[0], got))
	c.result.add(signature, "%s: got %s (table %d), right is %s", q.get(names), got.text(names), got.match.table, wants[0].text(names))
	return nil
}

// checkSource asks both hosts which source address they choose.
func (c *comparison) checkSource(q question, plain answer) error {
	c.result.answers++
	want, err := c.w.plain.source(q)
	if err != nil {
		return err
	}
	got, err := c.w.real.source(q)
	if err != nil || got == want {
		return nil // no way at all is another answer's fault
	}
	c.result.add(fmt.Sprintf("%s, main has %s: source", q.kind, kindOf(plain.match)), "%s: source %s, right is %s", q.get(c.plain.names), got, want)
	return nil
}

// kindOf is what kind of route of main the plain host found.
func kindOf(r route) string {
	switch {
	case !r.dst.IsValid():
		return "none"
	case r.table != unix.RT_TABLE_MAIN && r.table != unix.RT_TABLE_LOCAL:
		return "another table"
	case r.typ != unix.RTN_UNICAST:
		return typeNames[r.typ]
	case r.isDefault():
		return "a default"
	case r.isHalf():
		return "a half"
	case len(r.legs) > 1:
		return "a multipath route"
	case len(r.legs) == 1 && r.legs[0].gateway.IsValid():
		return "a route by a gateway"
	case r.dst.IsSingleIP():
		return "a host route"
	}
	return "a network"
}

// relation tells whether two answers are of one link.
func relation(want, got answer) string {
	if len(want.legs) == 0 || len(got.legs) == 0 {
		return ""
	}
	if slices.ContainsFunc(got.legs, func(l leg) bool { return l.index != want.legs[0].index }) {
		return " of another link"
	}
	return " of the same link"
}
