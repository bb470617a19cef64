package install

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Rules are the rules of one uplink in the kernel.
type Rules struct {
	Uplink  uplink.Uplink
	Marking wire.Marking // of the interface; zero: not known
	Guards  []route.Rule // of traffic that is bound to the interface, as read last
	// NoPrefix leaves out the rules for the delegated prefix, which cannot be this uplink's.
	NoPrefix bool
	// Parts of that prefix have rules nevertheless: links behind this host had them before another uplink had a say.
	Parts []netip.Prefix
	// Delegated leaves out the block rule: the address is in a prefix that another uplink delegates, and leaves by that.
	Delegated bool

	env       *Env
	adopted   bool
	tables    map[uint32]bool // whose rules of ours are this uplink's; false: only those from its address
	originals map[uint32]bool // whose three rules of the original are this uplink's
	shared    bool            // another client serves the address on another link
	extra     []route.Rule    // rules of the last sync that lead elsewhere than to the table
}

// adopt finds rules that earlier clients of the address left: clients of ours that died, and the original.
func (r *Rules) adopt() error {
	if r.adopted {
		return nil
	}
	host := r.Uplink.Host()
	rules, err := r.env.Kernel.RulesWhere(r.Uplink.Family(), func(rule *route.Rule) bool { return rule.Src == host })
	if err != nil {
		return err
	}
	r.adopted = true
	r.tables, r.originals = r.Uplink.Leftovers(rules)
	if len(rules) == 0 {
		return nil
	}
	r.NoteExtra(r.withRoutes()) // a holder before may have placed routes
	if r.shared, err = r.env.OtherHolder(r.Uplink.Key); err != nil {
		return err
	}
	if r.shared { // the other client uses those rules
		clear(r.tables)
		clear(r.originals)
	}
	return nil
}

// Former returns the table that rules of an earlier client of ours lead to; 0 if there is none, or more than one.
func (r *Rules) Former() (table uint32, err error) {
	if !r.Uplink.IsAddress() {
		return 0, nil
	}
	if err := r.adopt(); err != nil || len(r.tables) != 1 {
		return 0, err
	}
	for table = range r.tables {
	}
	return table, nil
}

// place makes the rules those of table, and deletes what was adopted or placed before. If the caller places routes
// itself, routes of ours in the table are left from an earlier client, and are deleted.
func (r *Rules) place(table uint32) error {
	if !r.Uplink.IsAddress() {
		return nil
	}
	if err := r.adopt(); err != nil {
		return err
	}
	if !r.Uplink.Settings.PlacesRoutes() {
		if err := r.env.Kernel.FlushTable(r.Uplink.Family(), table); err != nil {
			return err
		}
	}
	r.tables[table] = true
	if err := r.ReadGuards(); err != nil {
		return err
	}
	if err := r.sync(table, r.Want(table)); err != nil {
		return err
	}
	given := r.tables
	r.tables, r.originals = map[uint32]bool{table: true}, nil
	delete(given, table)
	return r.flush(given)
}

// flush deletes the routes of tables that are the uplink's alone.
func (r *Rules) flush(tables map[uint32]bool) error {
	for table, whole := range tables {
		if !whole {
			continue
		}
		if err := r.env.Kernel.FlushTable(r.Uplink.Family(), table); err != nil {
			return err
		}
	}
	return nil
}

// Restore adds the rules of a lease of table that the kernel does not have, and returns them.
func (r *Rules) Restore(table uint32) (lost []route.Rule, err error) {
	have, err := r.env.Kernel.RulesWhere(r.Uplink.Family(), func(rule *route.Rule) bool { return rule.Protocol == route.Protocol })
	if err != nil {
		return nil, err
	}
	for _, want := range r.Want(table) {
		if !slices.Contains(have, want) {
			lost = append(lost, want)
		}
	}
	if len(lost) == 0 {
		return nil, nil
	}
	_, err = r.env.SyncRules(r.Uplink.Family(), func(route.Rule) bool { return false }, lost, r.Attrs)
	return lost, err
}

