package client

import (
	"fmt"
	"log/slog"
	"slices"

	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// ruleset is the rules of one uplink in the kernel.
type ruleset struct {
	uplink    uplink.Uplink
	kernel    *route.Conn
	log       *slog.Logger
	adopted   bool
	tables    map[uint32]bool // whose marked rules are this uplink's; false: only those from its address
	originals map[uint32]bool // whose unmarked three are
	shared    bool            // another link has the address, too
	besides   []route.Rule    // rules to elsewhere than the table, of the last sync
	marking   wire.Marking    // of the interface; zero: none that we know of
	guards    []route.Rule    // of what is bound to the interface, as of the last look
}

// adopt finds what earlier holders of the address left behind: marked rules of a client
// that died, and the original's.
func (r *ruleset) adopt() error {
	r.adopted = true
	host := r.uplink.Host()
	rules, err := r.kernel.RulesWhere(r.uplink.Family(), func(rule *route.Rule) bool { return rule.Src == host })
	if err != nil {
		return err
	}
	r.tables, r.originals = r.uplink.Leftovers(rules)
	if len(rules) == 0 {
		return nil
	}
	if r.shared, err = peer.OtherHolder(r.uplink.Key); err != nil {
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
func (r *ruleset) place(table uint32) error {
	if !r.uplink.IsAddress() {
		return nil
	}
	if !r.adopted {
		if err := r.adopt(); err != nil {
			return err
		}
	}
	if !r.uplink.Settings.PlacesRoutes() {
		if err := r.kernel.FlushTable(r.uplink.Family(), table); err != nil {
			return err
		}
	}
	r.tables[table] = true
	if err := r.readGuards(); err != nil {
		return err
	}
	if err := r.sync(table, r.want(table)); err != nil {
		return err
	}
	r.tables, r.originals = map[uint32]bool{table: true}, nil
	return nil
}

// clear removes all rules and routes of the uplink, but for a rule to keep that stops the
// address.
func (r *ruleset) clear(keep ...route.Rule) error {
	if !r.uplink.IsAddress() || !r.adopted {
		return nil
	}
	host := r.uplink.Host()
	besides, err := r.kernel.RulesWhere(r.uplink.Family(), func(rule *route.Rule) bool { return rule.Src == host && uplink.LeavesTable(*rule) })
	if err != nil {
		return err
	}
	if len(besides)+len(keep) > 0 { // whose they are, no table tells
		if r.shared, err = peer.OtherHolder(r.uplink.Key); err != nil {
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
		if err := r.kernel.FlushTable(r.uplink.Family(), table); err != nil {
			return err
		}
	}
	clear(r.tables) // they may be others' soon
	return nil
}

// sync makes the rules of the uplink those of the lease of table; 0 is none.
func (r *ruleset) sync(table uint32, want []route.Rule) error {
	if err := r.yield(table); err != nil {
		return err
	}
	if table == 0 {
		r.besides = nil // another holder of the address may want just the same
	}
	added, deleted, err := r.kernel.SyncRules(r.uplink.Family(), r.owns, want)
	for _, rule := range added {
		r.log.Info("rule added", r.attrs(rule)...)
	}
	for _, rule := range deleted {
		r.log.Info("rule removed", r.attrs(rule)...)
	}
	if err == nil && slices.ContainsFunc(deleted, func(rule route.Rule) bool { return rule.Src.IsValid() && !uplink.IsHost(rule) }) {
		err = r.sweep()
	}
	if err != nil {
		return fmt.Errorf("rules of %s: %w", r.uplink, err)
	}
	r.noteBesides(want)
	return nil
}

// noteBesides remembers which rules to elsewhere than the table are there for this uplink.
func (r *ruleset) noteBesides(want []route.Rule) {
	r.besides = slices.DeleteFunc(slices.Clone(want), func(rule route.Rule) bool { return !uplink.LeavesTable(rule) })
}

// sweep removes what stands beside the rules of prefixes that nobody has any more.
func (r *ruleset) sweep() error {
	marked, err := r.kernel.RulesWhere(r.uplink.Family(), func(rule *route.Rule) bool { return rule.Protocol == route.Protocol })
	if err != nil {
		return err
	}
	_, deleted, err := r.kernel.SyncRules(r.uplink.Family(), uplink.Orphans(marked), nil)
	for _, rule := range deleted {
		r.log.Info("rule removed", r.attrs(rule)...)
	}
	return err
}

// yield finds the tables, but for the leased one, that another address has rules for by
// now: it got the lease while this process was stopped, say, and one of its rules is just
// like one of ours.
func (r *ruleset) yield(leased uint32) error {
	if len(r.tables) == 0 || len(r.tables) == 1 && r.tables[leased] {
		return nil
	}
	host := r.uplink.Host()
	theirs, err := r.kernel.RulesWhere(r.uplink.Family(), func(rule *route.Rule) bool {
		return rule.Table != leased && r.tables[rule.Table] && rule.Protocol == route.Protocol &&
			rule.Src.IsValid() && rule.Src.IsSingleIP() && rule.Src != host
	})
	for _, rule := range theirs {
		r.tables[rule.Table] = false
	}
	return err
}

// unshare removes what another holder of the address left, which is gone: as long as it was there,
// neither knew of a rule beside those to a table whether the other one needs it.
func (r *ruleset) unshare(table uint32) error {
	if !r.shared {
		return nil
	}
	shared, err := peer.OtherHolder(r.uplink.Key)
	if err != nil || shared {
		return err
	}
	r.shared = false
	return r.sync(table, r.want(table))
}

func (r *ruleset) attrs(rule route.Rule) []any {
	return []any{"rule", rule.String(), "ifname", r.uplink.Key.Ifname, "addr", r.uplink.Key.Address,
		"family", r.uplink.Key.Family.String(), "table", rule.Table, "priority", rule.Priority}
}

func (r *ruleset) owns(rule route.Rule) bool {
	if rule.Protocol == route.Protocol && uplink.LeavesTable(rule) {
		return rule.Src == r.uplink.Host() && (!r.shared || slices.Contains(r.besides, rule))
	}
	if rule.Protocol == route.Protocol {
		whole, known := r.tables[rule.Table]
		return whole || known && rule.Src == r.uplink.Host()
	}
	return r.originals[rule.Table] && r.uplink.Original(rule, rule.Table)
}

// readGuards finds what is bound to the interface now.
func (r *ruleset) readGuards() error {
	if r.marking == (wire.Marking{}) {
		return nil
	}
	rules, err := r.kernel.RulesWhere(r.uplink.Family(), func(rule *route.Rule) bool { return uplink.IsGuard(*rule) })
	if err == nil {
		r.guards = uplink.GuardsOf(r.marking, rules)
	}
	return err
}

// want are all rules that a lease of table means: those of the uplink, and the lookups for
// what is bound to its interface.
func (r *ruleset) want(table uint32) []route.Rule { return r.wantWith(r.guards, table) }

func (r *ruleset) wantWith(guards []route.Rule, table uint32) []route.Rule {
	rules := r.uplink.Strict(guards).Rules(table)
	for _, guard := range guards {
		rules = append(rules, uplink.LookupOf(guard, table))
	}
	return rules
}
