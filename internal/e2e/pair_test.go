package e2e

import "testing"

// TestPair is the main job from end to end: a lease, its rules, and nothing left when
// the address goes.
func TestPair(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.link("wan1", "10.78.0.2/24")
	server := h.serve()
	if got := h.lease("10.77.0.2", "wan0", "-n", "255.255.255.0", "-t", "cable"); got != 10000 {
		t.Errorf("first table: got %d, want 10000", got)
	}
	if got := h.lease("10.78.0.2", "wan1"); got != 10001 {
		t.Errorf("second table: got %d, want 10001", got)
	}
	h.wantRules(append(clientRules("10.77.0.2", "10.77.0.0/24", 10000), clientRules("10.78.0.2", "10.78.0.0/24", 10001)...)...)
	h.wantLeases("10000|inet|wan0|10.77.0.2|cable|0", "10001|inet|wan1|10.78.0.2||0")

	h.ns.IP(t, "address del 10.77.0.2/24 dev wan0")
	h.waitRules(clientRules("10.78.0.2", "10.78.0.0/24", 10001)...)
	h.ns.IP(t, "link del wan1")
	h.waitClean()
	if code := server.stop(); code != 0 {
		t.Errorf("server: exit code %d after SIGTERM, want 0", code)
	}
}
