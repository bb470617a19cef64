package e2e

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
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
		routes := []string{"none", "copy"}[n%2]
		var table uint32
		// A client that places routes makes no caller wait for a server that was away.
		eventually(t, "there is a table for "+address(n), func() error {
			if table = h.lease(address(n), name(n), "--routes", routes); table == 0 {
				return errors.New("none yet")
			}
			return nil
		})
		held[address(n)] = clientRules(address(n), fmt.Sprintf("10.%d.0.0/24", n), table)
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
	before, err := openFiles(server.cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}

	ended := 0                         // times that the server did
	added, removed := uplinks, uplinks // numbers of the links that do not stay
	for i := range flaps {
		// The last third is with one server, to see what it gathers.
		down := ended < restarts && ended <= i*restarts*3/2/flaps
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
			removed++
		}
		wait()
	}
	if added-uplinks != links || ended != restarts {
		t.Errorf("got %d links and %d restarts, want %d and %d", added-uplinks, ended, links, restarts)
	}

	for ; removed < added; removed++ {
		h.ns.IP(t, "link del "+name(removed))
		delete(held, address(removed))
	}
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
	eventually(t, "the server has open what it had in the beginning", func() error {
		after, err := openFiles(server.cmd.Process.Pid)
		if err == nil && !slices.Equal(after, before) {
			err = fmt.Errorf("got\n%q, want\n%q", after, before)
		}
		return err
	})
	if code := server.stop(); code != 0 {
		t.Errorf("server: exit code %d after SIGTERM, want 0", code)
	}
	if pids := append(h.pids(serverBin), h.pids(clientBin)...); len(pids) > 0 {
		t.Errorf("processes are left: %d", pids)
	}
}
