package server

import (
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/allocator"
	"github.com/table-allocator/table-allocator/internal/route"
)

// rulesInUse knows the rules of the host, and the routes of tables. A table that a rule looks up, or that
// has routes, must not be leased to another address: other programs may use tables of our range, and the
// rules of a client that was killed would catch the traffic of the next holder.
type rulesInUse struct {
	conn    *route.Conn
	log     *slog.Logger
	now     time.Duration // of the round at hand
	read    time.Duration // when tables was read
	failed  bool
	tables  map[allocator.Family]map[uint32][]route.Rule
	sources map[netip.Addr][]uint32 // tables that rules look up for what comes from an address
	routes  routesRead
	last    uint32    // table that can be leased
	left    []tableOf // that routes in them keep from the key which asks
}

// rulesFor is how long a dump of the rules is used, so that a burst of requests costs one dump.
const rulesFor = 100 * time.Millisecond

// begin sets the time of the round. A round reads the rules twice at most, however many tables it
// grants.
func (r *rulesInUse) begin(now time.Duration) {
	r.now = now
}

// avoid reports whether rules or routes forbid to lease table to key. lastHolder held it last, by the database.
// lastResort says that no other table was found: avoid reads the host again, and accepts more.
func (r *rulesInUse) avoid(table uint32, key, lastHolder allocator.Key, lastResort bool) bool {
	r.refresh(lastResort)
	for _, family := range familiesOf(key.Family) {
		rules := r.tables[family][table]
		known := key == lastHolder || slices.ContainsFunc(rules, func(rule route.Rule) bool { return isClients(rule) && isHost(rule.Src, key) })
		if !harmless(rules, key, lastHolder) || r.avoidRoutes(family, table, key, lastHolder, known, lastResort) {
			return true
		}
	}
	r.forgetRoutes(key.Family, table)
	return false
}

// taken reports whether a client of ours has rules for table from another address than key's, and none
// from key's. Clients delete the rules that an earlier holder of their table left.
func (r *rulesInUse) taken(table uint32, key allocator.Key) (other bool) {
	r.refresh(false)
	for _, rule := range r.tables[key.Family][table] {
		switch {
		case isHost(rule.Src, key):
			return false
		case rule.Protocol == route.Protocol && rule.Flags == 0 && rule.Src.IsValid() && rule.Src.IsSingleIP():
			other = true
		}
	}
	return other
}

// named reports whether a rule looks up a table for packets of a family; of unspec, of any.
func (r *rulesInUse) named(family allocator.Family, table uint32) bool {
	r.refresh(true) // it is a rare question
	if family == allocator.Unspec {
		return len(r.tables[allocator.Inet][table])+len(r.tables[allocator.Inet6][table]) > 0
	}
	return len(r.tables[family][table]) > 0
}

// lookedUp returns the tables that rules look up for packets from exactly key's address.
func (r *rulesInUse) lookedUp(key allocator.Key) []uint32 {
	addr, err := netip.ParseAddr(key.Addr)
	if err != nil || key.Family == allocator.Unspec {
		return nil
	}
	r.refresh(false)
	return r.sources[addr]
}

// harmless reports whether all rules that look up one table may stay when the table is leased to key:
// those from key's address, which a client that was killed left, and those of the last holder. The next
// client replaces them.
func harmless(rules []route.Rule, key, lastHolder allocator.Key) bool {
	known := lastHolder != allocator.Key{}
	for _, rule := range rules {
		if isHost(rule.Src, key) || isHost(rule.Src, lastHolder) {
			known = true
		}
	}
	for _, rule := range rules {
		switch {
		case rule.Flags != 0:
			return false // "not from": for anybody but that address
		case isHost(rule.Src, key), isHost(rule.Src, lastHolder):
		case rule.Src.IsValid() && rule.Src.IsSingleIP():
			return false // of another address
		case !known, !isClients(rule):
			return false // neither of a client of ours nor of the original
		}
	}
	return true
}

// prioritiesOfOriginal are those of its clients, which have no option for them. uplink has them for ours; no server needs a room of clients.
var prioritiesOfOriginal = []uint32{10000, 20000, 91000}

// isClients reports whether a rule is of a client of ours or of the original, whose rules have the protocol that ip gives them and
// priorities of their own. One of another program for the same address, as of those that clouds have for second links, leads to a table
// with routes that are no leftovers.
func isClients(rule route.Rule) bool {
	return rule.Protocol == route.Protocol || rule.Protocol == unix.RTPROT_UNSPEC && slices.Contains(prioritiesOfOriginal, rule.Priority)
}

// isHost reports whether src is exactly the address of key.
func isHost(src netip.Prefix, key allocator.Key) bool {
	addr, err := netip.ParseAddr(key.Addr)
	return err == nil && key.Family != allocator.Unspec && src.IsValid() && src.IsSingleIP() && src.Addr() == addr
}

// refresh reads the rules, unless it has done so a moment ago, or in this round. If that fails,
// the ones read last count.
func (r *rulesInUse) refresh(uncached bool) {
	if age := r.now - r.read; r.tables != nil && age <= rulesFor && !(uncached && age > 0) {
		return
	}
	err := r.dump()
	if err != nil && !r.failed {
		r.log.Warn("cannot read the rules of the host, so a table that one refers to may be leased", "err", err)
	}
	if r.tables == nil {
		r.tables = make(map[allocator.Family]map[uint32][]route.Rule)
	}
	r.read, r.failed = r.now, err != nil
}

func (r *rulesInUse) dump() error {
	tables, sources := make(map[allocator.Family]map[uint32][]route.Rule), make(map[netip.Addr][]uint32)
	for family, number := range map[allocator.Family]int{allocator.Inet: unix.AF_INET, allocator.Inet6: unix.AF_INET6} {
		rules, err := r.list(number)
		if err != nil {
			r.close()
			return err
		}
		tables[family] = make(map[uint32][]route.Rule)
		for _, rule := range rules {
			tables[family][rule.Table] = append(tables[family][rule.Table], rule)
			if rule.Src.IsValid() && rule.Src.IsSingleIP() && rule.Flags == 0 && rule.Action == route.Lookup {
				sources[rule.Src.Addr()] = append(sources[rule.Src.Addr()], rule.Table)
			}
		}
	}
	r.tables, r.sources = tables, sources
	return nil
}

func (r *rulesInUse) list(family int) ([]route.Rule, error) {
	if r.conn == nil {
		conn, err := route.Dial()
		if err != nil {
			return nil, err
		}
		r.conn = conn
	}
	return r.conn.Rules(family)
}

func (r *rulesInUse) close() {
	if r.conn != nil {
		r.conn.Close()
		r.conn = nil
	}
}
