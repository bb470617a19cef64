package e2e

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// openFiles are what a process has open, by kind.
func openFiles(pid int) ([]string, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	fds, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var kinds []string
	for _, fd := range fds {
		if target, err := os.Readlink(dir + "/" + fd.Name()); err == nil {
			kind, _, _ := strings.Cut(target, ":[")
			kinds = append(kinds, kind)
		}
	}
	slices.Sort(kinds)
	return kinds, nil
}

// holder is the process that holds the lease of an address.
func (h *host) holder(addr string) int {
	h.t.Helper()
	for _, pid := range h.pids(clientBin) {
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err == nil && slices.Contains(strings.Split(string(line), "\x00"), addr) {
			return pid
		}
	}
	h.t.Fatalf("no client has %s", addr)
	return 0
}

// memory is what a process has of its own, in KiB.
func memory(pid int) (kib int, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(text), "RssAnon:")
	_, err = fmt.Sscan(rest, &kib)
	return kib, err
}

// possessions are what a process may gather over time.
type possessions struct {
	files  []string
	memory int // KiB
}

func (h *host) possessions(pid int) (p possessions) {
	h.t.Helper()
	var err error
	if p.files, err = openFiles(pid); err == nil {
		p.memory, err = memory(pid)
	}
	if err != nil {
		h.t.Fatalf("process %d: %v", pid, err)
	}
	return p
}

// wantNoMore fails unless a process has open what it had, and not much more memory. The
// garbage collector gives back late, and the race detector's shadow grows with what is
// touched: a leak of one KiB in each of a thousand flaps is what it sees.
func (h *host) wantNoMore(what string, pid int, before possessions) {
	h.t.Helper()
	var after possessions
	eventually(h.t, what+" has open what it had in the beginning", func() error {
		after = h.possessions(pid)
		if !slices.Equal(after.files, before.files) {
			return fmt.Errorf("got\n%q, want\n%q", after.files, before.files)
		}
		return nil
	})
	h.t.Logf("%s: %d descriptors, memory %d KiB, then %d", what, len(after.files), before.memory, after.memory)
	if most := before.memory*3/2 + 6<<10; after.memory > most {
		h.t.Errorf("%s has %d KiB of memory, and had %d in the beginning", what, after.memory, before.memory)
	}
}

// goroutines ends a process by having it say what its goroutines are, by who made them.
func goroutines(p *process) map[string]int {
	p.t.Helper()
	_ = p.cmd.Process.Signal(syscall.SIGQUIT) // the log tells
	p.wait()
	found := make(map[string]int)
	for _, trace := range strings.Split(p.log.String(), "\ngoroutine ")[1:] {
		if strings.HasPrefix(trace, "0 ") { // a thread's own stack, of the one that heard the signal
			continue
		}
		maker := "main"
		if m := regexp.MustCompile(`\ncreated by (\S+)`).FindStringSubmatch(trace); m != nil {
			maker = m[1]
		}
		if !strings.HasPrefix(maker, "runtime.") && !strings.HasPrefix(maker, "os/signal.") {
			found[maker]++
		}
	}
	if found["main"] == 0 {
		p.t.Errorf("no goroutines in what it wrote:\n%s", p.log.String())
	}
	return found
}

