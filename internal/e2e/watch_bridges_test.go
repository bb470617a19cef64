package e2e

import (
	"errors"
	"testing"
)

// TestWatchInnerBridges: a bridge whose virtual machines are not running is no uplink. They are reached from each address once they run,
// and status finds nothing wrong. With a default route over it the bridge is an uplink.
func TestWatchInnerBridges(t *testing.T) {
	h := twoUplinks(t)
	h.ns.Batch(t, "link add vmbr1 type bridge", "link set vmbr1 up", "address add 10.66.0.1/24 dev vmbr1")
	const network = "10.66.0.0/24 dev vmbr1 proto 116 src 10.66.0.1"
	h.waitRoutes(h.tableOf("10.78.0.2"), "default via 10.78.0.1 dev wan1 proto 116 src 10.78.0.2 metric 200",
		"10.78.0.0/24 dev wan1 proto 116 scope link src 10.78.0.2", network)
	h.notServed("10.66.0.1")
	if r := h.run(bin(t, clientBin), "status"); r.code != 0 {
		t.Errorf("exit code %d:\n%s", r.code, r.stdout)
	}
	h.ns.Batch(t, "link add tap0 type veth peer name machine", "link set tap0 master vmbr1", "link set tap0 up", "link set machine up")
	h.notServed("10.66.0.1")
	h.ns.IP(t, "route add default via 10.66.0.9 dev vmbr1 metric 300")
	h.served("10.66.0.1")
	eventually(t, "its network is no local one any more", func() error {
		got := h.ns.IP(t, "route get 10.66.0.7 from 10.78.0.2")
		if want := "10.66.0.7 from 10.78.0.2 via 10.78.0.1 dev wan1 table " + h.tableOf("10.78.0.2"); len(got) < len(want) || got[:len(want)] != want {
			return errors.New(got)
		}
		return nil
	})
}
