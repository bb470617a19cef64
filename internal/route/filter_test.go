package route

import (
	"errors"
	"os"
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
	heard := func() (events []Event) {
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