// TestSoakPair: addresses come and go, the server is stopped and killed, links are made
// and removed with clients on them; after each step the rules are right, and in the end
// nothing is left.
func TestSoakPair(t *testing.T) {
	h := newHost(t)
	flaps, restarts, links := 60, 8, 12
	if os.Getenv("SOAK") == "full" {
		flaps, restarts, links = 10_000, 100, 200
	}

	// Uplinks stay; each has one address, which flaps.
	const uplinks = 4
	held := make(map[string][]string) // the rules of each address that has a lease
	name := func(n int) string { return fmt.Sprint("wan", n) }
	address := func(n int) string { return fmt.Sprintf("10.%d.0.2", n) }
	lease := func(n int) {
		t.Helper()
		routes, rules := "none", clientRules
		if n%2 == 1 {
			routes, rules = "copy", copyRules
		}
		var table uint32
		// A client that places routes makes no caller wait for a server that was away.
		eventually(t, "there is a table for "+address(n), func() error {
			if table = h.lease(address(n), name(n), "--routes", routes); table == 0 {
				return errors.New("none yet")
			}
			return nil
		})
		held[address(n)] = rules(address(n), fmt.Sprintf("10.%d.0.0/24", n), table)
	}
	wait := func() {
		t.Helper()
		h.waitRules(slices.Concat(slices.Collect(maps.Values(held))...)...)
	}
	for n := range uplinks {
		h.link(name(n), address(n)+"/24")
	}
	server := h.serve()
	for n := range uplinks {
		lease(n)
	}
	wait()
	// A client that places routes stays when its address goes for a moment.
	staying := h.holder("10.1.0.2")
	var server0, staying0 possessions
	processes := len(h.pids(clientBin))
	begun := time.Now()

	ended := 0                         // times that the server did
	added, removed := uplinks, uplinks // numbers of the links that do not stay
	for i := range flaps {
		// The last third is with one server, to see what it gathers.
		down := ended < restarts && ended <= i*restarts*3/2/flaps
		if i == flaps*3/4 { // when all caches are warm
			server0, staying0 = h.possessions(server.cmd.Process.Pid), h.possessions(staying)
		}
		if down {
			if ended++; ended%2 == 0 {
				server.kill()
			} else if code := server.stop(); code != 0 {
				t.Fatalf("server: exit code %d after SIGTERM, want 0", code)
			}
		}
		n := i % uplinks
		cidr := address(n) + "/24 dev " + name(n)
		switch i / uplinks % 3 {
		case 0: // at once
			h.ns.IP(t, "address del "+cidr)
			h.ns.IP(t, "address add "+cidr)
		case 1: // so that the client sees it
			h.ns.IP(t, "address del "+cidr)
			delete(held, address(n))
			wait()
			h.ns.IP(t, "address add "+cidr)
		case 2:
			h.ns.IP(t, "link set "+name(n)+" down")
			h.ns.IP(t, "link set "+name(n)+" up")
		}
		if down {
			server = h.restart()
		}
		lease(n)
		if added-uplinks < links*(i+1)/flaps {
			h.link(name(added), address(added)+"/24")
			lease(added)
			added++
		}
		if added-removed > 2 {
			h.ns.IP(t, "link del "+name(removed))
			delete(held, address(removed))
			// Before the server goes away again: what it does not hear of runs out after an hour.
			eventually(t, "the lease of "+name(removed)+" is given back", func() error {
				for _, lease := range h.leases() {
					if strings.Contains(lease, "|"+name(removed)+"|") {
						return errors.New(lease)
					}
				}
				return nil
			})
			removed++
		}
		wait()
	}
	if added-uplinks != links || ended != restarts {
		t.Errorf("got %d links and %d restarts, want %d and %d", added-uplinks, ended, links, restarts)
	}

	t.Logf("%d flaps, %d restarts, %d links in %v", flaps, ended, added-uplinks, time.Since(begun).Round(time.Millisecond))

	for ; removed < added; removed++ {
		h.ns.IP(t, "link del "+name(removed))
		delete(held, address(removed))
	}
	wait()
	h.waitClients(processes)
	h.wantNoMore("the server", server.cmd.Process.Pid, server0)
	h.wantNoMore("a client that stayed", staying, staying0)
	for n := range uplinks / 2 {
		h.ns.IP(t, "address del "+address(n)+"/24 dev "+name(n))
		delete(held, address(n))
	}
	wait()
	h.signalClients(syscall.SIGTERM)
	h.waitClean()
	for _, family := range []string{"-4", "-6"} {
		if rules := h.ns.IP(t, family+" rule show"); strings.Contains(rules, "proto 116") {
			t.Errorf("rules are left:\n%s", rules)
		}
		if routes, err := h.ns.Output("ip", family, "route", "show", "table", "all", "proto", "116"); err != nil || routes != "" {
			t.Errorf("routes are left: %v\n%s", err, routes)
		}
	}
	if pids := h.pids(clientBin); len(pids) > 0 {
		t.Errorf("processes are left: %d", pids)
	}
	after := goroutines(server)
	server = h.restart()
	fresh := goroutines(server)
	t.Logf("goroutines of the server: %v, of a new one: %v", after, fresh)
	if !maps.Equal(after, fresh) {
		t.Errorf("goroutines of the server: got %v, want %v as in a new one", after, fresh)
	}
	if pids := h.pids(serverBin); len(pids) > 0 {
		t.Errorf("processes are left: %d", pids)
	}
}
