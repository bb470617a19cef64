package route

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// SyncRules makes the rules of family that are owned equal to want and returns what it added and
// deleted, also with an error. Additions go first, in the order of want, behind equal priorities.
// It is safe to repeat and changes nothing where nothing differs. Of what is deleted the rules from one
// address go last: they say whose the others are to who comes after a process that was killed meanwhile.
//
// A delete takes the first rule that it matches, and it matches partially. Where that would be
// another rule than the one meant, that one is put back at once; it then stands behind the rules
// of its priority.
func (c *Conn) SyncRules(family int, owned func(Rule) bool, want []Rule) (added, deleted []Rule, err error) {
	spot := func(r *Rule) uint64 { return uint64(r.Priority)<<32 | uint64(r.Table) }
	near := make(map[uint64]bool, len(want)) // cheaper to ask than wanted
	wanted := make(map[Rule]bool, len(want))
	for _, r := range want {
		if err := r.check(family); err != nil {
			return nil, nil, fmt.Errorf("add rule %q: %w", r, err)
		}
		wanted[r], near[spot(&r)] = true, true
	}
	// An answer does not say that all is as it was meant: other programs change rules too, and to
	// the kernel a rule exists already if one does with a TOS, realms, an inversion or a selector
	// more than it. Only a look tells.
	var last Rule
	for range syncRounds {
		have, err := c.dumpRules(family, nil)
		if err != nil {
			return added, deleted, err
		}
		present := make(map[Rule]bool, len(want))
		var stale []Rule
		for i := range have {
			r := &have[i].Rule
			if near[spot(r)] && wanted[*r] {
				present[*r] = true
			} else if owned(*r) {
				stale = append(stale, *r)
			}
		}
		settled := len(stale) == 0
		if !settled {
			last = stale[0]
		}
		var missing []Rule
		for _, r := range want {
			if !present[r] {
				present[r], settled, last = true, false, r
				missing = append(missing, r)
			}
		}
		more, err := c.addRules(family, missing)
		added = append(added, more...)
		if err != nil {
			return added, deleted, err
		}
		if settled {
			return added, deleted, nil
		}
		if len(stale) > 0 {
			have = slices.Clone(have) // deleteRule changes it
			slices.SortStableFunc(stale, func(a, b Rule) int { return cmp.Compare(a.ofAddress(), b.ofAddress()) })
		}
		for _, r := range stale {
			var gone bool
			if have, gone, err = c.deleteRule(have, r); err != nil {
				return added, deleted, err
			}
			if gone {
				deleted = append(deleted, r)
			}
		}
	}
	return added, deleted, fmt.Errorf("sync rule %q: %w", last, errUnsettled)
}

// ofAddress is 1 for a rule from one address, and else 0.
func (r Rule) ofAddress() int {
	if r.Src.IsValid() && r.Src.IsSingleIP() {
		return 1
	}
	return 0
}

// addRules returns those that it added, also with an error. That a rule is there already is none.
func (c *Conn) addRules(family int, rules []Rule) (added []Rule, err error) {
	const flags = unix.NLM_F_CREATE | unix.NLM_F_EXCL
	messages := make([]change, 0, len(rules))
	for _, r := range rules {
		messages = append(messages, change{unix.RTM_NEWRULE, flags, r.encode(family)})
	}
	for i, ok := range c.changeTogether(messages) {
		if !ok {
			switch err := c.change(unix.RTM_NEWRULE, flags, messages[i].body); {
			case errors.Is(err, unix.EEXIST):
				continue
			case err != nil:
				return added, fmt.Errorf("add rule %q: %w", rules[i], err)
			}
		}
		added = append(added, rules[i])
	}
	return added, nil
}

// deleteRule deletes r, a rule of have, which is in the kernel's order. It returns what have then
// is, and whether there still was an r.
func (c *Conn) deleteRule(have []kernelRule, r Rule) (_ []kernelRule, gone bool, err error) {
	at := slices.IndexFunc(have, func(k kernelRule) bool { return k.Rule == r })
	target := have[at]
	have = slices.Delete(have, at, at+1)
	for i := 0; i < at; {
		twin := have[i]
		if !target.hits(twin.Rule) {
			i++
			continue
		}
		if _, err := c.deleteFirst(target); err != nil {
			return have, false, err
		}
		err := c.change(unix.RTM_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, twin.raw)
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return have, false, fmt.Errorf("put back rule %q: %w", twin.Rule, err)
		}
		have = append(slices.Delete(have, i, i+1), twin)
		at--
	}
	gone, err = c.deleteFirst(target)
	return have, gone, err
}

// deleteFirst deletes the first rule that r hits and reports whether there was one. It must not
// carry NLM_F_EXCL: from Linux 5.19 on that bit means NLM_F_BULK and is refused.
func (c *Conn) deleteFirst(r kernelRule) (bool, error) {
	err := c.change(unix.RTM_DELRULE, 0, r.raw)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("delete rule %q: %w", r.Rule, err)
	}
	return true, nil
}
