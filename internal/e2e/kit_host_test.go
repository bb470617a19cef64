package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// host is a network namespace with the commands running in it.
type host struct {
	t   *testing.T
	ns  *nettest.Namespace
	isp *nettest.Namespace // the far end of every link
	dir string
	db  string
}

// newHost makes a host without links, and lets the test run beside others.
func newHost(t *testing.T) *host {
	t.Helper()
	t.Parallel()
	dir := t.TempDir()
	h := &host{
		t:   t,
		ns:  nettest.New(t, "host"),
		isp: nettest.New(t, "isp"),
		dir: dir,
		db:  filepath.Join(dir, "leases.db"),
	}
	t.Cleanup(h.endClients)
	return h
}

// link adds a link that is up, with addresses in "192.0.2.5/24" form.
func (h *host) link(name string, addrs ...string) {
	h.t.Helper()
	nettest.Veth(h.t, h.ns, name, h.isp, name)
	for _, a := range addrs {
		h.ns.IP(h.t, "address add "+a+" dev "+name)
	}
}

// batch runs many `ip` commands in one process.
func (h *host) batch(lines []string) {
	h.t.Helper()
	path := filepath.Join(h.dir, "batch")
	if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")+"\n"), 0o644); err != nil {
		h.t.Fatal(err)
	}
	h.ns.IP(h.t, "-batch "+path)
}

// many makes links whose far ends are in the same namespace, and are called far0, far1 ...
func (h *host) many(links int) {
	h.t.Helper()
	var lines []string
	for i := range links {
		lines = append(lines, fmt.Sprintf("link add wan%d type veth peer name far%d", i, i),
			fmt.Sprintf("link set wan%d up", i), fmt.Sprintf("link set far%d up", i))
	}
	h.batch(lines)
}

// rename gives a link another name, which not all kernels do while it is up.
func (h *host) rename(from, to string) {
	h.t.Helper()
	h.ns.IP(h.t, "link set "+from+" down")
	h.ns.IP(h.t, "link set "+from+" name "+to)
	h.ns.IP(h.t, "link set "+to+" up")
}

// waitClean waits until nothing of the clients is left: processes, rules, leases.
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

// endClients ends what a test leaves running, and shows the log of a failed one.
func (h *host) endClients() {
	for _, pid := range h.pids(clientBin) {
		_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended already
	}
	if h.t.Failed() {
		h.t.Logf("clients logged:\n%s", h.clientLog())
		out, _ := h.ns.Output("ip", "rule")
		h.t.Logf("rules at the end:\n%s", out)
	}
}
