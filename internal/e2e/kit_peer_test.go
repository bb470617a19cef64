package e2e

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// others are programs of the test that speak the protocol, in place of the server or of a client.
type others struct{ *machine }

// askAt sends a datagram to a padded name and returns the answer; "" if no answer comes in time, or if
// no socket has the name.
func (p *peer) askAt(name, datagram string, wait time.Duration) string {
	p.t.Helper()
	if errs := p.conn.Send(wire.Message{Data: []byte(datagram), To: padded(p.t, name)}); errs != nil {
		if errors.Is(errs[0], syscall.ECONNREFUSED) {
			return ""
		}
		p.t.Fatal(errs[0])
	}
	answer, err := p.receive(wait)
	if err != nil && !errors.Is(err, io.EOF) {
		p.t.Fatal(err)
	}
	return answer
}

// peer is a client of the test's own.
type peer struct {
	t    *testing.T
	conn *wire.Conn
}

// receive waits for a datagram; io.EOF says that none came in time.
func (p *peer) receive(wait time.Duration) (string, error) {
	if err := p.conn.SetReadDeadline(time.Now().Add(wait)); err != nil {
		return "", err
	}
	datagrams, err := p.conn.Receive()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return "", io.EOF
	}
	if err != nil {
		return "", err
	}
	if len(datagrams) != 1 {
		return "", fmt.Errorf("%d datagrams at once", len(datagrams))
	}
	return string(datagrams[0].Data), nil
}

// peer binds a socket on the host. Its name is padded, as a C program writes it, or exact, as Python
// writes it.
func (h others) peer(name string, exact bool) *peer {
	h.t.Helper()
	addr := must(h.t)(wire.Padded(name))
	if exact {
		addr = must(h.t)(wire.Exact(name))
	}
	var conn *wire.Conn
	var err error
	h.ns.Do(func() { conn, err = wire.Listen(addr, wire.MaxRequest) })
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { conn.Close() })
	return &peer{h.t, conn}
}

func must(t *testing.T) func(wire.Addr, error) wire.Addr {
	return func(a wire.Addr, err error) wire.Addr {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
}

func padded(t *testing.T, name string) wire.Addr {
	t.Helper()
	return must(t)(wire.Padded(name))
}

func exact(t *testing.T, name string) wire.Addr {
	t.Helper()
	return must(t)(wire.Exact(name))
}

// owner is how messages name the owner of a socket that this program has made for a user. The pid in
// front of it may be that of a child, which has the socket for a moment, too.
func owner(uid int) string {
	comm, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		panic(err)
	}
	return fmt.Sprintf(" (%s) of uid %d", strings.TrimSpace(string(comm)), uid)
}

// bound binds a socket of user uid to a name on the host. Nothing reads it until the test does.
func (h others) bound(uid int, addr wire.Addr) *wire.Conn {
	h.t.Helper()
	var conn *wire.Conn
	var err error
	h.as(uid, func(func()) { conn, err = wire.Listen(addr, wire.MaxReplace) })
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { conn.Close() })
	return conn
}

// fake is a server of the test's own.
type fake struct {
	mu       sync.Mutex
	requests []string // in the order of their arrival
	from     []wire.Addr
}

// heard are the requests so far.
func (f *fake) heard() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.requests)
}

func (f *fake) count(cmd wire.Command) (n int) {
	for _, text := range f.heard() {
		if strings.Contains(text, fmt.Sprintf(`"cmd":%d,`, cmd)) {
			n++
		}
	}
	return n
}

// fakeServer starts a server of a user at a name. answer makes the answer to each request; "" is none.
func (h others) fakeServer(uid int, at wire.Addr, answer func(wire.Request) string) *fake {
	h.t.Helper()
	f := &fake{}
	done := make(chan struct{})
	var conn *wire.Conn
	h.as(uid, func(ready func()) {
		defer close(done)
		var err error
		if conn, err = wire.Listen(at, wire.MaxRequest); err != nil {
			h.t.Error(err)
			return
		}
		ready()
		for {
			datagrams, err := conn.Receive()
			if err != nil {
				return
			}
			for _, d := range datagrams {
				f.mu.Lock()
				f.requests = append(f.requests, string(d.Data))
				f.from = append(f.from, d.From)
				f.mu.Unlock()
				req, err := wire.ParseRequest(d.Data)
				if err != nil {
					h.t.Errorf("request %q: %v", d.Data, err)
				}
				if text := answer(req); text != "" {
					conn.Send(wire.Message{Data: []byte(text), To: d.From})
				}
			}
		}
	})
	h.t.Cleanup(func() {
		conn.Close()
		<-done
	})
	return f
}

// alwaysGrant answers as a server that leases the same table to every client.
func alwaysGrant(table uint32, seconds int64) func(wire.Request) string {
	return func(r wire.Request) string {
		if r.Cmd == wire.Release {
			return string(wire.Reply{}.Append(nil))
		}
		return string(wire.Reply{Table: table, Expires: wire.Seconds(wire.Now()) + seconds}.Append(nil))
	}
}
