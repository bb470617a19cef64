package inspect

import (
	"errors"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/outside"
)

// TestCheckLimit: a check that gets no answer ends for whoever asks, and says that it could not look.
func TestCheckLimit(t *testing.T) {
	answer := make(chan struct{})
	stuck := Check{Name: "stuck", Severity: Error, look: func(*patient) []symptom { <-answer; return nil }}
	if found, unseen := stuck.within(time.Millisecond, &patient{}); found != nil || !errors.Is(unseen, outside.ErrSilent) {
		t.Errorf("%v, %v", found, unseen)
	}
	close(answer)
	fails := Check{Name: "fails", look: func(p *patient) []symptom { p.unseen = errors.New("permission denied"); return nil }}
	if found, unseen := fails.within(time.Hour, &patient{}); found != nil || unseen == nil || unseen.Error() != "permission denied" {
		t.Errorf("%v, %v", found, unseen)
	}
	finds := Check{Name: "finds", look: func(*patient) []symptom { return []symptom{{what: "a fault"}} }}
	if found, unseen := finds.within(time.Hour, &patient{unseen: errors.New("of the check before")}); len(found) != 1 || unseen != nil {
		t.Errorf("%v, %v", found, unseen)
	}
	sends := finds
	sends.Sends = true
	if found, unseen := sends.within(0, &patient{}); len(found) != 1 || unseen != nil {
		t.Errorf("a check that waits for other hosts: %v, %v", found, unseen)
	}
}
