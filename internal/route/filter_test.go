package route

import (
	"errors"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestOnlyDeletedRules: the watcher hears of the end of rules that lead to one table, and of everything that is no rule.
func TestOnlyDeletedRules(t *testing.T) {
	t.Parallel()
	n, _ := dial(t)
	var w *Watcher
	var err error
	n.Do(func() { w, err = Watch(Links | Rules4 | Rules6) })
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if err := w.OnlyDeletedRules(100000); err != nil {
		t.Fatal(err)
	}
	heard := func() []Event { return heardBy(t, w) }
	for _, family := range []string{"-4", "-6"} {
		n.IP(t, family+" rule add priority 100 lookup 100000 protocol 116")
		n.IP(t, family+" rule add priority 101 lookup 100001 protocol 116")
		n.IP(t, family+" rule add priority 102 unreachable protocol 116")
	}
	if events := heard(); len(events) > 0 {
		t.Errorf("of rules that were added: %+v", events)
	}
	for _, family := range []string{"-4", "-6"} {
		for _, priority := range []string{"100", "101", "102"} {
			n.IP(t, family+" rule del priority "+priority)
		}
	}
	events := heard()
	if len(events) != 2 {
		t.Fatalf("of rules that were deleted: %+v", events)
	}
	for i, family := range []int{unix.AF_INET, unix.AF_INET6} {
		if e := events[i]; e.Kind != RuleChanged || e.Family != family || !e.Deleted || e.Table != 100000 || e.Protocol != Protocol {
			t.Errorf("got %+v", e)
		}
	}
	n.IP(t, "link set lo down")
	if events := heard(); len(events) == 0 {
		t.Error("nothing of a link")
	}
	if err := w.AllRules(); err != nil {
		t.Fatal(err)
	}
	n.IP(t, "rule add priority 101 lookup 100001 protocol 116")
	if events := heard(); len(events) != 1 {
		t.Errorf("without the filter: %+v", events)
	}
}

// heardBy returns what a watcher hears until all is quiet.
func heardBy(t *testing.T, w *Watcher) (events []Event) {
	t.Helper()
	if err := w.SetDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	for {
		some, err := w.Next()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return events
		}
		if err != nil {
			t.Fatal(err)
		}
		events = append(events, some...)
	}
}

// TestOwnRoutesUnheard: whoever fills tables hears of routes of others, of the end of any, and of main, but not of each
// route that it adds, whichever rules it hears of.
func TestOwnRoutesUnheard(t *testing.T) {
	t.Parallel()
	n, _ := dial(t)
	n.IP(t, "link set lo up")
	var w *Watcher
	var err error
	n.Do(func() { w, err = Watch(Routes4 | Routes6) })
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	for name, filter := range map[string]func() error{"all rules": w.AllRules, "rules of one table": func() error { return w.OnlyDeletedRules(100000) }} {
		if err := filter(); err != nil {
			t.Fatal(err)
		}
		var want []Event
		for _, test := range []struct {
			route string
			event Event
		}{
			{"add unreachable default table 100000 protocol 116 metric 5", Event{}},
			{"add unreachable default table 100 protocol 116 metric 5", Event{}},
			{"add unreachable default table 100000 protocol 115 metric 6", Event{Table: 100000, Protocol: 115}},
			{"add unreachable default protocol 116 metric 7", Event{Table: unix.RT_TABLE_MAIN, Protocol: 116}},
			{"del unreachable default table 100000 protocol 116 metric 5", Event{Table: 100000, Protocol: 116, Deleted: true}},
			{"del unreachable default table 100 protocol 116 metric 5", Event{Table: 100, Protocol: 116, Deleted: true}},
			{"del unreachable default table 100000 protocol 115 metric 6", Event{Table: 100000, Protocol: 115, Deleted: true}},
			{"del unreachable default protocol 116 metric 7", Event{Table: unix.RT_TABLE_MAIN, Protocol: 116, Deleted: true}},
		} {
			for version, family := range map[string]int{"-4 ": unix.AF_INET, "-6 ": unix.AF_INET6} {
				n.IP(t, version+"route "+test.route)
				if e := test.event; e.Table != 0 {
					e.Kind, e.Family = RouteChanged, family
					want = append(want, e)
				}
			}
		}
		events := heardBy(t, w)
		for i := range events {
			events[i] = events[i].bare()
			events[i].Index = 0
		}
		if !slices.Equal(events, want) {
			t.Errorf("%s: heard %+v\nwant %+v", name, events, want)
		}
	}
}
