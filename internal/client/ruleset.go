package client

import (
	"fmt"
	"log/slog"

	"github.com/table-allocator/table-allocator/internal/route"
)

// ruleset is the rules of one uplink in the kernel.
type ruleset struct {
	uplink    Uplink
	kernel    *route.Conn
	log       *slog.Logger
	adopted   bool
	tables    map[uint32]bool // whose marked rules are this uplink's
	originals map[uint32]bool // whose unmarked three are
}

// adopt finds what earlier holders of the address left behind: marked rules of a client
// that died, and the original's.
func (r *ruleset) adopt() error {
	r.adopted = true
	rules, err := r.kernel.Rules(r.uplink.family())
	if err != nil {
		return err
	}
	r.tables, r.originals = r.uplink.leftovers(rules)
	if len(r.tables) == 0 {
		return nil
	}
	other, err := otherHolder(r.uplink.Key)
	if err != nil {
		return err
	}
	if other {
		clear(r.tables) // the same address on two links: those rules are in use
	}
	return nil
}

// place makes the rules those of table, empties the table of routes that somebody
// before us left there, and removes what was adopted or placed before.
func (r *ruleset) place(table uint32) error {
	if !r.uplink.wantsRules() {
		return nil
	}
	if !r.adopted {
		if err := r.adopt(); err != nil {
			return err
		}
	}
	if err := r.kernel.FlushTable(r.uplink.family(), table); err != nil {
		return err
	}
	r.tables[table] = true
	if err := r.sync(r.uplink.rules(table)); err != nil {
		return err
	}
	r.tables, r.originals = map[uint32]bool{table: true}, nil
	return nil
}

// clear removes all rules and routes of the uplink.
func (r *ruleset) clear() error {
	if !r.uplink.wantsRules() || len(r.tables)+len(r.originals) == 0 {
		return nil
	}
	if err := r.sync(nil); err != nil {
		return err
	}
	for table := range r.tables {
		if err := r.kernel.FlushTable(r.uplink.family(), table); err != nil {
			return err
		}
	}
	return nil
}

func (r *ruleset) sync(want []route.Rule) error {
	added, deleted, err := r.kernel.SyncRules(r.uplink.family(), r.owns, want)
	for _, rule := range added {
		r.log.Info("rule added", r.attrs(rule)...)
	}
	for _, rule := range deleted {
		r.log.Info("rule removed", r.attrs(rule)...)
	}
	if err != nil {
		return fmt.Errorf("rules of %s: %w", r.uplink, err)
	}
	return nil
}

func (r *ruleset) attrs(rule route.Rule) []any {
	return []any{"rule", rule.String(), "ifname", r.uplink.Key.Ifname, "addr", r.uplink.Key.Address,
		"family", r.uplink.Key.Family.String(), "table", rule.Table, "priority", rule.Priority}
}

func (r *ruleset) owns(rule route.Rule) bool {
	if rule.Protocol == route.Protocol {
		return r.tables[rule.Table]
	}
	return r.originals[rule.Table] && r.uplink.original(rule, rule.Table)
}