// clear deletes all rules and routes of the uplink, but for rules to keep that block the address.
func (r *Rules) clear(keep ...route.Rule) error {
	if !r.Uplink.IsAddress() || !r.adopted {
		return nil
	}
	host := r.Uplink.Host()
	leaving, err := r.env.Kernel.RulesWhere(r.Uplink.Family(), func(rule *route.Rule) bool {
		return rule.Src == host && uplink.LeavesTable(*rule) && !uplink.IsForeign(*rule)
	})
	if err != nil {
		return err
	}
	if len(leaving)+len(keep) > 0 { // they may be another client's, which no table shows
		if r.shared, err = r.env.OtherHolder(r.Uplink.Key); err != nil {
			return err
		}
	}
	if r.shared {
		keep = nil // the other client decides what may leave
	}
	if err := r.sync(0, keep); err != nil {
		return err
	}
	err = r.flush(r.tables)
	clear(r.tables) // they may be leased to others soon
	return err
}

// unblock deletes the rules that block the address if no client serves it. Several may wait for its return.
func (r *Rules) unblock() error {
	host := r.Uplink.Host()
	rules, err := r.env.Kernel.RulesWhere(r.Uplink.Family(), func(rule *route.Rule) bool {
		return rule.Src == host && rule.Protocol == route.Protocol && !uplink.IsForeign(*rule)
	})
	if err != nil || slices.ContainsFunc(rules, func(rule route.Rule) bool { return !uplink.LeavesTable(rule) }) {
		return err
	}
	_, err = r.env.SyncRules(r.Uplink.Family(), func(rule route.Rule) bool { return slices.Contains(rules, rule) }, nil, r.Attrs)
	return err
}

// sync makes the rules of the uplink want, which are those for a lease of table; 0 is no lease.
func (r *Rules) sync(table uint32, want []route.Rule) error {
	if err := r.yield(table); err != nil {
		return err
	}
	dropped := slices.DeleteFunc(slices.Clone(r.extra), func(rule route.Rule) bool { return !uplink.IsShared(rule) || slices.Contains(want, rule) })
	if table == 0 {
		r.extra = nil // another client of the address may want the same rules
	}
	host := r.Uplink.Host()
	owned := func(rule route.Rule) bool { // that of the choice goes with the lease, and is else the chooser's
		return r.owns(host, rule) && (table == 0 || rule.Table != table || !uplink.IsChoice(rule))
	}
	deleted, err := r.env.SyncRules(r.Uplink.Family(), owned, want, r.Attrs)
	// A process that was killed within the end of a lease may have left what goes last.
	if err == nil && (len(dropped) > 0 || table == 0 ||
		slices.ContainsFunc(deleted, func(rule route.Rule) bool { return !uplink.IsHost(rule) && (rule.Src.IsValid() || rule.Dst.IsValid()) })) {
		err = r.sweep(table, dropped)
	}
	if err != nil {
		return fmt.Errorf("rules of %s: %w", r.Uplink, err)
	}
	r.NoteExtra(want)
	return nil
}

// NoteExtra notes which of the uplink's rules lead elsewhere than to the table.
func (r *Rules) NoteExtra(want []route.Rule) {
	r.extra = nil // a clone of want would keep the room of all
	for _, rule := range want {
		if uplink.LeavesTable(rule) {
			r.extra = append(r.extra, rule)
		}
	}
}

// withRoutes are the rules that the uplink has if routes are placed for it.
func (r *Rules) withRoutes() []route.Rule {
	u := r.Uplink
	u.Settings.Routes, u.NoNetwork = uplink.CopyRoutes, false
	return u.Rules(0)
}

// sweep deletes rules of prefixes and networks that lead elsewhere than to a table, once no uplink has the prefix or
// network, and those of dropped that only table has a rule for.
func (r *Rules) sweep(table uint32, dropped []route.Rule) error {
	marked, err := r.env.Kernel.RulesWhere(r.Uplink.Family(), func(rule *route.Rule) bool { return rule.Protocol == route.Protocol })
	if err != nil {
		return err
	}
	orphan := uplink.Orphans(marked)
	others := uplink.Orphans(slices.DeleteFunc(slices.Clone(marked), func(rule route.Rule) bool { return rule.Table == table }))
	_, err = r.env.SyncRules(r.Uplink.Family(), func(rule route.Rule) bool {
		return orphan(rule) || slices.Contains(dropped, rule) && others(rule)
	}, nil, r.Attrs)
	return err
}

