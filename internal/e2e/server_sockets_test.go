package e2e

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// connected is a peer that has connected its socket to the server, as some programs do, and so takes
// datagrams from nobody else.
func (h *host) connected(name string) *rawPeer {
	h.t.Helper()
	p := h.exactPeer(name)
	if err := unix.Connect(p.fd, &unix.SockaddrUnix{Name: "@tas_socket"}); err != nil {
		h.t.Fatal(err)
	}
	return p
}

// unread has peers of root ask more than the server's send buffer has room for, and read nothing.
func (h *host) unread(to sockaddr) (peers []*rawPeer) {
	h.t.Helper()
	const sockets, each = 60, 15
	for i := range sockets {
		p := h.rawPeer(sockaddr{unix.AF_UNIX, 0}) // the kernel finds a name
		p.to = to
		peers = append(peers, p)
		for range each {
			p.send(acquire(i % 30))
		}
	}
	return peers
}

// wantUnread fails unless the answer is a lease, from whatever socket it comes.
func wantUnread(t *testing.T, p *rawPeer, datagram string) {
	t.Helper()
	p.send(datagram)
	answer, _ := p.receive()
	granted(t, answer)
}

// TestServerUnread: however many answers root's programs do not read, whoever reads is answered, at
// both names, and the server can end.
func TestServerUnread(t *testing.T) {
	for _, to := range []sockaddr{paddedName("tas_socket"), exactName("tas_socket")} {
		t.Run(fmt.Sprint(len(to)), func(t *testing.T) {
			h := newHost(t)
			h.link("wan0", "10.77.0.2/24")
			server := h.serve()
			begun := time.Now()
			h.unread(to)
			if got := h.lease("10.77.0.2", "wan0"); got == 0 {
				t.Error("a client got no table")
			}
			if r := h.client("-r", "-4", "-a", "10.77.0.2", "-i", "wan0"); r.code != 0 {
				t.Errorf("-r: %+v", r)
			}
			// Without its holder the command itself gives the lease back.
			wantUnread(t, h.cPeer("other"), request(2, "wan0", "10.77.0.2", 0))
			if r := h.client("-r", "-4", "-a", "10.77.0.2", "-i", "wan0"); r.code != 0 {
				t.Errorf("-r without a holder: %+v", r)
			}
			for i, p := range []*rawPeer{h.cPeer("padded"), h.exactPeer("exact"), h.connected("connected")} {
				for n := range 20 {
					wantUnread(t, p, acquire(20+n%2))
				}
				t.Logf("%d: 20 answers within %v", i, time.Since(begun).Round(time.Millisecond))
			}
			if code := server.stop(); code != 0 {
				t.Errorf("exit code: got %d, want 0", code)
			}
		})
	}
}

// TestServerUnreadConnected: programs that connected their sockets and do not read leave room for
// those that did not.
func TestServerUnreadConnected(t *testing.T) {
	h := newHost(t)
	server := h.serve()
	for i := range 60 {
		p := h.connected(fmt.Sprint("silent", i))
		for range 15 {
			p.send(acquire(i % 30))
		}
	}
	for _, p := range []*rawPeer{h.cPeer("padded"), h.exactPeer("exact")} {
		for n := range 20 {
			wantUnread(t, p, acquire(20+n%2))
		}
	}
	if code := server.stop(); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
}

// TestServerUnreadReadLater: what was not read at once is there when its reader comes, and afterwards
// answers come from the server's name again.
func TestServerUnreadReadLater(t *testing.T) {
	h := newHost(t)
	h.serve()
	silent := h.unread(paddedName("tas_socket"))
	for _, p := range silent {
		n := 0
		for ; p.answered(0); n++ {
			answer, _ := p.receive()
			granted(t, answer)
		}
		if n == 0 {
			t.Error("a peer has no answer at all")
		}
	}
	p := h.cPeer("peer")
	eventually(t, "the server's name answers again", func() error {
		p.send(acquire(1))
		answer, from := p.receive()
		granted(t, answer)
		if string(from) != string(p.to) {
			return errors.New("an answer from a socket without a name")
		}
		return nil
	})
}
