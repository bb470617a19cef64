package e2e

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestWatchRenewsFirst: a watch renews what the one before had leased before it reads any routes, since main and tables may have
// very many, and the leases may be about to end.
func TestWatchRenewsFirst(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.link("wan1", "10.78.0.2/24")
	h.serve()
	first := h.watch("--tag", "cable")
	h.served("10.77.0.2")
	h.served("10.78.0.2")
	before := h.leases()
	first.kill()
	trace := filepath.Join(h.dir, "trace")
	tracer := h.start(exec.Command("strace", "-f", "-o", trace, "-e", "trace=sendto,sendmsg,sendmmsg", "-s", "300",
		staticBin(t, clientBin), "watch", "--tag", "cable"))
	const server, routes = "tas_socket", "rtm_type=RTN_UNSPEC" // those of type local are the addresses
	eventually(t, "the watch reads routes", func() error {
		text, err := os.ReadFile(trace)
		if err == nil && !strings.Contains(string(text), routes) {
			err = errors.New("it has not yet")
		}
		return err
	})
	h.signalClients(syscall.SIGTERM)
	tracer.wait()
	early, _, _ := strings.Cut(readFile(t, trace), routes)
	for _, addr := range []string{"10.77.0.2", "10.78.0.2"} {
		asked := false
		for line := range strings.Lines(early) {
			asked = asked || strings.Contains(line, server) && strings.Contains(line, addr)
		}
		if !asked {
			t.Errorf("the lease of %s was not renewed before routes were read:\n%s", addr, early)
		}
	}
	if after := h.leases(); strings.Join(after, "\n") != strings.Join(before, "\n") {
		t.Errorf("leases were %q, and are %q", before, after)
	}
}