// yield finds the tables, but for the leased one, that another address has rules for: that address may have got the
// lease while this process was stopped, and may have the same rules.
func (r *Rules) yield(leased uint32) error {
	if len(r.tables) == 0 || len(r.tables) == 1 && r.tables[leased] {
		return nil
	}
	host := r.Uplink.Host()
	theirs, err := r.env.Kernel.RulesWhere(r.Uplink.Family(), func(rule *route.Rule) bool {
		return rule.Table != leased && r.tables[rule.Table] && rule.Protocol == route.Protocol &&
			rule.Src.IsValid() && rule.Src.IsSingleIP() && rule.Src != host
	})
	for _, rule := range theirs {
		r.tables[rule.Table] = false
	}
	return err
}

// Unshare deletes what another client of the address left, once that is gone. As long as it was there, neither knew
// whether the other one needs a rule that leads elsewhere than to a table. table is that of the lease; 0 if there is none,
// as of the last client that ends.
func (r *Rules) Unshare(table uint32) error {
	if !r.shared {
		return nil
	}
	shared, err := r.env.OtherHolder(r.Uplink.Key)
	if err != nil || shared {
		return err
	}
	r.shared = false
	var want []route.Rule
	if table != 0 {
		want = r.Want(table)
	}
	return r.sync(table, want)
}

// SyncRules is Kernel.SyncRules, and logs each change, with the attributes that attrs gives for a rule.
func (e *Env) SyncRules(family int, owned func(route.Rule) bool, want []route.Rule, attrs func(route.Rule) []any) (deleted []route.Rule, err error) {
	added, deleted, err := e.Kernel.SyncRules(family, owned, want)
	if !e.Log.Enabled(context.Background(), slog.LevelDebug) {
		return deleted, err
	}
	for _, r := range added {
		e.Log.Debug("rule added", attrs(r)...)
	}
	for _, r := range deleted {
		e.Log.Debug("rule removed", attrs(r)...)
	}
	return deleted, err
}

// Attrs is what a log line says of a rule.
func (r *Rules) Attrs(rule route.Rule) []any {
	return []any{"rule", rule.String(), "ifname", r.Uplink.Key.Ifname, "addr", r.Uplink.Key.Address,
		"family", r.Uplink.Key.Family.String(), "table", rule.Table, "priority", rule.Priority}
}

// owns reports whether a rule of the kernel belongs to the uplink, of which host is the address.
func (r *Rules) owns(host netip.Prefix, rule route.Rule) bool {
	if uplink.IsForeign(rule) {
		return false // it is of a binding to another interface
	}
	if rule.Protocol == route.Protocol && uplink.LeavesTable(rule) {
		return rule.Src == host && (!r.shared || slices.Contains(r.extra, rule))
	}
	if rule.Protocol == route.Protocol {
		whole, known := r.tables[rule.Table]
		return whole || known && rule.Src == host
	}
	return r.originals[rule.Table] && r.Uplink.Original(rule, rule.Table)
}

// ReadGuards reads the guards of traffic that is bound to the interface.
func (r *Rules) ReadGuards() error {
	if r.Marking == (wire.Marking{}) {
		return nil
	}
	rules, err := r.env.Kernel.RulesWhere(r.Uplink.Family(), func(rule *route.Rule) bool { return uplink.IsGuard(*rule) })
	if err == nil {
		r.Guards = uplink.GuardsOf(r.Marking, rules)
	}
	return err
}

// Delegates reports whether packets from an address have a rule for the delegated prefix.
func (r *Rules) Delegates(addr netip.Addr) bool {
	if !r.NoPrefix {
		return r.Uplink.Settings.Prefix.Contains(addr)
	}
	return slices.ContainsFunc(r.Parts, func(part netip.Prefix) bool { return part.Contains(addr) })
}

// Want are all rules for a lease of table: those of the uplink, and the lookups for traffic that is bound to its interface.
func (r *Rules) Want(table uint32) []route.Rule { return r.wantWith(r.Guards, table) }

func (r *Rules) wantWith(guards []route.Rule, table uint32) []route.Rule {
	u := r.Uplink
	if r.NoPrefix {
		u.Settings.Prefix = netip.Prefix{}
	}
	if r.Delegated {
		u.Settings.OnLoss = uplink.Fallback
	}
	rules := u.Rules(table)
	for _, part := range r.Parts {
		rules = append(rules, u.FromPrefix(part, table)...)
	}
	return append(rules, r.Uplink.Lookups(r.Marking, guards, table)...)
}
