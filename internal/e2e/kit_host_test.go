package e2e

import (
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// host is a machine on which our commands run. Its parts have the methods for a test, one file each.
type host struct {
	t        *testing.T
	*machine                    // programs that run on it
	routing                     // its rules and routes, as ip shows them
	database                    // what the server has stored
	clients                     // client processes, and the watch
	others                      // programs of the test that talk to the server, or in its place
	isp      *nettest.Namespace // the far end of every link that link makes
	finish   func()             // ends the clients, once
}

// newHost makes a host without links. The test runs in parallel with others.
func newHost(t *testing.T) *host {
	t.Helper()
	t.Parallel()
	h := hostIn(t, nettest.New(t, "host"))
	h.finish = sync.OnceFunc(h.endClients)
	t.Cleanup(h.finish)
	return h
}

// hostIn makes a host of a network namespace, with a directory and a database of its own.
func hostIn(t *testing.T, ns *nettest.Namespace) *host {
	t.Helper()
	m := &machine{t: t, ns: ns, dir: t.TempDir()}
	return &host{t: t, machine: m, routing: routing{m}, clients: clients{m}, others: others{m},
		database: database{t, filepath.Join(m.dir, "leases.db")}}
}

// link makes a link that is up, with addresses such as "192.0.2.5/24".
func (h *host) link(name string, addrs ...string) {
	h.t.Helper()
	if h.isp == nil {
		h.isp = nettest.New(h.t, "isp")
		h.t.Cleanup(h.finish) // before the far end is closed, which deletes the links
	}
	nettest.Veth(h.t, h.ns, name, h.isp, name)
	for _, a := range addrs {
		h.ns.IP(h.t, "address add "+a+" dev "+name)
	}
}

// waitClean waits until no client process, rule or lease is left.
func (h *host) waitClean() {
	h.t.Helper()
	eventually(h.t, "nothing is left of the clients", func() error {
		if pids := h.pids(clientBin); len(pids) > 0 {
			return fmt.Errorf("processes: %d", pids)
		}
		if rules := h.rules(); len(rules) > 0 {
			return fmt.Errorf("rules: %q", rules)
		}
		if leases := h.leases(); len(leases) > 0 {
			return fmt.Errorf("leases: %q", leases)
		}
		return nil
	})
}

// left is an error that names what is left of an address: its lease, source rule or routes.
func (h *host) left(addr string) error {
	h.t.Helper()
	for _, lease := range h.leases() {
		if strings.Contains(lease, "|"+addr+"|") {
			return fmt.Errorf("lease %s", lease)
		}
	}
	if table := h.tableOf(addr); table != "" {
		return fmt.Errorf("rules: %q", h.rulesFrom(addr))
	}
	for _, family := range []string{"-4", "-6"} {
		for _, route := range lines(h.ns.IP(h.t, family+" route show table all proto 116")) {
			if strings.Contains(route+" ", " src "+addr+" ") {
				return fmt.Errorf("route %s", route)
			}
		}
	}
	return nil
}

// endClients kills the clients that a test leaves running, and logs what they logged if it failed.
func (h *host) endClients() {
	for _, pid := range h.pids(clientBin) {
		_ = syscall.Kill(pid, syscall.SIGKILL) // the process may have ended
	}
	if h.t.Failed() {
		h.t.Logf("clients logged:\n%s", h.clientLog())
		out, _ := h.ns.Output("ip", "rule")
		h.t.Logf("rules at the end:\n%s", out)
	}
}
