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

// others are programs of the test's own that speak the protocol, on both sides.
type others struct{ *machine }

// askAt sends a datagram to the padded name and returns the answer, "" if none comes in
// time or nobody is there.
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

// peer is a program of our own making that talks to the server.
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

// peer binds a socket in the host; name is the text of a padded name, as a C program
// binds it, or with exact of the name as Python does.
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

// owner is how messages call user uid of a socket that this program has made. The pid may
// be of a child that has it for a moment, too.
func owner(uid int) string {
	comm, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		panic(err)
	}
	return fmt.Sprintf(" (%s) of uid %d", strings.TrimSpace(string(comm)), uid)
}

// bound is a socket of user uid at a name of the host. The user's program does nothing
// with it until the test does.
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

// fake is a server of the test's own, of some user and at some form of the name.
type fake struct {
	mu       sync.Mutex
	requests []string // as they came
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

// fakeServer answers each request with what answer makes of it, and not at all where
// that is "".
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

// alwaysGrant answers like a server that leases one table to everybody.
func alwaysGrant(table uint32, seconds int64) func(wire.Request) string {
	return func(r wire.Request) string {
		if r.Cmd == wire.Release {
			return string(wire.Reply{}.Append(nil))
		}
		return string(wire.Reply{Table: table, Expires: wire.Seconds(wire.Now()) + seconds}.Append(nil))
	}
}
