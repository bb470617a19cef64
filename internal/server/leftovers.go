package server

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/table-allocator/table-allocator/internal/allocator"
	"github.com/table-allocator/table-allocator/internal/route"
)

// routesIn is what routes a table has that is to be leased.
type routesIn struct {
	ours   bool
	others bool
	links  []int // that routes of others lead to
}

// noLink stands for the link of a route that names a nexthop object which shows none.
const noLink = -1

func (t *routesIn) add(r route.Route) {
	if r.Protocol == route.Protocol {
		t.ours = true
		return
	}
	t.others = true
	links := r.Links()
	if r.NexthopID != 0 && len(links) == 0 {
		links = []int{noLink}
	}
	for _, index := range links {
		if !slices.Contains(t.links, index) {
			t.links = append(t.links, index)
		}
	}
}

// avoidRoutes reports whether the routes in a table of family forbid to lease it to key. Callers of a client in mode
// none leave routes in their table, and an address that changes must not use up a table each time. So key gets the
// table with routes over its own link if it held the table last, as known says; and, if lastResort, also if a key of
// the same link did. Clients of ours delete what clients of ours left.
func (r *rulesInUse) avoidRoutes(family allocator.Family, table uint32, key, lastHolder allocator.Key, known, lastResort bool) bool {
	t := r.routesOf(family, table, lastResort)
	switch {
	case !t.others:
		return t.ours && key.Family == allocator.Unspec && key != lastHolder
	case !known && !(lastResort && key.Family == lastHolder.Family && key.Ifname == lastHolder.Ifname):
	case r.leadOver(t.links, key):
		return false
	}
	if lastResort {
		r.noteLeft(family, table)
	}
	return true
}

// leadOver reports whether all links are the one of key.
func (r *rulesInUse) leadOver(links []int, key allocator.Key) bool {
	if len(links) == 0 {
		return true // the routes answer with an error
	}
	link, found, err := r.conn.LinkByName(key.Ifname)
	if err != nil || !found {
		return key.Family == allocator.Unspec // whose ifname is any text
	}
	return len(links) == 1 && links[0] == link.Index
}

// routesRead are the routes of some tables, as read a moment ago.
type routesRead struct {
	since  time.Duration // when the first of them was read
	tables map[tableOf]*routesIn
	next   tableOf // the table behind the last one that was read
	count  int     // tables that were read with it
}

// routesOf returns the routes of a table, read a moment ago; uncached: in this round. Numbers that were never leased
// are asked for one after the other, so each time the next number is asked for, twice as many tables are read.
func (r *rulesInUse) routesOf(family allocator.Family, table uint32, uncached bool) *routesIn {
	read := &r.routes
	if age := r.now - read.since; read.tables == nil || age > rulesFor || uncached && age > 0 {
		*read = routesRead{since: r.now, tables: make(map[tableOf]*routesIn)}
	}
	at := tableOf{family, table}
	if t := read.tables[at]; t != nil {
		return t
	}
	count := 1
	if at == read.next {
		count = 2 * read.count
	}
	if r.conn == nil {
		return &routesIn{} // the rules could not be read, which was logged
	}
	count = int(min(uint64(count), route.FirstMost, uint64(r.last-table)+1))
	tables, err := r.conn.FirstRoutes(int(family), table, count)
	if err != nil {
		r.log.Warn("cannot read the routes of a table, so it may be leased with them", "table", table, "err", err)
		tables = make([][]route.Route, 1)
	}
	for i, routes := range tables {
		t := &routesIn{}
		for _, route := range routes {
			t.add(route)
		}
		read.tables[tableOf{family, table + uint32(i)}] = t
	}
	read.next, read.count = tableOf{family, table + uint32(len(tables))}, len(tables)
	return read.tables[at]
}

// forgetRoutes forgets what routes a table has. It is called when the table is leased and when the lease ends, so that
// the next holder gets it by what it has then.
func (r *rulesInUse) forgetRoutes(family allocator.Family, table uint32) {
	for _, family := range familiesOf(family) {
		delete(r.routes.tables, tableOf{family, table})
	}
}

// familiesOf returns the families of rules and routes that concern a lease of family.
func familiesOf(family allocator.Family) []allocator.Family {
	switch family {
	case allocator.Inet:
		return ofInet
	case allocator.Inet6:
		return ofInet6
	}
	return ofAny
}

var (
	ofAny   = []allocator.Family{allocator.Inet, allocator.Inet6}
	ofInet  = ofAny[:1]
	ofInet6 = ofAny[1:]
)

// tableOf is a table of a family.
type tableOf struct {
	family allocator.Family
	table  uint32
}

// noteLeft notes that the routes in a table forbid to lease it to the key that asks.
func (r *rulesInUse) noteLeft(family allocator.Family, table uint32) {
	if at := (tableOf{family, table}); !slices.Contains(r.left, at) {
		r.left = append(r.left, at)
	}
}

// sayLeft names the tables that are not leased because of routes in them, and the cure; "" if there are none.
func (r *rulesInUse) sayLeft() string {
	const most = 4
	if len(r.left) == 0 {
		return ""
	}
	slices.SortFunc(r.left, func(a, b tableOf) int {
		return cmp.Or(cmp.Compare(a.family, b.family), cmp.Compare(a.table, b.table))
	})
	var tables []string
	for _, at := range r.left {
		if len(tables) == most {
			tables = append(tables, fmt.Sprintf("%d more", len(r.left)-most))
			break
		}
		tables = append(tables, fmt.Sprint(at.table))
	}
	flag := ""
	if r.left[0].family == allocator.Inet6 {
		flag = "-6 "
	}
	return fmt.Sprintf("; routes of others are in %s: to free a table, ip %sroute flush table %d", strings.Join(tables, ", "), flag, r.left[0].table)
}
