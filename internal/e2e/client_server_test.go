package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestClientNoTable: after five tries, two seconds apart, the caller hears 0. Four ways to
// it, at the same time.
func TestClientNoTable(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24", "10.77.0.3/24", "10.77.0.4/24", "10.77.0.5/24", "10.77.0.6/24")
	silent := h.fakeServer(0, padded(t, "silent"), func(wire.Request) string { return "" })
	h.garbageServer(padded(t, "garbage"))
	h.fakeServer(stranger, padded(t, "squatted"), alwaysGrant(20254, 3600))

	// A stranger is believed by whoever names him.
	if got := h.lease("10.77.0.6", "wan0", "-d", "squatted", "--server-user", "1", "--server-user", fmt.Sprint(stranger)); got != 20254 {
		t.Errorf("trusted: table %d", got)
	}
	rules := clientRules("10.77.0.6", "10.77.0.0/24", 20254)
	h.wantRules(rules...)

	begun := time.Now()
	servers := []string{"nobody", "silent", "garbage", "squatted"}
	want := []string{`nobody has the name "@nobody"`, "no answer", "no answer", owner(stranger) + ", who is not trusted"}
	var cmds []*exec.Cmd
	for i, name := range servers {
		cmds = append(cmds, h.command("-4", "-a", fmt.Sprintf("10.77.0.%d", i+2), "-i", "wan0", "-d", name,
			"--debug", "-l", filepath.Join(h.dir, "client.log")))
	}
	for i, r := range h.together(cmds) {
		if r.stdout != "0\n" || r.code != 0 || !strings.Contains(r.stderr, want[i]) {
			t.Errorf("%s: got %+v, want %s", servers[i], r, want[i])
		}
	}
	// Not earlier; how much later is the machine's affair.
	if took := time.Since(begun); took < 10*time.Second {
		t.Errorf("gave up after %v", took)
	}
	h.onlyClient()
	h.wantRules(rules...)
	if acquires, releases := silent.count(wire.Acquire), silent.count(wire.Release); acquires != 5 || releases != 10 {
		t.Errorf("the silent server got %d requests and %d releases, want 5 and 10", acquires, releases)
	}
	h.waitClientLog(4, `msg="no table"`)
	h.waitClientLog(1, "reply ignored, since its sender is not trusted")
	if r := h.run(bin(t, clientBin), "-r", "-4", "-a", "10.77.0.2", "-i", "wan0", "-d", "squatted"); r.stdout != "0\n" || !strings.Contains(r.stderr, owner(stranger)) {
		t.Errorf("release: got %+v", r)
	}
}

// garbageServer answers with what is no reply of this protocol.
func (h *host) garbageServer(at wire.Addr) {
	const good = `{"version":1,"cmd":2,"table":20000,"lease_expires":999999}`
	if _, err := wire.ParseReply([]byte(good)); err != nil {
		h.t.Fatal(err)
	}
	garbage := []string{
		`[]`, `1`, `"x"`, `null`, `{`, `{}`, "\x00", good[:len(good)-1], good + "}", "[" + good + "]",
		strings.Replace(good, `"version":1`, `"version":2`, 1), strings.Replace(good, `"version":1,`, ``, 1),
		strings.Replace(good, `"cmd":2`, `"cmd":0`, 1), strings.Replace(good, `"cmd":2`, `"cmd":258`, 1),
		strings.Replace(good, `20000`, `-1`, 1), strings.Replace(good, `20000`, `4294967296`, 1), strings.Replace(good, `20000`, `"20000"`, 1),
		strings.Replace(good, `999999`, `-5`, 1), strings.Replace(good, `999999`, `1e9`, 1), strings.Replace(good, `999999`, `99999999999999999999`, 1),
		`{"x":` + strings.Repeat("[", 100) + strings.Repeat("]", 100) + "," + good[1:], strings.Repeat("x", 60000),
	}
	h.as(0, func(ready func()) {
		conn, err := wire.Listen(at, wire.MaxRequest)
		if err != nil {
			h.t.Error(err)
			return
		}
		h.t.Cleanup(func() { conn.Close() })
		ready()
		for n := 0; ; {
			datagrams, err := conn.Receive()
			if err != nil {
				return
			}
			for _, d := range datagrams[:1] {
				for range 5 { // have room in its queue
					conn.Send(wire.Message{Data: []byte(garbage[n%len(garbage)]), To: d.From})
					n++
				}
			}
		}
	})
}

