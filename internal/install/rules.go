package install

import (
	"fmt"
	"slices"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Rules are the rules of one uplink in the kernel.
type Rules struct {
	Uplink  uplink.Uplink
	Marking wire.Marking // of the interface; zero: none that we know of
	Guards  []route.Rule // of what is bound to the interface, as of the last look

	env       *Env
	adopted   bool
	tables    map[uint32]bool // whose marked rules are this uplink's; false: only those from its address
	originals map[uint32]bool // whose unmarked three are
	shared    bool            // another link has the address, too
	extra     []route.Rule    // rules that leave the table, of the last sync
}

// adopt finds what earlier holders of the address left behind: marked rules of a client
// that died, and the original's.
func (r *Rules) adopt() error {
	if r.adopted {
		return nil
	}
	r.adopted = true
	host := r.Uplink.Host()
	rules, err := r.env.Kernel.RulesWhere(r.Uplink.Family(), func(rule *route.Rule) bool { return rule.Src == host })
	if err != nil {
		return err
	}
	r.tables, r.originals = r.Uplink.Leftovers(rules)
	if len(rules) == 0 {
		return nil
	}
	if r.shared, err = r.env.OtherHolder(r.Uplink.Key); err != nil {
		return err
	}
	if r.shared { // those rules are in use
		clear(r.tables)
		clear(r.originals)
	}
	return nil
}

// place makes the rules those of table, and removes what was adopted or placed before. If
// nobody of us places routes, it empties the table of those that somebody left there.
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
	r.tables, r.originals = map[uint32]bool{table: true}, nil
	return nil
}

// clear removes all rules and routes of the uplink, but for a rule to keep that stops the
// address.
func (r *Rules) clear(keep ...route.Rule) error {
	if !r.Uplink.IsAddress() || !r.adopted {
		return nil
	}
	host := r.Uplink.Host()
	leaving, err := r.env.Kernel.RulesWhere(r.Uplink.Family(), func(rule *route.Rule) bool { return rule.Src == host && uplink.LeavesTable(*rule) })
	if err != nil {
		return err
	}
	if len(leaving)+len(keep) > 0 { // whose they are, no table tells
		if r.shared, err = r.env.OtherHolder(r.Uplink.Key); err != nil {
			return err
		}
	}
	if r.shared {
		keep = nil // the other holder knows what may leave
	}
	if err := r.sync(0, keep); err != nil {
		return err
	}
	for table, whole := range r.tables {
		if !whole {
			continue
		}
		if err := r.env.Kernel.FlushTable(r.Uplink.Family(), table); err != nil {
			return err
		}
	}
	clear(r.tables) // they may be others' soon
	return nil
}

// sync makes the rules of the uplink those of the lease of table; 0 is none.
func (r *Rules) sync(table uint32, want []route.Rule) error {
	if err := r.yield(table); err != nil {
		return err
	}
	if table == 0 {
		r.extra = nil // another holder of the address may want just the same
	}
	deleted, err := r.env.SyncRules(r.Uplink.Family(), r.Owns, want, r.Attrs)
	if err == nil && slices.ContainsFunc(deleted, func(rule route.Rule) bool { return rule.Src.IsValid() && !uplink.IsHost(rule) }) {
		err = r.sweep()
	}
	if err != nil {
		return fmt.Errorf("rules of %s: %w", r.Uplink, err)
	}
	r.NoteExtra(want)
	return nil
}

// NoteExtra remembers which rules to elsewhere than the table are there for this uplink.
func (r *Rules) NoteExtra(want []route.Rule) {
	r.extra = slices.DeleteFunc(slices.Clone(want), func(rule route.Rule) bool { return !uplink.LeavesTable(rule) })
}

// sweep removes what stands beside the rules of prefixes that nobody has any more.
func (r *Rules) sweep() error {
	marked, err := r.env.Kernel.RulesWhere(r.Uplink.Family(), func(rule *route.Rule) bool { return rule.Protocol == route.Protocol })
	if err != nil {
		return err
	}
	_, err = r.env.SyncRules(r.Uplink.Family(), uplink.Orphans(marked), nil, r.Attrs)
	return err
}

// yield finds the tables, but for the leased one, that another address has rules for by
// now: it got the lease while this process was stopped, say, and one of its rules is just
// like one of ours.
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

// Unshare removes what another holder of the address left, which is gone: as long as it was there,
// neither knew of a rule beside those to a table whether the other one needs it.
func (r *Rules) Unshare(table uint32) error {
	if !r.shared {
		return nil
	}
	shared, err := r.env.OtherHolder(r.Uplink.Key)
	if err != nil || shared {
		return err
	}
	r.shared = false
	return r.sync(table, r.Want(table))
}

// SyncRules is Kernel.SyncRules, and logs what changes with what attrs says of a rule.
func (e *Env) SyncRules(family int, owned func(route.Rule) bool, want []route.Rule, attrs func(route.Rule) []any) (deleted []route.Rule, err error) {
	added, deleted, err := e.Kernel.SyncRules(family, owned, want)
	for _, r := range added {
		e.Log.Info("rule added", attrs(r)...)
	}
	for _, r := range deleted {
		e.Log.Info("rule removed", attrs(r)...)
	}
	return deleted, err
}

// Attrs is what a log line says of a rule.
func (r *Rules) Attrs(rule route.Rule) []any {
	return []any{"rule", rule.String(), "ifname", r.Uplink.Key.Ifname, "addr", r.Uplink.Key.Address,
		"family", r.Uplink.Key.Family.String(), "table", rule.Table, "priority", rule.Priority}
}

// Owns reports whether a rule that is there belongs to the uplink.
func (r *Rules) Owns(rule route.Rule) bool {
	if rule.Protocol == route.Protocol && uplink.LeavesTable(rule) {
		return rule.Src == r.Uplink.Host() && (!r.shared || slices.Contains(r.extra, rule))
	}
	if rule.Protocol == route.Protocol {
		whole, known := r.tables[rule.Table]
		return whole || known && rule.Src == r.Uplink.Host()
	}
	return r.originals[rule.Table] && r.Uplink.Original(rule, rule.Table)
}

// ReadGuards finds what is bound to the interface now.
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

// Want are all rules that a lease of table means: those of the uplink, and the lookups for
// what is bound to its interface.
func (r *Rules) Want(table uint32) []route.Rule { return r.wantWith(r.Guards, table) }

func (r *Rules) wantWith(guards []route.Rule, table uint32) []route.Rule {
	rules := r.Uplink.Strict(guards).Rules(table)
	for _, guard := range guards {
		rules = append(rules, uplink.LookupOf(guard, table))
	}
	return rules
}
