// Package outside asks what may never answer: file systems, and the name services of the host. It hides that such a
// question cannot be taken back once the kernel or a library has it. It imports nothing of this module.
package outside

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
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
	const ticks = 10 // of which a process that was stopped, or got no processor, misses one and not all
	timer := time.NewTicker(limit / ticks)
	defer timer.Stop()
	for range ticks {
		select {
		case a := <-answered:
			return a.value, a.err
		case <-timer.C:
		}
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

// ReadFile is os.ReadFile, within Limit. A process may keep what /proc shows of it from being read: by the lock of its memory,
// or by the file system that its program is on.
func ReadFile(path string) ([]byte, error) { return about(path, os.ReadFile) }

// Stat is os.Stat, as ReadFile is os.ReadFile.
func Stat(path string) (os.FileInfo, error) { return about(path, os.Stat) }

// Readlink is os.Readlink, as ReadFile is os.ReadFile.
func Readlink(path string) (string, error) { return about(path, os.Readlink) }

func about[T any](path string, f func(path string) (T, error)) (value T, err error) {
	if strings.HasPrefix(path, Proc+"/") { // of which there are many files: one limit for all
		if err := Listens(Proc); err != nil {
			return value, err
		}
	}
	return Ask(path, Limit, func() (T, error) {
		Reach(filepath.Dir(path))
		return f(path)
	})
}

// Proc is where the kernel shows processes.
const Proc = "/proc"

// Listens returns ErrSilent if a directory, or one above it, does not answer within Limit.
func Listens(dir string) error {
	_, err := Ask(dir, Limit, func() (struct{}, error) {
		Reach(dir)
		return struct{}{}, nil
	})
	return err
}

// Reach looks at a directory and at those above it, from the root on, and returns when all of them have answered. A process
// that waits for a name in a silent directory while another process looks for that name cannot be ended, by no signal. One
// that waits for the directory itself can be: so whoever reads below a directory that may be silent calls Reach before, within Ask.
func Reach(dir string) {
	var above []string
	for at := filepath.Clean(dir); ; at = filepath.Dir(at) {
		above = append(above, at)
		if at == filepath.Dir(at) {
			break
		}
	}
	for _, at := range slices.Backward(above) {
		if _, err := os.Stat(at); err != nil {
			return // which the caller finds out, too
		}
	}
}
