package e2e

import (
	"strings"
	"syscall"
	"testing"
)

// TestLookHeldUp: while files below /run do not answer, commands that look say what the kernel and the holders say.
func TestLookHeldUp(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.link("wan1", "10.78.0.2/24")
	h.ns.Batch(t, "route add default via 10.77.0.1 dev wan0 metric 100", "route add default via 10.78.0.1 dev wan1 metric 200")
	h.serve()
	h.watch()
	h.served("10.78.0.2")
	h.ns.IP(t, "route del default dev wan1") // a fault, for which history is read
	h.waitStatus("10.78.0.2", "no-route", "")
	r := h.retreat()
	r.hang("/run")
	for _, tt := range []struct {
		args, says string
		code       int // -1: any
	}{
		{"status", "no route (leaves by wan0)", 1}, {"status --prometheus", "table_allocator_uplink_up", 0}, {"doctor", "table-empty", 3},
		{"bound", "IFNAME", -1}, {"explain 9.9.9.9 --from 10.78.0.2", "leaves by wan0", 0}, {"history", "no answer", 1},
	} { // bound shows what other tests have bound, since it cannot tell that without /run
		cmd := r.in(append([]string{bin(t, clientBin)}, strings.Fields(tt.args)...)...)
		if got := r.run(cmd.Path, cmd.Args[1:]...); got.code != tt.code && tt.code >= 0 || !strings.Contains(got.stdout+got.stderr, tt.says) {
			t.Errorf("%s: %+v, want %d and %q", tt.args, got, tt.code, tt.says)
		}
	}
	cmd := r.in(bin(t, clientBin), "status", "--follow")
	p := r.start(cmd)
	p.waitLog("no answer within")
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	r.letGo()
	p.wait()
}
