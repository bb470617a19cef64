package e2e

import (
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// flood sends a datagram many times as a user, from many sockets, and reads no answer: the
// kernel charges each to the one who answers.
func (h *host) flood(uid int, to sockaddr, datagram string) {
	h.t.Helper()
	peers := make([]*rawPeer, 60)
	for i := range peers {
		peers[i] = h.rawPeer(sockaddr{unix.AF_UNIX, 0}) // the kernel finds a name
		peers[i].to = to
	}
	err := asUser(uid, uid, func() error {
		for range 12 {
			for _, p := range peers {
				if err := p.trySend(datagram); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		h.t.Fatal(err)
	}
}

// TestClientFlooded: what a stranger does not read leaves room for the holder's renewals.
func TestClientFlooded(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	server := h.serve(`"table_timeout":4`)
	h.lease("10.77.0.2", "wan0")
	query := request(2, "wan0", "10.77.0.2", int(wire.Query))
	h.flood(uidNobodyKnows, paddedName("wan0-10.77.0.2-2"), query)
	before := strings.Count(server.log.String(), "lease renewed")
	eventually(t, "it renews twice more", func() error {
		if n := strings.Count(server.log.String(), "lease renewed"); n < before+2 {
			return fmt.Errorf("%d renewals, %d before", n, before)
		}
		return nil
	})
	if log := h.clientLog(); strings.Contains(log, "the server does not answer") {
		t.Errorf("the holder could not send:\n%s", log)
	}
}

// TestServerFloodedByPermitted: a user who may lease and never reads leaves room for root.
func TestServerFloodedByPermitted(t *testing.T) {
	h := newHost(t)
	h.serve(fmt.Sprintf(`"allowed_users":[%d]`, uidNobodyKnows))
	h.flood(uidNobodyKnows, paddedName("tas_socket"), acquire(2))
	p := h.cPeer("eth0-10.9.0.3-2")
	wantTable(t, p.ask(acquire(3)), 10001)
}

// TestClientSquattedTwice: beside a squatter, too, a key has one holder, which later calls
// find and which -r ends.
func TestClientSquattedTwice(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	squatter := h.bound(uidNobodyKnows, padded(t, "wan0-10.77.0.2-2"))
	for range 3 {
		if got := h.lease("10.77.0.2", "wan0"); got != 10000 {
			t.Errorf("table: got %d", got)
		}
	}
	h.waitClients(1)
	// With the name free again it is still the same process.
	squatter.Close()
	if got := h.lease("10.77.0.2", "wan0"); got != 10000 {
		t.Errorf("table: got %d", got)
	}
	h.waitClients(1)
	h.wantRules(clientRules("10.77.0.2", "10.77.0.0/24", 10000)...)
	if r := h.client("-r", "-4", "-a", "10.77.0.2", "-i", "wan0"); r.code != 0 {
		t.Errorf("-r: %+v", r)
	}
	h.waitClean()
}

// TestClientNameOfAnotherKey: two identifiers of family unspec can share a holder's name.
func TestClientNameOfAnotherKey(t *testing.T) {
	h := newHost(t)
	h.serve()
	for _, args := range [][]string{{"-i", "a", "-a", "1-x"}, {"-i", "a-1", "-a", "x"}} {
		if r := h.client(args...); r.stdout == "0\n" || r.code != 0 {
			t.Errorf("%q: got %+v", args, r)
		}
	}
	h.waitClients(2)
	if leases := h.leases(); len(leases) != 2 {
		t.Errorf("leases: %q", leases)
	}
}
