package client

import (
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/install"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// news is what a batch of events is about, for all who need it: a thousand sessions must not each go through a
// thousand events.
type news struct {
	overrun      bool
	main         map[int]mainNews          // by family
	newDefault   bool                      // main has a new default route, or a half of one: its link is an uplink, whatever else it is
	nexthops     bool                      // nexthop objects changed
	objects      map[uint32]bool           // of those, the deleted
	linksChanged bool                      // links were added, changed or deleted
	addresses    map[netip.Addr]bool       // that were added, changed or deleted
	came         map[onLink]bool           // addresses that were added, or changed
	went         map[netip.Addr][]int      // the links that addresses were deleted from
	back         []netip.Addr              // that were added after that
	links        map[int]bool              // that were added, changed or deleted
	gone         map[int]bool              // of those, the deleted
	addressed    map[int]bool              // links whose addresses were added, changed or deleted
	silent       map[int]bool              // that were down at least for a moment, or that addresses were deleted from
	names        map[string]bool           // of those links
	history      map[linkOf][]install.Past // in order: the link was down, its routes in main were added or deleted
	left         []install.Past            // in order: addresses were deleted
	replaced     install.Replaced          // links of which a route took another one's place in main
	mainOn       map[linkOf]bool           // links of which another program changed routes of main
	lost         map[tableOf]bool          // other tables that routes were deleted from
	filled       map[tableOf]bool          // tables that got a default route of ours
	rules        map[ruleAt]bool           // where rules of ours were added or deleted; true: deleted
	tables       map[uint32]bool           // tables of rules of ours that were added or deleted; true: deleted
	defaults     map[int]bool              // families of which another program changed a default route of main
	choice       map[int]bool              // families of which main has lost a default route of ours, or another one took its place
	others       map[int]bool              // families of which another program changed rules, or default routes of other tables
}

// onLink is an address on a link.
type onLink struct {
	addr  netip.Addr
	index int
}

// linkOf is a link as one family has it. The ifindex 0 stands for routes with several links or none.
type linkOf struct{ family, index int }

// mainNews is what happened to the routes of main.
type mainNews struct {
	others bool // another program changed one
	silent bool // some may have gone without an event: in place of a new one, or with a nexthop object
}

// tableOf is a table as one family has it.
type tableOf struct {
	family int
	table  uint32
}

// ruleAt is a priority of rules.
type ruleAt struct {
	family   int
	priority uint32
}

func digest(events []route.Event) news {
	n := news{addresses: make(map[netip.Addr]bool), links: make(map[int]bool), silent: make(map[int]bool), names: make(map[string]bool)}
	for at, e := range events {
		past := install.Past{At: at, Event: e}
		switch e.Kind {
		case route.Overrun:
			n.overrun = true
		case route.AddressChanged:
			n.addAddress(past)
		case route.LinkChanged, route.LinkGone:
			n.addLink(past)
		case route.RouteChanged:
			n.addRoute(past)
		case route.NexthopChanged:
			n.addNexthop(e)
		case route.RuleChanged:
			n.addRule(e)
		}
	}
	return n
}

func (n *news) addLink(e install.Past) {
	n.links[e.Index], n.names[e.Name] = true, true
	if e.Down {
		n.silent[e.Index] = true
		n.addHistory(e, unix.AF_INET, e.Index)
		n.addHistory(e, unix.AF_INET6, e.Index)
	}
	if e.Kind == route.LinkGone {
		n.gone = with(n.gone, e.Index)
	}
	n.linksChanged = true // routes of several next hops go with the link of one, without an event
}

func (n *news) addNexthop(e route.Event) {
	n.nexthops = true
	if e.Deleted {
		if n.objects == nil {
			n.objects = make(map[uint32]bool)
		}
		n.objects[e.Nexthop] = true
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		n.addMain(family, mainNews{silent: true})
	}
}

func (n *news) addAddress(e install.Past) {
	n.addresses[e.Addr] = true
	n.addressed = with(n.addressed, e.Index)
	if n.came == nil {
		n.came, n.went = make(map[onLink]bool), make(map[netip.Addr][]int)
	}
	if e.Deleted {
		n.went[e.Addr] = append(n.went[e.Addr], e.Index)
		n.silent[e.Index] = true
		n.left = append(n.left, e)
	} else {
		n.came[onLink{e.Addr, e.Index}] = true
		if len(n.went[e.Addr]) > 0 {
			n.back = append(n.back, e.Addr)
		}
	}
}

func with(set map[int]bool, n int) map[int]bool {
	if set == nil {
		set = make(map[int]bool)
	}
	set[n] = true
	return set
}

func (n *news) addHistory(e install.Past, family, index int) {
	if n.history == nil {
		n.history = make(map[linkOf][]install.Past)
	}
	at := linkOf{family, index}
	n.history[at] = append(n.history[at], e)
}

func (n *news) addRoute(e install.Past) {
	if n.mainOn == nil {
		n.mainOn, n.lost, n.filled = make(map[linkOf]bool), make(map[tableOf]bool), make(map[tableOf]bool)
	}
	others := e.Protocol != route.Protocol
	if e.Table == unix.RT_TABLE_MAIN {
		n.addRouteOfMain(e, others)
		return
	}
	if e.Route.IsLocalRange() {
		n.links[e.Index] = true
	}
	if e.Deleted {
		n.lost[tableOf{e.Family, e.Table}] = true
	}
	if !e.Deleted && !others && e.Route.Dst.Bits() == 0 {
		n.filled[tableOf{e.Family, e.Table}] = true
	}
	if others && e.Route.Dst.Bits() <= uplink.Halves(e.Family) {
		n.others = with(n.others, e.Family)
	}
}

// addRouteOfMain adds a route of main, which another program made or we.
func (n *news) addRouteOfMain(e install.Past, others bool) {
	for _, index := range e.Route.Links() {
		n.addHistory(e, e.Family, index)
	}
	if e.Replaced && others {
		n.addReplaced(e)
	}
	toAll := e.Route.Dst.Bits() == 0
	if toAll && (e.Deleted && uplink.IsChoiceRoute(*e.Route) || others && e.Replaced) {
		n.choice = with(n.choice, e.Family)
	}
	if toAll && others {
		n.defaults = with(n.defaults, e.Family)
	}
	n.newDefault = n.newDefault || others && !e.Deleted && e.Route.Dst.Bits() <= uplink.Halves(e.Family)
	n.addMain(e.Family, mainNews{others: others, silent: others && e.Replaced})
	if others {
		n.mainOn[linkOf{e.Family, e.Index}] = true
	}
}

func (n *news) addReplaced(e install.Past) {
	if n.replaced == nil {
		n.replaced = make(install.Replaced)
	}
	n.replaced[install.PlaceOf(*e.Route)] = e.Index
}

func (n *news) addMain(family int, m mainNews) {
	if n.main == nil {
		n.main = make(map[int]mainNews)
	}
	have := n.main[family]
	n.main[family] = mainNews{have.others || m.others, have.silent || m.silent}
}

func (n *news) addRule(e route.Event) {
	if e.Protocol != route.Protocol {
		n.others = with(n.others, e.Family)
		return
	}
	if n.rules == nil {
		n.rules, n.tables = make(map[ruleAt]bool), make(map[uint32]bool)
	}
	at := ruleAt{e.Family, e.Priority}
	n.rules[at] = n.rules[at] || e.Deleted
	n.tables[e.Table] = n.tables[e.Table] || e.Deleted
}

// concerns reports whether a session's address or link changed. It goes by the address, so that events of a thousand
// others on the link cost nothing.
func (n news) concerns(s *session) bool {
	return n.addresses[s.addr] || n.links[s.inst.Index] || s.inst.Index == 0 && n.names[s.lease.uplink.Key.Ifname]
}

// boundTo reports whether traffic was bound to the interface of a session, or was set free.
func (n news) boundTo(s *session) bool {
	m, family := s.inst.Rules.Marking, s.family()
	_, strict := n.rules[ruleAt{family, m.Block + 1}]
	_, loose := n.rules[ruleAt{family, m.Fallback + 1}]
	return m != (wire.Marking{}) && (n.overrun || strict || loose)
}

// lostLookups reports whether lookups were deleted, perhaps of a session.
func (n news) lostLookups(s *session) bool {
	m, family := s.inst.Rules.Marking, s.family()
	return m != (wire.Marking{}) && (n.rules[ruleAt{family, m.Block}] || n.rules[ruleAt{family, m.Fallback}] ||
		n.rules[ruleAt{family, uplink.OwnPriority(m)}])
}
