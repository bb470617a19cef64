// Package outside asks what may never answer: file systems, and the name services of the host. It hides that such a
// question cannot be taken back once the kernel or a library has it. It imports nothing of this module.
package outside

import (
	"errors"
	"fmt"
	"sync"
	"time"
)

// ErrSilent says that what was asked has not answered within its limit.
var ErrSilent = errors.New("no answer")

// Limit is for questions of a loop: shorter than the second that the shortest lease leaves for a renewal.
const Limit = 700 * time.Millisecond

var (
	mu     sync.Mutex
	silent = make(map[string]int) // by thing: questions that were given up and have not returned
)

// Ask calls f, which asks a thing such as a directory, and returns what f returns. If f takes longer than limit, Ask
// returns ErrSilent and f goes on: it shares nothing that changes with the caller. Until f has returned, every Ask for
// the same thing returns ErrSilent at once, so that a thing costs one thread and one limit, however often it is asked.
func Ask[T any](thing string, limit time.Duration, f func() (T, error)) (value T, err error) {
	type answer struct {
		value T
		err   error
	}
	refusal := fmt.Errorf("%s: %w within %v", thing, ErrSilent, limit)
	mu.Lock()
	stuck := silent[thing] > 0
	mu.Unlock()
	if stuck {
		return value, refusal
	}
	answered := make(chan answer, 1)
	gaveUp := false // mu guards it
	go func() {
		value, err := f()
		mu.Lock()
		defer mu.Unlock()
		answered <- answer{value, err}
		if gaveUp {
			if silent[thing]--; silent[thing] == 0 {
				delete(silent, thing)
			}
		}
	}()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case a := <-answered:
		return a.value, a.err
	case <-timer.C:
	}
	mu.Lock()
	defer mu.Unlock()
	select {
	case a := <-answered: // just now
		return a.value, a.err
	default:
		gaveUp = true
		silent[thing]++
		return value, refusal
	}
}
