package client

import (
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/table-allocator/table-allocator/internal/events"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// A front is the rules of other programs that come before those of addresses and are for some packets only, by
// family. Where packets leave that have no such mark or port does not tell of them.
type front struct {
	rules   map[int]frontRules
	changed map[int]bool  // families whose rules have changed
	limit   *rate.Limiter // of events: a program may change its rules all the time
}

// frontRules are these rules of a family, up to a priority.
type frontRules struct {
	upTo  uint32 // the source rule of addresses in service that stands last
	rules []route.Rule
}

func newFront() front {
	const every, burst = time.Minute, 20
	return front{make(map[int]frontRules), make(map[int]bool), rate.NewLimiter(rate.Every(every), burst)}
}

// tellFront notes which of these rules of a family came or went since it was called last.
func (l *loop) tellFront(family int) {
	now := frontRules{upTo: l.lastSource(family)}
	var err error
	now.rules, err = l.kernel.RulesWhere(family, func(r *route.Rule) bool {
		return r.Priority <= now.upTo && r.Protocol != route.Protocol && r.Protocol != unix.RTPROT_KERNEL && (r.SelectsSockets() || r.Oif != "" || r.Other != "")
	})
	if err != nil {
		return // the next change is compared with what is known
	}
	known, has := l.front.rules[family]
	l.front.rules[family] = now
	if !has {
		return // nobody knows since when they are there
	}
	both := min(known.upTo, now.upTo) // a rule behind it was not looked for before, or is not now
	tell := func(rules, others []route.Rule, what events.What, text string) {
		for _, r := range rules {
			if r.Priority <= both && !slices.Contains(others, r) && l.front.limit.Allow() {
				l.events.Append(events.Event{What: what, Family: wire.Family(family).String(), Text: fmt.Sprintf("%q %s", r, text)})
			}
		}
	}
	tell(known.rules, now.rules, events.RuleWent, events.WentFront)
	tell(now.rules, known.rules, events.RuleCame, events.CameFront)
}

// lastSource is the priority of the last source rule of addresses in service.
func (l *loop) lastSource(family int) (last uint32) {
	for _, s := range l.sessions {
		if s.family() == family && s.serves() {
			last = max(last, s.lease.uplink.Priorities.Source)
		}
	}
	return last
}

// noteFronts notes which families' rules may have changed. Those whose rules nobody has read have nothing to compare.
func (l *loop) noteFronts(n news) {
	for family := range l.front.rules {
		if !n.overrun && !n.others[family] {
			continue
		}
		l.front.changed[family] = true
		if l.exitsAt == 0 {
			l.exitsAt = wire.Now() + tellIn
		}
	}
}

// tellFronts is tellFront for the families whose rules have changed.
func (l *loop) tellFronts() {
	for family := range l.front.changed {
		delete(l.front.changed, family)
		l.tellFront(family)
	}
}