// TestClientFinalRefusals: what no later try can change is told at once.
func TestClientFinalRefusals(t *testing.T) {
	for _, tt := range []struct{ name, reply, want string }{
		{"denied", string(wire.Refuse(wire.Denied, "you may not").Append(nil)), "you may not"},
		{"not served", string(wire.Refuse(wire.NotServed, "inet is off").Append(nil)), "inet is off"},
		{"malformed", string(wire.Refuse(wire.Malformed, "what?").Append(nil)), "what?"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			h.link("wan0", "10.77.0.2/24")
			server := h.fakeServer(0, padded(t, "tas_socket"), func(wire.Request) string { return tt.reply })
			if r := h.client("-4", "-a", "10.77.0.2", "-i", "wan0"); r.stdout != "0\n" || r.code != 0 || !strings.Contains(r.stderr, tt.want) {
				t.Errorf("got %+v", r)
			}
			h.waitNoClient()
			if n := server.count(wire.Acquire); n != 1 {
				t.Errorf("%d requests, want one", n)
			}
		})
	}
	t.Run("of the real server", func(t *testing.T) {
		h := newHost(t)
		h.link("wan0", "10.77.0.2/24")
		h.serve(`addr_families:{"inet":false,"inet6":true,"unspec":false}`)
		if r := h.client("-4", "-a", "10.77.0.2", "-i", "wan0"); r.stdout != "0\n" || r.code != 0 || !strings.Contains(r.stderr, "inet") {
			t.Errorf("family: got %+v", r)
		}
		if r := h.clientWith(asStranger, "-6", "-a", "fd00::2", "-i", "wan0"); r.stdout != "0\n" || r.code != 0 || !strings.Contains(r.stderr, "4711") {
			t.Errorf("uid: got %+v", r)
		}
		h.waitClean()
	})
}

// TestClientPassingRefusal: a table that becomes free in time is taken.
func TestClientPassingRefusal(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24", "10.77.0.3/24")
	h.serve("num_tables:1")
	if got := h.lease("10.77.0.2", "wan0"); got != 10000 {
		t.Fatalf("table %d", got)
	}
	holder := h.onlyClient()
	p := h.start(h.command("-f", "--debug", "-4", "-a", "10.77.0.3", "-i", "wan0"))
	p.waitLog("gets no table")
	if err := syscall.Kill(holder, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	p.waitLog("10000\n")
	h.wantRules(clientRules("10.77.0.3", "10.77.0.0/24", 10000)...)
}

// TestClientServersForms: a C program holds only the padded name and answers to padded
// ones, another program perhaps holds only the exact one.
func TestClientServersForms(t *testing.T) {
	for _, tt := range []struct {
		name string
		at   func(*testing.T, string) wire.Addr
	}{{"padded", padded}, {"exact", exact}} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			h.link("ta0", "10.77.0.2/24")
			server := h.fakeServer(0, tt.at(t, "tas_socket"), alwaysGrant(20000, 3600))
			if tt.name == "padded" { // and that the other form is a stranger's is nothing to us
				h.bound(stranger, exact(t, "tas_socket"))
			}
			if got := h.lease("10.77.0.2", "ta0", "-t", "op1"); got != 20000 {
				t.Errorf("table %d", got)
			}
			h.wantRules(clientRules("10.77.0.2", "10.77.0.0/24", 20000)...)
			h.signalClients(syscall.SIGTERM)
			h.waitNoClient()
			h.wantRules()
			got := strings.Join(server.heard(), "\n")
			want := `{"address":"10.77.0.2","ifname":"ta0","tag":"op1","addr_family":2,"cmd":0,"version":1,"marks":1,"lease_left":1}` + "\n" +
				`{"address":"10.77.0.2","ifname":"ta0","tag":"op1","addr_family":2,"cmd":1,"version":1}`
			if got != want {
				t.Errorf("requests: got\n%s\nwant\n%s", got, want)
			}
			if from := server.from[0]; from != padded(t, "ta0-10.77.0.2-2") {
				t.Errorf("sent from %s", from)
			}
		})
	}
}

