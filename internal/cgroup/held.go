package cgroup

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Held is what holds a process on a link.
type Held struct {
	PID    int
	Name   string
	Uplink        // the zero one: nothing does, or a unit with BPFProgram= does
	Cgroup string // that the process is in
	Why    string // why nothing holds it, or not all; empty: all is held
}

// Check returns what holds processes and all that descend from them.
func (c *Cgroups) Check(pids []int) ([]Held, error) {
	bound, err := c.Bound()
	if err != nil {
		return nil, err
	}
	var all []Held
	var failed error
	if err := Tree(pids, func(pid int) {
		h, err := c.held(pid, bound)
		switch {
		case err == nil:
			all = append(all, h)
		case !errors.Is(err, unix.ESRCH) || slices.Contains(pids, pid): // a descendant may end at any time
			failed = errors.Join(failed, err)
		}
	}); err != nil {
		return nil, err
	}
	return all, failed
}

func (c *Cgroups) held(pid int, bound []Bound) (h Held, err error) {
	h.PID = pid
	if h.Cgroup, err = c.of(pid); err != nil {
		return h, err
	}
	name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)) // without it the pid has to do
	h.Name = strings.TrimSuffix(string(name), "\n")
	at := slices.IndexFunc(bound, func(b Bound) bool { return slices.Contains(b.PIDs, pid) })
	if at < 0 {
		h.Why = "not bound: cgroup " + h.Cgroup + " is none of ours"
		return h, nil
	}
	h.Uplink = bound[at].Uplink
	if missing := bound[at].Unlocked; missing != "" {
		h.Why = "misses " + missing
	}
	var own, theirs unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &own); err != nil {
		return h, fmt.Errorf("own network namespace: %w", err)
	}
	if statNamespace(pid, &theirs) == nil && own.Ino != theirs.Ino {
		h.Why = "in another network namespace, from which with block nothing leaves, and with fallback everything"
	}
	return h, nil
}
