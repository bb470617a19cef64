package inspect

import (
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/events"
)

// TestSinceOfFamilies: VPNs add a rule of one text for both families.
func TestSinceOfFamilies(t *testing.T) {
	const rule = `"61: from all lookup 200"`
	event := func(second int64, what events.What, family, text string) events.Event {
		return events.Event{Time: time.Unix(second, 0), What: what, Family: family, Text: rule + " " + text}
	}
	rows := []Row{}
	for _, family := range []string{"inet", "inet6"} {
		r := Row{Family: family, State: "shadowed-part", Findings: []Finding{{Severity: Error, Evidence: rule + " " + beforeAddress}}}
		rows = append(rows, r)
	}
	noteSince(rows, &Server{}, []events.Event{
		event(1000, events.RuleCame, "inet", events.CameFront),
		event(1001, events.RuleCame, "inet6", events.CameFront),
		event(1002, events.RuleWent, "inet6", events.WentFront),
		event(1003, events.RuleCame, "inet6", events.CameFront),
	})
	if rows[0].Since != 1000 || rows[1].Since != 1003 {
		t.Errorf("since %d and %d, want 1000 and 1003", rows[0].Since, rows[1].Since)
	}
}
