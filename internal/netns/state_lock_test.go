package netns

import "testing"

// TestLockInTurn: a service that locks again as soon as it has unlocked does not keep a command out.
func TestLockInTurn(t *testing.T) {
	var m memory
	asked, done := make(chan struct{}), make(chan error)
	first, err := m.lock()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		close(asked)
		unlock, err := m.lock()
		if err == nil {
			unlock()
		}
		done <- err
	}()
	<-asked
	for unlock := first; ; {
		unlock()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
			return
		default:
		}
		if unlock, err = m.lock(); err != nil {
			t.Fatal(err)
		}
	}
}
