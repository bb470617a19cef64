package outside

import (
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestAsk: a thing that does not answer costs one limit, until it answers again, and other things none.
func TestAsk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		var calls atomic.Int32
		stuck := func() (string, error) {
			calls.Add(1)
			<-release
			return "late", nil
		}
		begin := time.Now()
		for range 3 {
			if got, err := Ask("/hangs", Limit, stuck); got != "" || !errors.Is(err, ErrSilent) {
				t.Errorf("a thing that hangs: got %q, %v", got, err)
			}
		}
		if took := time.Since(begin); took != Limit || calls.Load() != 1 {
			t.Errorf("three questions took %v and %d calls", took, calls.Load())
		}
		failure := errors.New("its own")
		if got, err := Ask("/answers", Limit, func() (string, error) { return "at once", failure }); got != "at once" || !errors.Is(err, failure) {
			t.Errorf("another thing: got %q, %v", got, err)
		}
		close(release)
		synctest.Wait()
		if got, err := Ask("/hangs", Limit, stuck); got != "late" || err != nil {
			t.Errorf("after it answered: got %q, %v", got, err)
		}
		if len(silent) != 0 {
			t.Errorf("still given up: %v", silent)
		}
	})
}

// TestAskTwice: a thing answers again when all that was given up has returned.
func TestAskTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := make(chan struct{}), make(chan struct{})
		for _, release := range []chan struct{}{first, second} {
			go func() {
				if _, err := Ask("/hangs", time.Second, func() (int, error) { <-release; return 0, nil }); !errors.Is(err, ErrSilent) {
					t.Errorf("got %v", err)
				}
			}()
		}
		time.Sleep(2 * time.Second)
		at := func() error {
			_, err := Ask("/hangs", time.Second, func() (int, error) { return 0, nil })
			return err
		}
		close(first)
		synctest.Wait()
		if err := at(); !errors.Is(err, ErrSilent) {
			t.Errorf("one of two has returned: got %v", err)
		}
		close(second)
		synctest.Wait()
		if err := at(); err != nil {
			t.Errorf("both have returned: got %v", err)
		}
	})
}