// TestClientRenews: at half the lease time, through an absence of the server, and to a
// server that has forgotten all.
func TestClientRenews(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.link("wan1", "10.78.0.2/24")
	server := h.serve("table_timeout:2")
	// The other one has 10000, so that nothing here is the first number by chance.
	h.lease("10.78.0.2", "wan1")
	if got := h.lease("10.77.0.2", "wan0", "-t", "cable"); got != 10001 {
		t.Fatalf("table %d", got)
	}
	rules := h.rules()
	renewed := `msg="lease renewed" ifname=wan0 addr=10.77.0.2`
	eventually(t, "two renewals", func() error {
		if n := strings.Count(server.log.String(), renewed); n < 2 {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
	m := h.monitor()
	server.kill()
	h.waitClientLog(2, "the server does not answer")
	server = h.serve("table_timeout:2")
	h.waitClientLog(2, "the server answers again")
	server.waitLog(renewed)
	h.wantRules(rules...)
	h.wantLeases("10000|inet|wan1|10.78.0.2||0", "10001|inet|wan0|10.77.0.2|cable|0")
	if changes := m.changes(); len(changes) > 0 {
		t.Errorf("rules changed: %q", changes)
	}
	// A server with another pool and no memory.
	server.kill()
	if err := os.Rename(h.db, h.db+".old"); err != nil {
		t.Fatal(err)
	}
	for _, more := range []string{"-wal", "-shm"} {
		if err := os.Remove(h.db + more); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
	before := h.rules()
	h.serve("table_timeout:2", "table_offset:30000")
	eventually(t, "both have moved", func() error {
		if got := strings.Join(h.rules(), "\n"); strings.Contains(got, "lookup 1000") {
			return errors.New(got)
		}
		return nil
	})
	m.wantNeverWithout("from the address", before, func(rule string) bool { return strings.Contains(rule, " from 10.77.0.2 ") })
	m.wantNeverWithout("to the network", before, func(rule string) bool { return strings.Contains(rule, " to 10.77.0.0/24 ") })
	m.wantNeverWithout("of unbound sockets", before, func(rule string) bool { return strings.Contains(rule, " iif lo ") })
	h.signalClients(syscall.SIGTERM)
	h.waitClean()
}

// TestClientAbsurdExpiry: no end of a lease that a server tells makes the client flood it
// or stop renewing.
func TestClientAbsurdExpiry(t *testing.T) {
	for _, tt := range []struct {
		name    string
		expires func() int64
	}{
		{"zero", func() int64 { return 0 }},
		{"the past", func() int64 { return 1 }},
		{"now", func() int64 { return wire.Seconds(wire.Now()) }},
		{"one second", func() int64 { return wire.Seconds(wire.Now()) + 1 }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			h.link("wan0", "10.77.0.2/24")
			server := h.fakeServer(0, padded(t, "tas_socket"), func(wire.Request) string {
				return string(wire.Reply{Table: 20000, Expires: tt.expires()}.Append(nil))
			})
			begun := time.Now()
			if got := h.lease("10.77.0.2", "wan0"); got != 20000 {
				t.Errorf("table %d", got)
			}
			eventually(t, "it renews", func() error {
				if n := server.count(wire.Acquire); n < 6 {
					return fmt.Errorf("%d requests", n)
				}
				return nil
			})
			n := server.count(wire.Acquire)
			if most := int(time.Since(begun)/(200*time.Millisecond)) + 2; n > most {
				t.Errorf("%d requests, want at most %d in this time", n, most)
			}
		})
	}
	t.Run("beyond all time", func(t *testing.T) {
		h := newHost(t)
		h.link("wan0", "10.77.0.2/24")
		server := h.fakeServer(0, padded(t, "tas_socket"), func(r wire.Request) string {
			return string(wire.Reply{Table: 20000, Expires: 1 << 33}.Append(nil))
		})
		if got := h.lease("10.77.0.2", "wan0"); got != 20000 {
			t.Errorf("table %d", got)
		}
		if n := server.count(wire.Acquire); n != 1 {
			t.Errorf("%d requests", n)
		}
		// Its holder still answers, with an expiry that the protocol has room for.
		if got := h.lease("10.77.0.2", "wan0"); got != 20000 {
			t.Errorf("asked again: table %d", got)
		}
		h.onlyClient()
	})
	t.Run("negative", func(t *testing.T) { // and the next one is not
		h := newHost(t)
		h.link("wan0", "10.77.0.2/24")
		var n atomic.Int32
		h.fakeServer(0, padded(t, "tas_socket"), func(wire.Request) string {
			if n.Add(1) == 1 {
				return `{"version":1,"cmd":2,"table":20000,"lease_expires":-1}`
			}
			return string(wire.Reply{Table: 20001, Expires: 1 << 33}.Append(nil))
		})
		if got := h.lease("10.77.0.2", "wan0"); got != 20001 {
			t.Errorf("table %d", got)
		}
	})
}
