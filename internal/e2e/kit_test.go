// Package e2e runs the real commands against the real kernel, in private network namespaces inside
// a sandbox.
//
// A test makes a host, gives it links and addresses, starts what it needs, and compares what ip,
// sqlite3 or the far end of a link shows with text:
//
//	func TestExample(t *testing.T) {
//		h := newHost(t)                    // a network namespace; the test runs beside others
//		h.link("wan0", "10.77.0.2/24")     // a link, whose far end is h.isp
//		h.serve(`"table_timeout":4`)       // the server, with members of its configuration
//		h.lease("10.77.0.2", "wan0")       // the client, as a hook calls it
//		h.wantRules(clientRules("10.77.0.2", "10.77.0.0/24", 10000)...)
//		h.ns.IP(t, "address del 10.77.0.2/24 dev wan0")
//		h.waitClean()                      // no client, rule or lease is left
//	}
//
// A method whose name begins with "want" fails the test at once, one that begins with "wait" does so
// after patience. No test sleeps until something should have happened: eventually checks again until it
// has. Processes that a test starts are killed at its end. If it failed, the test logs what they wrote.
//
// These files have the kit, and a new method belongs into one of them, unless one file of tests uses it
// alone:
//
//	kit_host      host: a machine with links; what is left at the end
//	kit_programs  machine, process: start a program, run one to its end, find and freeze processes
//	kit_ip        routing: rules and routes, as ip shows them; kit_monitor: their changes
//	kit_links     addresses and names of links
//	kit_server    the server, its configuration; database: what it has stored
//	kit_client    clients: the client as hooks call it, in the foreground, and watch
//	kit_users     commands and sockets of other users
//	kit_peer      others: programs of the test in place of the server or of a client;
//	kit_rawpeer   the same with plain system calls, as C programs make them
//	kit_uplinks   uplinks: a host behind providers, and the internet behind those
//	kit_packets   packets to the internet: from where, and by which provider they got there
//	kit_site      site: such a host with an /etc and daemons of its own
//	kit_home      home: a site with IPv6, where a watch serves what real programs configure
//	kit_daemons   DHCP servers and clients, router advertisements
//	kit_pair      pair: such a host with two uplinks, whose packets a test marks itself
//	kit_cgroup    crossing: such a host with cgroups of its own, for run, bind and attach
//	kit_prober    a program for those, whose sockets a test commands
//
// A host behind providers is one of
//
//	newHost(t).behind(routed(0), routed(1))  no addresses yet; u.address(n) gives uplink n some
//	newCrossing(t)                           both families, a server and a watch; cgroups
//	newSite(t)                               IPv4, three providers with DHCP; hooks are installed
//	newHome(t, n), newHookedHome(t, n)       both families, without and with the hooks
//
// and u.only(1, f) fails the test unless the packets that f sends leave by uplink 1, u.waitUplink(1, addr)
// waits until packets from addr do, u.flows fails the test if a packet is lost while something changes.
package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

func TestMain(m *testing.M) {
	if !isProbe() {
		nettest.Main(m, "sqlite3", "strace")
	}
}

const (
	serverBin = "table-allocator-server"
	clientBin = "table-allocator-client"
	// patience is how long an event may take before the test fails. It is long, because the machine may
	// be busy, and longer than the minute after which clients and namespaces give up what does not come.
	patience = 3 * time.Minute
)

// bin is the path of one of our commands, built with the race detector.
func bin(t *testing.T, name string) string {
	t.Helper()
	dir, err := binDir()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, name)
}

var binDir = sync.OnceValues(func() (string, error) {
	if dir := os.Getenv("TABLE_ALLOCATOR_BIN"); dir != "" {
		return dir, nil
	}
	dir, err := os.MkdirTemp("", "bin")
	if err != nil {
		return "", err
	}
	out, err := exec.Command("go", "build", "-race", "-o", dir+"/", "../../cmd/...").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build the commands: %w\n%s", err, out)
	}
	return dir, nil
})

// unordered describes how got differs from want in any order; "" if it does not.
func unordered(got, want []string) string {
	count := make(map[string]int)
	for _, s := range want {
		count[s]++
	}
	for _, s := range got {
		count[s]--
	}
	diff := ""
	for s, n := range count {
		switch {
		case n > 0:
			diff += fmt.Sprintf("\n  missing: %s", s)
		case n < 0:
			diff += fmt.Sprintf("\n  too many: %s", s)
		}
	}
	return diff
}

// eventually waits until check returns nil. The pause between two checks is an eighth of the time that
// has passed, so that a long wait does not take the processor from the programs that it waits for.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	begin := time.Now()
	for {
		err := check()
		if err == nil {
			return
		}
		passed := time.Since(begin)
		if passed > patience {
			t.Fatalf("waited %v until %s: %v", patience, what, err)
		}
		time.Sleep(min(max(passed/8, 5*time.Millisecond), 100*time.Millisecond))
	}
}

// fullSize reports whether tests run at the size that takes long.
func fullSize() bool { return os.Getenv("SOAK") == "full" }

// unorderedError is unordered as an error.
func unorderedError(got, want []string) error {
	if diff := unordered(got, want); diff != "" {
		return errors.New(diff)
	}
	return nil
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
